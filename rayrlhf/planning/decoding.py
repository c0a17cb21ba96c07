"""Seconds of generation: prompts by arithmetic, tokens by a roofline, sequence by sequence until the longest is done.

An engine runs as many sequences as its key/value cache holds. A step of n of them reads the weights once and every
cached key and value, or is bound by arithmetic when n is large; whoever is done makes room for the next. The tail, when
few long responses are left, comes out of that by itself.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from itertools import islice

from rayrlhf.planning.assumptions import Assumptions
from rayrlhf.planning.hardware import Hardware
from rayrlhf.planning.lengths import response_lengths
from rayrlhf.planning.memory import kv_bytes_per_token
from rayrlhf.planning.shapes import ModelShape
from rayrlhf.planning.workload import Role, Workload

__all__ = ["Decoder", "Generation", "forward_flops", "generate_seconds"]

# More sequences than this are scaled from so many: the plan is to take seconds.
SIMULATED = 2048


@dataclass(frozen=True, slots=True)
class Generation:
    seconds: float
    prefill: float
    """of it, the prompts"""
    tail: float
    """of it, while fewer than half of the engine's places are taken and nothing waits"""
    places: int
    """sequences that run at once"""
    finished: tuple[tuple[float, float], ...] = ()
    """when each response of one engine is done, and its tokens, of those that were simulated"""


def forward_flops(shape: ModelShape, tokens: float, asked: float, attended: float) -> float:
    """Of one pass without gradients.

    Args:
        tokens: that go through the layers.
        asked: of them, those that the head is asked about.
        attended: keys that a token attends to in the mean.
    """
    attention = 4.0 * attended * shape.heads * shape.head_dim * shape.layers
    return tokens * (2.0 * shape.multiplied + attention) + asked * 2.0 * shape.head


@dataclass(frozen=True, slots=True)
class Decoder:
    """One engine's step times."""

    shape: ModelShape
    dtype: str
    dtype_bytes: int
    shards: float
    """GPUs of the engine, or its cores"""
    hardware: Hardware
    assume: Assumptions

    def step(self, sequences: float, cached: float) -> float:
        """Seconds to make one token of each of `sequences`, `cached` tokens being in the cache."""
        shape, assume = self.shape, self.assume
        shards = self.shards if self.hardware.is_gpu else 1.0
        keys = cached * kv_bytes_per_token(shape, self.dtype_bytes, shards)
        nbytes = self._weights(sequences) * self.dtype_bytes + keys
        flops = forward_flops(shape, sequences, sequences, cached / sequences)
        reading = nbytes / (self.hardware.bandwidth * assume["decode_bandwidth"] * self.shards)
        computing = flops / (self.hardware.flops(self.dtype) * assume["decode_flops"] * self.shards)
        fixed = assume["decode_step_ms"] * 1e-3 + sequences * assume["decode_sequence_us"] * 1e-6
        return max(reading, computing) + fixed + self._shards_talk(sequences)

    def prefill(self, tokens: float) -> float:
        """Seconds for one prompt."""
        flops = forward_flops(self.shape, tokens, 1, tokens / 2)
        return flops / (self.hardware.flops(self.dtype) * self.assume["mfu_forward"] * self.shards)

    def _weights(self, sequences: float) -> float:
        """Parameters that a step reads: of a mixture the experts that some sequence chose."""
        shape = self.shape
        always = float(shape.in_layers - shape.in_experts + shape.head)
        if not shape.experts:
            return always
        left_out = math.pow(1 - shape.experts_per_token / shape.experts, sequences)
        return always + shape.in_experts * (1 - left_out)

    def _shards_talk(self, sequences: float) -> float:
        """Two all-reduces a layer, of the hidden states."""
        if self.shards <= 1 or not self.hardware.is_gpu:
            return 0.0
        nbytes = 2 * sequences * self.shape.hidden * self.dtype_bytes
        link = self.hardware.link(round(self.shards))
        each = nbytes / (link.gb_s * 1e9 * self.assume["link_share"]) + self.assume["tensor_parallel_ms"] * 1e-3
        return 2 * self.shape.layers * each


def generate_seconds(role: Role, work: Workload, hardware: Hardware, assume: Assumptions, cache: float) -> Generation:
    """Of one step's responses, dealt evenly to the engines.

    Args:
        cache: bytes of key/value cache of an engine, all its shards together.
    """
    decoder = Decoder(role.shape, work.dtype, work.dtype_bytes, role.devices, hardware, assume)
    mine = max(1, -(-work.batch_size // role.ranks))
    count = min(mine, SIMULATED)
    lengths = response_lengths(count, work.response_tokens, work.longest_response, work.response_spread)
    shards = role.devices if work.gpu else 1.0
    room = int(cache / kv_bytes_per_token(role.shape, work.dtype_bytes, shards) / work.sequence_tokens)
    places = max(1, min(work.max_sequences, room))
    decoding, tail, done = _decode(decoder, lengths, work.prompt_tokens, places)
    prefill = mine * decoder.prefill(work.prompt_tokens)
    # What is left out of the simulation goes through as its middle does: without a second tail.
    all_decoded = decoding + (mine / count - 1) * (decoding - tail)
    finished = tuple((prefill + at * all_decoded / decoding, length) for at, length in done)
    return Generation(all_decoded + prefill, prefill, tail, min(places, mine), finished)


def _decode(
    decoder: Decoder, lengths: list[float], prompt: float, places: int
) -> tuple[float, float, list[tuple[float, float]]]:
    """(Seconds until all are done, of them those with less than half of the places taken, when each is done and its
    tokens)."""
    waiting = iter(lengths)
    running: list[tuple[float, float]] = []
    """(the step at which it is done, the step at which it began)"""
    now = seconds = tail = began = 0.0
    finished: list[tuple[float, float]] = []
    for length in islice(waiting, places):
        heapq.heappush(running, (length, 0.0))
    full = len(running)
    while running:
        done, start = running[0]
        steps, count = done - now, len(running)
        if steps:
            age = count * (now + steps / 2) - began
            took = steps * decoder.step(count, count * prompt + age)
            seconds += took
            tail += took if count < full / 2 else 0.0
        now = done
        finished.append((seconds, done - start))
        heapq.heappop(running)
        began -= start
        for length in islice(waiting, 1):
            heapq.heappush(running, (now + length, now))
            began += now
    return seconds, tail, finished
