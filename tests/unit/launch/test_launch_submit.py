"""What a job is told, and what its end is told as: without a cluster."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType
from rich.console import Console

from rayrlhf.config import Config
from rayrlhf.errors import ConfigError
from rayrlhf.launch import jobs as jobs_module
from rayrlhf.launch import submit as submit_module
from rayrlhf.launch.jobs import Jobs, RequestFailed, connect
from rayrlhf.launch.submit import entrypoint, environment, exit_code, show_status, submit

ROOT = Path(__file__).parents[3]
CONFIG = "model: {path: org/name}\nworld: {name: instructions}\nrun: {name: mine, output: /shared/runs}\n"


def details(status: JobStatus = JobStatus.RUNNING, job: str = "mine-1", **more: Any) -> JobDetails:
    return JobDetails(type=JobType.SUBMISSION, submission_id=job, status=status, entrypoint="exec python", **more)


class Server:
    """Stands in for the cluster: remembers what it was given."""

    def __init__(self, *known: JobDetails, log: str = "") -> None:
        self.known, self.log, self.given = list(known), log, dict[str, Any]()

    def list_jobs(self) -> list[JobDetails]:
        return self.known

    def submit_job(self, **given: Any) -> str:
        self.given = given
        assert Path(given["runtime_env"]["working_dir"]).is_file()
        return str(given["submission_id"])

    def get_job_info(self, job: str) -> JobDetails:
        found = next((d for d in self.known if d.submission_id == job), None)
        if found is None:
            raise RequestFailed(404, f"Job {job} does not exist")
        return found

    def get_job_logs(self, job: str) -> str:
        return self.log

    find, _nearest = Jobs.find, Jobs._nearest


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()

    @contextmanager
    def connected(address: str) -> Iterator[Server]:
        yield server

    monkeypatch.setattr(submit_module, "connect", connected)
    return server


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG)
    return path


def submitted(config: Path, *overrides: str, names: tuple[str, ...] = (), **environ: str) -> str:
    console = Console(file=StringIO())
    submit(config, overrides, "http://head:8265", names, config.parent, True, console, environ)
    return console.file.getvalue()  # type: ignore[attr-defined]


# ---- what a job is given


def test_a_job_gets_command_environment_and_run_folder_and_no_secret_is_shown(config: Path, server: Server) -> None:
    said = submitted(
        config, "ppo.steps=7", names=("MINE",), MINE="a value", HF_TOKEN="hf_secret", OTHER="not asked for"
    )
    assert server.given["entrypoint"] == "exec python -m rayrlhf.cli run mine.yaml ppo.steps=7 --resume"
    assert server.given["submission_id"].startswith("mine-")
    assert server.given["metadata"] == {"run": "/shared/runs/mine"}
    assert server.given["runtime_env"]["env_vars"] == {
        "RAY_JOB_STOP_WAIT_TIME_S": "3600",
        "COLUMNS": "200",
        "HF_TOKEN": "hf_secret",
        "MINE": "a value",
    }
    assert "environment: COLUMNS, HF_TOKEN, MINE, RAY_JOB_STOP_WAIT_TIME_S" in said
    assert "hf_secret" not in said
    assert "a value" not in said
    assert "hf_secret" not in server.given["entrypoint"]


def test_overrides_reach_the_jobs_shell_as_they_were_written() -> None:
    overrides = ["model={path: /shared/a model}", "run.stages=[ppo]", "data.chat_template='$HOME'"]
    words = shlex.split(entrypoint("my configs/a.yaml", overrides, resume=False))
    assert words == ["exec", "python", "-m", "rayrlhf.cli", "run", "my configs/a.yaml", *overrides]


def test_a_stop_may_take_as_long_as_the_calls_that_it_waits_for() -> None:
    tree = {"model": {"path": "org/name"}, "world": {"name": "instructions"}, "cluster": {"call_timeout_s": 100.5}}
    assert environment(Config.model_validate(tree), {}, {}) == {"RAY_JOB_STOP_WAIT_TIME_S": "201", "COLUMNS": "200"}


def test_a_line_of_a_jobs_log_is_as_long_as_it_is_up_to_200_columns() -> None:
    tree = {"model": {"path": "org/name"}, "world": {"name": "instructions"}}
    assert environment(Config.model_validate(tree), {}, {})["COLUMNS"] == "200"
    assert environment(Config.model_validate(tree), {"COLUMNS": "90"}, {})["COLUMNS"] == "90"


def test_the_variable_that_the_config_names_for_a_rewards_token_goes_along(config: Path, server: Server) -> None:
    reward = "ppo.reward={kind: http, url: https://rewards.example/score, token_variable: MY_TOKEN}"
    submitted(config, reward, MY_TOKEN="mine-1234567890")
    assert server.given["runtime_env"]["env_vars"]["MY_TOKEN"] == "mine-1234567890"
    assert "mine-1234567890" not in server.given["entrypoint"]


def test_a_value_on_the_command_line_is_refused_and_not_repeated(config: Path, server: Server) -> None:
    with pytest.raises(ConfigError, match="--env HF_TOKEN: give the name") as error:
        submitted(config, names=("HF_TOKEN=hf_secret",))
    assert "hf_secret" not in str(error.value)


def test_a_variable_that_is_not_set_is_named(config: Path, server: Server) -> None:
    with pytest.raises(ConfigError, match="--env MINE: the environment has no MINE"):
        submitted(config, names=("MINE",))


# ---- what is refused before anything is sent


def test_a_config_that_holds_a_secret_of_this_environment_is_refused(config: Path, server: Server) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.project") as error:
        submitted(config, "tracking.project=hush-1234567890", WANDB_API_KEY="hush-1234567890")
    assert "hush" not in str(error.value)
    assert not server.given


def test_a_data_folder_of_this_environment_is_not_the_jobs_unless_it_goes_along(config: Path, server: Server) -> None:
    submitted(config, RAYRLHF_HUMAN_DATA="/here")
    assert "RAYRLHF_HUMAN_DATA" not in server.given["runtime_env"]["env_vars"]
    submitted(config, names=("RAYRLHF_HUMAN_DATA",), RAYRLHF_HUMAN_DATA="/shared/data")
    assert server.given["runtime_env"]["env_vars"]["RAYRLHF_HUMAN_DATA"] == "/shared/data"


def test_a_misspelt_key_is_found_here(config: Path, server: Server) -> None:
    with pytest.raises(ConfigError, match=r"ppo\.stepz: unknown key; did you mean ppo\.steps"):
        submitted(config, "ppo.stepz=7")
    assert not server.given


def test_a_run_folder_that_would_go_with_the_job_is_refused(config: Path, server: Server) -> None:
    with pytest.raises(ConfigError, match=r"run\.output: found 'runs'; a job's folder goes when it ends"):
        submitted(config, "run.output=runs")
    assert not server.given


def test_links_to_folders_that_are_not_sent_are_told(config: Path, server: Server) -> None:
    assert "are not sent" not in submitted(config)
    (config.parent / "data").symlink_to(config.parent)
    assert "links to folders are not sent: data (name the folders themselves" in submitted(config)


def test_a_run_folder_that_another_job_writes_to_is_refused(config: Path, server: Server) -> None:
    server.known = [details(metadata={"run": "/shared/runs/mine"})]
    with pytest.raises(ConfigError, match="mine-1 is RUNNING and writes to /shared/runs/mine") as error:
        submitted(config)
    assert "rayrlhf stop mine-1" in error.value.hint
    server.known = [details(JobStatus.STOPPED, metadata={"run": "/shared/runs/mine"})]
    submitted(config)


@pytest.mark.parametrize("output", ["/shared/../shared/runs", "//shared/runs/", "/shared/./other/../runs"])
def test_a_run_folder_in_other_words_is_the_same_folder(config: Path, server: Server, output: str) -> None:
    server.known = [details(metadata={"run": "/shared/runs/mine"})]
    with pytest.raises(ConfigError, match="mine-1 is RUNNING and writes to /shared/runs/mine"):
        submitted(config, f"run.output={output}")
    server.known = [details(metadata={"run": f"{output}/mine"})]
    with pytest.raises(ConfigError, match="mine-1 is RUNNING and writes to /shared/runs/mine"):
        submitted(config)


# ---- what a job's end is told as


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 1, 1),
        ("FAILED", None, 1),
        ("FAILED", -9, 137),
        ("STOPPED", None, 143),
    ],
)
def test_the_client_ends_with_the_runs_exit_code(status: str, code: int | None, expected: int) -> None:
    assert exit_code(details(JobStatus(status), driver_exit_code=code)) == expected


def test_status_of_a_failed_job_shows_the_error_and_the_hint_and_not_the_log(server: Server) -> None:
    log = "sft 1/2\nDataError: first\nppo 1/2\nTrainingError: the loss of step 3 is nan\n  hint: lower the rate\n"
    server.log = log
    server.known = [details(JobStatus.FAILED, driver_exit_code=1, driver_agent_http_address="http://node:1")]
    console = Console(file=StringIO(), width=40)
    show_status("mine-1", "http://head:8265", console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "exit code  1\n" in said
    assert "cause      TrainingError: the loss of step 3 is nan\n  hint: lower the rate\n" in said
    assert "first" not in said


def test_status_of_a_job_whose_node_is_gone_shows_what_ray_says_of_it(server: Server) -> None:
    gone = details(JobStatus.FAILED, driver_agent_http_address="http://node:1", message="the node died")
    server.known = [gone]
    server.get_job_logs = lambda job: (_ for _ in ()).throw(RequestFailed(500, "no agent"))  # type: ignore[method-assign]
    console = Console(file=StringIO())
    show_status("mine-1", "http://head:8265", console)
    assert "cause      the node died\n" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_failure_without_an_error_of_ours_shows_the_logs_end() -> None:
    log = "\n".join(f"line {n}" for n in range(100))
    assert submit_module._cause(log).splitlines()[0] == "line 80"


def test_an_unknown_job_names_the_nearest_or_the_newest() -> None:
    known = Server(details(job="mine-a1b2c3", start_time=1), details(job="other-d4e5f6", start_time=2))
    with pytest.raises(ConfigError) as error:
        known.find("mine-a1b2c4")  # type: ignore[misc]
    assert error.value.hint == "did you mean mine-a1b2c3?"
    with pytest.raises(ConfigError) as error:
        known.find("zzz")  # type: ignore[misc]
    assert error.value.hint == "the newest are other-d4e5f6, mine-a1b2c3"
    for none in ("", "..", "../version", "mine-a1b2c3/logs", "mine?"):
        with pytest.raises(ConfigError) as error:
            known.find(none)  # type: ignore[misc]
        assert error.value.message == f"{none!r}: no name of a job"


# ---- the way to the cluster


def test_an_address_that_is_not_http_is_refused() -> None:
    with pytest.raises(ConfigError, match="--address ray://head:10001: not HTTP"), connect("ray://head:10001"):
        pass


def test_the_address_that_was_given_is_used_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client prefers its variables to its argument."""
    asked: list[str] = []
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    monkeypatch.setattr(
        jobs_module.Jobs, "_check_connection_and_version", lambda self, **_: asked.append(self._address)
    )
    with connect("head:8265"):
        pass
    assert set(asked) == {"http://head:8265"}
    assert os.environ["RAY_ADDRESS"] == "http://elsewhere:8265"


def test_where_nobody_answers_the_message_says_what_to_give(tmp_path: Path) -> None:
    """In a process in which torch cannot be imported, as on a laptop that has none."""
    program = "import sys; sys.modules['torch'] = None; from rayrlhf.cli import main; main()"
    command = [sys.executable, "-c", program, "submit", "configs/tiny.yaml", f"run.output={tmp_path}"]
    done = subprocess.run(
        [*command, "--address", "http://127.0.0.1:1"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert "ResourceError: --address http://127.0.0.1:1: no Ray job server answers" in done.stderr
    assert "http://HEAD:8265" in done.stderr
