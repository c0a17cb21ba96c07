"""A toy model goes the whole way: vLLM starts, a learner publishes to it, the publish is verified, it samples.

All of it is the product's own: the actors of a run, its publisher, its pool of engines.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from uuid import uuid4

import numpy as np

from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.models import ModelSettings, PolicyActor
from rayrlhf.actors.placement import RolePlacement
from rayrlhf.actors.pool import EnginePool
from rayrlhf.actors.rollout import RolloutActor
from rayrlhf.config.model import FromScratch
from rayrlhf.data.batching import Cutting
from rayrlhf.engines.deepspeed import LearnerSettings
from rayrlhf.engines.vllm import EngineSettings
from rayrlhf.errors import RayRLHFError
from rayrlhf.launch.doctor.asking import named
from rayrlhf.launch.doctor.facts import Node, Published, Started
from rayrlhf.models.build import from_scratch
from rayrlhf.types import PromptTokens, SampleRequest
from rayrlhf.weights.probe import probe_rows
from rayrlhf.weights.publish import Publication, WeightPublisher

__all__ = ["start_and_publish"]

START_S, CALL_S = 240.0, 60.0
VOCABULARY, CONTEXT, EOS, PROBED, RESPONSES, LENGTH = 512, 64, 0, 64, 4, 8
SHAPE = FromScratch(vocab_size=VOCABULARY, hidden_size=64, layers=2, heads=2, context=CONTEXT)
PROMPT = PromptTokens(0, np.arange(1, 9, dtype=np.int32))
# Of a GPU for each of the two, which may have one between them.
HALF = 0.5


class ToyPolicy(PolicyActor):
    _tokenizer = "none: nothing is decoded here"

    def build(self) -> None:
        """Write the model where the engine will find it."""
        from_scratch(SHAPE, VOCABULARY, EOS, 1, seed=0).lm.save_pretrained(self.settings.path)

    def clear(self, logs: bool) -> None:
        model = Path(self.settings.path)
        shutil.rmtree(model.parent if logs else model, ignore_errors=True)


def start_and_publish(node: Node, device: str) -> tuple[Started, Published | None]:
    """Both on this node; no `Published` where no engine started."""
    return asyncio.run(_start_and_publish(node, device))


async def _start_and_publish(node: Node, device: str) -> tuple[Started, Published | None]:
    folder = f"{tempfile.gettempdir()}/rayrlhf-doctor-{uuid4().hex[:8]}"
    dtype = "bfloat16" if device == "cuda" else "float32"
    gpus = HALF if device == "cuda" else 0.0
    there = {f"node:{node.address}": 0.001}
    policy = ActorGroup(RolePlacement("policy", 1, 0, gpus, 1, there), CALL_S)
    rollout = ActorGroup(RolePlacement("rollout", 1, 0, gpus, 1, there), CALL_S)
    started, published = Started(0.0, device, "it was never asked to"), None
    try:
        await policy.spawn(ToyPolicy, [(f"{folder}/policy.log", _policy(folder, dtype, device))], START_S)
        await rollout.spawn(RolloutActor, [(f"{folder}/rollout.log", _engine(folder, dtype, device))], START_S)
        await policy.call("build", timeout_s=START_S)
        engine, learner = await asyncio.gather(
            _start_engine(rollout), _start_policy(policy, device), return_exceptions=True
        )
        if isinstance(engine, BaseException):
            raise engine
        started = Started(engine, device)
        if isinstance(learner, BaseException):
            raise learner
        published = await _publish(policy, rollout, dtype)
    except Exception as error:  # whatever it is, it is what was found
        problem, cure = _told(error, node, folder)
        if started.problem:
            return Started(0.0, device, problem, cure), None
        return started, Published(problem=problem, cure=cure)
    finally:
        await _close(policy, rollout, logs=published is not None)
    return started, published


async def _start_engine(rollout: ActorGroup) -> float:
    start = perf_counter()
    await rollout.call("start", [PROMPT], timeout_s=START_S)
    return perf_counter() - start


async def _start_policy(policy: ActorGroup, device: str) -> None:
    meeting = await policy.rendezvous(device, False, START_S)
    await policy.call("start", each=[(rank,) for rank in meeting], timeout_s=START_S)


async def _publish(policy: ActorGroup, rollout: ActorGroup, dtype: str) -> Published:
    publisher = WeightPublisher(probe_rows(VOCABULARY, PROBED, CONTEXT), dtype, None)
    pool = EnginePool(rollout, policy, publisher, [PROMPT])
    publication: Publication = await pool.publish(0)
    sampled = 0
    async for batch in pool.generate([SampleRequest(i, PROMPT.prompt_id, i) for i in range(RESPONSES)]):
        sampled += sum(info.response_tokens for info in batch.infos)
    return Published(publication.seconds, publication.nbytes / 2**20, PROBED, sampled)


async def _close(policy: ActorGroup, rollout: ActorGroup, logs: bool) -> None:
    with suppress(Exception):  # whatever failed has been told
        await asyncio.gather(policy.call("close"), rollout.call("close"), return_exceptions=True)
        await policy.call("clear", logs)
    for group in (policy, rollout):
        with suppress(Exception):
            group.close()


def _told(error: BaseException, node: Node, folder: str) -> tuple[str, str]:
    """What happened, and where more of it stands."""
    first = error.message.splitlines()[0] if isinstance(error, RayRLHFError) else named(error)
    cure = f"see the logs in {folder} on {node.name}; `rayrlhf run configs/tiny.yaml` runs the same parts"
    return f"on {node.name}: {first}", cure


def _policy(folder: str, dtype: str, device: str) -> ModelSettings:
    learner = LearnerSettings(1, dtype, device, 1e-4, (0.9, 0.95), 1e-5, 0.0, 1.0, 1e3, folder, "policy")
    return ModelSettings(
        path=f"{folder}/model",
        dtype=dtype,
        device=device,
        trust_remote_code=False,
        cutting=Cutting(4096),
        zero_stage=1,
        temperature=1.0,
        learner=learner,
        transport="shared_memory",
        bucket_bytes=2**20,
        run="doctor",
    )


def _engine(folder: str, dtype: str, device: str) -> EngineSettings:
    return EngineSettings(
        model=f"{folder}/model",
        dtype=dtype,
        device=device,
        context=CONTEXT,
        max_tokens=LENGTH,
        temperature=1.0,
        tensor_parallel=1,
        threads=1,
        kv_cache_gib=1,
        gpu_memory_utilization=0.3,
        max_sequences=RESPONSES,
        transport="shared_memory",
        run="doctor",
        eos=EOS,
        trust_remote_code=False,
        deterministic=False,
    )
