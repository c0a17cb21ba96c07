"""One model in one process group under DeepSpeed: `Learner` trains it, `FrozenModel` only runs it. No Ray.

Both take micro-batches of any type M and a function of (module, M). Ranks may bring different numbers of
micro-batches; the shorter ones run a dummy whose loss counts zero, or a sharded model would wait forever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayrlhf.config.deepspeed import zero_stage_in_use
from rayrlhf.engines.average import WeightAverage
from rayrlhf.engines.distributed import all_reduce_max
from rayrlhf.engines.gradients import GradientParts
from rayrlhf.engines.guards import check_step, local_grad_norm
from rayrlhf.errors import TrainingError
from rayrlhf.models.attention import use_attention
from rayrlhf.models.build import checkpoint_activations
from rayrlhf.models.residence import Part, Residence, tensors_within, weights_of
from rayrlhf.models.sharding import shard
from rayrlhf.weights.buckets import bucket_plan, publish_names

__all__ = ["FrozenModel", "Learner", "LearnerSettings", "LossFunction"]

# So many buckets of a publish grow up to the size that the config says.
FIRST_BUCKETS = 2

M = TypeVar("M")
M_contra = TypeVar("M_contra", contravariant=True)
R = TypeVar("R")


class LossFunction(Protocol[M_contra]):
    def __call__(self, module: Callable[..., Tensor], micro_batch: M_contra, /) -> Tensor:
        """The micro-batch's share of the global loss: already divided by the global denominator."""
        ...


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    zero_stage: int
    """that is asked for; `Learner.zero_stage` is the one in use"""
    dtype: str
    device: str
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip: float
    max_loss: float
    """A global loss beyond this, of either sign, stops the run."""
    failed_folder: str
    """Where the batch goes that stopped it ..."""
    role: str
    """... in files named `<role>-<rank>`."""
    average: float | None = None
    """decay of an average of the weights; None keeps none"""
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """keys of DeepSpeed's config beyond those that a learner sets itself"""
    activation_checkpointing: bool = False


class _Engine:
    """What learner and frozen model share: the device, equal numbers of micro-batches, passes without gradients."""

    def __init__(self, module: nn.Module, device: str, dtype: str) -> None:
        self.module = module
        use_attention(module, device, dtype)
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._call: Callable[..., Tensor] = module
        self._residence = Residence(self.device)

    def occupy(self, part: Part) -> None:
        """Let exactly this part of the model be on the device; what is not needed there waits on the host."""
        self._residence.occupy(part, list(weights_of(self.module)), self._rest())

    def _rest(self) -> Iterator[Tensor]:
        """What an optimizer step needs beyond the weights."""
        return iter(())

    def infer(self, function: Callable[[Callable[..., Tensor], M], R], micro_batches: Sequence[M], dummy: M) -> list[R]:
        """`function(module, m)` for each micro-batch, without gradients."""
        self.module.eval()
        with torch.no_grad():
            results = [function(self._call, m) for m in self._equalised(micro_batches, dummy)]
        return results[: len(micro_batches)]

    def _equalised(self, micro_batches: Sequence[M], dummy: M) -> list[M]:
        longest = int(all_reduce_max(len(micro_batches), self.device))
        return [*micro_batches, *[dummy] * (longest - len(micro_batches))]


class FrozenModel(_Engine):
    """A model that is only run: whole on each rank (stage 0) or sharded over them (stage 3)."""

    def __init__(self, module: nn.Module, zero_stage: int, dtype: str, device: str) -> None:
        super().__init__(module.requires_grad_(False), device, dtype)
        if zero_stage == 3:
            import deepspeed

            shard(module, _base_config(3, dtype), dtype)
            engine, *_ = deepspeed.initialize(model=module, config=_base_config(3, dtype))
            self.module, self._call = engine.module, engine
        else:
            for parameter in module.parameters():
                # Not module.to(dtype): that would round the rotary frequencies too, which DeepSpeed leaves alone in
                # the learner, and the two would drift apart with the position.
                parameter.data = parameter.data.to(getattr(torch, dtype))
            module.to(self.device)


class Learner(_Engine):
    """A model, its optimizer and its gradients under ZeRO."""

    def __init__(self, module: nn.Module, settings: LearnerSettings) -> None:
        super().__init__(module, settings.device, settings.dtype)
        import deepspeed

        self.settings = settings
        if settings.activation_checkpointing:
            checkpoint_activations(module)
        asks_for_zero = bool(settings.deepspeed.get("zero_optimization"))
        self.zero_stage = zero_stage_in_use(settings.zero_stage, settings.dtype, self.world_size, asks_for_zero)
        config = _learner_config(settings, self.zero_stage)
        if self.zero_stage == 3:
            shard(module, config, settings.dtype)
        self.engine, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=config)
        self.module, self._call = self.engine.module, self.engine
        # With no one to reduce with, DeepSpeed would copy the whole gradient twice. Only stage 0 can do without.
        self.engine.enable_backward_allreduce = self.world_size > 1 or self.zero_stage > 0
        # With the optimizer on the host ZeRO 1 and 2 keep sums that are stale after a boundary within a step.
        offloaded = "offload_optimizer" in config["zero_optimization"]
        self._tells_parts_apart = not (offloaded and self.zero_stage in (1, 2))
        self.average = WeightAverage(self.module, settings.average, self.rank) if settings.average else None
        self.before_step: Callable[[], None] | None = None
        """Called once, when the next gradient is whole and before it is clipped; on every rank."""

    def _rest(self) -> Iterator[Tensor]:
        zero = self.engine.optimizer
        torchs = getattr(zero, "optimizer", zero)  # inside ZeRO's, or alone
        average = self.average.tensors if self.average else []
        return tensors_within([vars(zero), vars(torchs), average, list(self.module.parameters())])

    def train_step(
        self,
        loss_function: LossFunction[M],
        micro_batches: Sequence[M],
        dummy: M,
        learning_rate: float,
        rest: Sequence[M] = (),
        measure: bool = False,
    ) -> dict[str, float]:
        """One optimizer step over this rank's micro-batches, then those of `rest`.

        The gradient is that of the sum of all micro-batches' losses over all ranks: `loss_function` divides by the
        global denominator, and the factor `world_size` undoes DeepSpeed's averaging.

        Returns:
            `loss` (this rank's share of it) and `grad_norm` (global, before clipping); with `measure` also
            `first_norm` and `rest_norm`, of the gradients of `micro_batches` and of `rest` alone (not with the
            optimizer offloaded under ZeRO 1 or 2, where they cannot be told apart).

        Raises:
            TrainingError: on every rank, before the step is taken, when the loss or the gradient is NaN or infinite or
                the loss is beyond `max_loss` (see engines/guards.py).
        """
        self.module.train()
        measure = measure and self._tells_parts_apart
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        first, second = self._equalised(micro_batches, dummy), self._equalised(rest, dummy)
        counts = [i < len(micro_batches) for i in range(len(first))] + [i < len(rest) for i in range(len(second))]
        parts = GradientParts(self.module, self.rank, self.zero_stage) if measure else None
        total = 0.0
        for i, (micro_batch, counted) in enumerate(zip([*first, *second], counts, strict=True)):
            ends_part = i == len(counts) - 1 or (measure and i == len(first) - 1)
            self.engine.set_gradient_accumulation_boundary(ends_part)
            loss = loss_function(self._call, micro_batch) * float(counted)
            total += float(loss.detach())
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
            if parts and ends_part:
                parts.read()
        local_norm = float(local_grad_norm(self.module))
        check_step(self, total, local_norm, loss_function, [*micro_batches, *rest], dummy)
        if self.before_step:
            look, self.before_step = self.before_step, None
            look()
        self.engine.step()
        # Without ZeRO in float32 DeepSpeed reports no norm; this rank's is then the whole gradient's.
        norm = float(self.engine.get_global_grad_norm()) if self.zero_stage else local_norm
        if not math.isfinite(norm):  # the same on every rank, so all of them stop
            raise TrainingError(
                "the gradient's norm is too large for a float32, though every rank's share of it is not; this step's "
                "weights are lost",
                "lower the learning rate",
            )
        if self.average:
            self.average.update()
        return {"loss": total, "grad_norm": norm} | (parts.norms(self.device) if parts else {})

    def bucket_names(self, module: nn.Module, bucket_bytes: int) -> list[list[str]]:
        """Which parameters of `module` go together in `named_buckets`."""
        named = publish_names(module)
        last = {id(p): place for place, (_, p) in enumerate(named)}
        named.sort(key=lambda pair: last[id(pair[1])])  # the names of a shared parameter together: it travels once
        again = [p is before for (_, p), (_, before) in zip(named[1:], named, strict=False)]
        sizes = [(n, 0 if known else _nbytes(p)) for (n, p), known in zip(named, [False, *again], strict=True)]
        return bucket_plan(sizes, bucket_bytes, FIRST_BUCKETS)

    def named_buckets(self, module: nn.Module, bucket_bytes: int) -> Generator[list[tuple[str, Tensor]], None, None]:
        """The whole parameters of `module`, bucket by bucket.

        Under ZeRO-3 a bucket is gathered, and let go when the next one is asked for (or the generator closed): a
        collective, and every rank must walk through it in step.
        """
        parameters = dict(publish_names(module))
        for names in self.bucket_names(module, bucket_bytes):
            with self._gathered([parameters[n] for n in names]):
                yield [(n, parameters[n].data) for n in names]

    def save_pretrained(self, module: Any, folder: Path, bucket_bytes: int = 2**28) -> None:
        """Write `module` (a Hugging Face model) as safetensors; rank 0 writes, all ranks take part."""
        state: dict[str, Tensor] = {}
        for bucket in self.named_buckets(module, bucket_bytes):
            if self.rank == 0:
                state.update((name, tensor.detach().to("cpu", copy=True)) for name, tensor in bucket)
        if self.rank == 0:
            for alias in _tied_aliases(module):  # a checkpoint holds a shared tensor once
                del state[alias]
            module.save_pretrained(folder, state_dict=state)
        dist.barrier()

    def _gathered(self, parameters: list[nn.Parameter]) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, enabled=self.zero_stage == 3)


def _base_config(zero_stage: int, dtype: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": zero_stage},
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 2**31,
    }


def _learner_config(settings: LearnerSettings, zero_stage: int) -> dict[str, Any]:
    base = _base_config(zero_stage, settings.dtype)
    return {
        "data_types": {"grad_accum_dtype": "fp32"},
        **settings.deepspeed,
        **base,
        "zero_optimization": {**settings.deepspeed.get("zero_optimization", {}), **base["zero_optimization"]},
        "gradient_clipping": settings.grad_clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                # DeepSpeed's own is compiled on first use, and hangs on a CPU. torch's runs where the weights are, and
                # is fused into one pass over them on a GPU (on a CPU that gains nothing, and rounds otherwise).
                "torch_adam": True,
                **({"fused": True} if settings.device == "cuda" else {}),
                "lr": settings.learning_rate,
                "betas": list(settings.betas),
                "eps": settings.eps,
                "weight_decay": settings.weight_decay,
            },
        },
    }


def _nbytes(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


def _tied_aliases(module: nn.Module) -> list[str]:
    """The second and further names of shared parameters."""
    first = {name for name, _ in module.named_parameters()}
    return [name for name, _ in publish_names(module) if name not in first]
