"""How fast a step was, and what of it its longest responses took."""

import pytest

from rayrlhf.metrics.throughput import throughput
from rayrlhf.types import RolloutInfo


def finished(*seconds: float) -> list[RolloutInfo]:
    return [RolloutInfo(i, i, 10, 4, False, 0, seconds=s) for i, s in enumerate(seconds)]


def tail(infos: list[RolloutInfo], waited: float, step: float) -> float:
    times = {"time/update_s": 1.0, "time/generate_s": waited, "time/step_s": step}
    return throughput(infos, 100.0, times)["rollout/tail_share"]


def test_the_tail_is_what_a_step_waited_for_its_longest_2_percent():
    assert tail(finished(*range(100, 0, -1)), 100.0, 200.0) == (100 - 98) / 200


@pytest.mark.parametrize("responses", [2, 8, 49, 50, 99])
def test_a_small_batch_waits_for_its_longest_response(responses: int):
    assert tail(finished(*[1.0] * (responses - 1), 100.0), 100.0, 100.0) == 0.99


def test_the_only_response_of_a_step_is_its_tail():
    assert tail(finished(3.0), 3.0, 4.0) == 0.75


def test_a_step_whose_responses_were_drawn_beside_the_last_one_waited_for_no_tail():
    infos = finished(*[0.02] * 63, 0.3)
    assert tail(infos, 0.0, 0.05) == 0.0
    assert tail(infos, 0.2, 0.25) == 0.2 / 0.25


def test_a_step_that_learned_nothing_has_no_rate_of_learning():
    figures = throughput(finished(1.0), 1.0, {"time/update_s": 0.0, "time/generate_s": 1.0, "time/step_s": 1.0})
    assert figures["throughput/train_tokens_per_s"] == 0.0
    assert figures["throughput/rollout_tokens_per_s"] == 4.0
