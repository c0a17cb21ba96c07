"""One supervised stage under Ray Train: the driver's side launches and watches, the worker's side trains.

Both sides share the stage's workspace: the workers write metrics.jsonl, result.json and model/ there, the driver
follows metrics.jsonl for the progress bar.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import ray

from rayrlhf.actors.base import use_rays_network
from rayrlhf.actors.placement import plan_training
from rayrlhf.config import Config
from rayrlhf.config.training import Adam, SupervisedConfig
from rayrlhf.data.batching import Cutting
from rayrlhf.engines.deepspeed import LearnerSettings
from rayrlhf.errors import ActorError, ActorTimeout, RayRLHFError
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.progress import StageProgress
from rayrlhf.supervised.loop import TrainSettings

__all__ = ["TrainingJob", "learner_settings", "run_training", "train_settings"]

# What a person sees of a record, and what it is called there.
SHOWN = {"loss": "loss", "pretrain_loss": "pretrain loss", "learning_rate": "lr"}
JUDGED = {"heldout_loss": "held-out loss", "reward": "reward"}

WorkerBody = Callable[["TrainingJob"], dict[str, Any]]


@dataclass(frozen=True)
class TrainingJob:
    """What each worker gets."""

    stage: str
    body: WorkerBody
    """Runs on every worker; rank 0's return value becomes the stage's result."""
    workspace: str
    logs: tuple[str, ...]
    """a log file per rank"""
    device: str
    threads: int
    model: str | None
    """folder or name of the model to start from"""
    trust_remote_code: bool
    seed: int
    deterministic: bool
    learner: LearnerSettings
    train: TrainSettings
    data: Any
    """handle of the stage's own examples; the worker fetches them"""
    extra: dict[str, Any]


def run_training(
    context: StageContext,
    stage: str,
    section: SupervisedConfig,
    body: WorkerBody,
    data: Any,
    workspace: Path,
    model: str | None,
    **extra: Any,
) -> dict[str, Any]:
    """Train on `cluster.train` workers; returns what rank 0's body returned.

    Raises:
        ActorError, or the error of ours that a worker raised.
    """
    context.ensure_ray()
    config, placement = context.config, plan_training(context.config)
    job = TrainingJob(
        stage=stage,
        body=body,
        workspace=str(workspace.resolve()),
        logs=tuple(context.log(f"{stage}-{rank}") for rank in range(placement.ranks)),
        device=config.cluster.device,
        threads=placement.threads,
        model=model,
        trust_remote_code=config.model.trust_remote_code,
        seed=config.run.seed,
        deterministic=config.run.deterministic,
        learner=learner_settings(context, stage, section.adam, section.zero_stage, section.learning_rate),
        train=train_settings(config, section),
        data=ray.put(data),
        extra=extra,
    )
    with StageProgress(context.console, stage) as progress:
        _watch(_start(context, job, workspace), _Follower(workspace / "metrics.jsonl"), context, progress, job)
    shutil.rmtree(workspace / "ray", ignore_errors=True)  # Ray Train's own notes of a run that is over
    result: dict[str, Any] = json.loads((workspace / "result.json").read_text(encoding="utf-8"))
    return result


def learner_settings(
    context: StageContext,
    role: str,
    adam: Adam,
    zero_stage: int,
    learning_rate: float,
    average: float | None = None,
) -> LearnerSettings:
    """What a DeepSpeed learner of any stage needs of the config; `role` names the files of a batch that failed."""
    config = context.config
    return LearnerSettings(
        zero_stage=zero_stage,
        dtype=config.model.dtype,
        device=config.cluster.device,
        learning_rate=learning_rate,
        betas=adam.betas,
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        grad_clip=adam.grad_clip,
        max_loss=config.run.max_loss,
        failed_folder=str((context.folder / "failed").resolve()),
        role=role,
        average=average,
        deepspeed=config.deepspeed.keys(),
        activation_checkpointing=config.deepspeed.activation_checkpointing,
    )


def train_settings(config: Config, section: SupervisedConfig) -> TrainSettings:
    return TrainSettings(
        learning_rate=section.learning_rate,
        batch_size=section.batch_size,
        epochs=section.epochs,
        warmup_ratio=section.warmup_ratio,
        final_lr_ratio=section.final_lr_ratio,
        cutting=Cutting(section.micro_batch_tokens, config.model.packed),
        log_every=section.log_every,
        seed=config.run.seed,
        max_steps=getattr(section, "max_steps", None),
    )


def _start(context: StageContext, job: TrainingJob, workspace: Path) -> Future[Any]:
    """Start the trainer in a thread of its own: in the main thread Ray Train would keep Ctrl-C for itself, for good."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    placement = plan_training(context.config)
    gpu = placement.gpus > 0
    trainer = TorchTrainer(
        worker,
        train_loop_config={"job": job},
        torch_config=_over_rays_network("nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=placement.ranks,
            use_gpu=gpu,
            resources_per_worker=placement.bundles()[0],
            placement_strategy=placement.strategy.upper(),
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=str((workspace / "ray").resolve()),
            worker_runtime_env={"env_vars": placement.environment()},
        ),
    )
    outcome: Future[Any] = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=fit, name=f"fit-{job.stage}", daemon=True).start()
    return outcome


def _over_rays_network(backend: str) -> Any:
    """Ray Train's process group over the interface that Ray found: by itself gloo asks the host's name."""
    from ray.train.torch import TorchConfig

    class Config(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> Any:
            plain: Any = super().backend_cls

            class Backend(plain):  # type: ignore[misc]
                def on_start(self, worker_group: Any, backend_config: Any) -> None:
                    worker_group.execute(use_rays_network)
                    super().on_start(worker_group, backend_config)

            return Backend

    return Config(backend=backend)


def _watch(
    outcome: Future[Any], follower: _Follower, context: StageContext, progress: StageProgress, job: TrainingJob
) -> None:
    """Show the workers' records until the trainer ends; raise what made it fail.

    Raises:
        ActorTimeout: when the workers do not start, or say nothing for longer than `cluster.call_timeout_s`.
    """
    cluster = context.config.cluster
    done, deadline = False, monotonic() + cluster.start_timeout_s
    while not done:
        done = not wait([outcome], timeout=0.2).not_done
        for record in follower.new_records():  # once more after the end: the last lines count too
            _show(context, progress, job.stage, record)
            deadline = monotonic() + cluster.call_timeout_s
        if not done and monotonic() > deadline:
            raise ActorTimeout(
                f"{job.stage}: its workers have said nothing before the deadline",
                f"see {job.logs[0]}; raise cluster.start_timeout_s or cluster.call_timeout_s if they are only slow",
            )
    if (error := outcome.exception()) is not None:
        raise _explain(error, job) from None


def _explain(error: BaseException, job: TrainingJob) -> Exception:
    """A worker's own error if it is one of ours, else where to look."""
    for rank, failure in sorted(getattr(error, "worker_failures", {}).items()):
        cause = getattr(failure, "cause", failure)
        where = f"{job.stage} worker {rank}"
        if isinstance(cause, RayRLHFError):
            return type(cause)(f"{where}: {cause.message}", cause.hint)
        return ActorError(f"{where} failed: {type(cause).__name__}: {str(cause)[:500]}", f"see {job.logs[rank]}")
    return ActorError(f"{job.stage} failed: {str(error)[:500]}", f"see {job.logs[0]}")


def _show(context: StageContext, progress: StageProgress, stage: str, record: dict[str, Any]) -> None:
    if "phase" in record:
        progress.phase(record["phase"])
        return
    context.sink.write({"stage": stage, **record})
    if "heldout_loss" in record:  # an epoch is judged: rare, so it gets a line even where there is a bar
        words = "  ".join(f"{name} {record[key]:.4g}" for key, name in JUDGED.items() if key in record)
        context.console.print(f"{stage:<9} {record['step']}/{record['steps']}  {words}", highlight=False)
    else:
        numbers = {name: record[key] for key, name in SHOWN.items() if key in record}
        progress.step(record["step"], record["steps"], numbers)


class _Follower:
    """Reads the lines that a growing JSONL file has gained since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def new_records(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        if self._path.exists():
            with open(self._path, encoding="utf-8") as file:
                file.seek(self._position)
                while (line := file.readline()).endswith("\n"):
                    self._position = file.tell()
                    records.append(json.loads(line))
        return records


def worker(config: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker."""
    import ray.train

    from rayrlhf.actors.base import peak_memory_gib, send_output_to
    from rayrlhf.engines.distributed import prepare_process
    from rayrlhf.metrics.sinks import JsonLines, to_json

    job: TrainingJob = config["job"]
    rank = ray.train.get_context().get_world_rank()
    send_output_to(Path(job.logs[rank]))
    prepare_process(job.device, job.threads, job.deterministic)
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if job.device == "cuda" else "gloo", verbose=False)
    start = perf_counter()
    result = job.body(job)
    if rank == 0:
        result["train_seconds"] = perf_counter() - start
        result["memory_gib"] = {"memory/train_gib": peak_memory_gib()}
        (Path(job.workspace) / "result.json").write_text(to_json(result), encoding="utf-8")
        JsonLines(Path(job.workspace) / "metrics.jsonl").write({"phase": "done"})


def worker_log(job: TrainingJob, rank: int) -> Callable[[dict[str, Any]], None]:
    """Where a worker's records go: the stage's metrics.jsonl from rank 0, nowhere from the others."""
    from rayrlhf.metrics.sinks import JsonLines

    if rank:
        return lambda record: None
    return JsonLines(Path(job.workspace) / "metrics.jsonl").write


def fetch(job: TrainingJob) -> Sequence[Any]:
    """The stage's examples, from the object store."""
    data: Sequence[Any] = ray.get(job.data)
    return data
