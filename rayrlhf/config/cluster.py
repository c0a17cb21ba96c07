"""`cluster`: where Ray is and what each role's ranks get."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rayrlhf.config.base import NonNegative, NonNegativeInt, Positive, PositiveInt, Section

__all__ = ["ClusterConfig", "RankResources", "RecoveryConfig", "RoleName", "RoleResources"]


class RankResources(Section):
    cpus: NonNegative = 0.4
    """Ray's logical CPUs a rank. Below one on a laptop: the roles of a synchronous step take turns."""
    gpus: NonNegative | None = None
    """None: one a rank when `cluster.device` is cuda, else none."""
    threads: PositiveInt = 1
    """Threads of torch's (or the engine's) CPU kernels in a rank."""
    resources: dict[str, Positive] = Field(default_factory=dict)
    """Custom resources of Ray's nodes that each rank asks for: `{fast_disk: 0.01}` keeps a role on nodes that were
    started with `--resources='{"fast_disk": 1}'`."""
    strategy: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """How the ranks lie on the nodes: close together or apart, if possible or (strict) not at all."""


class RoleResources(RankResources):
    ranks: PositiveInt = 1


class RecoveryConfig(Section):
    """What happens when an actor dies, or hangs."""

    max_restarts: NonNegativeInt = 3
    """Restarts of a role (of each engine, of the workers of a supervised stage) within `window_s`; one more failure
    ends the run with a checkpoint. 0: the first one does."""
    window_s: Positive = 3600.0
    backoff_s: NonNegative = 1.0
    """Seconds before the first restart; twice as many before each further one within the window."""
    hang_floor_s: Positive = 60.0
    """A call in PPO hangs when it takes longer than this and longer than ..."""
    hang_factor: Annotated[float, Field(gt=1, allow_inf_nan=False, strict=True)] = 10.0
    """... so many times the longest one of its kind so far. The first of a kind may take `cluster.call_timeout_s`."""
    look_s: Positive = 20.0
    """Deadline for what is asked of a node about a process of its own that hangs or is gone: where it is stuck, to end
    it, to give back what it leaves. A new worker of Ray's has to start for that."""


RoleName = Literal["policy", "reference", "reward", "value", "rollout"]


class ClusterConfig(Section):
    address: str | None = None
    """None starts Ray here, and in a Ray job (`rayrlhf submit`, `ray job submit`) joins the job's cluster; `auto` or
    `host:port` joins a cluster."""
    device: Literal["cpu", "cuda"] = "cpu"
    start_timeout_s: Positive = 300.0
    """Deadline for placing and starting the actors of a run."""
    call_timeout_s: Positive = 1800.0
    """Deadline for each remote call after that. A reward source that reads text has its own limits, if longer."""
    recovery: RecoveryConfig = RecoveryConfig()
    policy: RoleResources = RoleResources()
    reference: RoleResources = RoleResources()
    reward: RoleResources = RoleResources()
    value: RoleResources = RoleResources()
    rollout: RankResources = RankResources(threads=2)
    """Each of `rollout.engines` engines; with tensor parallelism a GPU per shard."""
    shared: tuple[tuple[RoleName, ...], ...] = ()
    """Roles that share devices, set by set: `[[policy, rollout], [reference, reward, value]]`. Rank i of each role of a
    set gets the same GPU and they hold it in turns: engines sleep, models wait on the host. Roles in no set have
    devices of their own."""
    train: RoleResources = RoleResources(cpus=1, threads=2)
    """Workers of pretrain, sft, reward and dpo."""

    @model_validator(mode="after")
    def _gpus_fit_the_device(self) -> ClusterConfig:
        for role in ("policy", "reference", "reward", "value", "rollout", "train"):
            gpus = getattr(self, role).gpus
            if self.device == "cpu" and gpus:
                raise ValueError(f"{role}.gpus is {gpus:g} but cluster.device is cpu")
            if self.device == "cuda" and gpus == 0:
                raise ValueError(f"{role}.gpus is 0 but cluster.device is cuda")
        return self

    @model_validator(mode="after")
    def _sets_of_roles_can_share(self) -> ClusterConfig:
        seen: set[str] = set()
        for roles in self.shared:
            if len(roles) < 2 or seen & set(roles) or len(set(roles)) < len(roles):
                raise ValueError(f"shared: {', '.join(roles)}: a set names two roles or more, and a role is in one set")
            seen |= set(roles)
            for role in roles:
                mine, first = getattr(self, role), getattr(self, roles[0])
                if mine.gpus is not None:
                    raise ValueError(f"{role}.gpus and shared contradict each other: {role} shares a whole GPU")
                if (mine.resources, mine.strategy) != (first.resources, first.strategy):
                    raise ValueError(
                        f"{role} and {roles[0]} share devices: give both the same resources and strategy, they lie "
                        "on the same nodes"
                    )
        return self

    def sharing(self, role: str) -> tuple[RoleName, ...]:
        """The roles on this role's devices, itself among them; none if it has devices of its own."""
        return next((roles for roles in self.shared if role in roles), ())

    def gpus(self, resources: RankResources) -> float:
        """GPUs of one rank with these resources."""
        if resources.gpus is not None:
            return resources.gpus
        return 1.0 if self.device == "cuda" else 0.0
