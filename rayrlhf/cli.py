"""The commands. Thin: read the config, call the stage, turn errors into one message and an exit code.

Exit codes: 0 done, 1 the run failed, 2 the input cannot be used, 130 interrupted, 143 asked to end (SIGTERM).
"""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rayrlhf.config import Config, load_config
from rayrlhf.config.secrets import masked
from rayrlhf.errors import USER_ERRORS, RayRLHFError, Stopped

__all__ = ["app", "main"]

# What a full or broken disk says, wherever a run happens to write when it does.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="RLHF on Ray: the whole InstructGPT recipe.",
)

ConfigPath = Annotated[Path, typer.Argument(help="YAML file", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...", metavar="[KEY=VALUE]...")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print config and placement, start nothing.")]
Runs = Annotated[list[Path], typer.Argument(help="folders of runs, such as runs/demo", metavar="RUN [RUN]...")]
Output = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="Instead of RUN/report.html, or comparison.html for several runs."),
]
VerifyStep = Annotated[
    int | None,
    typer.Option(
        "--verify-step",
        metavar="N",
        min=1,
        help="Compare PPO step N (from 1, as in metrics.jsonl) with the one-process reference trainer: scores, "
        "advantages, losses, every gradient and weight tensor. Runs the ppo stage even if it was done before; a "
        "difference ends the run with exit code 1.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the interrupted run of this name: finished stages are taken as they are, the one under way "
        "from its newest whole checkpoint (checkpoint.every of PPO, checkpoint.training_every of pretrain, sft, reward "
        "and dpo). Settings that change what is learned must be as they were.",
    ),
]

Subjects = Annotated[
    list[str], typer.Argument(help="a run's folder, models, section.key=value ...", metavar="RUN|MODEL...")
]
EvalOutput = Annotated[
    Path | None, typer.Option("--output", metavar="FOLDER", help="Where results go; RUN/eval if left out.")
]

Address = Annotated[
    str,
    typer.Option(
        "--address", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, http://HEAD:8265.", metavar="URL"
    ),
]
Job = Annotated[str, typer.Argument(help="as `rayrlhf submit` named it", metavar="JOB")]
Follow = Annotated[bool, typer.Option("--follow", help="Show the log until the job ends; end with its exit code.")]
HardwareName = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        metavar="NAME|FILE",
        help="h100-80g, a100-80g, ..., cpu, or a YAML file in the form of "
        "rayrlhf/planning/hardware.yaml; the config's plan.hardware if left out.",
    ),
]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Machines there are.")]
Assume = Annotated[
    list[str] | None, typer.Option("--assume", metavar="NAME=VALUE", help="In place of an assumption; may be repeated.")
]


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    verify_step: VerifyStep = None,
    resume: Resume = False,
) -> None:
    """All stages in a row: pretrain, sft, collect, reward, ppo, and what else run.stages names (dpo, eval). None is run
    twice for the same inputs."""
    _run(load_config(config, overrides or ()), dry_run, verify_step, resume)


@app.command()
def pretrain(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False, resume: Resume = False) -> None:
    """A causal LM from scratch on plain text, with its tokenizer."""
    _run_one("pretrain", config, overrides, dry_run, resume=resume)


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False, resume: Resume = False) -> None:
    """Supervised fine-tuning on demonstrations."""
    _run_one("sft", config, overrides, dry_run, resume=resume)


@app.command()
def reward(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False, resume: Resume = False) -> None:
    """A reward model from rankings."""
    _run_one("reward", config, overrides, dry_run, resume=resume)


@app.command()
def dpo(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False, resume: Resume = False) -> None:
    """The baseline: direct preference optimisation of the SFT model on the rankings."""
    _run_one("dpo", config, overrides, dry_run, resume=resume)


@app.command()
def ppo(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    verify_step: VerifyStep = None,
    resume: Resume = False,
) -> None:
    """PPO of the SFT model against the reward model."""
    _run_one("ppo", config, overrides, dry_run, verify_step, resume)


@app.command("eval")
def evaluate(subjects: Subjects, output: EvalOutput = None) -> None:
    """What a run's policies (or any models) are worth on held-out prompts, text and multiple choice, side by side."""
    from rayrlhf.stages.eval_command import evaluate as evaluate_them

    overrides = [subject for subject in subjects if "=" in subject]
    evaluate_them([s for s in subjects if s not in overrides], overrides, output, Console())


@app.command()
def report(runs: Runs, output: Output = None) -> None:
    """One HTML file that shows what a run did, or several runs beside each other. It needs no server and no network."""
    from rayrlhf.evaluation.report import write_report

    Console().print(f"the report is in {write_report(runs, output)}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    hardware: HardwareName = None,
    nodes: Nodes = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Small models on this CPU first, for under a minute: the plan then rests on what they took, and so "
            "does a later --hardware <run.output>/this-machine.yaml.",
        ),
    ] = False,
    look: Annotated[
        bool,
        typer.Option("--search", help="Rank placements that fit on --nodes, or find the fewest GPUs that will do."),
    ] = False,
    assume: Assume = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
) -> None:
    """What a PPO run needs and how long it takes, before anything starts: from the config (or a form such as
    configs/planning/workload.yaml) and the models' shapes alone. Exit code 0 if it fits, 1 if it does not."""
    from rayrlhf.planning.command import numbers, plan_and_print, read_asked

    if measure:
        from rayrlhf.launch.calibrate import measure_this_machine

        hardware = str(measure_this_machine(load_config(config, overrides or ()), hardware))
    asked = read_asked(config, overrides or (), hardware, nodes, numbers(assume or ()))
    raise typer.Exit(0 if plan_and_print(asked, look, as_json) else 1)


@app.command()
def audit(run: Annotated[Path, typer.Argument(help="folder of a run, such as runs/demo", metavar="RUN")]) -> None:
    """Prove from a run's ledger that each sample was trained on or quarantined exactly once; exit code 1 if not."""
    from rayrlhf.stages.audit import show_audit

    show_audit(run, Console())


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML file", metavar="[CONFIG]")] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="Ray cluster to look at; left out: the config's, or here."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The findings as the last line of stdout, the table on stderr.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Without the all-reduces and the toy publish.")] = False,
) -> None:
    """What of this machine, or of every node of a cluster, would stop a run: each check with what to do; exit code 1
    where one fails."""
    from rayrlhf.launch.doctor.show import as_json as line
    from rayrlhf.launch.doctor.show import failed, read_config, show

    settings = read_config(config, overrides or (), as_json) if config else None
    from rayrlhf.launch.doctor.examination import examine

    console = Console(stderr=as_json)
    with console.status("") as status:
        findings = examine(settings, address, quick, lambda doing: status.update(f"{doing} ..."))
    show(findings, console)
    if as_json:
        print(line(findings))
    raise typer.Exit(1 if failed(findings) else 0)


@app.command()
def submit(
    config: ConfigPath,
    address: Address,
    overrides: Overrides = None,
    follow: Follow = False,
    resume: Resume = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env", metavar="NAME", help="A variable that the job gets with its value here; may be repeated."
        ),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(help="The folder that is sent and that the job starts in.", metavar="FOLDER")
    ] = Path("."),
) -> None:
    """`rayrlhf run` as a job on a Ray cluster: sends code and config, needs no GPU and no Ray here. WANDB_API_KEY,
    HF_TOKEN and the reward service's token go along where they are set."""
    from rayrlhf.launch import submit as jobs

    job = jobs.submit(config, overrides or (), address, env or (), working_dir, resume, Console())
    if follow:
        with _leaving(job, address):
            raise typer.Exit(jobs.show_logs(job, address, True, Console()))


@app.command()
def status(job: Job, address: Address) -> None:
    """How a submitted job fares, and if it failed, why."""
    from rayrlhf.launch.submit import show_status

    show_status(job, address, Console())


@app.command()
def logs(job: Job, address: Address, follow: Follow = False) -> None:
    """What a submitted job has printed."""
    from rayrlhf.launch.submit import show_logs

    with _leaving(job, address):
        raise typer.Exit(show_logs(job, address, follow, Console()))


@app.command()
def stop(job: Job, address: Address) -> None:
    """End a submitted job, with a checkpoint where something learns, and wait until it has."""
    from rayrlhf.launch.submit import stop as stop_job

    with _leaving(job, address):
        raise typer.Exit(stop_job(job, address, Console()))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="ppo, rollout, learner, sync or control", metavar="NAME")],
) -> None:
    """A benchmark of this machine: a table, and JSON as its last line (--json: that alone)."""
    from rayrlhf.launch.bench import run_benchmark

    raise typer.Exit(run_benchmark(name, context.args))


@app.command()
def manifests(
    values: Annotated[Path, typer.Option("--values", metavar="FILE", help="YAML, such as cluster/values.yaml.")],
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="Where the files go.")],
    kinds: Annotated[
        list[str] | None, typer.Argument(help="kuberay, launcher, slurm, docker, monitoring; all if left out")
    ] = None,
) -> None:
    """The files of a cluster, from one set of values: KubeRay, Ray's cluster launcher, Slurm, Docker, monitoring."""
    from rayrlhf.launch.manifests import write_manifests

    for path in write_manifests(values, output, kinds or ()):
        Console().print(str(path), highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Entry point: errors of ours become one message, never a traceback."""
    error = Console(stderr=True)
    with suppress(ValueError):  # signals reach the main thread alone
        signal.signal(signal.SIGTERM, _end)
    try:
        code = app(standalone_mode=False)  # typer turns Ctrl-C into 130 and returns it
    except KeyboardInterrupt:
        code = 130
    except _Terminated:
        error.print("asked to end; every actor is gone")
        sys.exit(143)
    except Stopped as problem:
        _print(error, problem)
        sys.exit(143)
    except USER_ERRORS as problem:
        _print(error, problem)
        sys.exit(2)
    except RayRLHFError as problem:
        _print(error, problem)
        sys.exit(1)
    except OSError as problem:
        if problem.errno not in DISK:
            raise
        _print(error, RayRLHFError(str(problem), "mend that, then go on with --resume: checkpoints are as they were"))
        sys.exit(1)
    except typer.Abort:
        sys.exit(130)
    except Exception as problem:
        # Click's usage errors know how to show themselves.
        if not hasattr(problem, "show"):
            raise
        problem.show()
        sys.exit(2)
    if code == 130:
        error.print("interrupted; every actor is gone")
    sys.exit(code or 0)


class _Terminated(BaseException):
    """SIGTERM where nothing is there to be saved; as KeyboardInterrupt, so that everything is given back."""


def _end(number: int, frame: object) -> None:
    raise _Terminated


@contextmanager
def _leaving(job: str, address: str) -> Iterator[None]:
    """Whoever stops looking at a job does not stop it."""
    try:
        yield
    except (KeyboardInterrupt, _Terminated) as reason:
        Console(stderr=True).print(
            f"{job} goes on; to look at it again: rayrlhf logs {job} --follow --address {address}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        sys.exit(130 if isinstance(reason, KeyboardInterrupt) else 143)


def _run_one(
    stage: str,
    config: Path,
    overrides: list[str] | None,
    dry_run: bool,
    verify_step: int | None = None,
    resume: bool = False,
) -> None:
    _run(load_config(config, [*(overrides or ()), f"run.stages=[{stage}]"]), dry_run, verify_step, resume)


def _run(config: Config, dry_run: bool, verify_step: int | None, resume: bool) -> None:
    from rayrlhf.stages.run import run as run_stages  # torch and Ray: only once the config is known to be good

    run_stages(config, Console(), dry_run, verify_step, resume)


def _print(console: Console, problem: Exception) -> None:
    console.print(f"[bold red]{type(problem).__name__}[/]: ", end="")
    console.print(masked(str(problem)), highlight=False, markup=False, emoji=False, soft_wrap=True)


if __name__ == "__main__":
    main()
