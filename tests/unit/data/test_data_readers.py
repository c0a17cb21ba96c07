import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rayrlhf.data.readers import read_choices, read_demonstrations, read_prompts, read_rankings, read_text
from rayrlhf.errors import DataError
from rayrlhf.types import ChoiceQuestion, Demonstration, Prompt, Ranking

Reader = Callable[..., list]

USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def write(root: Path, *records: dict) -> str:
    (root / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return "a.jsonl"


def refusal(read: Reader, root: Path, record: dict) -> DataError:
    """The error for a bad record on line 2; the place is cut off its message."""
    good = {
        read_text: {"text": "t"},
        read_prompts: {"prompt": "p"},
        read_demonstrations: {"prompt": "p", "response": "r"},
        read_rankings: {"prompt": "p", "chosen": "c", "rejected": "r"},
        read_choices: {"prompt": "p", "choices": ["a", "b"], "answer": 0},
    }[read]
    with pytest.raises(DataError) as caught:
        read([write(root, good, record)], root)
    place = f"{root}/a.jsonl:2: "
    assert caught.value.message.startswith(place)
    assert caught.value.hint
    return DataError(caught.value.message.removeprefix(place), caught.value.hint)


def test_a_demonstration_is_a_prompt_and_a_response(tmp_path):
    name = write(
        tmp_path,
        {"prompt": "p", "response": " r\n", "source": "s", "extra": 1},
        {"prompt": [SYSTEM, USER, ASSISTANT, USER], "response": "r", "source": None},
        {"messages": [USER, ASSISTANT]},
        {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT], "prompt": None},
    )
    assert read_demonstrations([name], tmp_path) == [
        Demonstration((("user", "p"),), " r\n", "s"),
        Demonstration((("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "u")), "r"),
        Demonstration((("user", "u"),), "a"),
        Demonstration((("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "u")), "a"),
    ]


def test_comparisons_and_rankings_are_both_rankings(tmp_path):
    name = write(
        tmp_path,
        {"prompt": "p", "chosen": "c", "rejected": "r", "source": "s"},
        {"prompt": [USER], "responses": ["x", "y", "z"], "ranks": [2, 1, 2]},
    )
    assert read_rankings([name], tmp_path) == [
        Ranking((("user", "p"),), ("c", "r"), (1, 2), "s"),
        Ranking((("user", "u"),), ("x", "y", "z"), (2, 1, 2), ""),
    ]


def test_responses_that_were_cut_are_numbers_of_a_ranking(tmp_path):
    ranking = {"prompt": "p", "responses": ["x", "y", "z"], "ranks": [2, 1, 2]}
    name = write(tmp_path, ranking | {"unfinished": [2, 0, 2]}, ranking | {"unfinished": []}, ranking)
    found = [record.unfinished for record in read_rankings([name], tmp_path)]
    assert found == [frozenset({0, 2}), frozenset(), frozenset()]


def test_a_question_has_choices_and_the_number_of_the_right_one(tmp_path):
    name = write(
        tmp_path,
        {"prompt": "1 + 1 is", "choices": ["2", "3"], "answer": 0, "source": "s", "extra": 1},
        {"prompt": "p", "choices": ["x", "y", "z"], "answer": 2},
    )
    assert read_choices([name], tmp_path) == [
        ChoiceQuestion("1 + 1 is", ("2", "3"), 0, "s"),
        ChoiceQuestion("p", ("x", "y", "z"), 2, ""),
    ]


def test_a_split_keeps_its_own_records_and_those_that_name_none(tmp_path):
    pair = {"chosen": "c", "rejected": "r"}
    name = write(
        tmp_path,
        {"prompt": "1", "split": "train", **pair},
        {"prompt": "2", "split": "test", **pair},
        {"prompt": "3", **pair},
    )
    prompts = {
        split: "".join(record.prompt[0][1] for record in read_rankings([name], tmp_path, split=split))
        for split in (None, "train", "test")
    }
    assert prompts == {None: "123", "train": "13", "test": "23"}


def test_a_split_that_leaves_nothing_names_the_splits_there_are(tmp_path):
    name = write(tmp_path, *({"prompt": "p", "chosen": "c", "rejected": "r", "split": s} for s in ("train", "test")))
    with pytest.raises(DataError, match=r"a\.jsonl: no record with split 'dev'; found 'test', 'train'"):
        read_rankings([name], tmp_path, split="dev")


def test_prompts_keep_their_source_and_drop_the_rest(tmp_path):
    name = write(tmp_path, {"prompt": "p", "source": "s", "response": "r"}, {"prompt": [USER]})
    assert read_prompts([name, name], tmp_path) == [Prompt((("user", "p"),), "s"), Prompt((("user", "u"),))] * 2


def test_no_sources_give_no_records(tmp_path):
    readers = (read_text, read_prompts, read_demonstrations, read_rankings, read_choices)
    assert [read([], tmp_path) for read in readers] == [[]] * 5


@pytest.mark.parametrize(
    ("read", "record", "message"),
    [
        (read_text, {"txt": "t"}, "`text` is missing or null, expected a string; found the fields txt"),
        (read_text, {"text": 1}, "`text` is int, expected a string"),
        (read_text, {"text": "\ud800"}, "`text` has half a surrogate pair at character 0"),
        (read_prompts, {}, "`prompt` is missing or null, expected a string or a list of turns; found the fields none"),
        (
            read_prompts,
            {"prompt": None, "a": 1},
            "`prompt` is missing or null, expected a string or a list of turns; found the fields a",
        ),
        (read_prompts, {"prompt": 3}, "`prompt` is int, expected a string or a list of turns"),
        (read_prompts, {"prompt": " \n"}, "`prompt` is empty"),
        (read_prompts, {"prompt": "ab\udc00"}, "`prompt` has half a surrogate pair at character 2"),
        (read_prompts, {"prompt": []}, "`prompt` has no turns"),
        (read_prompts, {"prompt": ["hi"]}, "`prompt[0]` is not a turn: found str, expected role and content"),
        (
            read_prompts,
            {"prompt": [{"from": "human", "value": "x"}]},
            "`prompt[0]` is not a turn: found fields from, value, expected role and content",
        ),
        (
            read_prompts,
            {"prompt": [USER, {"role": "tool", "content": "x"}]},
            "`prompt[1].role` is 'tool', expected one of system, user, assistant",
        ),
        (
            read_prompts,
            {"prompt": [{"role": ["user"], "content": "x"}]},
            "`prompt[0].role` is ['user'], expected one of system, user, assistant",
        ),
        (
            read_prompts,
            {"prompt": [{"role": "user", "content": None}]},
            "`prompt[0].content` is NoneType, expected a string",
        ),
        (read_prompts, {"prompt": [{"role": "user", "content": " "}]}, "`prompt[0].content` is empty"),
        (
            read_prompts,
            {"prompt": [USER, ASSISTANT]},
            "the prompt in `prompt` ends with a turn of 'assistant', expected a turn of 'user'",
        ),
        (read_prompts, {"prompt": "p", "source": 1}, "`source` is int, expected a string"),
        (
            read_demonstrations,
            {"prompt": "p"},
            "`response` is missing or null, expected a string; found the fields prompt",
        ),
        (read_demonstrations, {"prompt": "p", "response": ["r"]}, "`response` is list, expected a string"),
        (read_demonstrations, {"prompt": "p", "response": "\t"}, "`response` is empty"),
        (read_demonstrations, {"messages": "hi"}, "`messages` is str, expected a list"),
        (read_demonstrations, {"messages": []}, "`messages` has no turns"),
        (read_demonstrations, {"messages": [USER]}, "`messages` ends with a turn of 'user', expected 'assistant'"),
        (
            read_demonstrations,
            {"messages": [ASSISTANT]},
            "the prompt in `messages` ends with nothing, expected a turn of 'user'",
        ),
        (
            read_demonstrations,
            {"messages": [USER, SYSTEM, ASSISTANT]},
            "the prompt in `messages` ends with a turn of 'system', expected a turn of 'user'",
        ),
        (
            read_demonstrations,
            {"messages": [USER, ASSISTANT], "response": "r"},
            "has `messages` and also `prompt` or `response`",
        ),
        (
            read_rankings,
            {"prompt": "p", "chosen": "c"},
            "`rejected` is missing or null, expected a string; found the fields prompt, chosen",
        ),
        (read_rankings, {"prompt": "p", "chosen": " ", "rejected": "r"}, "`chosen` is empty"),
        (
            read_rankings,
            {"prompt": "p", "chosen": "c", "responses": ["a", "b"], "ranks": [1, 2]},
            "is both a comparison and a ranking",
        ),
        (
            read_rankings,
            {"prompt": "p", "responses": ["a", "b"]},
            "`ranks` is missing or null, expected a list; found the fields prompt, responses",
        ),
        (
            read_rankings,
            {"prompt": "p", "ranks": [1, 2]},
            "`responses` is missing or null, expected a list; found the fields prompt, ranks",
        ),
        (read_rankings, {"prompt": "p", "responses": "ab", "ranks": [1, 2]}, "`responses` is str, expected a list"),
        (read_rankings, {"prompt": "p", "responses": ["a", " "], "ranks": [1, 2]}, "`responses[1]` is empty"),
        (
            read_rankings,
            {"prompt": "p", "responses": ["a", 2], "ranks": [1, 2]},
            "`responses[1]` is int, expected a string",
        ),
        (
            read_rankings,
            {"prompt": "p", "responses": ["a"], "ranks": [1]},
            "`responses` has 1 of them, expected 2 or more",
        ),
        (
            read_rankings,
            {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]},
            "`ranks[0]` is 0, expected a positive whole number",
        ),
        (
            read_rankings,
            {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1.5]},
            "`ranks[1]` is 1.5, expected a positive whole number",
        ),
        (
            read_rankings,
            {"prompt": "p", "responses": ["a", "b"], "ranks": [True, 2]},
            "`ranks[0]` is True, expected a positive whole number",
        ),
        (
            read_rankings,
            {"prompt": "p", "chosen": "c", "rejected": "r", "split": 1},
            "`split` is int, expected a string",
        ),
        (
            read_rankings,
            {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "unfinished": [2]},
            "`unfinished` has 2, expected numbers of responses from 0 to 1",
        ),
        (
            read_rankings,
            {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "unfinished": [0, -1]},
            "`unfinished` has -1, expected numbers of responses from 0 to 1",
        ),
        (
            read_rankings,
            {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "unfinished": [True]},
            "`unfinished` has True, expected numbers of responses from 0 to 1",
        ),
        (
            read_rankings,
            {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "unfinished": 1},
            "`unfinished` is int, expected a list",
        ),
        (
            read_choices,
            {"prompt": "p", "choices": ["a", "b"]},
            "`answer` is missing or null, expected a number; found the fields prompt, choices",
        ),
        (
            read_choices,
            {"prompt": "p", "choices": ["a", "b"], "answer": 2},
            "`answer` is 2, expected the number of a choice, 0 to 1",
        ),
        (
            read_choices,
            {"prompt": "p", "choices": ["a", "b"], "answer": -1},
            "`answer` is -1, expected the number of a choice, 0 to 1",
        ),
        (
            read_choices,
            {"prompt": "p", "choices": ["a", "b"], "answer": "a"},
            "`answer` is 'a', expected the number of a choice, 0 to 1",
        ),
        (
            read_choices,
            {"prompt": "p", "choices": ["a", "b"], "answer": True},
            "`answer` is True, expected the number of a choice, 0 to 1",
        ),
        (
            read_choices,
            {"prompt": "p", "choices": ["a"], "answer": 0},
            "`choices` has 1 of them, expected 2 or more",
        ),
        (read_choices, {"prompt": "p", "choices": ["a", " "], "answer": 0}, "`choices[1]` is empty"),
        (read_choices, {"prompt": "p", "choices": ["a", 2], "answer": 0}, "`choices[1]` is int, expected a string"),
        (read_choices, {"prompt": " ", "choices": ["a", "b"], "answer": 0}, "`prompt` is empty"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused(tmp_path, read, record, message):
    assert refusal(read, tmp_path, record).message == message


def test_a_ranking_whose_ranks_do_not_match_its_responses_names_the_line(tmp_path):
    error = refusal(read_rankings, tmp_path, {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2]})
    assert error.message == "3 `responses` but 2 `ranks`"
    assert error.hint == "give one rank per response, 1 for the best; equal ranks are ties"
