"""The guard of every optimizer step: a loss or gradient that is broken stops the run and says where it broke.

Once a rank has the losses and gradients of a step, and before the weights move, `check_step` reduces two numbers over
the ranks. Where one of them is bad, every rank looks at its tensors in the order in which data flows (batch,
parameters, activations, loss, gradients), writes its micro-batches to disk, and raises the same error.

Nothing here may wait for a rank that does not come. The search has two collective parts only, in the same order on all
ranks: one pass of equally many micro-batches, and one exchange of what was found.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayrlhf.checkpoint.evidence import write_tensors
from rayrlhf.engines.distributed import all_reduce_sum
from rayrlhf.errors import TrainingError
from rayrlhf.types import Rollout

if TYPE_CHECKING:
    from rayrlhf.engines.deepspeed import Learner, LossFunction

__all__ = ["check_step", "first_bad_tensor", "local_grad_norm", "tensors_of"]

M = TypeVar("M")


def check_step(
    learner: Learner,
    loss: float,
    grad_norm: float,
    loss_function: LossFunction[M],
    micro_batches: Sequence[M],
    dummy: M,
) -> None:
    """Return if the step may be taken. A collective: one all-reduce of two numbers when all is well.

    Args:
        loss: this rank's share of the global loss.
        grad_norm: of what this rank holds of the gradient (`local_grad_norm`).

    Raises:
        TrainingError: on every rank with the same words, when the global loss or any gradient is not finite, or the
            loss is over `max_loss`. The weights are then still those before the step.
    """
    # A sum is not finite when one of its terms is not, so no rank's NaN gets lost, as it may in a maximum.
    both = all_reduce_sum(torch.tensor([loss, grad_norm], dtype=torch.float64, device=learner.device))
    total, norms = (float(x) for x in both)
    limit = learner.settings.max_loss
    if not math.isfinite(total):
        raise _stopped(learner, f"the loss is not finite ({total})", True, loss_function, micro_batches, dummy)
    if abs(total) > limit:
        problem = f"the loss {total:.3g} is over run.max_loss {limit:g}"
        raise _stopped(learner, problem, False, loss_function, micro_batches, dummy)
    if not math.isfinite(norms):
        raise _stopped(learner, "the gradient is not finite", True, loss_function, micro_batches, dummy)


def local_grad_norm(module: nn.Module) -> Tensor:
    """Norm of what this rank holds of the gradient between the last backward pass and the step: all of it without
    ZeRO, its own share with."""
    shares = (_own_gradient(parameter) for parameter in module.parameters())
    return nn.utils.get_total_norm([share for share in shares if share is not None])


def tensors_of(micro_batch: Any) -> dict[str, Tensor]:
    """Every tensor and array in a micro-batch of any type by its dotted name, such as `batch.tokens` or `0`.

    Dataclasses, mappings and sequences are walked; of rollouts only the ids are taken, since what a pass reads of them
    stands beside them as tensors. Anything else is left out.
    """
    return dict(_walk("", micro_batch))


def first_bad_tensor(
    learner: Learner, micro_batches: Sequence[M], loss_function: LossFunction[M], dummy: M
) -> str | None:
    """Name of the first tensor of any rank, in the order in which data flows, that is not finite; None without one.

    A collective: every rank must call it.
    """
    search = _Search(learner.rank)
    _look_everywhere(search, learner, micro_batches, loss_function, dummy)
    found = [finding for finding in _all_gather(search.first) if finding is not None]
    return min(found, key=_Finding.order).name if found else None


# ---- the search ------------------------------------------------------------------------------------------------------


class _Kind(IntEnum):
    """In the order in which data flows."""

    BATCH = 0
    PARAMETER = 1
    ACTIVATION = 2
    LOSS = 3
    GRADIENT = 4


CURES = {
    _Kind.BATCH: "look for the sample in the file, and at the rewards, values and log-probs that it was made from",
    _Kind.PARAMETER: "the weights were broken before this step: check the model that the stage starts from",
    _Kind.ACTIVATION: "lower the learning rate; check that the model's weights fit model.dtype",
    _Kind.LOSS: "lower the learning rate",
    _Kind.GRADIENT: "lower the learning rate",
}
EXPLODED = "lower the learning rate; raise run.max_loss if a loss of this size is to be expected"
NOT_FOUND = "the same pass without dropout showed nothing; lower the learning rate or the dropout"


@dataclass(frozen=True, slots=True)
class _Finding:
    kind: _Kind
    place: int
    """counts what this rank has looked at, in the same order on all ranks"""
    name: str
    numbers: int
    bad: int
    """of them, NaN or infinite"""
    largest: float
    """magnitude; infinite when any is bad"""

    def order(self) -> tuple[int, int]:
        return self.kind, self.place

    def record(self) -> dict[str, Any]:
        return {"name": self.name, "numbers": self.numbers, "bad": self.bad, "largest": self.largest}


class _Search:
    """Looks at tensors; keeps the first bad one in the order in which data flows, and of each kind the largest."""

    def __init__(self, rank: int) -> None:
        self.where = f" on rank {rank}" if _ranks() > 1 else ""
        self.first: _Finding | None = None
        self.largest: dict[_Kind, _Finding] = {}
        self.losses: list[float] = []
        self._place = 0

    def look(self, kind: _Kind, name: str, tensor: Tensor | None) -> None:
        self._place += 1  # also where another rank holds the tensor
        if tensor is None or not tensor.is_floating_point() or not tensor.numel():
            return
        low, high = (float(x) for x in torch.aminmax(tensor.detach()))  # NaN when any number is
        finite = math.isfinite(low) and math.isfinite(high)
        largest = max(abs(low), abs(high)) if finite else math.inf
        bad = 0 if finite else tensor.numel() - int(torch.isfinite(tensor).sum())
        finding = _Finding(kind, self._place, name + self.where, tensor.numel(), bad, largest)
        if kind not in self.largest or largest > self.largest[kind].largest:
            self.largest[kind] = finding
        if bad and (self.first is None or finding.order() < self.first.order()):
            self.first = finding


def _look_everywhere(
    search: _Search, learner: Learner, micro_batches: Sequence[M], loss_function: LossFunction[M], dummy: M
) -> None:
    """A collective: the activations come from one more pass, without gradients and without dropout."""
    for i, micro_batch in enumerate(micro_batches):
        for name, tensor in tensors_of(micro_batch).items():
            search.look(_Kind.BATCH, f"{name} of micro-batch {i}", tensor)
    for name, parameter in learner.module.named_parameters():
        shard = getattr(parameter, "ds_tensor", None)
        own = parameter.detach() if shard is None else _without_padding(parameter, shard)
        search.look(_Kind.PARAMETER, f"the parameter {name}", own)
    # Gradients flow backwards: the last parameter's is the first to come. Before the pass, which may let go of them.
    for name, parameter in reversed(list(learner.module.named_parameters())):
        search.look(_Kind.GRADIENT, f"the gradient of {name}", _own_gradient(parameter))
    started = 0

    def run(module: Any, micro_batch: M) -> Tensor:
        nonlocal started
        at, started = started, started + 1
        which = f"micro-batch {at}" if at < len(micro_batches) else "a dummy micro-batch"
        with _watched(search, learner.module, which):
            loss = loss_function(module, micro_batch)
        search.look(_Kind.LOSS, f"the loss of {which}", loss)
        return loss

    search.losses = [float(loss) for loss in learner.infer(run, micro_batches, dummy)]


@contextmanager
def _watched(search: _Search, module: nn.Module, which: str) -> Iterator[None]:
    """Look at what every module inside gives, in the order in which they finish: inner ones first."""

    def hook(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = tensors_of(output)
            for part, tensor in tensors.items():
                what = f"{name}, {part}," if len(tensors) > 1 else name
                search.look(_Kind.ACTIVATION, f"the output of {what} in {which}", tensor)

        return look

    names = {m: name or type(m).__name__ for name, m in module.named_modules()}
    handles = [m.register_forward_hook(hook(name)) for m, name in names.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "tensor", value
    elif isinstance(value, np.ndarray):
        if value.dtype.kind in "biuf":  # else there is no tensor of its kind
            yield name or "array", torch.from_numpy(np.array(value))  # a copy: torch warns of arrays it may not write
    elif isinstance(value, Rollout):
        yield f"{name}.sample_id".lstrip("."), torch.tensor(value.info.sample_id)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk(f"{name}.{key}".lstrip("."), inner)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _walk(f"{name}.{field.name}".lstrip("."), getattr(value, field.name))
    elif isinstance(value, list | tuple):
        if value and all(isinstance(v, Rollout) for v in value):
            yield f"{name}.sample_id".lstrip("."), torch.tensor([r.info.sample_id for r in value])
        else:
            for i, inner in enumerate(value):
                yield from _walk(f"{name}.{i}".lstrip("."), inner)


def _own_gradient(parameter: nn.Parameter) -> Tensor | None:
    """What this rank holds of a reduced gradient; None where that is nothing. No collective at any stage."""
    if parameter.grad is not None or not parameter.requires_grad:  # no ZeRO
        return parameter.grad
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3
        from deepspeed.utils import safe_get_local_grad

        return _without_padding(parameter, safe_get_local_grad(parameter))
    fragment = getattr(parameter, "_hp_mapping", None)  # ZeRO 1 and 2; DeepSpeed's public reader is a collective
    if fragment is None:
        return None
    gradient: Tensor = fragment.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
    return gradient


def _without_padding(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """ZeRO-3 cuts a parameter into equal shards; what the last ones have past its end is uninitialised memory."""
    real: int = parameter.ds_numel - dist.get_rank() * shard.numel()  # type: ignore[attr-defined]
    return shard.detach().flatten()[: max(0, real)]


# ---- what becomes of it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Report:
    """What one rank tells the others: strings and numbers, in one exchange."""

    first: _Finding | None
    largest: _Finding | None
    written: str


def _stopped(
    learner: Learner,
    problem: str,
    broken: bool,
    loss_function: LossFunction[M],
    micro_batches: Sequence[M],
    dummy: M,
) -> TrainingError:
    """Search, write, exchange; the error that every rank then raises.

    Args:
        broken: something is not finite; otherwise all is, and too large.
    """
    search = _Search(learner.rank)
    try:
        _look_everywhere(search, learner, micro_batches, loss_function, dummy)
    except Exception as error:
        # Straight out, without the exchange: the others may be in the middle of the pass, where only the end of this
        # process lets them go.
        cause = f"{type(error).__name__}: {error}"
        return TrainingError(f"{problem}; the search for the first bad tensor failed ({cause})", "see the rank's log")
    written = _write_report(learner, problem, search, micro_batches)
    # Not the loss, which is the problem itself, nor the gradients, which follow from it.
    kinds = (_Kind.BATCH, _Kind.PARAMETER, _Kind.ACTIVATION)
    largest = max((f for k in kinds if (f := search.largest.get(k))), key=lambda f: f.largest, default=None)
    reports = _all_gather(_Report(search.first, largest, written))
    return _error(problem, broken, reports)


def _error(problem: str, broken: bool, reports: Sequence[_Report]) -> TrainingError:
    if broken:
        named = [(r.first.order(), i, r.first) for i, r in enumerate(reports) if r.first is not None]
        _, owner, finding = min(named, default=(None, 0, None))
        what = f"the first bad tensor: {finding.name} ({finding.bad} of {finding.numbers} numbers)" if finding else ""
        cure = CURES[finding.kind] if finding else NOT_FOUND
    else:
        sized = [(-r.largest.largest, i, r.largest) for i, r in enumerate(reports) if r.largest is not None]
        _, owner, finding = min(sized, default=(None, 0, None))
        what = f"the largest: {finding.name} (up to {finding.largest:.3g})" if finding else ""
        cure = EXPLODED
    parts = [problem, what or "no tensor stands out", reports[owner].written, "the weights are those before the step"]
    return TrainingError("; ".join(parts), cure)


def _write_report(learner: Learner, problem: str, search: _Search, micro_batches: Sequence[Any]) -> str:
    """Write this rank's files; a phrase that says where they are, or why not."""
    settings = learner.settings
    description = {
        "problem": problem,
        "role": settings.role,
        "rank": learner.rank,
        "ranks": _ranks(),
        "zero_stage_in_use": learner.zero_stage,
        "optimizer_steps_before": learner.engine.global_steps,
        "first_bad_tensor_of_this_rank": search.first and search.first.record(),
        "largest_of_this_rank": {kind.name.lower(): f.record() for kind, f in search.largest.items()},
        "loss_share_per_micro_batch": search.losses,
        "settings": dataclasses.asdict(settings),
    }
    folder = Path(settings.failed_folder)
    tensors = {f"{i}.{key}": t for i, batch in enumerate(micro_batches) for key, t in tensors_of(batch).items()}
    path, fault = write_tensors(folder, f"{settings.role}-{learner.rank}", tensors, description)
    return f"its batch could not be written to {path} ({fault})" if fault else f"its batch is in {path}"


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


T = TypeVar("T")


def _all_gather(value: T) -> list[T]:
    """Every rank's value, in rank order; small, picklable ones."""
    if _ranks() == 1:
        return [value]
    values: list[Any] = [None] * _ranks()
    dist.all_gather_object(values, value)
    return values
