"""A publish into a real vLLM engine: what must arrive arrives, and each planted fault is found.

The engine runs in this process (it is a library here), or with tensor parallelism in one process a shard; the sender
is the learner's own code path: publish names, buckets, shared memory, fingerprints, probe. A receiver's faults are
planted where it runs, through the engine's own calls to its workers, on one shard at a time too.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayrlhf.config.model import FromScratch
from rayrlhf.errors import WeightSyncError
from rayrlhf.models.build import PolicyModel, from_scratch
from rayrlhf.types import PromptTokens, Rollout, SampleRequest
from rayrlhf.weights.buckets import BucketHeader, bucket_plan, fingerprint, pack, publish_names
from rayrlhf.weights.probe import ProbeRow, probe_rows
from rayrlhf.weights.publish import EngineReceipt, Publication, SentBucket, WeightPublisher
from rayrlhf.weights.transports import create_sender

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

VOCAB, CONTEXT, EOS, BUCKET = 600, 192, 0, 100_000
# A CPU engine caches blocks of 128 tokens.
LONG = 4


class Policy:
    """One trainer rank; `drop` leaves parameters out, `corrupt` spoils a bucket after its fingerprint was taken."""

    def __init__(self, model: PolicyModel) -> None:
        self.model = model
        self.sender = create_sender("shared_memory", "test")
        self.drop: set[str] = set()
        self.corrupt: str | None = None
        self.bucket_bytes = BUCKET

    def train(self) -> None:
        """Every weight moves, as after an optimizer step."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)

    async def start_publish(self, version: int) -> SentBucket:
        self.version, self.index = version, 0
        self.parameters = {n: p.data for n, p in publish_names(self.model.lm) if n not in self.drop}
        self.plan = bucket_plan([(n, t.nbytes) for n, t in self.parameters.items()], self.bucket_bytes)
        return await self.next_bucket()

    async def next_bucket(self) -> SentBucket:
        names, index = self.plan[self.index], self.index
        header, buffer = pack([(n, self.parameters[n]) for n in names], self.version, index, self.sender.reserve)
        digest = fingerprint(header, buffer)
        self.index += 1
        if self.corrupt == "flipped bit" and index == 1:
            buffer[7] ^= 1
        if self.corrupt == "previous version" and index == 1:
            header = BucketHeader(header.version - 1, header.index, header.specs)
        ticket = self.sender.send(header)
        if self.corrupt == "dropped bucket" and index == 1:
            ticket = {**ticket, "dropped": True}
        return SentBucket(ticket, digest, header.nbytes, self.index == len(self.plan))

    async def probe(self, rows: list[ProbeRow]) -> list[float]:
        tokens = torch.tensor([row.context for row in rows])
        ends = torch.arange(1, len(rows) + 1) * tokens.shape[1]
        with torch.no_grad():
            return self.model(tokens, ends, targets=torch.tensor([row.targets for row in rows])).flatten().tolist()


class Target:
    """The engine behind the publisher's protocol."""

    name = "rollout-0"

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    async def begin_update(self, version: int) -> None:
        self.engine.begin_update(version)

    async def load_bucket(self, ticket: dict[str, Any]) -> None:
        if not ticket.get("dropped"):
            self.engine.load_bucket(ticket)

    async def verify(self, ticket: dict[str, Any], rows: list[ProbeRow]) -> EngineReceipt:
        await self.load_bucket(ticket)
        return self.engine.verify(rows)

    async def commit(self, version: int) -> None:
        self.engine.commit(version)


class Pair:
    def __init__(self, folder: Path, architecture: str, tied: bool, shards: int) -> None:
        from rayrlhf.engines.vllm import EngineSettings, RolloutEngine

        spec = FromScratch(
            architecture=architecture,
            vocab_size=VOCAB,
            hidden_size=64,
            layers=2,
            heads=2,
            context=CONTEXT,
            tie_embeddings=tied,
        )
        self.policy = Policy(from_scratch(spec, VOCAB, EOS, 1, seed=0))
        self.policy.model.lm.save_pretrained(folder)
        settings = EngineSettings(
            model=str(folder),
            dtype="float32",
            device="cpu",
            context=CONTEXT,
            max_tokens=12,
            temperature=0.7,
            tensor_parallel=shards,
            threads=1,
            kv_cache_gib=1,
            gpu_memory_utilization=0.5,
            max_sequences=256,
            transport="shared_memory",
            run="test",
            eos=EOS,
            trust_remote_code=False,
            deterministic=False,
        )
        prompts = [PromptTokens(i, np.arange(5 + i, 30 + i, dtype=np.int32)) for i in range(4)]
        prompts.append(PromptTokens(LONG, np.arange(5, 145, dtype=np.int32)))
        self.engine = RolloutEngine(settings, prompts)
        self.publisher = WeightPublisher(probe_rows(VOCAB, 64, CONTEXT), "float32", None)
        self.shards = shards
        self.version = 0
        self.publish()

    def publish(self) -> Publication:
        self.version += 1
        return asyncio.run(self.publisher.publish(self.version, self.policy, [Target(self.engine)]))

    def plant(self, fault: str, shards: Sequence[int]) -> None:
        self.engine._llm.collective_rpc(plant, args=(fault, list(shards)))

    def heal(self) -> None:
        """Nothing is planted any more, and the engine serves what the policy is."""
        self.policy.drop, self.policy.corrupt, self.policy.bucket_bytes = set(), None, BUCKET
        self.engine._llm.collective_rpc(heal)
        self.publish()
        assert self.engine.version == self.version

    def every_choice_of_shards(self) -> list[tuple[int, ...]]:
        return [c for n in range(1, self.shards + 1) for c in combinations(range(self.shards), n)]


# ---- in the engine's workers -----------------------------------------------------------------------------------------


def plant(worker: Any, fault: str, shards: list[int]) -> None:
    """From here on something goes wrong between the receiver of these shards and their model."""
    engine = worker.weight_transfer_engine
    if engine.parallel_config.rank not in shards:
        return
    receiver, model = engine._receiver, engine.model
    receive, receive_weights, load_weights = receiver.receive, engine.receive_weights, model.load_weights
    keep = engine._keep_what_waits
    first: dict[str, torch.Tensor] = {}
    reused = torch.empty(BUCKET * 4, dtype=torch.uint8)

    def with_a_flipped_bit(ticket: dict[str, Any]) -> torch.Tensor:
        got = receive(ticket).clone()
        if ticket["header"]["index"] == 1:
            got[4] ^= 1  # the last bit of the second number: no log-prob of the probe shows it
        return got

    def of_the_first_version(ticket: dict[str, Any]) -> torch.Tensor:
        got = receive(ticket)
        return first.setdefault("bucket", got.clone()) if ticket["header"]["index"] == 1 else got

    def into_the_same_memory(ticket: dict[str, Any]) -> torch.Tensor:
        got = receive(ticket)
        reused[: got.numel()].copy_(got)
        return reused[: got.numel()]

    def changed_while_it_is_loaded(buffer: torch.Tensor) -> None:
        keep(buffer)
        buffer[:64] += 1

    def without_one_bucket(update: Any) -> None:
        if update.ticket["header"]["index"] != 1:
            receive_weights(update)

    def with_the_first_head(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights((n, first.setdefault(n, t.clone()) if n == "lm_head.weight" else t) for n, t in weights)

    if fault == "dropped bucket":
        engine.receive_weights = without_one_bucket
    elif fault == "stale head":
        model.load_weights = with_the_first_head
    elif fault == "changed buffer":
        receiver.receive = lambda ticket: receive(ticket).clone()  # the sender's own cannot be written to from here
        engine._keep_what_waits = changed_while_it_is_loaded
    else:
        if fault == "reused buffer":
            engine._keep_what_waits = lambda buffer: None
        receiver.receive = {
            "flipped bit": with_a_flipped_bit,
            "previous version": of_the_first_version,
            "reused buffer": into_the_same_memory,
        }[fault]


def heal(worker: Any) -> None:
    engine = worker.weight_transfer_engine
    vars(engine._receiver).pop("receive", None)
    vars(engine).pop("receive_weights", None)
    vars(engine).pop("_keep_what_waits", None)
    vars(engine.model).pop("load_weights", None)


# ---- the tests -------------------------------------------------------------------------------------------------------


# An engine that is collected takes vLLM's process-wide parallel state with it, under the next one's feet.
ALIVE: list[Pair] = []
CASES = {
    "llama_tied": ("llama", True, 1),
    "llama_untied": ("llama", False, 1),
    "gpt2_tied": ("gpt2", True, 1),
    "llama_tied_two_shards": ("llama", True, 2),
    "llama_untied_two_shards": ("llama", False, 2),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    architecture, tied, shards = request.param
    environment = dict(os.environ)
    made = Pair(tmp_path_factory.mktemp("model"), architecture, tied, shards)
    ALIVE.append(made)
    yield made
    made.policy.sender.close()
    if shards > 1:
        made.engine.close()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def healthy(pair: Pair) -> Iterator[Pair]:
    """Before and after each test the engine serves what the policy is."""
    yield pair
    pair.heal()


def requests() -> list[SampleRequest]:
    return [SampleRequest(i, i, seed=100 + i) for i in range(4)]


def sampled(engine: Any, asked: list[SampleRequest]) -> list[Rollout]:
    """The responses in the order of their numbers; engines hand them over as they are finished."""
    got = [rollout for part in engine.generate(asked, at_once=3) for rollout in part]
    return sorted(got, key=lambda rollout: rollout.info.sample_id)


def test_samples_after_a_publish_have_the_new_policys_log_probs_and_version(healthy: Pair) -> None:
    # Fills the prefix cache with the old weights' keys and values.
    sampled(healthy.engine, [*requests(), SampleRequest(LONG, LONG, seed=1)])
    healthy.policy.train()
    assert healthy.publish().buckets >= 3
    for rollout in sampled(healthy.engine, [*requests(), SampleRequest(LONG, LONG, seed=1)]):
        tokens = torch.from_numpy(rollout.tokens).long()[None]
        with torch.no_grad():
            logits = healthy.policy.model.lm(input_ids=tokens).logits[0].double() / 0.7
        logprobs = torch.log_softmax(logits, -1)[rollout.prompt_tokens - 1 : -1]
        expected = logprobs.gather(1, tokens[0, rollout.prompt_tokens :, None])[:, 0]
        assert np.abs(expected.numpy() - rollout.logprobs).max() < 1e-5
        assert set(rollout.versions.tolist()) == {healthy.version}


def test_the_engine_looks_for_safetensors_and_for_no_other_weights(healthy: Pair, tmp_path: Path) -> None:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    torch.save({}, tmp_path / "pytorch_model.bin")
    loader = DefaultModelLoader(healthy.engine._llm.llm_engine.vllm_config.load_config)
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        loader._prepare_weights(str(tmp_path), None, None, True, None)


def test_the_same_seed_draws_the_same_tokens(healthy: Pair) -> None:
    first, second = sampled(healthy.engine, requests()), sampled(healthy.engine, requests())
    assert [r.tokens.tolist() for r in first] == [r.tokens.tolist() for r in second]


def test_more_prompt_tokens_than_one_pass_takes_are_sampled_all_the_same(healthy: Pair) -> None:
    many = [SampleRequest(i, i % 4, seed=i) for i in range(256)]
    assert sum(25 for _ in many) > 4096
    rollouts = sampled(healthy.engine, many)
    assert [r.info.sample_id for r in rollouts] == list(range(256))
    assert all(r.info.response_tokens == len(r.logprobs) >= 1 for r in rollouts)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("flipped bit", "bucket 1 of .* arrived altered"),
        ("previous version", "a bucket of version"),
        ("dropped bucket", "no weights came for|buckets were sent"),
    ],
)
def test_a_spoiled_publish_is_found_and_the_engine_serves_nothing(healthy: Pair, fault: str, words: str) -> None:
    healthy.policy.train()
    healthy.policy.corrupt = fault
    with pytest.raises(WeightSyncError, match=words):
        healthy.publish()
    assert healthy.engine.version is None
    with pytest.raises(WeightSyncError, match="no verified weights"):
        sampled(healthy.engine, requests())


def test_only_the_version_that_was_verified_last_can_be_committed_and_twice_is_once(healthy: Pair) -> None:
    """The driver names it with each request to sample."""
    healthy.engine.commit(healthy.version)
    assert healthy.engine.version == healthy.version
    for other in (healthy.version - 1, healthy.version + 1):
        with pytest.raises(WeightSyncError, match=f"asked to commit version {other}"):
            healthy.engine.commit(other)


def test_a_head_that_stayed_old_is_found(healthy: Pair) -> None:
    """Tied or not, the head is sent under its own name; left out, fingerprints agree, and after a small step (here
    none) the probe's log-probs too: the layer itself knows what did not come."""
    healthy.policy.drop = {"lm_head.weight"}
    with pytest.raises(WeightSyncError, match=r"no weights came for lm_head\.weight"):
        healthy.publish()
    assert healthy.engine.version is None


def test_a_prefix_cache_that_was_not_reset_is_found(healthy: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healthy.engine._llm, "reset_prefix_cache", lambda: True)
    sampled(healthy.engine, [SampleRequest(0, LONG, seed=1)])  # its keys and values stay cached
    healthy.policy.train()
    with pytest.raises(WeightSyncError, match="prefix cache still holds keys and values of the old weights"):
        healthy.publish()
    assert healthy.engine.version is None


# What says so. A head that stayed old, and a layer's part in a buffer that is used again before the layer is complete,
# are beyond the fingerprint: only log-probs can tell.
FOUND = {
    "flipped bit": r"bucket 1 of \d+ arrived altered",
    "changed buffer": r"bucket 0 of \d+ arrived altered",
    "previous version": r"bucket 1 of \d+ arrived altered",
    "dropped bucket": "no weights came for",
    "stale head": "largest log-prob difference",
    "reused buffer": "largest log-prob difference",
}


@pytest.mark.parametrize("fault", FOUND)
def test_a_fault_of_the_receiver_is_found_on_whichever_shard_it_is(healthy: Pair, fault: str) -> None:
    for shards in healthy.every_choice_of_shards():
        if fault == "reused buffer":
            healthy.policy.bucket_bytes = 1  # a tensor each, so that every layer comes in several
        healthy.plant(fault, shards)
        if fault in ("stale head", "previous version"):
            healthy.publish()  # the version that stays
        healthy.policy.train()
        with pytest.raises(WeightSyncError, match=FOUND[fault]):
            healthy.publish()
        assert healthy.engine.version is None, shards
        healthy.heal()


def test_a_publish_that_broke_off_at_any_bucket_leaves_nothing_in_the_next(
    healthy: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM counts what has come of a layer; a count that survived would end the layer before its new weights are in."""
    healthy.policy.bucket_bytes = 1  # a tensor each, so that most breaks are within a layer
    buckets = healthy.publish().buckets
    assert buckets > 15
    for broken in range(buckets):

        async def breaks_off(target: Target, ticket: dict[str, Any], at: int = broken) -> None:
            if ticket["header"]["index"] == at:
                raise WeightSyncError("broke off")
            target.engine.load_bucket(ticket)

        healthy.policy.train()
        with monkeypatch.context() as patched:
            patched.setattr(Target, "load_bucket", breaks_off)
            with pytest.raises(WeightSyncError, match="broke off"):
                healthy.publish()
        healthy.policy.train()
        assert healthy.publish().committed == ["rollout-0"]
