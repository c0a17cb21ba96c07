"""The step clock: no second is lost or counted twice, and the trace opens in Chrome."""

import json
from time import sleep

import pytest

from rayrlhf.metrics.clock import PHASES, StepClock


def test_phases_and_other_add_up_to_the_step(tmp_path):
    clock = StepClock(tmp_path / "trace.json")
    clock.start_step()
    for name in PHASES:
        with clock.phase(name):
            sleep(0.002)
        sleep(0.001)
    times = clock.end_step()
    parts = sum(times[f"time/{name}_s"] for name in (*PHASES, "other"))
    assert parts == pytest.approx(times["time/step_s"], abs=1e-9)
    assert times["time/other_s"] >= 0.006
    assert all(times[f"time/{name}_s"] >= 0.002 for name in PHASES)


def test_the_phases_are_those_of_the_design_and_one_that_did_not_run_took_0_s(tmp_path):
    clock = StepClock(tmp_path / "trace.json")
    clock.start_step()
    times = clock.end_step()
    assert {k for k in times if k.startswith("time/")} == {
        f"time/{name}_s" for name in ("generate", "score", "estimate", "update", "publish", "save", "other", "step")
    }
    assert times["time/generate_s"] == 0.0


def test_a_phase_entered_twice_counts_both_times(tmp_path):
    clock = StepClock(tmp_path / "trace.json")
    clock.start_step()
    for _ in range(2):
        with clock.phase("publish"):
            sleep(0.003)
    assert clock.end_step()["time/publish_s"] >= 0.006


def test_a_new_step_starts_from_zero(tmp_path):
    clock = StepClock(tmp_path / "trace.json")
    clock.start_step()
    with clock.phase("save"):
        sleep(0.003)
    clock.end_step()
    clock.start_step()
    assert clock.end_step()["time/save_s"] == 0.0


def test_what_runs_in_the_background_is_traced_and_in_no_sum(tmp_path):
    clock = StepClock(tmp_path / "trace.json")
    clock.start_step()
    with clock.background("generate"):
        sleep(0.003)
    assert clock.end_step()["time/generate_s"] == 0.0
    clock.close()
    first, step = json.loads((tmp_path / "trace.json").read_text())
    assert first["name"] == "generate"
    assert first["dur"] >= 3000
    assert first["tid"] not in (step["tid"], 1)


def test_each_phase_is_announced_as_it_begins(tmp_path):
    heard: list[str] = []
    clock = StepClock(tmp_path / "trace.json", heard.append)
    clock.start_step()
    with clock.phase("update"):
        assert heard == ["update"]


def test_a_phase_that_fails_is_still_timed(tmp_path):
    clock = StepClock(tmp_path / "trace.json")
    clock.start_step()

    def score() -> None:
        with clock.phase("score"):
            sleep(0.002)
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        score()
    assert clock.end_step()["time/score_s"] >= 0.002
    clock.close()
    assert json.loads((tmp_path / "trace.json").read_text())[0]["name"] == "score"


def test_the_trace_is_a_chrome_trace_of_complete_events(tmp_path):
    clock = StepClock(tmp_path / "trace.json")
    for _ in range(2):
        clock.start_step()
        for name in ("generate", "score"):
            with clock.phase(name):
                sleep(0.001)
        clock.end_step()
    clock.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    assert [e["name"] for e in events] == ["generate", "score", "step"] * 2
    for event in events:
        assert event["ph"] == "X"  # a complete event: begin and duration in one, both in microseconds
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ts"] >= 0
        assert event["dur"] >= 0
    for generate, score, step in (events[:3], events[3:]):
        assert step["tid"] != generate["tid"]  # their own row, or the bars would hide each other
        assert step["ts"] <= generate["ts"]
        assert generate["ts"] + generate["dur"] <= score["ts"]
        assert score["ts"] + score["dur"] <= step["ts"] + step["dur"]
        assert generate["dur"] >= 1000
    assert events[2]["ts"] + events[2]["dur"] <= events[5]["ts"]
