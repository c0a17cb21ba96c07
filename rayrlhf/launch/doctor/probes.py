"""What runs on a node to measure it, as a task or in this process: no Ray, and torch only in a process of its own."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from time import perf_counter

from rayrlhf.data.sources import check_sources
from rayrlhf.errors import DataError, ModelError
from rayrlhf.launch.doctor.facts import GPU, Inputs, Machine, Place, Storage, Wanted
from rayrlhf.launch.supported import installed_versions, twins
from rayrlhf.models.folder import check_weights

__all__ = [
    "leave_file",
    "look_for_file",
    "measure_inputs",
    "measure_machine",
    "measure_storage",
    "nearest_folder",
    "remove_file",
]

SHM = "/dev/shm"
WRITTEN_MIB = 64
COMMAND_S, HUB_S = 20.0, 10.0
# Network file systems look again after a few seconds.
SEEN_S = 5.0
USE_CUDA = "import torch; torch.zeros(1, device='cuda')"


def measure_machine() -> Machine:
    shm = shutil.disk_usage(SHM)
    gpus = read_gpus(_nvidia_smi())
    locked = _soft_limit(resource.RLIMIT_MEMLOCK)
    return Machine(
        versions=installed_versions(),
        twins=twins(),
        gpus=gpus,
        cores=len(os.sched_getaffinity(0)),
        torch_problem=_why_torch_cannot() if gpus else "",
        shm_total_gib=shm.total / 2**30,
        shm_free_gib=shm.free / 2**30,
        open_files=_soft_limit(resource.RLIMIT_NOFILE),
        processes=_soft_limit(resource.RLIMIT_NPROC),
        locked_memory_gib=None if locked is None else locked / 2**30,
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
    )


def measure_storage(output: str) -> Storage:
    """Write a file where runs go, and take it away again."""
    folder = nearest_folder(output)
    try:
        remove_file(leave_file(output, "x"))
        free = shutil.disk_usage(folder).free / 2**30
        if free * 1024 < 2 * WRITTEN_MIB:
            return Storage(str(folder), "", free)
        return Storage(str(folder), "", free, _write_speed(folder))
    except OSError as error:
        return Storage(str(folder), _reason(error))


def measure_inputs(wanted: Wanted) -> Inputs:
    """Look for the models and the data, without reading them."""
    models = tuple(_model(key, name) for key, name in wanted.models.items())
    root = Path(wanted.data_root)
    try:
        check_sources(wanted.data, root)
    except DataError as error:
        return Inputs(models, (), error.message)
    named = ((key, name) for key, sources in wanted.data.items() for name in sources)
    hub = ((key, name) for key, name in named if not (root / Path(name).expanduser()).is_file())  # then it is a hub's
    return Inputs(models, tuple(_on_hub(key, name, "dataset") for key, name in hub))


def leave_file(output: str, text: str) -> str:
    """The path of a new file where runs go; OSError where none can be written."""
    descriptor, name = tempfile.mkstemp(prefix=".rayrlhf-doctor-", dir=nearest_folder(output))
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return name


def remove_file(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def look_for_file(path: str, text: str) -> str:
    """What is wrong with the file that another node has left; empty where nothing is."""
    deadline = time.monotonic() + SEEN_S
    problem = "not there"
    while True:
        try:
            problem = "" if Path(path).read_text(encoding="utf-8") == text else "another one"
        except FileNotFoundError:
            problem = "not there"
        except OSError as error:
            problem = f"not readable ({_reason(error)})"
        if not problem or time.monotonic() > deadline:
            return problem
        time.sleep(0.2)


def nearest_folder(output: str) -> Path:
    """The folder itself, or the first one above it that exists."""
    path = Path(output)
    return next(folder for folder in (path, *path.parents) if folder.exists())


def read_gpus(listed: str) -> tuple[GPU, ...]:
    """From `nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader,nounits`, in MiB."""
    found = []
    for line in listed.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 3 and fields[1].isdigit():
            found.append(GPU(fields[0], int(fields[1]) / 1024, fields[2]))
    return tuple(found)


def _nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    return done.stdout if done.returncode == 0 else ""


def _why_torch_cannot() -> str:
    """Ray hides the GPUs from a task that asks for none, so another process tries."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", USE_CUDA]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3 * COMMAND_S, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:200]


def _soft_limit(kind: int) -> int | None:
    soft = resource.getrlimit(kind)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _write_speed(folder: Path) -> float:
    """MiB/s."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(prefix=".rayrlhf-doctor-", dir=folder) as file:
        start = perf_counter()
        for _ in range(WRITTEN_MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN_MIB / (perf_counter() - start)


def _model(key: str, name: str) -> Place:
    folder = Path(name)
    if not folder.is_absolute():
        return _on_hub(key, name, "model")
    if not folder.is_dir():
        return Place(key, name, problem="no such folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        return Place(key, name, problem="the folder cannot be read")
    if not (folder / "config.json").is_file():
        return Place(key, name, problem="the folder has no config.json")
    try:
        check_weights(name)
    except ModelError as error:
        return Place(key, name, problem=error.message)
    return Place(key, name, "folder")


def _on_hub(key: str, name: str, kind: str) -> Place:
    """Of an error its kind alone is told: what it says may hold an address with a login."""
    from huggingface_hub import HfApi, constants

    repository = name.partition(":")[0]
    kept = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}" / "snapshots"
    if any(kept.glob("*/*")):
        return Place(key, name, "cache")
    if constants.HF_HUB_OFFLINE:
        return Place(key, name, problem="not in the cache, and HF_HUB_OFFLINE is set")
    try:
        HfApi().repo_info(repository, repo_type=kind, timeout=HUB_S)
    except Exception as error:  # of httpx, the hub's own, a proxy's
        return Place(key, name, problem=f"not in the cache, and the hub says {type(error).__name__}")
    return Place(key, name, "hub")


def _reason(error: OSError) -> str:
    return error.strerror or errno.errorcode.get(error.errno or 0, type(error).__name__)
