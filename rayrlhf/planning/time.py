"""Seconds of a PPO step, phase by phase, as driver/loop.py has them.

generate   engines (decoding.py)
score      a forward pass of every role over all tokens
estimate   rewards and advantages: next to nothing
update     forward and backward passes over all tokens, minibatch by minibatch, with what ZeRO sends between ranks
publish    the policy's weights to the engines
move       what roles on shared devices leave to the host and fetch again
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rayrlhf.planning.assumptions import Assumptions
from rayrlhf.planning.decoding import Generation, forward_flops, generate_seconds
from rayrlhf.planning.hardware import Hardware
from rayrlhf.planning.lengths import response_lengths
from rayrlhf.planning.memory import RankMemory
from rayrlhf.planning.workload import Role, Workload

__all__ = ["PHASES", "RoleClock", "StepTime", "step_time"]

PHASES = ("generate", "score", "estimate", "update", "publish", "move")
# What a step of Adam reads and writes of a parameter, in float32: gradient, weight and two moments; all but the first
# go back.
ADAM_BYTES = 28
# Of a batch, as actors/pool.py hands it over.
PARTS = 8


@dataclass(frozen=True, slots=True)
class StepTime:
    phases: Mapping[str, float]
    by_role: Mapping[str, Mapping[str, float]]
    """seconds of each role in a phase, if it were alone"""
    generation: Generation
    seconds: float
    """of the step: the phases' sum, or less where they overlap"""


class RoleClock:
    """The arithmetic of one workload on one kind of hardware."""

    def __init__(self, work: Workload, hardware: Hardware, assume: Assumptions) -> None:
        self.work, self.hardware, self.assume = work, hardware, assume

    def together(self, seconds: Mapping[str, float]) -> float:
        """Roles that work at once: in turns on shared devices; on a CPU never faster than its cores."""
        work = self.work
        if work.gpu:
            return max((sum(seconds.get(r, 0.0) for r in roles) for roles in work.device_sets()), default=0.0)
        busy = sum(s * work.roles[r].ranks * work.roles[r].devices for r, s in seconds.items())
        return max([busy / self.hardware.per_node, *seconds.values()], default=0.0) / self.assume["cpu_share"]

    def score(self, role: Role, part: float = 1.0) -> float:
        """Of so much of a batch, which takes a pass at the least."""
        work, assume = self.work, self.assume
        tokens = part * work.batch_size * work.sequence_tokens / role.ranks
        asked = part * work.batch_size * work.response_tokens / role.ranks
        computing = forward_flops(role.shape, tokens, asked, self._attended()) / self._rate(role, "mfu_forward")
        passes = self._passes(tokens)
        gathering = self._gather(role) * passes if role.zero_stage == 3 else 0.0
        fixed = passes * assume["micro_batch_ms"] + assume["call_ms"]
        return role.copies * (max(computing, gathering) + fixed * 1e-3)

    def scored_early(self, score: Mapping[str, float], generate: float) -> float:
        """Seconds of scoring that are over when the last response comes: a tenth of it never is, nor anything of roles
        that wait for the engines' devices."""
        if any(role in self.work.sharing("rollout") for role in score):
            return 0.0
        return min(0.9 * self.together(score), self.assume["scored_early"] * generate)

    def scored_beside(self, roles: Iterable[Role], generation: Generation, generate: float) -> tuple[float, float]:
        """On a CPU: seconds of scoring that are over when the last response comes, and those that are left.

        Whoever scores takes the engines' cores meanwhile, each thread as much as any other, and sampling takes as much
        longer. A part is scored once all of it is there, in passes of its own; the last one, of the longest responses,
        has most tokens.
        """
        roles, cores, engines = list(roles), self.hardware.per_node, self.work.roles["rollout"]
        drawing = engines.ranks * engines.devices
        scoring = sum(role.ranks * role.devices for role in roles)
        busy = max(1.0, (drawing + scoring) / cores)
        draw_rate, score_rate = max(1.0, drawing / cores) / busy, max(1.0, scoring / cores) / busy
        at_once, finished = -(-len(generation.finished) // PARTS), generation.finished
        whole = sum(self.work.prompt_tokens + tokens for _, tokens in finished)
        drawn = waiting = early = 0.0
        for part in (finished[i : i + at_once] for i in range(0, len(finished), at_once)):
            at = part[-1][0] * generate / generation.seconds
            # Until it is there somebody scores beside, as long as there is something to score.
            done = min(waiting, (at - drawn) / draw_rate * score_rate)
            tokens = sum(self.work.prompt_tokens + tokens for _, tokens in part)
            waiting += self.together({role.name: self.score(role, tokens / whole) for role in roles}) - done
            drawn, early = at, early + done
        return early, waiting

    def update(self, role: Role) -> float:
        """All minibatches of a step."""
        minibatches = self.work.batch_size // self.work.minibatch_size * self.work.epochs
        return minibatches * self._minibatch(role) + self.assume["call_ms"] * 1e-3

    def _minibatch(self, role: Role) -> float:
        tokens, asked = self._of_slowest_rank(role)
        passes = self._passes(tokens)
        layers = forward_flops(role.shape, tokens, 0, self._attended())
        head = forward_flops(role.shape, 0, asked, 0)
        # Backward: a gradient of the inputs and one of the weights (LoRA: of few weights), each as much as forward.
        factor = 2.0 + role.learned / role.shape.parameters
        flops = (factor + self.work.checkpointing) * layers + factor * head
        computing = flops / self._rate(role, "mfu_train") + 2 * passes * self.assume["micro_batch_ms"] * 1e-3
        talking = self._talk(role, passes)
        hidden = self.assume["overlap"] * talking
        return max(computing + talking - hidden, talking) + self._step(role)

    def _of_slowest_rank(self, role: Role) -> tuple[float, float]:
        """(Tokens, positions asked about) of a minibatch on the rank that has most: all others wait for it."""
        work = self.work
        lengths = response_lengths(
            work.minibatch_size, work.response_tokens, work.longest_response, work.response_spread
        )
        share = work.minibatch_size * work.sequence_tokens / role.ranks
        tokens = max(share, work.prompt_tokens + max(lengths))
        asked = tokens * work.response_tokens / work.sequence_tokens
        if role.name == "policy":
            text = max(1.0, work.text_blocks * work.minibatch_size / role.ranks) * work.text_tokens
            return tokens + text, asked + text
        return tokens, asked

    def _attended(self) -> float:
        """Keys that a token's query meets: under sdpa's mask whole rows, in flash attention half of a sequence."""
        work = self.work
        return work.sequence_tokens / 2 if work.gpu else float(work.longest)

    def _passes(self, tokens: float) -> int:
        """Micro-batches of a rank."""
        return max(1, -int(-tokens // max(self.work.micro_batch_tokens, self.work.sequence_tokens)))

    def _rate(self, role: Role, share: str) -> float:
        devices = 1.0 if self.work.gpu else role.devices
        return self.hardware.flops(self.work.dtype) * self.assume[share] * devices

    def _bandwidth(self, ranks: int) -> float:
        """At which a collective of so many ranks moves a buffer: a node has a port for each device, or one."""
        here = self.hardware
        within = here.within.gb_s * 1e9
        if ranks > here.per_node and self.work.gpu:
            within = min(within, here.between.gb_s * 1e9 * (1 if here.between.of_node else here.per_node))
        return within * self.assume["link_share"]

    def _gather(self, role: Role, ranks: int | None = None) -> float:
        """Seconds to gather all weights of a sharded model once, layer by layer."""
        ranks = ranks or role.ranks
        nbytes = self.work.dtype_bytes * role.shape.parameters * (ranks - 1) / ranks
        latency = role.shape.layers * self.hardware.link(ranks).latency_us * 1e-6
        seconds = nbytes / self._bandwidth(ranks) + latency
        if self.work.offload_param and role.learns:
            share = self.work.dtype_bytes * role.shape.parameters / ranks
            seconds += share / (self.hardware.host.gb_s * 1e9 * self.assume["link_share"])
        return seconds

    def _talk(self, role: Role, passes: int) -> float:
        """What ZeRO sends between ranks in a minibatch (Rajbhandari et al. 2020, section 7)."""
        if role.ranks == 1 and role.zero_stage < 3:
            return 0.0
        once = (role.ranks - 1) / role.ranks * self.work.dtype_bytes / self._bandwidth(role.ranks)
        gradients, weights = once * role.learned, once * role.learned
        if role.zero_stage == 0:
            return 2 * gradients
        if role.zero_stage == 1:
            return gradients + weights
        if role.zero_stage == 2:
            return gradients * passes + weights
        again = self._gather(role, self.work.hpz) if self.work.hpz > 1 else self._gather(role)
        return (self._gather(role) + again + gradients) * passes

    def _step(self, role: Role) -> float:
        """The optimizer's step."""
        learned = role.learned / (role.ranks if role.zero_stage else 1)
        average = 12 * role.shape.parameters / (role.ranks if role.zero_stage == 3 else 1) if role.average else 0.0
        devices = 1.0 if self.work.gpu else role.devices
        here = average / (self.hardware.bandwidth * devices * self.assume["optimizer_bandwidth"])
        if not self.work.offload_optimizer:
            nbytes = (ADAM_BYTES + self.work.dtype_bytes) * learned
            return here + nbytes / (self.hardware.bandwidth * devices * self.assume["optimizer_bandwidth"])
        neighbours = min(role.ranks, self.hardware.per_node)
        there = (4 + self.work.dtype_bytes) * learned / (self.hardware.host.gb_s * 1e9 * self.assume["link_share"])
        return here + there + ADAM_BYTES * learned * neighbours / (self.assume["host_adam_gb_s"] * 1e9)

    def publish(self) -> float:
        """Gather, send, load and check; engines get it at once."""
        policy, rollout = self.work.roles["policy"], self.work.roles["rollout"]
        nbytes = float(self.work.dtype_bytes * policy.shape.parameters)
        link = self.hardware.between
        if (
            "rollout" in self.work.sharing("policy")
            or not self.work.gpu
            or self.work.devices() <= self.hardware.per_node
        ):
            link = self.hardware.within
        sending = nbytes / (link.gb_s * 1e9 * self.assume["link_share"]) if self.work.gpu else 0.0
        engines = 1 if self.work.gpu else rollout.ranks
        return self.assume["publish_fixed_s"] + sending + engines * nbytes / (self.assume["publish_gb_s"] * 1e9)

    def move(self, memory: Mapping[str, RankMemory]) -> float:
        """Everything of a role that shares its device leaves and comes back once a step, over the host's link."""
        if not self.work.gpu:
            return 0.0
        sets = [roles for roles in self.work.device_sets() if len(roles) > 1]
        return max((self.moved({name: memory[name] for name in roles}) for roles in sets), default=0.0)

    def moved(self, memory: Mapping[str, RankMemory]) -> float:
        """Of roles that have a device in turns."""
        speed = self.hardware.host.gb_s * 1e9 * self.assume["link_share"]
        return 2 * self.assume["moved"] * sum(_moves(name, held) for name, held in memory.items()) / speed


def _moves(role: str, memory: RankMemory) -> float:
    if role == "rollout":  # its cache is dropped, not kept
        return memory.weights["weights"]
    return sum(memory.weights.values()) + sum(memory.rest.values())


def step_time(work: Workload, hardware: Hardware, assume: Assumptions, memory: Mapping[str, RankMemory]) -> StepTime:
    clock, roles = RoleClock(work, hardware, assume), work.roles
    rollout = roles["rollout"]
    cache = memory["rollout"].weights["key/value cache"] * (max(1.0, rollout.devices) if work.gpu else 1.0)
    generation = generate_seconds(rollout, work, hardware, assume, cache)
    frozen = [r for r in ("reference", "reward") if r in roles]
    learning = [r for r in ("policy", "value") if r in roles and (r != "policy" or work.recomputes_old)]
    score = {name: clock.score(roles[name]) for name in [*frozen, *learning]}
    update = {name: clock.update(roles[name]) for name in ("policy", "value") if name in roles}
    generate = generation.seconds
    if not work.gpu:  # engines on few cores
        generate *= max(1.0, rollout.ranks * rollout.devices / hardware.per_node) / assume["cpu_share"]
    # Learners that are busy with another batch score this one when it comes to them.
    scored = _of(score, frozen) if work.overlap else score
    if work.gpu:
        early = clock.scored_early(scored, generate)
        left = clock.together(scored) - early
    else:
        early, left = clock.scored_beside((roles[name] for name in scored), generation, generate)
    phases = {
        # On a CPU whoever scores meanwhile takes the engines' cores.
        "generate": generate + (0.0 if work.gpu else early) + assume["call_ms"] * 1e-3,
        "score": left + clock.together(score) - clock.together(scored),
        "estimate": work.batch_size / roles["policy"].ranks * assume["estimate_us"] * 1e-6 + assume["call_ms"] * 1e-3,
        "update": clock.together(update),
        "publish": clock.publish(),
        "move": clock.move(memory),
    }
    by_role = {"generate": {"rollout": generate}, "score": score, "update": update}
    seconds = sum(phases.values())
    if work.overlap:
        drawn = phases["generate"] + left
        learned = clock.together(_of(score, learning)) + phases["estimate"] + phases["update"]
        # Whoever draws and whoever learns may share devices, which have to do it all.
        busy = clock.together({role: score.get(role, 0.0) + update.get(role, 0.0) for role in score | update})
        seconds = max(drawn, learned, busy) + phases["publish"] + phases["move"]
    return StepTime(phases, by_role, generation, seconds)


def _of(seconds: Mapping[str, float], roles: Iterable[str]) -> dict[str, float]:
    return {role: seconds[role] for role in roles if role in seconds}
