"""A form for work that is described and not configured (configs/planning/workload.yaml), as a workload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rayrlhf.config.base import NonNegative, Positive, PositiveInt, Section, ZeroStage
from rayrlhf.config.cluster import RoleName
from rayrlhf.config.load import read_yaml, validated
from rayrlhf.config.ppo import WeightsConfig
from rayrlhf.planning.catalogue import shape_named
from rayrlhf.planning.shapes import ModelShape
from rayrlhf.planning.workload import Role, Workload, fitting_transport

__all__ = ["Form", "is_form", "lora_parameters", "read_form", "workload_of_form"]

Model = str | dict[str, Any]


class FormModels(Section):
    """Each a name of rayrlhf/planning/models.yaml, a folder, a hub name, or the keys of a Hugging Face config."""

    policy: Model
    reference: Model | None = None
    """None: as the policy."""
    reward: Model | None = None
    """None: as the policy, with one output."""
    value: Model | None = None
    """None: as the reward model."""


class Lengths(Section):
    mean: Positive
    longest: PositiveInt
    spread: NonNegative = 0.6
    """Standard deviation of the logarithm of lengths; 0: all alike. Prompts are planned by their mean."""

    @model_validator(mode="after")
    def _mean_is_possible(self) -> Lengths:
        if self.mean > self.longest:
            raise ValueError(f"mean {self.mean:g} is over longest {self.longest}")
        return self


class Pretraining(Section):
    blocks: NonNegative = 0.0
    """Of text, per response; 0: no PPO-ptx."""
    tokens: PositiveInt = 2048


class FormWork(Section):
    models: FormModels
    prompts: PositiveInt
    """How many there are ..."""
    passes: Positive = 1.0
    """... and how often each is answered; together with `batch_size` they make the steps."""
    prompt_tokens: Lengths
    response_tokens: Lengths
    batch_size: PositiveInt = 512
    """Responses a step."""
    minibatch_size: PositiveInt = 64
    """Responses an optimizer step."""
    epochs: PositiveInt = 1
    """Passes over a step's responses."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lora_rank: PositiveInt | None = None
    """None: all weights of policy and value model learn."""
    average: bool = False
    """An average of the policy's weights is kept."""
    pretraining: Pretraining = Pretraining()

    @model_validator(mode="after")
    def _minibatches_divide_the_batch(self) -> FormWork:
        if self.batch_size % self.minibatch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of minibatch_size {self.minibatch_size}")
        return self


class RolePlace(Section):
    ranks: PositiveInt = 1
    zero_stage: ZeroStage = 0


class EnginePlace(Section):
    engines: PositiveInt = 1
    tensor_parallel: PositiveInt = 1


class Placement(Section):
    policy: RolePlace
    value: RolePlace
    reference: RolePlace
    reward: RolePlace
    rollout: EnginePlace
    shared: tuple[tuple[RoleName, ...], ...] = ()
    """Roles that take turns on the same GPUs."""
    micro_batch_tokens: PositiveInt = 4096
    activation_checkpointing: bool = True
    offload_optimizer: bool = False
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.9
    max_sequences: PositiveInt = 256

    @model_validator(mode="after")
    def _sets_of_roles_can_share(self) -> Placement:
        ranks = {name: getattr(self, name).ranks for name in ("policy", "value", "reference", "reward")}
        ranks["rollout"] = self.rollout.engines * self.rollout.tensor_parallel
        named = [role for roles in self.shared for role in roles]
        if len(set(named)) < len(named):
            raise ValueError(f"shared: {', '.join(named)}: a role is in one set, once")
        for roles in self.shared:
            if len({ranks[role] for role in roles}) > 1:
                told = ", ".join(f"{role} {ranks[role]}" for role in roles)
                raise ValueError(f"shared: roles on the same devices need equally many ranks ({told})")
        return self


class Form(Section):
    workload: FormWork
    hardware: str = "h100-80g"
    nodes: PositiveInt | None = None
    placement: Placement | None = None
    """None: `rayrlhf plan` looks for one, as with --search."""
    assumptions: dict[str, float] = Field(default_factory=dict)

    def steps(self) -> int:
        return max(1, round(self.workload.prompts * self.workload.passes / self.workload.batch_size))


def is_form(path: Path) -> bool:
    return path.is_file() and "workload" in read_yaml(path)


def read_form(path: Path) -> Form:
    """ConfigError where it is not one."""
    return validated(Form, read_yaml(path), str(path))


# Where a placement is looked for: anything, every number in it is tried.
ANYWHERE = Placement(
    policy=RolePlace(), value=RolePlace(), reference=RolePlace(), reward=RolePlace(), rollout=EnginePlace()
)


def workload_of_form(form: Form) -> Workload:
    """Raises ModelError: a model whose shape cannot be read."""
    work, place = form.workload, form.placement or ANYWHERE
    shapes = _shapes(work.models)
    adapters = {n: None if work.lora_rank is None else lora_parameters(s, work.lora_rank) for n, s in shapes.items()}

    def learner(name: str, at: RolePlace, average: bool = False) -> Role:
        return Role(name, shapes[name], at.ranks, 1.0, True, max(at.zero_stage, 1), adapters[name], average)

    engines = place.rollout
    roles = {
        "policy": learner("policy", place.policy, work.average),
        "reference": Role(
            "reference", shapes["reference"], place.reference.ranks, zero_stage=place.reference.zero_stage
        ),
        "reward": Role("reward", shapes["reward"], place.reward.ranks, zero_stage=place.reward.zero_stage),
        "value": learner("value", place.value),
        "rollout": Role("rollout", shapes["policy"], engines.engines, float(engines.tensor_parallel)),
    }
    return Workload(
        roles=roles,
        dtype=work.dtype,
        gpu=True,
        steps=form.steps(),
        batch_size=work.batch_size,
        minibatch_size=work.minibatch_size,
        epochs=work.epochs,
        prompt_tokens=work.prompt_tokens.mean,
        longest_prompt=work.prompt_tokens.longest,
        response_tokens=work.response_tokens.mean,
        longest_response=work.response_tokens.longest,
        response_spread=work.response_tokens.spread,
        micro_batch_tokens=place.micro_batch_tokens,
        transport=fitting_transport(place.shared),
        bucket_bytes=WeightsConfig().bucket_mib * 2**20,
        shared=place.shared,
        text_blocks=work.pretraining.blocks,
        text_tokens=work.pretraining.tokens if work.pretraining.blocks else 0,
        checkpointing=place.activation_checkpointing,
        offload_optimizer=place.offload_optimizer,
        max_sequences=place.max_sequences,
        gpu_memory_utilization=place.gpu_memory_utilization,
    )


def _shapes(models: FormModels) -> dict[str, ModelShape]:
    policy = shape_named(models.policy, "workload.models.policy")
    reference = shape_named(models.reference, "workload.models.reference") if models.reference else policy
    reward = shape_named(models.reward, "workload.models.reward") if models.reward else policy
    value = shape_named(models.value, "workload.models.value") if models.value else reward
    return {"policy": policy, "reference": reference, "reward": reward.as_scalar(), "value": value.as_scalar()}


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Adapters A [in, r], B [r, out] beside every matrix of every layer (Hu et al. 2021, arXiv 2106.09685)."""
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * (hidden + queries) + 2 * (hidden + keys)
    shared = shape.mlp_width - shape.experts_per_token * shape.expert_width  # of a dense model all of it
    inner = shape.experts * (hidden + shape.expert_width) + (hidden + shared if shared else 0)
    return rank * shape.layers * (attention + (3 if shape.gated else 2) * inner)
