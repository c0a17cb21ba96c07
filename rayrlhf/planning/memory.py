"""Bytes of a rank of each role, by what holds them.

A learner under DeepSpeed 0.19 (P parameters, N ranks, b bytes of the model's dtype, g of the one that gradients add up
in, 4 of float32):

    stage        weights   gradients   float32 weights   Adam     step
    0 (float32)  4P        4P          -                 8P       -
    1            bP        bP          4P/N              8P/N     4P/N   a float32 copy of the own gradient
    2            bP        gP/N        4P/N              8P/N     4P/N
    3            bP/N      gP/N        4P/N              8P/N     4P/N   of at most sub_group_size (10^9) elements

    Rajbhandari et al. 2020 (arXiv 1910.02054), section 3.1, with what DeepSpeed keeps beside: buckets to reduce in, and
    at stage 3 up to stage3_max_live_parameters gathered.

A publish moves buckets of `weights.bucket_mib`, or of one larger tensor (weights/buckets.py):

    transport        policy                               engine
    shared_memory    two in /dev/shm of rank 0's node     read in place; to a GPU tensor by tensor
    nccl             two on rank 0                        one on every GPU
    ipc              two on every rank                    one on every GPU, a copy
    any, ZeRO 3      one more on every rank, gathered
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rayrlhf.planning.assumptions import Assumptions
from rayrlhf.planning.hardware import Hardware
from rayrlhf.planning.shapes import ModelShape
from rayrlhf.planning.workload import Role, Workload

__all__ = [
    "RankMemory",
    "activation_bytes",
    "beyond_engine",
    "kv_bytes_per_token",
    "logits_bytes",
    "rank_memory",
    "set_peak",
]

GIB = 2**30
SUB_GROUP = 1_000_000_000
# Elements that DeepSpeed gathers at once ahead of use (stage3_prefetch_bucket_size); a frozen model has its default.
PREFETCH_BUCKET = 50_000_000
# Entries of a chunk of logits in models/logprobs.py.
CHUNK_ENTRIES = 2**26
# Prompt tokens that an engine computes together, at least (engines/vllm.py).
PREFILL_TOKENS = 4096
# Buckets that a sender writes in turn, and transports that have them on GPUs (weights/transports).
SEGMENTS = 2
ON_DEVICE = ("nccl", "ipc")
# Bytes of freed memory that an engine's process keeps on a CPU (LARGEST_KEPT of models/vllm_layers.py).
KEPT = 2**30


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Of one device of a rank: `weights`, for a forward pass; `rest`, for an optimizer step as well."""

    weights: Mapping[str, float]
    rest: Mapping[str, float] = field(default_factory=dict)
    working: Mapping[str, float] = field(default_factory=dict)
    """only while it works: activations, logits, what a step needs for a moment"""
    publishing: Mapping[str, float] = field(default_factory=dict)
    """only during a publish, when nothing works"""
    framework: float = 0.0
    buckets: float = 0.0
    """that the sender keeps between publishes: on the device whoever has it, as `framework`"""
    host: Mapping[str, float] = field(default_factory=dict)
    """in the host's memory, per rank"""
    loading: float = 0.0
    """in the host's memory while the model is read, per rank that reads it"""
    segments: float = 0.0
    """the sender's buckets in shared memory: on one node, once"""

    @property
    def stays(self) -> float:
        """On the device also while others have it."""
        return self.framework + self.buckets

    @property
    def resident(self) -> float:
        return sum(self.weights.values()) + sum(self.rest.values()) + self.stays

    @property
    def moment(self) -> Mapping[str, float]:
        """What there is beside it when it is fullest."""
        return max(self.working, self.publishing, key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> float:
        return self.resident + sum(self.moment.values())

    def parts(self) -> dict[str, float]:
        buckets = {"sync buckets": self.buckets}
        return {**self.weights, **self.rest, **self.moment, "framework": self.framework, **buckets}


def rank_memory(role: Role, work: Workload, hardware: Hardware, assume: Assumptions) -> RankMemory:
    if role.name == "rollout":
        return _engine(role, work, hardware, assume)
    memory = _learner(role, work, assume) if role.learns else _frozen(role, work, assume)
    return _sending(memory, role, work) if role.name == "policy" else memory


def set_peak(together: Mapping[str, RankMemory]) -> float:
    """The most that a device holds at once on which these roles take turns (actors/sharing.py)."""
    if len(together) == 1:
        return next(iter(together.values())).peak
    moments = [memory.peak - memory.stays for memory in together.values()]
    if {"policy", "rollout"} <= together.keys():  # a publish: weights there, the engine as a whole here
        policy, engine = together["policy"], together["rollout"]
        sends = sum(policy.weights.values()) + sum(policy.publishing.values())
        moments.append(sends + engine.peak - engine.stays)
    return sum(memory.stays for memory in together.values()) + max(moments)


def _sending(memory: RankMemory, role: Role, work: Workload) -> RankMemory:
    """With the buckets of a publish, of the rank that has most."""
    size = work.dtype_bytes
    bucket = _bucket(role.shape, work)
    held = min(SEGMENTS * bucket, float(size * role.shape.parameters))
    gathered = {"gathered bucket": bucket} if role.zero_stage == 3 else {}
    if work.transport in ON_DEVICE:
        return replace(memory, publishing=gathered, buckets=held)
    return replace(memory, publishing=gathered, segments=held)


def _receiving(role: Role, work: Workload) -> dict[str, float]:
    """Of an engine: what comes, whole also where it keeps a shard; and what waits for the rest of a fused layer."""
    shape, size = role.shape, work.dtype_bytes
    largest = float(size * shape.largest_tensor)
    waits = max(largest, size * shape.in_experts / shape.layers)  # of a mixture, all experts of a layer
    if work.gpu:
        bucket = _bucket(shape, work) if work.transport in ON_DEVICE else largest
        return {"bucket": bucket, "waits for its layer": waits}
    # What vLLM loaded and then packed stays with the process, freed (models/vllm_layers.py); tables stay as they came.
    layers = size * (shape.parameters - shape.head * (1 if shape.tied else 2))
    return {"waits for its layer": waits, "freed and kept": float(min(layers, KEPT))}


def _engine_weights(shape: ModelShape, work: Workload) -> float:
    """On a CPU the head is packed: a copy beside the one that the model has, or shares with the table."""
    packed = 0 if work.gpu else shape.head
    return float(work.dtype_bytes * (shape.parameters + packed))


def _bucket(shape: ModelShape, work: Workload) -> float:
    """The largest: a tensor larger than a bucket has one of its own."""
    size = work.dtype_bytes
    return float(min(max(work.bucket_bytes, size * shape.largest_tensor), size * shape.parameters))


def beyond_engine(
    memory: RankMemory, role: Role, work: Workload, hardware: Hardware, assume: Assumptions
) -> tuple[float, float, str]:
    """(Bytes over, room, when) of an engine with GPUs of its own: it starts with its share, and a publish has the rest
    too.
    """
    share = hardware.memory_bytes * min(work.gpu_memory_utilization, role.devices)
    starts = memory.resident + sum(memory.working.values()) - share
    room = max(share, hardware.memory_bytes * min(1.0, role.devices) * (1 - assume["fragmentation"]))
    publishes = memory.resident + sum(memory.publishing.values()) - room
    return max((starts, share, ""), (publishes, room, " in a publish"))


def _learner(role: Role, work: Workload, assume: Assumptions) -> RankMemory:
    parameters, learned, ranks, size = role.shape.parameters, role.learned, role.ranks, work.dtype_bytes
    stage = role.zero_stage
    weights = {"weights": size * parameters / (ranks if stage == 3 else 1)}
    rest, host = dict[str, float](), dict[str, float]()
    share = learned / (ranks if stage else 1)
    if stage < 2 or not work.offload_optimizer:  # else they leave for the host bucket by bucket
        rest["gradients"] = work.gradient_bytes * (learned if stage < 2 else share)
    optimizer = {"float32 weights": 4 * share if stage else 0.0, "optimizer": 8 * share}
    if role.average:
        rest["average"] = 4 * parameters / (ranks if stage == 3 else 1)
    if work.offload_optimizer:
        host |= {**optimizer, "gradients": 4 * share}
    else:
        rest |= optimizer
    working = dict[str, float]()
    if stage == 3:
        working["gathered"] = _gathered(role, work)
        if work.hpz > 1:
            weights["hpZ copy"] = size * parameters / work.hpz
        if work.offload_param:
            host["weights"] = weights.pop("weights")
    framework = assume["framework_gib"] * GIB
    if not work.gpu:
        if stage in (1, 2):
            del rest["gradients"]  # see `_at_work_on_a_cpu`
        working |= _at_work_on_a_cpu(role, work, assume, share)
        framework += assume["engine_gib"] * GIB
        return RankMemory(weights, rest, working, framework=framework, host=host, loading=4.0 * parameters)
    if stage or ranks > 1:
        working["reduce bucket"] = float(size * work.reduce_bucket)
    # An optimizer step comes after the backward pass has let go of its activations.
    passes, copied = _passes(role, work, learns=True), min(share, SUB_GROUP) if stage == 3 else share
    step = 4 * copied if stage and not work.offload_optimizer else 0.0
    working |= {"step": step} if step > sum(passes.values()) else passes
    return RankMemory(weights, rest, working, framework=framework, host=host, loading=4.0 * parameters)


def _gathered(role: Role, work: Workload) -> float:
    """What ZeRO-3 holds of the others' weights at most."""
    return float(work.dtype_bytes * max(min(work.live_parameters, role.shape.parameters), role.shape.largest_layer))


def _at_work_on_a_cpu(role: Role, work: Workload, assume: Assumptions, share: float) -> dict[str, float]:
    """Activations, which the heap does not give back within a step, and the fullest moment after the forward pass.

    Large tensors come from the system and go back to it; only what is touched of a buffer counts. AdamW is not fused,
    and makes two tensors more of what it steps over.
    """
    size, ranks, stage = work.dtype_bytes, role.ranks, role.zero_stage
    passes = _passes(role, work, learns=True)
    bucket, others = size * min(work.reduce_bucket, role.learned), (ranks - 1) / ranks
    scratch = bucket * others  # of gloo's ring
    if stage == 0:
        reducing, stepping = (bucket + scratch) * (ranks > 1), 8.0 * min(role.learned, role.shape.largest_tensor)
    elif stage == 3:  # the bucket is never let go of; beside it what it is scattered from, and gloo's copy of that
        reducing, stepping = 3.0 * bucket, bucket + 4 * min(share, SUB_GROUP) + 8 * share
    else:  # the gradients lie in the bucket, and then in a copy of the own part
        reducing, stepping = bucket + scratch + work.gradient_bytes * share, 4 * share + 8 * share
    moment = max(passes["logits"], reducing, stepping)
    return {"activations": passes["activations"] * assume["retained"], "backward or step": moment}


def _frozen(role: Role, work: Workload, assume: Assumptions) -> RankMemory:
    parameters, size = role.shape.parameters, work.dtype_bytes
    working = _passes(role, work, learns=False)
    if role.zero_stage == 3 and work.gpu:
        working["gathered"] = _gathered(role, work)
    elif role.zero_stage == 3 and role.ranks > 1:
        # Nothing is kept for a backward pass: the bucket in use and the next one, which gloo gathers into lists of
        # its own and from there into one tensor.
        bucket = min(role.shape.parameters, max(PREFETCH_BUCKET, role.shape.largest_tensor))
        working["gathered"] = float(size * min(role.shape.parameters, 2 * bucket))
        working["copies of gloo"] = float(2 * size * bucket)
    weights = {"weights": role.copies * size * parameters / (role.ranks if role.zero_stage == 3 else 1)}
    framework = (assume["framework_gib"] + assume["scorer_gib"]) * GIB
    return RankMemory(weights, {}, working, framework=framework, loading=4.0 * parameters)


def _engine(role: Role, work: Workload, hardware: Hardware, assume: Assumptions) -> RankMemory:
    """vLLM takes its share of a GPU whole: the key/value cache gets what weights and a prefill leave of it."""
    size, shards = work.dtype_bytes, max(1.0, role.devices) if work.gpu else 1.0
    weights = _engine_weights(role.shape, work) / shards
    prefill = _forward_bytes(role.shape, max(PREFILL_TOKENS, work.longest), size) / shards
    framework = (assume["engine_imports_gib"] + assume["engine_runtime_gib"]) * GIB
    if work.gpu:
        # Of the whole GPU, also where Ray has promised it a part of one.
        cache = max(0.0, work.gpu_memory_utilization * hardware.memory_bytes - weights - prefill - framework)
    else:
        cache = work.kv_cache_gib * GIB
    parts = {"weights": weights, "key/value cache": cache}
    return RankMemory(parts, {}, {"prefill": prefill}, _receiving(role, work), framework)


def kv_bytes_per_token(shape: ModelShape, dtype_bytes: int, shards: float = 1.0) -> float:
    """Of all `shards` of an engine together: more shards than heads of keys hold copies of them."""
    copies = max(1.0, shards / shape.kv_heads)
    return shape.kv_entries * dtype_bytes * copies


def _passes(role: Role, work: Workload, learns: bool) -> dict[str, float]:
    """Activations and logits of one micro-batch."""
    trains, reads_text = role.name == "train", role.name == "policy" and work.text_tokens > 0
    if trains:
        tokens = float(max(work.train_micro_batch_tokens, work.train_longest, work.longest))
    else:
        tokens = _fullest(
            work.micro_batch_tokens, work.longest, work.minibatch_size if learns else work.batch_size, role
        )
        if reads_text:
            blocks = max(1, round(work.text_blocks * work.minibatch_size))
            tokens = max(tokens, _fullest(work.micro_batch_tokens, work.text_tokens, blocks, role))
    size = work.dtype_bytes
    # What is asked for: the response's tokens, or all of a text's.
    asked = tokens if trains or reads_text else tokens * work.longest_response / work.longest
    if learns:
        # Packed rows under sdpa have a mask; flash attention, on a GPU, needs none.
        mask = 0 if work.gpu else work.longest
        activations = activation_bytes(role.shape, tokens, size, work.checkpointing, mask)
    else:
        activations = _forward_bytes(role.shape, tokens, size)
    logits = 0.0 if role.shape.scalar else logits_bytes(asked, role.shape.vocab, size, learns)
    return {"activations": activations, "logits": logits}


def _fullest(budget: int, longest: int, sequences: int, role: Role) -> float:
    """Tokens of a rank's largest micro-batch: as many sequences as the budget holds, and as there are."""
    return float(max(longest, min(budget, -(-sequences // role.ranks) * longest)))


def activation_bytes(shape: ModelShape, tokens: float, dtype_bytes: int, checkpointing: bool, mask: int = 0) -> float:
    """What autograd keeps of a forward pass for the backward pass, without dropout, attention by sdpa or flash.

    Counted as Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) do, tensor by tensor, for the modules of
    transformers: no s x s scores are kept, there are no dropout masks, and RMSNorm keeps float32 copies.

    Args:
        mask: keys in a row of the mask that sdpa is given; 0 for none.
    """
    layer = tokens * _entries_per_token(shape, dtype_bytes, mask) * dtype_bytes
    if checkpointing:
        return shape.layers * tokens * shape.hidden * dtype_bytes + layer
    return shape.layers * layer


def _entries_per_token(shape: ModelShape, dtype_bytes: int, mask: int) -> float:
    """Entries (of the model's dtype) that one layer keeps of a token."""
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # RMSNorm: its input and the normalised in float32 (in half precision also cast back), and the product.
    # LayerNorm: its input, and what comes out.
    norm = hidden * (3 if dtype_bytes == 4 else 2 + 2) if shape.rms_norm else 2 * hidden
    # q, k, v and what attention gives. Under a mask keys and values are repeated for every query head, and each layer
    # keeps the mask in its own dtype.
    attention = 2 * queries + 2 * (queries if mask else keys) + mask
    inner = shape.mlp_width * (4 if shape.gated else 5)  # gate, its activation, up, product; or GELU written out
    return float(2 * norm + attention + inner)


def _forward_bytes(shape: ModelShape, tokens: float, dtype_bytes: int) -> float:
    """The most that a forward pass without gradients holds: the residual stream and one block's tensors."""
    block = max(3 * shape.mlp_width, 5 * shape.heads * shape.head_dim) if shape.gated else 3 * shape.mlp_width
    return tokens * (2 * shape.hidden + block) * dtype_bytes


def logits_bytes(positions: float, vocab: int, dtype_bytes: int, learns: bool) -> float:
    """Of `positions` rows of logits, as models/logprobs.py takes them: in chunks where they are many.

    One chunk: in the backward pass the log-softmax, its gradient and that of the logits, each in float32. Several: all
    logits and their gradient in the model's dtype, and that of one chunk.
    """
    entries = positions * vocab
    chunk = min(entries, CHUNK_ENTRIES)
    if not learns:
        return entries * dtype_bytes + chunk * 8
    if entries <= CHUNK_ENTRIES:
        return entries * 12 + (entries * dtype_bytes if dtype_bytes == 2 else 0)
    return 2 * entries * dtype_bytes + chunk * 12
