"""Which epoch is kept: by what number, what is written when, and what the reward model gets to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rayrlhf.data.batching import Cutting
from rayrlhf.data.prompts import LMExample
from rayrlhf.errors import TrainingError
from rayrlhf.stages.selection import BestEpoch, ResponseLimits, greedy_responses, mean_reward, spread_prompts

CPU = torch.device("cpu")
VOCAB, EOS, PAD = 23, 0, 1


class Engine:
    """A learner or a frozen model in one process, as rank `rank` of `world_size` that never talk."""

    device = CPU

    def __init__(self, module: Any = None, rank: int = 0, world_size: int = 1) -> None:
        self.module, self.rank, self.world_size = module, rank, world_size
        self.saved: list[Path] = []

    def infer(self, function: Any, micro_batches: Any, dummy: Any) -> list[Any]:
        with torch.no_grad():
            return [function(self.module, m) for m in micro_batches]

    def save_pretrained(self, lm: Any, folder: Path) -> None:
        self.saved.append(folder)


# ---- the best epoch


def judged(by: str, **numbers: list[float]) -> tuple[BestEpoch, Engine, list[dict[str, Any]]]:
    """After epochs of ten steps whose judges say `numbers`."""
    engine, records = Engine(), []
    judges = {name: iter(values).__next__ for name, values in numbers.items()}
    best = BestEpoch(engine, None, judges, by, Path("model"), records.append)
    epochs = len(next(iter(numbers.values())))
    for epoch in range(epochs):
        best(10 * (epoch + 1), 10 * epochs)
    return best, engine, records


def test_the_lowest_held_out_loss_is_kept_and_each_better_epoch_replaces_the_one_before() -> None:
    best, engine, records = judged("heldout_loss", heldout_loss=[3.0, 2.0, 2.5, 2.0, 2.25])
    assert best.best == {"step": 20, "heldout_loss": 2.0}, "of two equals the earlier"
    assert engine.saved == [Path("model")] * 2, "written after the first epoch and the second"
    assert [r for r in records if "step" in r] == [
        {"step": 10 * i, "steps": 50, "heldout_loss": loss}
        for i, loss in [(1, 3.0), (2, 2.0), (3, 2.5), (4, 2.0), (5, 2.25)]
    ]


def test_the_highest_reward_is_kept_whatever_the_loss_says() -> None:
    best, engine, records = judged("reward", heldout_loss=[1.0, 2.0, 3.0], reward=[-5.0, -1.0, -2.0])
    assert best.best == {"step": 20, "heldout_loss": 2.0, "reward": -1.0}
    assert len(engine.saved) == 2
    assert [r["reward"] for r in records if "step" in r] == [-5.0, -1.0, -2.0]


def test_a_number_that_is_not_finite_stops_the_stage() -> None:
    with pytest.raises(TrainingError, match="heldout_loss after step 20 is nan"):
        judged("heldout_loss", heldout_loss=[3.0, float("nan")])


# ---- the prompts


def demonstrations(*prompts: list[int]) -> list[LMExample]:
    return [LMExample(np.array([*p, 9, 9, EOS], dtype=np.int32), len(p), "") for p in prompts]


def test_prompts_are_distinct_without_their_responses_and_spread_over_all_examples() -> None:
    examples = demonstrations([2, 3], [2, 3], [4], [5], [6], [7], [8, 8])
    assert [p.tolist() for p in spread_prompts(examples, 100)] == [[2, 3], [4], [5], [6], [7], [8, 8]]
    assert [p.tolist() for p in spread_prompts(examples, 3)] == [[2, 3], [5], [7]]
    assert [p.tolist() for p in spread_prompts(examples, 1)] == [[2, 3]]


# ---- the responses


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.5,
            max_position_embeddings=64,
            eos_token_id=EOS,
            bos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def gpt2(seed: int = 10) -> GPT2LMHeadModel:
    """With dropout, which is to be off when it writes."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        resid_pdrop=0.5,
        tie_word_embeddings=False,  # tied ones repeat themselves and never end
        eos_token_id=EOS,
        bos_token_id=EOS,
    )
    return GPT2LMHeadModel(config)


PROMPTS = [np.array(p, dtype=np.int32) for p in ([5], [3, 9, 14, 2, 7, 7], [11, 4], [8, 20, 6], [2, 2, 2, 2], [17])]
LIMITS = ResponseLimits(tokens=12, eos=EOS, pad=PAD)


def argmax_loop(lm: Any, prompt: np.ndarray, limit: int) -> list[int]:
    """One prompt alone, no padding, no cache: all over again for every token."""
    lm.eval()
    tokens = prompt.tolist()
    for _ in range(limit):
        with torch.no_grad():
            tokens.append(int(lm(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == EOS:
            break
    return tokens


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_responses_are_those_of_each_prompt_alone_whatever_shares_its_batch(build: Any, batch_tokens: int) -> None:
    lm = build().train()
    expected = [argmax_loop(build(), prompt, 12) for prompt in PROMPTS]
    lengths = {len(e) - len(p) for e, p in zip(expected, PROMPTS, strict=True)}
    assert 12 in lengths, "some are cut by the limit"
    assert min(lengths) < 12, "some end by themselves"
    got = greedy_responses(lm, PROMPTS, LIMITS, batch_tokens, CPU)
    assert [row.tolist() for row in got] == expected
    assert {row.dtype for row in got} == {np.dtype(np.int32)}


def test_what_the_models_own_file_says_of_generation_is_left_aside_and_left_alone() -> None:
    lm = llama()
    lm.generation_config = own = GenerationConfig(repetition_penalty=5.0, eos_token_id=[0, 7, 11], max_length=3)
    got = greedy_responses(lm, PROMPTS, LIMITS, 4096, CPU)
    assert [row.tolist() for row in got] == [argmax_loop(llama(), prompt, 12) for prompt in PROMPTS]
    assert lm.generation_config is own


def test_the_mean_reward_is_that_of_prompt_and_response_and_the_ranks_shares_add_up_to_it() -> None:
    """Ranks that never talk leave the others' scores at 0, so their means add up to that of all."""

    def scalar(tokens: torch.Tensor, positions: torch.Tensor, position_ids: Any = None) -> torch.Tensor:
        ids = torch.arange(tokens.shape[1]).expand_as(tokens) if position_ids is None else position_ids
        return (tokens * 0.5 + ids).reshape(-1)[positions]

    rows = [argmax_loop(llama(), prompt, 12) for prompt in PROMPTS]
    expected = np.mean([0.5 * row[-1] + len(row) - 1 for row in rows])
    for ranks in (1, 2, 4, 8):
        shares = [
            mean_reward(Engine(None, r, ranks), llama(), Engine(scalar, r, ranks), PROMPTS, LIMITS, Cutting(64))
            for r in range(ranks)
        ]
        assert sum(shares) == pytest.approx(expected, rel=1e-6)
