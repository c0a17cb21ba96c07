"""`rayrlhf submit|status|logs|stop`: a run as a Ray job.

here:     config, checked ─► package (code, config) ─┐                        ┌─► log, status, exit code
          secrets, by name ─► environment ───────────┴─► job server (HTTP) ───┤
cluster:                                              entrypoint: rayrlhf run ┘ ─► actors, run folder on shared storage

Nothing here imports torch, and no Ray runs here: a laptop with the package and a way to the head's dashboard is enough.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import secrets
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

from ray.job_submission import JobDetails, JobStatus
from rich.console import Console

from rayrlhf.config import DATA_ROOT_VARIABLE, Config, load_config
from rayrlhf.errors import ConfigError, ResourceError
from rayrlhf.launch.follow import OutputClosed, follow
from rayrlhf.launch.jobs import Jobs, RequestFailed, connect
from rayrlhf.launch.packaging import collect_package, write_zip

__all__ = ["SECRETS", "entrypoint", "environment", "exit_code", "show_logs", "show_status", "stop", "submit"]

SECRETS = ("WANDB_API_KEY", "HF_TOKEN")
GRACE_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
LOG_COLUMNS = "200"
RAYS_GRACE_S = 3  # what a job has that says nothing of it
STOPPED = 143
# The block that our command line ends with when a run fails: the error's name, and all below it.
CAUSE = re.compile(r"^(?:[A-Z]\w*(?:Error|Lost|Timeout|Stopped|MovedOn)): ", re.MULTILINE)
CAUSE_LINES = 20


def submit(
    path: Path,
    overrides: Sequence[str],
    address: str,
    names: Sequence[str],
    folder: Path,
    resume: bool,
    console: Console,
    environ: Mapping[str, str] = os.environ,
) -> str:
    """Check the config, send it with the code, start the job; returns its id.

    Args:
        names: environment variables that the job gets with the values they have here.
        folder: what is sent, less what its ignore files name; the job runs in a copy of it.

    Raises:
        ConfigError: of the config, a name, or a package that is too large: before anything is sent.
        ResourceError: the cluster cannot be reached.
    """
    carried = _values_of(names, environ)
    # The job has no data folder from this environment, but a secret of it must not stand in the config all the same.
    seen = {name: value for name, value in environ.items() if name != DATA_ROOT_VARIABLE} | carried
    config = load_config(path, overrides, seen)
    _check_output(config)
    package = collect_package(folder, path)
    variables = environment(config, carried, environ)
    with connect(address) as jobs, tempfile.TemporaryDirectory() as scratch:
        _check_nobody_writes_there(jobs, _run_folder(config))
        archive = Path(scratch) / "package.zip"
        write_zip(package, archive)
        job: str = jobs.submit_job(
            entrypoint=entrypoint(package.config, overrides, resume),
            submission_id=f"{config.run.name}-{secrets.token_hex(3)}",
            runtime_env={"working_dir": str(archive), "env_vars": variables},
            metadata={"run": _run_folder(config)},
        )
    sent = f"{len(package.files)} files, {package.mib:.1f} MiB; environment: {', '.join(sorted(variables))}"
    console.print(f"{job} is submitted ({sent})", highlight=False, markup=False, soft_wrap=True)
    if package.links:
        told = f"links to folders are not sent: {', '.join(package.links)}"
        console.print(
            f"{told} (name the folders themselves, on shared storage)", highlight=False, markup=False, soft_wrap=True
        )
    return job


def entrypoint(config: str, overrides: Sequence[str], resume: bool) -> str:
    """The job's shell line. `exec`, so that no shell stands between Ray's signals and exit codes and the driver's."""
    words = ["python", "-m", "rayrlhf.cli", "run", config, *overrides, *(["--resume"] if resume else [])]
    return f"exec {shlex.join(words)}"


def environment(config: Config, carried: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """The job's environment: what was asked for, secrets that are set here, and how long a stop may take.

    A run that is asked to end finishes the step that learns and saves: each a few remote calls with a deadline. Its log
    has no terminal to take its width from: a line stays a line.
    """
    known = {name: environ[name] for name in (*SECRETS, *_reward_tokens(config)) if environ.get(name)}
    grace = str(math.ceil(2 * config.cluster.call_timeout_s))
    return {GRACE_VARIABLE: grace, "COLUMNS": LOG_COLUMNS, **known, **carried}


def exit_code(details: JobDetails) -> int:
    """The exit code of the run, as a shell would have it."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED
    code = details.driver_exit_code
    return 1 if code is None else 128 - code if code < 0 else code


def show_status(job: str, address: str, console: Console) -> None:
    """What the job is, since when, and if it failed, why."""
    with connect(address) as jobs:
        details = jobs.find(job)
        log = _log_of(jobs, details)
    rows = {
        "status": details.status.value + _duration(details),
        "run": (details.metadata or {}).get("run", ""),
        "command": details.entrypoint,
        "exit code": "" if details.driver_exit_code is None else str(details.driver_exit_code),
    }
    if details.status == JobStatus.FAILED:
        rows["cause"] = _cause(log or details.message or "")
    else:
        rows["last line"] = next(reversed(log.strip().splitlines()), "")
    for name, text in rows.items():
        if text:
            console.print(f"{name:<10} {text}", highlight=False, markup=False, emoji=False, soft_wrap=True)


def show_logs(job: str, address: str, following: bool, console: Console) -> int:
    """Print the job's log, to its end if `following`; then returns the run's exit code, else 0."""
    with connect(address) as jobs:
        jobs.find(job)
        if not following:
            _write(jobs.get_job_logs(job))
            return 0
        return _follow(jobs, job, console)


def stop(job: str, address: str, console: Console) -> int:
    """Ask the job to end, and show how it does; 0 if it ended by itself, 1 if Ray had to kill it."""
    with connect(address) as jobs:
        before = jobs.find(job)
        if before.status.is_terminal():
            console.print(f"{job} has ended already: {before.status.value}", highlight=False, markup=False)
            return 0
        shown, asked = len(_log_of(jobs, before)), monotonic()
        jobs.stop_job(job)
        console.print(f"{job} is asked to end", highlight=False, markup=False)
        after = _followed(jobs, job, console, shown)
    took = monotonic() - asked
    if after.status != JobStatus.STOPPED:
        console.print(f"{job} had ended before: {after.status.value}", highlight=False, markup=False)
        return 0
    grace = _grace_s(before)
    if took < grace:
        console.print(f"{job} has ended, {took:.0f} s later", highlight=False, markup=False)
        return 0
    console.print(
        f"{job} did not end within {grace} s ({GRACE_VARIABLE}) and was killed: it has the checkpoints of before",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 1


def _follow(jobs: Jobs, job: str, console: Console) -> int:
    details = _followed(jobs, job, console)
    code = exit_code(details)
    if details.status != JobStatus.SUCCEEDED:
        why = f"exit code {code}" if details.driver_exit_code is not None else (details.message or "").strip()
        _notice(console)(f"{job}: {details.status.value}" + (f" ({why})" if details.status == JobStatus.FAILED else ""))
    return code


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has seen enough; Python must not try to flush the rest at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _followed(jobs: Jobs, job: str, console: Console, shown: int = 0) -> JobDetails:
    try:
        return asyncio.run(follow(jobs, job, _write, _notice(console), shown))
    except OutputClosed as error:
        raise ResourceError(f"the job's log cannot be written here: {error}", f"{job} goes on") from None


def _notice(console: Console) -> Any:
    """To stderr: stdout is the job's log and nothing else."""
    own = Console(stderr=True, no_color=console.no_color)
    return lambda text: own.print(text, highlight=False, markup=False, soft_wrap=True)


def _values_of(names: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(
                f"--env {name.partition('=')[0]}: give the name of an environment variable alone",
                "its value is taken from here; values on a command line end up in histories and process lists",
            )
        if name not in environ:
            raise ConfigError(f"--env {name}: the environment has no {name}", "export it first")
    return {name: environ[name] for name in names}


def _reward_tokens(config: Config) -> list[str]:
    """Names of the variables in which the config says that reward services' tokens are."""
    return [value for key, value in _leaves(config.model_dump(mode="json")) if key == "token_variable" and value]


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in children:
        if isinstance(value, dict | list):
            yield from _leaves(value)
        else:
            yield str(key), value


def _run_folder(config: Config) -> str:
    return str(config.run.output / config.run.name)


def _check_output(config: Config) -> None:
    if not config.run.output.is_absolute():
        raise ConfigError(
            f"run.output: found {str(config.run.output)!r}; a job's folder goes when it ends, and checkpoints with it",
            "name a folder on storage that every node sees and that stays, for example run.output=/shared/runs",
        )


def _check_nobody_writes_there(jobs: Jobs, folder: str) -> None:
    """Before anything is sent. A run that comes second by another path, or by hand, is refused by the folder's lock."""
    for details in jobs.list_jobs():
        taken = (details.metadata or {}).get("run")
        if taken and not details.status.is_terminal() and _plain(taken) == _plain(folder):
            raise ConfigError(
                f"run.output, run.name: {details.submission_id} is {details.status.value} and writes to "
                f"{_plain(folder)}",
                f"`rayrlhf stop {details.submission_id}` first, or give another run.name",
            )


def _plain(path: str) -> str:
    """Less `..`, `.` and doubled slashes; links are the cluster's, and are not known here."""
    return "/" + os.path.normpath(path).lstrip("/")


def _log_of(jobs: Jobs, details: JobDetails) -> str:
    """Empty until the job has a node, which holds it, and once that node is gone."""
    try:
        return jobs.get_job_logs(details.submission_id) if details.driver_agent_http_address else ""
    except RequestFailed:
        return ""


def _grace_s(details: JobDetails) -> int:
    variables = (details.runtime_env or {}).get("env_vars") or {}
    return int(variables.get(GRACE_VARIABLE, RAYS_GRACE_S))


def _duration(details: JobDetails) -> str:
    if details.start_time is None:
        return ""
    end = details.end_time / 1000 if details.end_time else datetime.now().timestamp()
    began = datetime.fromtimestamp(details.start_time / 1000)
    return f", begun {began:%Y-%m-%d %H:%M:%S}, {max(end - began.timestamp(), 0) / 60:.1f} min"


def _cause(log: str) -> str:
    """The last error of ours in a log with what it says, else the log's last lines."""
    found = list(CAUSE.finditer(log))
    lines = (log[found[-1].start() :] if found else log).strip().splitlines()
    return "\n".join(lines[:CAUSE_LINES] if found else lines[-CAUSE_LINES:])
