"""One supervised stage under Ray Train: the driver's side launches (and watches: supervision.py), the worker's trains.

Both sides share the stage's workspace: the workers write metrics.jsonl, result.json and model/ there, the driver
follows metrics.jsonl for the progress bar. They share the run's checkpoints too: workers save, the driver says from
which one to go on.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import ray

from rayrlhf.actors.base import meeting_place, use_rays_network
from rayrlhf.actors.placement import plan_training
from rayrlhf.checkpoint.store import Checkpoint
from rayrlhf.config import Config
from rayrlhf.config.training import Adam, SupervisedConfig
from rayrlhf.data.batching import Cutting
from rayrlhf.engines.deepspeed import LearnerSettings
from rayrlhf.stages.context import StageContext
from rayrlhf.stages.progress import StageProgress
from rayrlhf.stages.resume import as_json, store_of_training
from rayrlhf.stages.supervision import Supervision, say_where
from rayrlhf.supervised.checkpoints import CheckpointPlan
from rayrlhf.supervised.loop import TrainSettings

__all__ = ["TrainingJob", "learner_settings", "run_training", "train_settings"]

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
    checkpoints: CheckpointPlan
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
    """Train on `cluster.train` workers; returns what rank 0's body returned, and how often they were started again.

    Raises:
        Stopped, ActorError, or the error of ours that a worker raised.
    """
    context.ensure_ray()
    config, placement, workspace = context.config, plan_training(context.config), workspace.resolve()
    job = TrainingJob(
        stage=stage,
        body=body,
        workspace=str(workspace),
        logs=tuple(context.log(f"{stage}-{rank}") for rank in range(placement.ranks)),
        device=config.cluster.device,
        threads=placement.threads,
        model=model,
        trust_remote_code=config.model.trust_remote_code,
        seed=config.run.seed,
        deterministic=config.run.deterministic,
        learner=learner_settings(context, stage, section.adam, section.zero_stage, section.learning_rate),
        train=train_settings(config, section),
        checkpoints=CheckpointPlan(
            store=store_of_training(context.folder, config, stage),
            every=config.checkpoint.training_every,
            inputs=as_json(context.inputs),
            workspace=workspace,
            stop=workspace / "ray" / "stop",
        ),
        data=ray.put(data),
        extra=extra,
    )
    with StageProgress(context.console, stage) as progress:
        restarts = Supervision(context, job, progress, lambda *of: _start(context, job, workspace, *of)).run()
    shutil.rmtree(workspace / "ray", ignore_errors=True)  # Ray Train's own notes of a run that is over
    result: dict[str, Any] = json.loads((workspace / "result.json").read_text(encoding="utf-8"))
    return result | {"restarts": restarts}


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


def _start(
    context: StageContext, job: TrainingJob, workspace: Path, found: Checkpoint | None, restarts: int
) -> Future[Any]:
    """Start the trainer in a thread of its own: in the main thread Ray Train would keep Ctrl-C for itself, for good.

    It has no `FailureConfig`: that would run a stage again whose loss is not finite, or whose disk is full.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    placement = plan_training(context.config)
    gpu = placement.gpus > 0
    trainer = TorchTrainer(
        worker,
        train_loop_config={"job": replace(job, checkpoints=replace(job.checkpoints, found=found))},
        torch_config=_over_rays_network("nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=placement.ranks,
            use_gpu=gpu,
            resources_per_worker=placement.bundles()[0],
            placement_strategy=placement.strategy.upper(),
        ),
        run_config=RunConfig(
            name=f"ray_train_{restarts}",
            storage_path=str(workspace / "ray"),
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
    """Workers are told where to meet, and do so by themselves: Ray Train's own way listens on every network, and gloo
    would ask the host's name."""
    from ray.train.torch import TorchConfig

    class Config(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> Any:
            plain: Any = super().backend_cls

            class Backend(plain):  # type: ignore[misc]
                def on_start(self, worker_group: Any, backend_config: Any) -> None:
                    worker_group.execute(use_rays_network)
                    address, port = worker_group.execute_single(0, meeting_place)
                    worker_group.execute(_meet_at, address, port)

            return Backend

    return Config(backend=backend)


def _meet_at(address: str, port: int) -> None:
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))


def worker(config: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker."""
    import ray.train

    from rayrlhf.actors.base import peak_memory_gib, send_output_to, show_stack_when_asked, whereabouts
    from rayrlhf.engines.distributed import Rendezvous, form_group, prepare_process
    from rayrlhf.metrics.sinks import JsonLines, to_json

    job: TrainingJob = config["job"]
    here = ray.train.get_context()
    rank, world = here.get_world_rank(), here.get_world_size()
    send_output_to(Path(job.logs[rank]))
    show_stack_when_asked()
    say_where(job.checkpoints, rank, whereabouts(job.logs[rank]))
    prepare_process(job.device, job.threads, job.deterministic)
    # DeepSpeed reads it: Ray Train shows a worker all GPUs of its node that the run has.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(here.get_local_rank()))
    os.environ["LOCAL_WORLD_SIZE"] = str(here.get_local_world_size())
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    form_group(Rendezvous(rank, world, *place, job.device, job.threads, job.deterministic))
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
