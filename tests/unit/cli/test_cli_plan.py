"""`rayrlhf plan` as it is called: no torch, one JSON object, an exit code that says whether it fits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rayrlhf import cli

ROOT = Path(__file__).parents[3]
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'transformers', 'ray', 'vllm', 'deepspeed', 'numpy'):
            raise ImportError(f'{name} must not be imported')
sys.meta_path.insert(0, Blocked())
from rayrlhf.cli import main
sys.argv = ['rayrlhf', *sys.argv[1:]]
main()
"""


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process in which torch cannot be imported."""
    command = [sys.executable, "-c", BLOCKED, "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)


def test_the_json_has_what_scripts_read_and_torch_is_not_needed() -> None:
    done = plan("configs/instructgpt/175b.yaml", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] is True
    assert found["gpus"] == sum(role["gpus"] for role in found["roles"].values()) == 400
    assert found["roles"]["policy"]["gpus"] == 64
    assert 0 < found["roles"]["policy"]["gib_per_gpu"] < 80
    assert found["step_seconds"] == pytest.approx(sum(phase["seconds"] for phase in found["phases"].values()))
    assert found["gpu_hours"] == pytest.approx(400 * 500 * found["step_seconds"] / 3600)
    assert found["assumptions"]["mfu_train"].keys() == {"value", "unit", "source"}


def test_the_table_names_roles_phases_and_assumptions() -> None:
    done = plan("configs/tiny.yaml", "--assume", "mfu_train=0.5")
    assert done.returncode == 0, done.stderr
    for word in ("policy", "rollout", "generate", "update", "mfu_train", "--assume", "s a step"):
        assert word in done.stdout


def test_what_does_not_fit_ends_with_1_and_says_what() -> None:
    done = plan("configs/instructgpt/6b.yaml", "deepspeed.activation_checkpointing=false")
    assert done.returncode == 1
    assert "does not fit: policy and value" in done.stdout


def test_a_search_lists_placements() -> None:
    done = plan("configs/planning/workload.yaml", "--nodes", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["placements"][0]["step_seconds"] == found["step_seconds"]
    assert any(key.startswith("cluster.policy.ranks=") for key in found["placements"][0]["overrides"])


def test_wrong_input_is_one_message(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["rayrlhf", "plan", "configs/tiny.yaml", "--hardware", "cpus"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "cpus: no such hardware (--hardware" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_refuses_what_cannot_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    large = ["model.from_scratch.hidden_size=8192", "model.from_scratch.layers=24", "model.from_scratch.heads=64"]
    gpus = ["cluster.device=cuda", "model.dtype=bfloat16", "world.size=0.05"]
    command = ["run", "configs/tiny.yaml", f"run.output={tmp_path}", "--dry-run", *gpus]
    monkeypatch.setattr(sys, "argv", ["rayrlhf", *command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "GPU-hours (ppo alone)" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["rayrlhf", *command, *large])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "ResourceError: this does not fit: policy: 398.8 GiB a GPU, 323.7 more than the 75.1 usable" in message
    assert message.count("GPU-seconds a step") == 3


def test_a_search_that_finds_nothing_ends_with_1_in_json_too() -> None:
    arguments = ("configs/instructgpt/175b.yaml", "--search", "--nodes", "1")
    found = plan(*arguments, "--json")
    assert found.returncode == 1, found.stderr
    tree = json.loads(found.stdout)
    assert (tree["fits"], tree["placements"]) == (False, [])
    assert tree["shortfalls"][0]["message"].startswith("no placement fits on 1 nodes of 8")
    told = plan(*arguments)
    assert told.returncode == 1
    assert "no placement fits on 1 nodes of 8" in told.stderr


def test_sequences_beyond_the_models_context_are_named_and_not_cured_by_nodes() -> None:
    found = plan("configs/instructgpt/6b.yaml", "rollout.max_tokens=4096", "--search", "--json")
    (short,) = json.loads(found.stdout)["shortfalls"]
    assert "tokens of prompt and response" in short["message"]
    told = plan("configs/instructgpt/6b.yaml", "rollout.max_tokens=4096", "--search")
    assert "--nodes" not in told.stderr


def test_a_search_shows_the_configs_own_placement_beside_those_it_finds() -> None:
    done = plan("configs/instructgpt/175b.yaml", "--search", "--json")
    found = json.loads(done.stdout)
    assert found["configured"]["gpus"] == 400
    assert "cluster.value.ranks=8" in found["configured"]["overrides"]
    assert "the config's own" in plan("configs/instructgpt/175b.yaml", "--search").stdout


def test_why_nothing_is_placed_on_a_cpu_is_said() -> None:
    told = plan("configs/tiny.yaml", "--search")
    assert "roles of a CPU share its cores and memory" in " ".join(told.stderr.split())
    told = plan("configs/planning/workload.yaml", "--hardware", "cpu")
    assert "a form's placement is one of GPUs" in " ".join(told.stderr.split())
