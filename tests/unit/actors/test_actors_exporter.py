"""What the exporter says to Ray, and says again; that it arrives is in tests/integration/test_ray_metrics.py."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest

from rayrlhf.actors import exporter
from rayrlhf.actors.exporter import RayMetrics

Said = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    heard: Said = []

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            heard.append((self.name, value, dict(tags)))

    monkeypatch.setattr(exporter, "Gauge", Gauge)
    monkeypatch.setattr(exporter.ray, "is_initialized", lambda: True)
    return heard


@pytest.fixture
def sink() -> Iterator[RayMetrics]:
    made = RayMetrics("demo", repeat_s=3600)
    yield made
    made.close()


def test_numbers_are_gauges_with_the_tags_of_the_record(said: Said, sink: RayMetrics) -> None:
    sink.write({"stage": "ppo", "arm": "a", "kl/mean": 0.5, "step": 3, "flag": True, "text": "x", "map": {"a": 1}})
    tags = {"run": "demo", "stage": "ppo", "arm": "a"}
    assert said == [("rayrlhf_kl_mean", 0.5, tags), ("rayrlhf_step", 3, tags)]


def test_what_is_not_in_the_next_record_of_the_stage_is_said_again(said: Said, sink: RayMetrics) -> None:
    sink.write({"stage": "sft", "step": 1, "heldout_loss": 2.0})
    del said[:]
    sink.write({"stage": "sft", "step": 2})
    assert [(name, value) for name, value, _ in said] == [("rayrlhf_step", 2), ("rayrlhf_heldout_loss", 2.0)]


def test_a_number_that_could_not_be_computed_is_not_said_until_it_can_be(said: Said, sink: RayMetrics) -> None:
    for value in (1.0, math.nan, math.inf, 2.0):
        sink.write({"stage": "ppo", "kl/mean": value})
    assert [value for _, value, _ in said] == [1.0, 2.0]


def test_another_stage_says_nothing_of_the_one_before(said: Said, sink: RayMetrics) -> None:
    sink.write({"stage": "sft", "loss": 2.0})
    del said[:]
    sink.write({"stage": "ppo", "step": 1})
    assert said == [("rayrlhf_step", 1, {"run": "demo", "stage": "ppo", "arm": ""})]


def test_records_of_stages_done_before_ray_was_there_are_not_the_present(
    said: Said, sink: RayMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter.ray, "is_initialized", lambda: False)
    sink.write({"stage": "sft", "loss": 2.0})
    monkeypatch.setattr(exporter.ray, "is_initialized", lambda: True)
    sink.write({"stage": "sft", "step": 1})
    assert [name for name, _, _ in said] == ["rayrlhf_step"]


def test_the_newest_numbers_are_repeated_until_the_sink_is_closed(said: Said) -> None:
    sink = RayMetrics("demo", repeat_s=0.01)
    sink.write({"stage": "ppo", "step": 1})
    deadline = time.monotonic() + 10
    while len(said) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    sink.close()
    count = len(said)
    time.sleep(0.05)
    assert len(said) == count >= 4
