"""Both ways in which an engine takes new weights, and which models take which."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rayrlhf.errors import WeightSyncError
from rayrlhf.weights.probe import probe_rows
from tests.integration.test_verified_publish import ALIVE, BUCKET, CONTEXT, VOCAB, Pair, Policy


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    environment = dict(os.environ)
    made = Pair(tmp_path_factory.mktemp("model"), "llama", tied=True, shards=1)
    ALIVE.append(made)
    yield made
    made.policy.sender.close()
    os.environ.clear()
    os.environ.update(environment)


def receiver(pair: Pair) -> Any:
    executor = pair.engine._llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.weight_transfer_engine


def vllms_way(pair: Pair) -> Any:
    from rayrlhf.models.vllm_layers import LayerwiseReload

    return LayerwiseReload(receiver(pair).model, receiver(pair).model_config)


def test_an_unquantized_model_on_a_cpu_takes_the_short_way(pair: Pair) -> None:
    assert type(receiver(pair)._reload).__name__ == "_PlainReload"


def test_a_layer_that_is_packed_in_a_way_of_its_own_gives_the_model_to_vllm(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from rayrlhf.models.vllm_layers import LayerwiseReload, create_reload

    class Quantized(UnquantizedLinearMethod):
        pass

    model = receiver(pair).model
    monkeypatch.setattr(model.model.layers[1].mlp.down_proj, "quant_method", Quantized())
    assert type(create_reload(model, receiver(pair).model_config)) is LayerwiseReload


def trained_probe(pair: Pair) -> tuple[Any, Any]:
    """The probe's log-probs, of trainer and engine, after a publish of which the sender's memory is used again."""
    pair.policy.train()
    pair.publish()
    for segment in pair.policy.sender._segments:
        segment.buffer.fill_(7)
    rows = probe_rows(VOCAB, 64, CONTEXT)
    return asyncio.run(pair.policy.probe(rows)), pair.engine._probe(rows)


@pytest.fixture
def one_bucket(pair: Pair) -> Iterator[None]:
    pair.policy.bucket_bytes = 2**24
    yield
    pair.policy.bucket_bytes = BUCKET


@pytest.mark.usefixtures("one_bucket")
def test_layers_are_packed_from_the_bucket_itself_and_keep_nothing_of_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayrlhf.models import vllm_layers

    copied: list[tuple[int, ...]] = []
    monkeypatch.setattr(vllm_layers, "materialize_meta_tensor", lambda meta: copied.append(tuple(meta.shape)))
    expected, got = trained_probe(pair)
    assert not copied
    assert got == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("one_bucket")
def test_what_vllm_computes_with_from_now_on_is_a_copy(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs its way to pack is to keep the weights as they are."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    def keeps_it(_: Any, layer: Any) -> None:
        kept = layer.weight.detach()
        layer.cpu_linear = lambda x, _, bias: torch.nn.functional.linear(x, kept, bias)
        layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    for layer in receiver(pair)._reload._layers:
        monkeypatch.setattr(layer, "_in_place", True)  # as it is again after this test
    with monkeypatch.context() as patched:
        patched.setattr(UnquantizedLinearMethod, "process_weights_after_loading", keeps_it)
        expected, got = trained_probe(pair)
    assert got == pytest.approx(expected, abs=1e-4)


def test_a_table_that_is_looked_up_in_is_packed_when_it_is_multiplied_by_and_with_its_newest_weights(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    packed: list[Any] = []
    pack = UnquantizedEmbeddingMethod.process_weights_after_loading
    monkeypatch.setattr(
        UnquantizedEmbeddingMethod,
        "process_weights_after_loading",
        lambda method, layer: (packed.append(type(layer)), pack(method, layer)),
    )
    table, x = receiver(pair).model.model.embed_tokens, torch.eye(64)[:3]
    for _ in range(2):
        pair.policy.train()
        pair.publish()
        weights = pair.policy.model.lm.get_input_embeddings().weight.data
        assert packed == [ParallelLMHead]
        assert torch.equal(table.cpu_linear(x, table.weight, None)[:, :VOCAB], weights[:, :3].T)
        packed.clear()


def test_one_way_takes_over_from_the_other_and_both_are_verified(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    short = receiver(pair)._reload
    for way in (vllms_way(pair), short, vllms_way(pair), short):
        monkeypatch.setattr(receiver(pair), "_reload", way)
        pair.policy.train()
        assert pair.publish().committed == ["rollout-0"]


def test_vllms_own_way_finds_memory_that_was_used_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver(pair), "_reload", vllms_way(pair))
    pair.policy.bucket_bytes = 1  # a tensor each, so that every layer comes in several
    pair.policy.train()
    assert pair.publish().committed == ["rollout-0"]
    pair.plant("reused buffer", [0])
    pair.policy.train()
    with pytest.raises(WeightSyncError, match="largest log-prob difference"):
        pair.publish()
    pair.heal()


def test_after_an_update_that_broke_off_the_model_has_its_own_parameters_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters are the same objects before and after: whoever holds one holds what the engine computes with."""
    before = dict(receiver(pair).model.named_parameters())
    with monkeypatch.context() as patched:
        patched.setattr(Policy, "next_bucket", breaks_off(Policy.next_bucket))
        pair.policy.train()
        with pytest.raises(RuntimeError, match="broke off"):
            pair.publish()
    assert pair.engine.version is None
    pair.publish()
    after = dict(receiver(pair).model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter and not parameter.is_meta for name, parameter in before.items())
    assert torch.equal(
        receiver(pair).model.model.norm.weight, pair.policy.model.lm.get_parameter("model.norm.weight").data
    )


def breaks_off(next_bucket: Any) -> Any:
    async def second_time(policy: Policy) -> Any:
        if policy.index == 1:
            raise RuntimeError("broke off")
        return await next_bucket(policy)

    return second_time
