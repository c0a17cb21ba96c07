"""Metrics and samples on disk: one valid JSON object a line, at once."""

import json
import math

import numpy as np
import pytest

from rayrlhf.metrics.sinks import JsonLines, RunSink, read_jsonl, to_json


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
    sink = RunSink(tmp_path, [wandb])
    sink.write({"stage": "ppo", "step": 1, "kl/mean": 0.5})
    sink.write_sample({"stage": "ppo", "step": 1, "response": "yes"})
    sink.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == wandb.records == [{"stage": "ppo", "step": 1, "kl/mean": 0.5}]
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"stage": "ppo", "step": 1, "response": "yes"}]
    assert wandb.closed


def test_a_run_without_wandb_writes_files_alone(tmp_path):
    sink = RunSink(tmp_path)
    sink.write({"step": 1})
    sink.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_response_with_a_unicode_line_separator_is_read_back_whole(tmp_path, separator):
    lines = JsonLines(tmp_path / "samples.jsonl")
    lines.write({"response": f"one{separator}two"})
    lines.close()
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"response": f"one{separator}two"}]


def test_records_that_are_taken_back_are_gone_and_later_ones_follow(tmp_path):
    file = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.write({"step": step})
    file.keep(lambda record: record["step"] <= 1)
    file.write({"step": 2, "again": True})
    file.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2, "again": True}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
