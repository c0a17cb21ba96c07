"""Checks of the nodes one by one: what was measured there -> a `Finding`. Pure: no Ray, no files, no clock."""

from __future__ import annotations

from collections.abc import Mapping

from rayrlhf.launch.doctor.facts import Clock, Inputs, Machine, Node, Place, Storage
from rayrlhf.launch.doctor.findings import Answers, Finding, Verdict, over_nodes, passed, skipped
from rayrlhf.launch.supported import untested

__all__ = [
    "check_clock",
    "check_data",
    "check_gpus",
    "check_limits",
    "check_models",
    "check_nodes",
    "check_shared_files",
    "check_shared_memory",
    "check_storage",
    "check_versions",
]

# A container has 64 MiB of /dev/shm unless somebody asks for more.
LEAST_SHM_GIB, LEAST_STORE_GIB = 1.0, 1.0
# Two segments that are written in turn, and what the receiver has of each.
BUCKETS_AT_ONCE = 4
LEAST_FREE_GIB, FEW_FREE_GIB, SLOW_MIB_PER_S = 1.0, 10.0, 50.0
# Ray's processes hold some hundred files each on a busy node.
LEAST_FILES, FEW_FILES = 1024, 8192
LEAST_PROCESSES, FEW_PROCESSES = 1024, 4096
# Traces of several nodes are told apart to a tenth of a second; tokens and certificates bear minutes.
CLOCKS_APART_S, CLOCKS_WRONG_S = 0.5, 60.0


def check_nodes(answers: Answers[Machine], nodes: Mapping[str, Node]) -> Finding:
    """Every node of the cluster runs our code."""

    def judge(name: str, machine: Machine) -> Verdict:
        node = nodes[name]
        # A Ray of its own promises the actors as many as they ask for: they take turns.
        promised = f" (Ray promises {node.cpus:g})" if node.cpus != machine.cores else ""
        return passed(f"{machine.cores} CPUs{promised}, {node.gpus:g} GPUs")

    return over_nodes("nodes", answers, judge, {"nodes": len(nodes)})


def check_versions(answers: Answers[Machine]) -> Finding:
    """Each node against the tested list, and all against each other: objects are pickled from one to the next."""

    def judge(_: str, machine: Machine) -> Verdict:
        if machine.twins:
            both = " and ".join(machine.twins)
            return Verdict("fail", f"{both} own the same module", f"pip uninstall {machine.twins[-1]}")
        if missing := [name for name, found in machine.versions.items() if found is None]:
            return Verdict("fail", f"not installed: {', '.join(missing)}", "install this release with its dependencies")
        if strange := untested(machine.versions):
            return Verdict("warn", "; ".join(strange.values()), "install the tested versions (supported.toml)")
        return passed(", ".join(f"{name} {found}" for name, found in machine.versions.items()))

    differing = _differing(answers.given)
    if differing:
        return Finding("versions", "fail", differing, "install the same versions on every node")
    return over_nodes("versions", _only(answers), judge)


def _differing(machines: Mapping[str, Machine]) -> str:
    """Packages that nodes have in several versions; a build's own suffix (+cpu) does not count, nor Python's patch."""
    found: dict[str, dict[str, list[str]]] = {}
    for node, machine in machines.items():
        for package, version in machine.versions.items():
            public = (version or "none").split("+")[0]
            told = ".".join(public.split(".")[:2]) if package == "python" else public
            found.setdefault(package, {}).setdefault(told, []).append(node)
    several = {package: versions for package, versions in found.items() if len(versions) > 1}
    return "; ".join(
        f"{package} " + ", ".join(f"{version} on {', '.join(nodes[:3])}" for version, nodes in versions.items())
        for package, versions in several.items()
    )


def check_gpus(answers: Answers[Machine], nodes: Mapping[str, Node], device: str | None) -> Finding:
    """What the driver lists, what torch can use and what Ray was told are the same.

    Args:
        device: `cluster.device`; None without a config.
    """
    machines = answers.given
    if not any(machine.gpus for machine in machines.values()) and not any(node.gpus for node in nodes.values()):
        if device == "cuda":
            cure = "see that `nvidia-smi` works on the nodes, or set cluster.device=cpu"
            return Finding("GPUs", "fail", "cluster.device is cuda, and no node has a GPU", cure)
        return skipped("GPUs", "no node has a GPU" + (", cluster.device is cpu" if device else ""))

    def judge(name: str, machine: Machine) -> Verdict:
        listed, declared = len(machine.gpus), nodes[name].gpus
        if declared > listed:
            cure = "start Ray with the GPUs that are there (`ray start --num-gpus`); see that the driver is loaded"
            return Verdict("fail", f"Ray was told of {declared:g} GPUs, the driver lists {listed}", cure)
        if machine.torch_problem:
            cure = "install torch built for CUDA (pip install -e '.[gpu]') and a driver that it supports"
            found = f"{_gpus(machine)}, which torch cannot use: {machine.torch_problem}"
            return Verdict("warn" if device == "cpu" else "fail", found, cure)
        if declared < listed:
            cure = "start Ray anew: it looks for GPUs when it starts (see CUDA_VISIBLE_DEVICES)"
            return Verdict("warn", f"the driver lists {listed} GPUs, Ray was told of {declared:g}", cure)
        return passed(_gpus(machine))

    finding = over_nodes("GPUs", _only(answers), judge, {"gpus": sum(len(m.gpus) for m in machines.values())})
    drivers = {gpu.driver for machine in machines.values() for gpu in machine.gpus}
    if finding.status == "pass" and len(drivers) > 1:
        told = f"{finding.found}; drivers differ: {', '.join(sorted(drivers))}"
        return Finding(finding.name, "warn", told, "install one driver everywhere", finding.figures)
    return finding


def _gpus(machine: Machine) -> str:
    kinds: dict[str, int] = {}
    for gpu in machine.gpus:
        kind = f"{gpu.name} ({gpu.memory_gib:.0f} GiB, driver {gpu.driver})"
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "no GPU"


def check_shared_memory(answers: Answers[Machine], nodes: Mapping[str, Node], bucket_gib: float | None) -> Finding:
    """/dev/shm holds Ray's object store, and the buckets of a publish.

    Args:
        bucket_gib: `weights.bucket_mib`; None without a config.
    """
    needed = max(LEAST_SHM_GIB, BUCKETS_AT_ONCE * (bucket_gib or 0.0))

    def judge(name: str, machine: Machine) -> Verdict:
        store, total, free = nodes[name].object_store_gib, machine.shm_total_gib, machine.shm_free_gib
        found = f"/dev/shm {total:.2g} GiB, {free:.2g} free; object store {store:.2g}"
        bigger = "give the container more (docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory)"
        if total < needed:
            return Verdict("fail", f"{found}; a run needs {needed:.2g}", bigger)
        if free < needed:
            cure = f"free it (`ls /dev/shm`: files of runs that were killed), or {bigger}"
            return Verdict("fail", f"{found}; a run needs {needed:.2g}", cure)
        if total < store:
            return Verdict("warn", f"{found}, which has to go to the disk", bigger)
        if store < max(LEAST_STORE_GIB, BUCKETS_AT_ONCE * (bucket_gib or 0.0)):
            return Verdict("warn", found, "start Ray with more: `ray start --object-store-memory=BYTES`")
        return passed(found)

    figures = {"shm_free_gib": min((m.shm_free_gib for m in answers.given.values()), default=0.0)}
    return over_nodes("shared memory", _only(answers), judge, figures)


def check_limits(answers: Answers[Machine]) -> Finding:
    """Of Ray's processes: open files, processes, and memory that InfiniBand locks."""

    def judge(_: str, machine: Machine) -> Verdict:
        files, processes = machine.open_files, machine.processes
        found = f"open files {_limit(files)}, processes {_limit(processes)}"
        raise_files = "raise it before `ray start` (ulimit -n 65536; LimitNOFILE in systemd)"
        raise_processes = "raise it before `ray start` (ulimit -u; TasksMax in systemd, pids.max of the container)"
        if files is not None and files < LEAST_FILES:
            return Verdict("fail", f"{found}: a run opens more files", raise_files)
        if processes is not None and processes < LEAST_PROCESSES:
            return Verdict("fail", f"{found}: threads count, and a run has more", raise_processes)
        if machine.infiniband and machine.locked_memory_gib is not None:
            locked = f"{found}, locked memory {machine.locked_memory_gib:.2g} GiB: NCCL over InfiniBand locks more"
            return Verdict("warn", locked, "ulimit -l unlimited before `ray start`")
        if files is not None and files < FEW_FILES:
            return Verdict("warn", f"{found}: few for a busy node", raise_files)
        if processes is not None and processes < FEW_PROCESSES:
            return Verdict("warn", f"{found}: few for a busy node", raise_processes)
        return passed(found)

    return over_nodes("limits", _only(answers), judge)


def _limit(value: int | None) -> str:
    return "unlimited" if value is None else str(value)


def check_storage(answers: Answers[Storage], needed_gib: float | None) -> Finding:
    """A checkpoint can be written: `run.output` takes files, has room, and is fast enough.

    Args:
        needed_gib: for as many checkpoints as a run keeps; None where the model's size is not known.
    """

    def judge(_: str, storage: Storage) -> Verdict:
        if storage.problem:
            cure = "name a folder in run.output that every node can write to"
            return Verdict("fail", f"{storage.folder}: {storage.problem}", cure)
        found = f"{storage.folder}: {storage.free_gib:.3g} GiB free, written at {storage.write_mib_per_s:.0f} MiB/s"
        room = "free some, lower checkpoint.keep, or name another disk in run.output"
        if storage.free_gib < max(LEAST_FREE_GIB, needed_gib or 0.0):
            asked = f"; the run's checkpoints take about {needed_gib:.3g}" if needed_gib else ""
            return Verdict("fail", found + asked, room)
        if needed_gib is None and storage.free_gib < FEW_FREE_GIB:
            return Verdict("warn", found, room)
        if storage.write_mib_per_s < SLOW_MIB_PER_S:
            return Verdict("warn", found, "a checkpoint will take long: raise checkpoint.every, or use a faster disk")
        return passed(found)

    given = answers.given.values()
    figures = {
        "free_gib": min((s.free_gib for s in given), default=0.0),
        "write_mib_per_s": min((s.write_mib_per_s for s in given), default=0.0),
    }
    return over_nodes("checkpoint path", answers, judge, figures)


def check_shared_files(answers: Answers[str], folder: str, nodes: int) -> Finding:
    """A file that was written here is seen on every node, as it was written.

    Args:
        answers: what is wrong with it there; empty where nothing is.
    """
    if nodes == 1:
        return skipped("shared files", "one node: nothing to share")

    def judge(_: str, problem: str) -> Verdict:
        if problem:
            cure = "put run.output on storage that every node mounts at the same path (NFS, Lustre, a shared volume)"
            return Verdict("fail", f"a file written to {folder} is {problem} there", cure)
        return passed(f"a file written to {folder} is seen")

    return over_nodes("shared files", answers, judge)


def check_clock(answers: Answers[Clock]) -> Finding:
    def judge(_: str, clock: Clock) -> Verdict:
        surely = max(0.0, abs(clock.ahead_s) - clock.uncertain_s)
        found = f"{clock.ahead_s:+.3f} s (within {clock.uncertain_s:.3f})"
        cure = "synchronise the nodes' clocks (chrony, systemd-timesyncd)"
        if surely > CLOCKS_WRONG_S:
            return Verdict("fail", f"{found}: tokens and certificates will be refused", cure)
        if surely > CLOCKS_APART_S:
            return Verdict("warn", f"{found}: logs and traces of the nodes do not line up", cure)
        return passed(f"within {CLOCKS_APART_S:g} s of the clock here")

    figures = {"largest_s": max((abs(c.ahead_s) for c in answers.given.values()), default=0.0)}
    return over_nodes("clock", answers, judge, figures)


def check_models(answers: Answers[Inputs], why_none: str) -> Finding:
    """Every model that the config names can be loaded on every node.

    Args:
        why_none: to be said where it names none.
    """
    if why_none:
        return skipped("model", why_none)

    def judge(_: str, inputs: Inputs) -> Verdict:
        cure = "copy it there, or to storage that every node sees; for a Hugging Face name see login and network"
        return _reached(inputs.models, cure)

    return over_nodes("model", answers, judge)


def check_data(answers: Answers[Inputs], nodes: Mapping[str, Node], why_none: str) -> Finding:
    """Every data source is there where the run is started, which alone reads them; better on every node."""
    if why_none:
        return skipped("data", why_none)

    def judge(name: str, inputs: Inputs) -> Verdict:
        verdict = Verdict("fail", inputs.data_problem, "see data.root and the name of the file")
        if not inputs.data_problem:
            verdict = _reached(inputs.data, "see login and network, or keep the data as files")
        if verdict.status == "fail" and not nodes[name].here:
            cure = "start the run where the data is, or put it on storage that every node sees"
            return Verdict("warn", verdict.found, cure)
        return verdict

    return over_nodes("data", answers, judge)


def _reached(places: tuple[Place, ...], cure: str) -> Verdict:
    if missing := [p for p in places if p.problem]:
        return Verdict("fail", "; ".join(f"{p.key} {p.name}: {p.problem}" for p in missing), cure)
    return passed(", ".join(f"{p.key} {p.name} ({p.where})" for p in places) or "every file is there")


def _only(answers: Answers[Machine]) -> Answers[Machine]:
    """Nodes that do not answer are told once, by `check_nodes`."""
    return Answers(answers.given)
