"""Metrics and samples on disk: one valid JSON object a line, at once."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from rayrlhf.metrics.sinks import JsonLines, RunSink, WandbSink, read_jsonl, to_json


def strict(text: str) -> dict:
    """JSON as the standard has it: NaN and Infinity are errors."""

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def lines(tmp_path):
    lines = JsonLines(tmp_path / "deep" / "metrics.jsonl")
    yield lines
    lines.close()


def test_numbers_that_could_not_be_computed_are_null(lines, tmp_path):
    record = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5, "e": 2, "f": "NaN", "g": True, "h": None}
    lines.write({**record, "i": np.float64("nan")})
    text = (tmp_path / "deep" / "metrics.jsonl").read_text()
    assert text == '{"a": null, "b": null, "c": null, "d": 1.5, "e": 2, "f": "NaN", "g": true, "h": null, "i": null}\n'


def test_a_number_that_could_not_be_computed_is_null_however_deep_it_lies():
    record = {"accuracy": {"people": {"ece": math.nan, "by_k": {2: [1.5, math.inf, "NaN"]}, "pairs": 3}}}
    assert to_json(record) == '{"accuracy": {"people": {"ece": null, "by_k": {"2": [1.5, null, "NaN"]}, "pairs": 3}}}'


def test_each_record_is_a_line_on_disk_at_once(lines, tmp_path):
    for step in range(3):
        lines.write({"step": step})
        text = (tmp_path / "deep" / "metrics.jsonl").read_text()
        assert [strict(line) for line in text.splitlines()] == [{"step": s} for s in range(step + 1)]


def test_line_breaks_in_a_response_stay_inside_their_line(lines, tmp_path):
    response = "one\ntwo\r\nthree\u2028four"
    lines.write({"response": response})
    with open(tmp_path / "deep" / "metrics.jsonl", encoding="utf-8", newline="\n") as file:
        (line,) = file
    assert strict(line) == {"response": response}


def test_reopening_appends(tmp_path):
    for step in (1, 2):
        lines = JsonLines(tmp_path / "m.jsonl")
        lines.write({"step": step})
        lines.close()
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}]


class FakeWandb:
    def __init__(self):
        self.records, self.closed = [], False

    def write(self, record):
        self.records.append(dict(record))

    def close(self):
        self.closed = True


def test_a_run_writes_metrics_to_both_places_and_samples_to_their_own_file(tmp_path):
    wandb = FakeWandb()
    sink = RunSink(tmp_path, wandb)
    sink.write({"stage": "ppo", "step": 1, "kl/mean": 0.5})
    sink.write_sample({"stage": "ppo", "step": 1, "response": "yes"})
    sink.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == wandb.records == [{"stage": "ppo", "step": 1, "kl/mean": 0.5}]
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"stage": "ppo", "step": 1, "response": "yes"}]
    assert wandb.closed


def test_a_run_without_wandb_writes_files_alone(tmp_path):
    sink = RunSink(tmp_path, None)
    sink.write({"step": 1})
    sink.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_response_with_a_unicode_line_separator_is_read_back_whole(tmp_path, separator):
    lines = JsonLines(tmp_path / "samples.jsonl")
    lines.write({"response": f"one{separator}two"})
    lines.close()
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"response": f"one{separator}two"}]


def test_a_stages_records_can_be_taken_back_and_writing_goes_on_after_the_others(tmp_path):
    sink = RunSink(tmp_path, None)
    for stage, step in (("pretrain", 1), ("sft", 1), ("sft", 2)):
        sink.write({"stage": stage, "step": step, "loss": 0.1 + 0.2})
    sink.take_back("sft")
    sink.write({"stage": "sft", "step": 1, "loss": 0.5})
    sink.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"stage": "pretrain", "step": 1, "loss": 0.1 + 0.2},
        {"stage": "sft", "step": 1, "loss": 0.5},
    ]
    assert [p.name for p in tmp_path.glob("*metrics*")] == ["metrics.jsonl"]


def test_wandb_hears_of_a_step_that_is_done_again_once(tmp_path, monkeypatch):
    logged = []
    run = SimpleNamespace(log=logged.append, finish=lambda: None)
    wandb = SimpleNamespace(init=lambda **settings: run, api=SimpleNamespace(api_key=None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sink = WandbSink("offline", "project", "name", tmp_path, {})
    for record in ({"step": 1, "loss": 0.5}, {"step": 1, "heldout_loss": 0.7}, {"step": 1, "loss": 0.4}):
        sink.write({"stage": "sft", **record})
    assert logged == [{"sft/step": 1, "sft/loss": 0.5}, {"sft/step": 1, "sft/heldout_loss": 0.7}]
