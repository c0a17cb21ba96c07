"""The page of a run: whole or in ruins, one run or several, and whatever a model wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayrlhf import cli
from rayrlhf.errors import ConfigError
from rayrlhf.evaluation.report import page as page_module
from rayrlhf.evaluation.report import write_report
from rayrlhf.evaluation.report.folder import read_folder
from rayrlhf.evaluation.report.structure import structure
from tests.made_run import write_jsonl, write_run

EVIL = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & \u2028 \ud800"


def data_of(page: str) -> dict[str, Any]:
    [block] = re.findall(r'<script type="application/json" id="report-data">(.*?)</script>', page, flags=re.S)
    data: dict[str, Any] = json.loads(block)
    return data


def test_the_report_of_a_run_is_one_file_in_its_folder(tmp_path: Path) -> None:
    path = write_report([write_run(tmp_path / "demo")])
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "demo" / "report.html"
    assert not re.findall(r'(?:src|href)="(?!#|data:,)', page)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert not list(path.parent.glob(".report*"))
    [run] = data_of(page)["runs"]
    assert [arm["label"] for arm in run["arms"]] == ["SFT", "PPO", "PPO-ptx", "DPO"]
    assert run["stages"][4]["facts"] == ["PPO: 40 steps, 120 s", "PPO-ptx: 40 steps, 120 s"]
    assert list(run["stages"][4]["memory"].items())[:2] == [("rollout", 1.8), ("policy", 1.1)]
    assert [stage["name"] for stage in run["stages"]] == ["pretrain", "sft", "reward", "dpo", "ppo"]
    assert run["stages"][0] == {
        "name": "pretrain",
        "key": "fc4dbb7e43da",
        "parents": {},
        "seconds": 56.6,
        "cached": True,
        "memory": {"train": 0.77},
        "facts": ["held-out loss 6.62 → 1.19", "0.9M parameters"],
    }
    assert (run["kl_target"], run["seed"], run["missing"], run["notes"]) == (6.0, 0, {}, [])


def test_the_page_of_512_prompts_and_five_arms_is_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "large", prompts=512, steps=100, others=("dpo", "best_of_8"))
    assert write_report([run]).stat().st_size < 1_500_000


def test_a_run_that_failed_says_so_and_why(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", prompts=2, steps=3)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    failed = summary | {"status": "failed", "error": "TrainingError: loss is nan", "seed": 10**400}
    (run / "summary.json").write_text(json.dumps(failed), encoding="utf-8")
    page = write_report([run]).read_text(encoding="utf-8")
    [found] = data_of(page)["runs"]
    assert found["notes"] == ["The run failed: TrainingError: loss is nan"]
    assert (found["status"], found["seed"]) == ("failed", None)
    assert 'failed: "failed"' in page


def test_what_a_model_wrote_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", prompts=2, steps=3)
    answer = {"text": EVIL, "tokens": ["</script>", EVIL], "kl": [0.1, 0.2], "flags": {EVIL: True}, "reward": 1}
    write_jsonl(run / "answers.jsonl", [{"prompt_id": EVIL, "prompt": EVIL, "kind": EVIL, "answers": {"sft": answer}}])
    write_jsonl(run / "samples.jsonl", [{"step": 1, "prompt": EVIL, "response": EVIL, "arm": EVIL}])
    (run / "config.yaml").write_text(f"run: {{name: {json.dumps('</title><b>')}}}\n")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"name": "</title><script>alert(3)</script>"}))
    page = write_report([run]).read_text(encoding="utf-8")
    assert len(re.findall(r"<script", page)) == 2
    assert len(re.findall(r"</title", page)) == 1
    assert "<img" not in page
    assert "onerror=alert(2)" in data_of(page)["runs"][0]["answers"]["rows"][0]["prompt"]


def test_only_the_pages_own_script_may_run_and_nothing_may_be_fetched(tmp_path: Path) -> None:
    page = write_report([write_run(tmp_path / "demo", prompts=2, steps=2)]).read_text(encoding="utf-8")
    [policy] = re.findall(r'Content-Security-Policy" content="(.*?)"', page)
    assert policy.startswith(
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; script-src 'sha256-"
    )
    assert "unsafe" not in policy


def test_every_static_file_is_in_the_page() -> None:
    static = Path(page_module.__file__).parent / "static"
    assert {path.name for path in static.iterdir()} == {"template.html", *page_module.STYLES, *page_module.SCRIPTS}


BOMB = [(i, f"b{i - 1}" if i else "a") for i in range(40)]


def drop(*names: str) -> Callable[[Path], None]:
    def ruin(run: Path) -> None:
        for name in names:
            (run / name).unlink()

    return ruin


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text) and None


@pytest.mark.parametrize(
    "ruin",
    [
        drop("answers.jsonl"),
        drop("summary.json"),
        drop("metrics.jsonl"),
        drop("samples.jsonl"),
        drop("config.yaml"),
        drop("answers.jsonl", "samples.jsonl", "metrics.jsonl", "summary.json"),
        drop("answers.jsonl", "samples.jsonl", "config.yaml", "summary.json"),
        write("summary.json", "{"),
        write("summary.json", "[]"),
        write("summary.json", '{"name": null, "seed": NaN, "stages": {"ppo": null}, "evaluation": {"gold_mean": 3}}'),
        write("summary.json", '{"stages": [], "evaluation": {"gold_mean": {"ppo": "high"}, "flags": {"ppo": 1}}}'),
        write("config.yaml", "run: [\n"),
        write("config.yaml", "just text"),
        write("metrics.jsonl", '{"stage": "ppo", "step": 1}\n'),
        write("metrics.jsonl", '{"stage": "ppo", "step": 1, "kl/mean": null, "reward/mean": null}\n'),
        write("metrics.jsonl", '{"stage": "ppo", "step": null, "kl/mean": 1}\n{"stage": 3}\n'),
        write("answers.jsonl", '{"prompt": 3, "answers": [1]}\n{"answers": {"sft": null, "ppo": {"kl": 1}}}\n{}\n'),
        write("answers.jsonl", '{"answers": {"ppo": {"tokens": ["a"], "kl": ["b"], "flags": [], "text": 1}}}\n'),
        write("summary.json", "[" * 100_000),
        write("summary.json", '{"evaluation": ' + '{"a": ' * 100_000),
        write(
            "metrics.jsonl", '{"stage": "ppo", "step": ' + "[" * 100_000 + "\n\0\x1b[2J\n" + "9" * 5000 + "\n[]\nnull\n"
        ),
        write("metrics.jsonl", '{"stage": "ppo", "step": 1e999, "kl/mean": ' + "9" * 4000 + "}\n"),
        write("metrics.jsonl", '{"stage": "ppo", "step": 1, "kl/mean": -1e308, "reward/mean": 1e308}\n' * 3),
        write("config.yaml", "a: &a [*a]"),
        write("config.yaml", "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*{p}, *{p}]\n" for i, p in BOMB)),
        write("config.yaml", "[" * 5000),
        write("config.yaml", "run: !!python/object/apply:os.system ['true']"),
        write("config.yaml", "run: {name: !!int x}"),
        write("samples.jsonl", '{"step": 1}\n{"response": null, "step": 2, "kl_k1": "x"}\n'),
    ],
)
def test_a_run_in_ruins_still_has_a_report(tmp_path: Path, ruin: Callable[[Path], None]) -> None:
    run = write_run(tmp_path / "demo", prompts=3, steps=4)
    ruin(run)
    [read] = data_of(write_report([run]).read_text(encoding="utf-8"))["runs"]
    assert read["name"] == "demo"


def test_what_is_missing_is_said_in_a_sentence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", prompts=3, steps=4)
    drop("answers.jsonl", "samples.jsonl", "metrics.jsonl", "summary.json")(run)
    [read] = structure([read_folder(run)])["runs"]
    assert sorted(read["missing"]) == ["answers", "evaluation", "gold", "samples", "training"]
    assert read["notes"] == ["summary.json is missing: the run is still going, or was killed."]
    assert (read["reading"], read["looked"], read["headline"]) == ("", 0, [])


def test_a_hacked_arm_is_found_out_and_the_good_ones_are_not(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", prompts=40, steps=60, trained=("ppo", "ppo_ptx", "ppo_no_kl"))
    [read] = structure([read_folder(run)])["runs"]
    assert {finding["arm"] for finding in read["findings"]} == {"ppo_no_kl"}
    assert {finding["title"] for finding in read["findings"]} >= {
        "Responses grow longer",
        "The policy is far from SFT",
        "Answers are more alike",
        "Reward rises while gold falls",
    }
    assert read["unchecked"] == []


def test_several_runs_are_told_apart_and_their_configs_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"kl_{coef}", 3, 4, kl_coef=coef) for coef in (0.05, 0.2)]
    path = write_report(runs)
    data = data_of(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "kl_0.05" / "comparison.html"
    assert [run["name"] for run in data["runs"]] == ["kl_0.05", "kl_0.2"]
    assert data["differences"] == [{"key": "ppo.kl.coef", "values": ["0.05", "0.2"]}]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / folder / "demo", 2, 2) for folder in ("a", "b")]
    names = [run["name"] for run in structure([read_folder(run) for run in runs])["runs"]]
    assert names == [f"demo ({tmp_path / 'a' / 'demo'})", f"demo ({tmp_path / 'b' / 'demo'})"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", prompts=2, steps=2)
    with pytest.raises(ConfigError, match=r"none/x\.html: cannot write the report"):
        write_report([run], tmp_path / "none" / "x.html")
    with pytest.raises(ConfigError, match="no run is named"):
        write_report([])


def test_the_command_says_where_the_report_is_and_refuses_what_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, target = write_run(tmp_path / "demo", prompts=2, steps=2), tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["rayrlhf", "report", str(run), "--output", str(target)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert (left.value.code, target.exists()) == (0, True)
    assert capsys.readouterr().out.strip() == f"the report is in {target}"
    monkeypatch.setattr("sys.argv", ["rayrlhf", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert f"runs near it: {run}" in capsys.readouterr().err
