import pytest

from rayrlhf.data.split import split_by_prompt
from rayrlhf.errors import ConfigError
from rayrlhf.types import Prompt


def records(n: int) -> list[Prompt]:
    """n records on n/2 prompts, each prompt twice and far apart."""
    return [Prompt((("user", f"prompt {i % (n // 2)}"),), str(i)) for i in range(n)]


def sources(found: list[Prompt]) -> list[int]:
    return [int(record.source) for record in found]


def test_records_with_one_prompt_land_on_one_side_and_keep_their_order():
    train, held_out = split_by_prompt(records(2000), 0.2, seed=1)
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert sorted(sources(train) + sources(held_out)) == list(range(2000))
    assert sources(train) == sorted(sources(train))
    assert sources(held_out) == sorted(sources(held_out))
    assert 300 < len(held_out) < 500


def test_a_split_is_the_same_in_every_process_and_release():
    _, held_out = split_by_prompt(records(40), 0.2, seed=0)
    assert sources(held_out) == [6, 8, 10, 26, 28, 30]


def test_another_seed_gives_another_split():
    assert split_by_prompt(records(200), 0.3, 0) != split_by_prompt(records(200), 0.3, 1)


def test_a_prompt_keeps_its_side_when_records_are_added():
    _, few = split_by_prompt(records(200)[:60], 0.3, 5)
    _, many = split_by_prompt(records(200), 0.3, 5)
    assert {r.prompt for r in few} <= {r.prompt for r in many}


@pytest.mark.parametrize("seed", range(20))
def test_neither_side_is_empty_given_two_prompts(seed):
    two = records(4)
    assert [len(side) for side in split_by_prompt(two, 1e-9, seed)] == [2, 2]
    assert [len(side) for side in split_by_prompt(two, 1 - 1e-9, seed)] == [2, 2]


def test_a_fraction_of_zero_holds_out_nothing():
    assert split_by_prompt(records(4), 0.0, 0) == (records(4), [])


def test_the_order_of_turns_and_roles_tells_prompts_apart():
    pair = [Prompt((("user", "a"),)), Prompt((("system", "a"), ("user", "a")))]
    assert [len(side) for side in split_by_prompt(pair, 0.5, 0)] == [1, 1]


def test_no_records_split_into_nothing():
    assert split_by_prompt([], 0.5, 0) == ([], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ConfigError, match="expected 0 <= fraction < 1"):
        split_by_prompt(records(4), fraction, 0)


def test_a_pair_that_a_longer_ranking_of_its_prompt_holds_is_left_out() -> None:
    from rayrlhf.data.split import drop_implied
    from rayrlhf.types import Ranking

    one, two = (("user", "one"),), (("user", "two"),)
    ranking = Ranking(one, ("a", "b", "c"), (1, 2, 2))
    said = Ranking(one, ("a", "c"), (1, 2))
    reversed_ = Ranking(one, ("c", "a"), (2, 1))
    contradicting = Ranking(one, ("b", "a"), (1, 2))
    tie_broken = Ranking(one, ("b", "c"), (1, 2))
    unknown = Ranking(one, ("a", "d"), (1, 2))
    elsewhere = Ranking(two, ("a", "c"), (1, 2))
    records = [said, ranking, reversed_, contradicting, tie_broken, unknown, elsewhere]
    assert drop_implied(records) == [ranking, contradicting, tie_broken, unknown, elsewhere]
