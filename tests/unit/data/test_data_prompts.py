import numpy as np
import pytest

from rayrlhf.data.chat import encode_prompt, encode_response
from rayrlhf.data.prompts import (
    TokenizeReport,
    pack_text,
    tokenize_choices,
    tokenize_demonstrations,
    tokenize_prompts,
    tokenize_rankings,
)
from rayrlhf.errors import ConfigError, DataError
from rayrlhf.types import ChoiceQuestion, Demonstration, PretrainText, Prompt, Ranking

SHORT = (("user", "red"),)
LONG = (("user", "x1y2z3" * 40),)


def lengths(tokenizer) -> tuple[int, int]:
    return len(encode_prompt(tokenizer, SHORT)), len(encode_prompt(tokenizer, LONG))


def test_prompts_keep_the_index_they_had_before_the_long_ones_were_dropped(tokenizer):
    prompts = [Prompt(LONG), Prompt(SHORT), Prompt(LONG), Prompt(SHORT)]
    kept, report = tokenize_prompts(tokenizer, prompts, 20, "drop")
    assert [prompt.prompt_id for prompt in kept] == [1, 3]
    assert kept[0].tokens.dtype == np.int32
    assert tokenizer.decode(kept[0].tokens) == "<|user|>\nred\n<|assistant|>\n"
    assert report == TokenizeReport(kept=2, dropped=2, truncated=0)


def test_a_prompt_of_just_the_limit_is_kept(tokenizer):
    short, _ = lengths(tokenizer)
    assert tokenize_prompts(tokenizer, [Prompt(SHORT)], short, "refuse")[1] == TokenizeReport(1, 0, 0)
    with pytest.raises(DataError):
        tokenize_prompts(tokenizer, [Prompt(SHORT)], short - 1, "refuse")


def test_refusing_long_prompts_says_how_many_the_longest_and_the_key(tokenizer):
    with pytest.raises(DataError) as caught:
        tokenize_prompts(tokenizer, [Prompt(SHORT), Prompt(LONG)], 20, "refuse")
    longest = lengths(tokenizer)[1]
    assert caught.value.message == f"1 of 2 prompts are longer than 20 tokens; the longest has {longest}"
    assert "data.max_prompt_tokens" in caught.value.hint


def test_dropping_every_prompt_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"1 of 1 prompts are longer .*; nothing is left\n.*data\.max_prompt_tokens"):
        tokenize_prompts(tokenizer, [Prompt(LONG)], 20, "drop")


def test_no_prompts_at_all_are_refused(tokenizer):
    with pytest.raises(DataError, match="there are no prompts"):
        tokenize_prompts(tokenizer, [], 20, "drop")


def test_a_demonstration_is_prompt_then_response_then_eos(tokenizer):
    demos = [Demonstration(LONG, "r"), Demonstration(SHORT, "green", "s")]
    (example,), report = tokenize_demonstrations(tokenizer, demos, 20, 40, "drop")
    assert tokenizer.decode(example.tokens) == "<|user|>\nred\n<|assistant|>\ngreen<|endoftext|>"
    assert example.tokens.dtype == np.int32
    assert example.prompt_tokens == lengths(tokenizer)[0]
    assert example.source == "s"
    assert report == TokenizeReport(kept=1, dropped=1, truncated=0)


def test_a_long_response_is_cut_at_its_end_and_has_no_eos(tokenizer):
    response = "a b c d e f g h i j k l m n o p"
    whole = encode_prompt(tokenizer, SHORT) + encode_response(tokenizer, response)
    (example,), report = tokenize_demonstrations(tokenizer, [Demonstration(SHORT, response)], 20, 22, "drop")
    assert example.tokens.tolist() == whole[:22]
    assert example.tokens[-1] != tokenizer.eos_token_id
    assert report.truncated == 1
    (example,), report = tokenize_demonstrations(tokenizer, [Demonstration(SHORT, response)], 20, len(whole), "drop")
    assert example.tokens.tolist() == whole
    assert report.truncated == 0


def test_a_ranking_keeps_the_responses_that_were_cut(tokenizer):
    ranking = Ranking(SHORT, ("green", "a b c d e f g h i j k l m n", "blue"), (2, 1, 2), "s")
    (example,), report = tokenize_rankings(tokenizer, [ranking], 15, 18, "refuse")
    prompt = encode_prompt(tokenizer, SHORT)
    whole = [prompt + encode_response(tokenizer, text) for text in ranking.responses]
    assert [tokens.tolist() for tokens in example.responses] == [tokens[:18] for tokens in whole]
    assert {tokens.dtype for tokens in example.responses} == {np.dtype(np.int32)}
    assert (example.ranks, example.prompt_tokens, example.source) == ((2, 1, 2), len(prompt), "s")
    assert example.response_chars == (5, 27, 4)
    assert report == TokenizeReport(kept=1, dropped=0, truncated=1)


def test_a_response_that_was_cut_before_its_end_has_no_eos(tokenizer):
    ranking = Ranking(SHORT, ("green", "green", "blue"), (1, 2, 3), "s", frozenset({1, 2}))
    (example,), report = tokenize_rankings(tokenizer, [ranking], 20, 40, "drop")
    texts = [tokenizer.decode(tokens[example.prompt_tokens :]) for tokens in example.responses]
    assert texts == ["green<|endoftext|>", "green", "blue"]
    assert report.truncated == 0  # nothing was cut here


def test_a_question_is_a_row_per_choice_plain_and_without_an_end(tokenizer):
    question = ChoiceQuestion("Name a colour:", ("red", "blue and green"), 1, "s")
    (example,), kept = tokenize_choices(tokenizer, [question], 40)
    assert kept == [question]
    assert [tokenizer.decode(tokens) for tokens in example.responses] == [
        "Name a colour: red",
        "Name a colour: blue and green",
    ]
    assert {tokens.dtype for tokens in example.responses} == {np.dtype(np.int32)}
    prompt = [tokens[: example.prompt_tokens].tolist() for tokens in example.responses]
    assert prompt[0] == prompt[1]
    assert tokenizer.decode(prompt[0]) == "Name a colour:"
    assert (example.source, example.response_chars) == ("s", (3, 14))


def test_questions_longer_than_the_limit_are_left_out_with_their_rows(tokenizer):
    questions = [ChoiceQuestion("red", ("green", "x1y2z3" * 30), 0), ChoiceQuestion("red", ("green", "blue"), 1)]
    examples, kept = tokenize_choices(tokenizer, questions, 40)
    assert kept == questions[1:]
    assert len(examples) == 1
    longest = max(len(tokens) for tokens in examples[0].responses)
    assert tokenize_choices(tokenizer, questions[1:], longest)[1] == questions[1:]
    assert tokenize_choices(tokenizer, questions[1:], longest - 1) == ([], [])
    assert tokenize_choices(tokenizer, [], 40) == ([], [])


def test_rankings_with_long_prompts_are_dropped_or_refused(tokenizer):
    rankings = [Ranking(LONG, ("a", "b"), (1, 2)), Ranking(SHORT, ("a", "b"), (1, 2))]
    assert tokenize_rankings(tokenizer, rankings, 20, 40, "drop")[1] == TokenizeReport(1, 1, 0)
    with pytest.raises(DataError, match="1 of 2 prompts are longer than 20 tokens"):
        tokenize_rankings(tokenizer, rankings, 20, 40, "refuse")


@pytest.mark.parametrize("tokenize", [tokenize_demonstrations, tokenize_rankings])
def test_limits_without_room_for_a_response_are_refused(tokenizer, tokenize):
    with pytest.raises(ConfigError, match="sequences of 20 tokens leave no room"):
        tokenize(tokenizer, [], 20, 20, "drop")


def test_text_is_packed_in_whole_blocks_with_an_eos_after_each_document(tokenizer):
    texts = [PretrainText("red"), PretrainText("green <|endoftext|>")]
    stream = encode_response(tokenizer, "red") + encode_response(tokenizer, "green <|endoftext|>")
    packed = pack_text(tokenizer, texts, context=4)
    assert packed.dtype == np.int32
    assert packed.shape == (len(stream) // 4, 4)
    assert packed.reshape(-1).tolist() == stream[: packed.size]
    assert stream.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize(("texts", "count"), [([], 0), ([PretrainText("\n")], 2)])
def test_less_than_one_block_of_text_is_refused(tokenizer, texts, count):
    with pytest.raises(DataError, match=f"has {count} tokens, less than one block of 64"):
        pack_text(tokenizer, texts, context=64)
