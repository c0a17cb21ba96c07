"""Each sign of trouble fires on numbers that show it, names the number and the step, and stays quiet on a good run."""

from __future__ import annotations

from collections.abc import Sequence

from rayrlhf.evaluation.report import signs
from rayrlhf.evaluation.report.signs import RULES, Arm, Finding, look


def arm(metric: str, values: Sequence[float | None], **more: Sequence[float | None]) -> Arm:
    """One metric over steps 1, 2, ..."""
    return Arm("ppo", {"step": list(range(1, len(values) + 1)), metric: values, **more})


def found(finding: Finding | None) -> Finding:
    assert finding is not None
    assert finding.advice
    return finding


def test_length_growth_fires_at_the_first_step_that_is_half_as_long_again() -> None:
    sign = found(signs.length_growth(arm("response/length_mean", [10, 11, 14, 16, 20])))
    assert sign.number == "10.0 tokens at the start, 20.0 at the end (2.0 times)"
    assert sign.step == 4  # 16 is the first of at least 15


def test_length_growth_stays_quiet_when_it_is_small_or_of_a_token_only() -> None:
    assert signs.length_growth(arm("response/length_mean", [10, 12, 14])) is None
    assert signs.length_growth(arm("response/length_mean", [3, 4, 4.9])) is None
    assert signs.length_growth(Arm("ppo")) is None


def test_a_kl_jump_is_the_largest_step_and_is_compared_with_what_steps_usually_do() -> None:
    sign = found(signs.kl_jump(arm("kl/mean", [0, 0.25, 0.5, 0.75, 4.0, 4.25])))
    assert sign.number == "3.2 nats per response more in one step (usually 0.25)"
    assert sign.step == 5


def test_a_steady_rise_of_kl_is_no_jump() -> None:
    assert signs.kl_jump(arm("kl/mean", [0, 2, 4, 6, 8])) is None
    assert signs.kl_jump(arm("kl/mean", [0, 0.1, 0.2, 1.4, 1.5])) is None  # 1.2 nats are few
    assert signs.kl_jump(arm("kl/mean", [0, 9])) is None  # nothing is usual after one move


def test_kl_over_ten_nats_names_the_first_step_over() -> None:
    sign = found(signs.kl_high(arm("kl/mean", [2, None, 10.5, 14.0])))
    assert sign.number.startswith("KL reaches 14.0 nats per response")
    assert sign.step == 3
    assert signs.kl_high(arm("kl/mean", [2, 9.9, 10])) is None


def test_a_drop_in_distinct_2_is_below_seven_tenths_of_sft() -> None:
    sign = found(signs.less_distinct(Arm("ppo", evaluated={"distinct_2": 0.30}, sft={"distinct_2": 0.50})))
    assert sign.number == "distinct-2 is 0.30 on held-out prompts, 0.50 for SFT"
    assert sign.step is None
    assert signs.less_distinct(Arm("ppo", evaluated={"distinct_2": 0.36}, sft={"distinct_2": 0.50})) is None
    assert signs.less_distinct(Arm("ppo", evaluated={"distinct_2": 0.30})) is None


def test_repeated_phrases_are_counted_late_against_early() -> None:
    good, bad = "a cat is small and soft", "i am glad to help i am glad to help i am glad to help"
    texts = [good] * 12 + [good, good, bad, bad]
    sign = found(signs.repeated_phrases(Arm("ppo", responses=list(enumerate(texts, start=1)))))
    assert sign.number.startswith("50 % of the late samples")
    assert sign.step == 15


def test_a_task_that_asks_for_repetition_is_no_sign() -> None:
    texts = ["drum drum drum drum drum"] * 16  # as many early as late
    assert signs.repeated_phrases(Arm("ppo", responses=list(enumerate(texts)))) is None
    assert signs.repeated_phrases(Arm("ppo", responses=[(1, "a a a a a")])) is None


def test_log_prob_gap_growth_needs_three_times_and_more_than_rounding() -> None:
    sign = found(signs.logprob_gap_growth(arm("rollout/logprob_gap", [0.001, 0.002, 0.01])))
    assert sign.number == "their log-probs differ by 0.01 nats a token at the end, 0.001 at the start"
    assert sign.step == 3
    assert signs.logprob_gap_growth(arm("rollout/logprob_gap", [1e-7, 1e-6])) is None
    assert signs.logprob_gap_growth(arm("rollout/logprob_gap", [0.01, 0.02])) is None


def test_reward_up_while_gold_falls_names_the_step_of_the_peak() -> None:
    reward = [0.1 * i for i in range(12)]
    gold = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    sign = found(signs.reward_up_gold_down(arm("reward/mean", reward, **{"reward/gold": gold})))
    # Means of three: (0.6 + 0.7 + 0.6) / 3 around step 6; (0.3 + 0.2 + 0.1) / 3 at the end.
    assert sign.step == 6
    assert sign.number == "gold falls from 0.63 to 0.20 while the reward rises from 0.50 to 1.00"


def test_gold_that_falls_with_the_reward_or_by_noise_is_no_hacking() -> None:
    falling = [1 - 0.05 * i for i in range(12)]
    assert signs.reward_up_gold_down(arm("reward/mean", falling, **{"reward/gold": falling})) is None
    reward, noisy = [0.1 * i for i in range(12)], [0.5, 0.55] * 6
    assert signs.reward_up_gold_down(arm("reward/mean", reward, **{"reward/gold": noisy})) is None
    assert signs.reward_up_gold_down(arm("reward/mean", reward)) is None


def test_gold_below_sft_with_reward_above_is_found_on_held_out_prompts() -> None:
    sft = {"reward_mean": 0.1, "gold_mean": 0.5}
    sign = found(signs.worse_gold_than_sft(Arm("ppo", evaluated={"reward_mean": 1.1, "gold_mean": 0.4}, sft=sft)))
    assert sign.number == "reward +1.00 against SFT, gold -0.10"
    assert signs.worse_gold_than_sft(Arm("ppo", evaluated={"reward_mean": 1.1, "gold_mean": 0.6}, sft=sft)) is None
    assert signs.worse_gold_than_sft(Arm("ppo", evaluated={"reward_mean": 1.1}, sft=sft)) is None


def test_a_win_that_goes_away_at_equal_length_is_named() -> None:
    rates = {"gold_win_rate": 0.70, "length_controlled_win_rate": 0.61}
    assert found(signs.wins_by_length(Arm("ppo", evaluated=rates))).number == (
        "wins on 70.0 % of the prompts, on 61.0 % at equal length"
    )
    assert signs.wins_by_length(Arm("ppo", evaluated=rates | {"length_controlled_win_rate": 0.68})) is None
    assert signs.wins_by_length(Arm("ppo", evaluated={"gold_win_rate": 0.7})) is None


def test_truncated_responses_count_from_a_fifth() -> None:
    sign = found(signs.many_truncated(arm("response/truncated_fraction", [0.0, 0.1, 0.25, 0.4])))
    assert sign.number == "40 % reach rollout.max_tokens at the end"
    assert sign.step == 3
    assert signs.many_truncated(arm("response/truncated_fraction", [0.5, 0.2])) is None


def test_a_critic_below_zero_at_the_end_is_named_from_where_it_stays_there() -> None:
    sign = found(signs.critic_worse_than_constant(arm("value/explained_variance", [-1.0, 0.3, -0.1, -0.2])))
    assert sign.number.startswith("explained variance is -0.20 at the end")
    assert sign.step == 3
    assert signs.critic_worse_than_constant(arm("value/explained_variance", [-5.0, -1.0, 0.2])) is None


def test_one_quarantined_engine_is_enough_and_its_reason_is_said() -> None:
    columns = {"step": [1, 2, 3], "weights/quarantined": [0, 1, 0]}
    sign = found(signs.quarantined_engines(Arm("ppo", columns, reasons=["probe differs by 0.2"])))
    assert sign.number == "up to 1 engine left out after 1 publish: probe differs by 0.2"
    assert sign.step == 2
    assert signs.quarantined_engines(arm("weights/quarantined", [0, 0])) is None


def test_what_the_run_does_not_hold_is_said_to_be_unchecked() -> None:
    findings, unchecked = look(arm("kl/mean", [1, 2, 30]))
    assert [finding.title for finding in findings] == ["The policy is far from SFT"]
    assert "length growth" in unchecked
    assert not {"KL over 10 nats", "a KL jump"} & set(unchecked)
    assert len(look(Arm("ppo"))[1]) == len(RULES)
