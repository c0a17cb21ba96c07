"""ZeRO-3 from a file: rank 0 reads it, the others get their parts, and no rank but it ever holds the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rayrlhf.models.build import load_policy, load_scalar
from tests.ranks import run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

VOCABULARY, LARGE_BYTES = 300, 4 * 100_000_000
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64}
MODELS = {
    "llama": LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **SMALL)),
    "llama-tied": LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **SMALL)),
    "gpt2": GPT2LMHeadModel(GPT2Config(**GPT2)),
    "reward": GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=1, pad_token_id=0)),
}
CASES = [(model, learns, dtype) for model in MODELS for learns in (False, True) for dtype in ("float32", "bfloat16")]


def load(path: Path, learns: bool, dtype: str) -> Any:
    from rayrlhf.engines.deepspeed import FrozenModel, Learner, LearnerSettings

    kind = load_scalar if path.name == "reward" else load_policy
    model = kind(str(path), False, zero_stage=3)
    if not learns:
        return FrozenModel(model, 3, dtype, "cpu")
    settings = LearnerSettings(3, dtype, "cpu", 1e-3, (0.9, 0.95), 1e-8, 0.0, 1.0, 1e4, "failed", "test")
    return Learner(model, settings)


def kib(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1])


def work(rank: int, world: int, port: int, folder: str) -> None:
    import deepspeed

    from rayrlhf.engines.distributed import Rendezvous, join_process_group

    join_process_group(Rendezvous(rank, world, "127.0.0.1", port, "cpu", 1, deterministic=True))
    import rayrlhf.engines.deepspeed  # noqa: F401 (what it takes is not the model's)

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = kib("VmRSS")
    large = load(Path(folder) / "large", False, "bfloat16")
    grown = 1024 * (kib("VmHWM") - before)
    del large
    (Path(folder) / f"grown-{rank}").write_text(str(grown))
    for name, learns, dtype in CASES:
        module = load(Path(folder) / name, learns, dtype).module
        found = {}
        for key, parameter in module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                found[key.partition(".")[2]] = parameter.detach().clone()
        buffers = {key.partition(".")[2]: buffer.clone() for key, buffer in module.named_buffers()}
        torch.save((found, buffers), Path(folder) / f"{name}-{learns}-{dtype}-{rank}.pt")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for name, model in MODELS.items():
        model.save_pretrained(folder / name)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=1024,
            num_hidden_layers=8,
            num_attention_heads=8,
            intermediate_size=2752,
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder / "large")
    run_ranks(work, 2, folder, 200.0)
    return folder


@pytest.mark.parametrize(("name", "learns", "dtype"), CASES)
def test_every_rank_sees_the_file_s_weights_and_the_right_buffers(
    loaded: Path, name: str, learns: bool, dtype: str
) -> None:
    wanted = load_file(loaded / name / "model.safetensors")
    kind = load_scalar if name == "reward" else load_policy
    buffers = {key.partition(".")[2]: b for key, b in kind(str(loaded / name), False).named_buffers()}
    for rank in range(2):
        found, its_buffers = torch.load(loaded / f"{name}-{learns}-{dtype}-{rank}.pt", weights_only=True)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key].to(getattr(torch, dtype))) for key in wanted)
        assert its_buffers.keys() == buffers.keys()
        assert all(torch.equal(its_buffers[key], buffers[key]) for key in buffers)


def test_only_the_first_rank_ever_holds_the_whole_model(loaded: Path) -> None:
    size = sum(t.numel() for t in load_file(loaded / "large" / "model.safetensors").values())
    assert 4 * size > 0.95 * LARGE_BYTES
    first, second = (int((loaded / f"grown-{rank}").read_text()) for rank in range(2))
    print(json.dumps({"float32_bytes": 4 * size, "first_rank": first, "second_rank": second}))
    assert first > 4 * size
    # Its own is half of the weights in bfloat16: a quarter of these bytes, twice while DeepSpeed puts it together.
    assert second < 0.75 * 4 * size
