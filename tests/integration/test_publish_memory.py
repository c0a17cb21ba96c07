"""What a publish under ZeRO-3 costs its sender in memory: a few buckets, however large the model.

Two ranks, each the policy's own actor without Ray around it, publish to nobody. Counted are the parameters that are
whole at one time, and what the kernel says of the process: its resident peak, set back before the publish.
"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.model import FromScratch
from rayrlhf.data.batching import Cutting
from rayrlhf.models.build import from_scratch
from tests.learners import learner_settings
from tests.ranks import run_ranks

pytestmark = pytest.mark.integration

PATIENCE_S = 200.0
M_MMAP_THRESHOLD = -3  # glibc's number, malloc.h
MIB = 2**20
BUCKET = 8 * MIB
SPEC = FromScratch(vocab_size=4096, hidden_size=512, layers=8, heads=8, context=64)
# Bytes in float32: an embedding of 4096 x 512, tied to the head; 8 layers with 4 x 512 x 512 of attention,
# 3 x 512 x 1376 of MLP and two norms of 512; a last norm.
MODEL = 4 * (2_097_152 + 8 * (1_048_576 + 2_113_536 + 1_024) + 512)
# Two buckets are between sender and engines. Of the one being gathered DeepSpeed holds a second copy, what came of all
# ranks, while it cuts that up. No parameter is larger than a bucket. The slack is allocators' and the process group's.
BOUND = 2 * BUCKET + 2 * BUCKET + 8 * MIB


def work(rank: int, world: int, port: int, folder: str) -> None:
    import deepspeed

    from rayrlhf.actors.models import ModelSettings, PolicyActor
    from rayrlhf.engines.deepspeed import Learner
    from rayrlhf.engines.distributed import Rendezvous, join_process_group
    from rayrlhf.weights.transports import create_sender

    # Blocks of this size and more go back to the kernel when they are freed: resident is then what is alive, without
    # the holes that glibc keeps between blocks of different sizes.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    join_process_group(Rendezvous(rank, world, "127.0.0.1", port, "cpu", 1, deterministic=True))
    gc.freeze()  # ZeRO-3 collects garbage when it starts: without this, most of the time goes there
    learner = learner_settings(
        3,
        role="policy",
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},  # else small ones stay whole
    )
    settings = {"path": "", "dtype": "float32", "device": "cpu", "trust_remote_code": False, "cutting": Cutting(64)}
    settings |= {"zero_stage": 3, "temperature": 1.0, "learner": learner, "transport": "shared_memory"}
    actor = PolicyActor(f"{folder}/{rank}.log", ModelSettings(**settings, bucket_bytes=BUCKET))
    actor.engine = Learner(from_scratch(SPEC, 4096, 0, 1, seed=0), learner)
    found = {}
    for name, bucket_bytes in (("buckets", BUCKET), ("at_once", 2**30)):
        actor.settings = ModelSettings(**settings, bucket_bytes=bucket_bytes)
        actor._sender = create_sender("shared_memory", f"memory-{name}") if rank == 0 else None
        found[name] = publish(actor)
        actor.close()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    deepspeed.comm.barrier()
    gc.unfreeze()
    deepspeed.comm.destroy_process_group()  # else its threads may outlive the interpreter, which then aborts


def publish(actor: Any) -> dict[str, int]:
    """How many buckets, the most bytes of parameters that were whole at one time, and by how much the process grew."""
    gathered: list[int] = []
    named_buckets = type(actor.engine).named_buckets

    def counted(*asked: Any) -> Iterator[Any]:
        for bucket in named_buckets(actor.engine, *asked):
            gathered.append(whole_bytes(actor))
            yield bucket

    actor.engine.named_buckets = counted
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = resident("VmRSS")
    actor.start_publish(1, elsewhere=False)
    while actor._sent <= actor._last:
        actor.next_bucket()
    return {"buckets": len(gathered), "gathered": max(gathered), "grew": resident("VmHWM") - before}


def whole_bytes(actor: Any) -> int:
    return sum(p.numel() * p.element_size() for p in actor.engine.module.parameters())


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("memory")
    run_ranks(work, 2, folder, PATIENCE_S)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_publishes_gathers_a_bucket_at_a_time_and_grows_by_a_few_however_large_the_model(
    rank: int, found: list[dict[str, Any]]
) -> None:
    got = found[rank]["buckets"]
    assert got["buckets"] > MODEL / BUCKET > 13
    assert 0.5 * BUCKET < got["gathered"] <= BUCKET
    assert got["grew"] < BOUND < MODEL / 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_gathers_all_at_once_is_over_that_bound(rank: int, found: list[dict[str, Any]]) -> None:
    """The same publish with a bucket as large as the model: what was measured above is seen when it is there."""
    got = found[rank]["at_once"]
    assert got["buckets"] == 1
    assert got["gathered"] == MODEL
    assert got["grew"] > 2 * BOUND
