"""A toy model goes the whole way: vLLM starts, a learner publishes to it, the publish is verified, it samples."""

from __future__ import annotations

import asyncio
from time import perf_counter

import numpy as np

from rayrlhf.config.model import FromScratch
from rayrlhf.errors import RayRLHFError
from rayrlhf.launch.doctor.asking import named
from rayrlhf.launch.doctor.facts import Node, Published, Started
from rayrlhf.launch.pair import PROBED, Pair, PairSettings
from rayrlhf.types import PromptTokens, SampleRequest

__all__ = ["start_and_publish"]

RESPONSES, LENGTH = 4, 8
SHAPE = FromScratch(vocab_size=512, hidden_size=64, layers=2, heads=2, context=64)
PROMPT = PromptTokens(0, np.arange(1, 9, dtype=np.int32))
# Of a GPU for each of the two, which may have one between them.
HALF = 0.5


def start_and_publish(node: Node, device: str) -> tuple[Started, Published | None]:
    """Both on this node; no `Published` where no engine started."""
    return asyncio.run(_start_and_publish(node, device))


async def _start_and_publish(node: Node, device: str) -> tuple[Started, Published | None]:
    pair = Pair(
        PairSettings(
            name="doctor",
            shape=SHAPE,
            device=device,
            max_tokens=LENGTH,
            sequences=RESPONSES,
            bucket_bytes=2**20,
            gpus=HALF if device == "cuda" else 0.0,
            resources={f"node:{node.address}": 0.001},
        ),
        [PROMPT],
    )
    started, published = Started(0.0, device, "it was never asked to"), None
    try:
        await pair.spawn()
        engine, learner = await asyncio.gather(_seconds_to_start(pair), pair.start_policy(), return_exceptions=True)
        if isinstance(engine, BaseException):
            raise engine
        started = Started(engine, device)
        if isinstance(learner, BaseException):
            raise learner
        published = await _publish(pair)
    except Exception as error:  # whatever it is, it is what was found
        problem, cure = _told(error, node, pair.folder)
        if started.problem:
            return Started(0.0, device, problem, cure), None
        return started, Published(problem=problem, cure=cure)
    finally:
        await pair.close(logs=published is not None)
    return started, published


async def _seconds_to_start(pair: Pair) -> float:
    start = perf_counter()
    await pair.start_engines()
    return perf_counter() - start


async def _publish(pair: Pair) -> Published:
    publication = await pair.pool.publish(0)
    sampled = 0
    async for batch in pair.pool.generate([SampleRequest(i, PROMPT.prompt_id, i) for i in range(RESPONSES)]):
        sampled += sum(info.response_tokens for info in batch.infos)
    return Published(publication.seconds, publication.nbytes / 2**20, PROBED, sampled)


def _told(error: BaseException, node: Node, folder: str) -> tuple[str, str]:
    """What happened, and where more of it stands."""
    first = error.message.splitlines()[0] if isinstance(error, RayRLHFError) else named(error)
    cure = f"see the logs in {folder} on {node.name}; `rayrlhf run configs/tiny.yaml` runs the same parts"
    return f"on {node.name}: {first}", cure
