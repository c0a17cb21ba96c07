"""Two runs of one name at once: the second is refused before it changes anything."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from rayrlhf.checkpoint.owner import owned
from rayrlhf.config import Config, load_config
from rayrlhf.errors import ConfigError
from rayrlhf.stages.run import run

TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Its folder holds what a run that is under way has written."""
    checkpoint = tmp_path / "tiny" / "checkpoints" / "step-000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.pt").write_bytes(b"weights")
    (tmp_path / "tiny" / "metrics.jsonl").write_text('{"step": 1}\n')
    return load_config(TINY, [f"run.output={tmp_path}", "run.name=tiny", "run.stages=[pretrain]"], environ={})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [False, True])
def test_the_folder_of_a_run_that_is_under_way_is_left_as_it_is(config: Config, tmp_path: Path, resume: bool) -> None:
    before = contents(tmp_path / "tiny")
    with owned(tmp_path / "tiny", print), pytest.raises(ConfigError, match="is in use: process "):
        run(config, Console(file=io.StringIO()), resume=resume)
    assert contents(tmp_path / "tiny") == before
    assert not (tmp_path / "tiny.1").exists()


def test_a_path_of_other_words_leads_to_the_same_folder(config: Config, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    tree = config.model_copy(
        update={"run": config.run.model_copy(update={"output": tmp_path / "link" / ".." / tmp_path.name})}
    )
    with owned(tmp_path / "tiny", print), pytest.raises(ConfigError, match="is in use: process "):
        run(tree, Console(file=io.StringIO()))


def test_what_only_looks_does_not_ask_for_the_folder(config: Config, tmp_path: Path) -> None:
    with owned(tmp_path / "tiny", print):
        assert run(config, Console(file=io.StringIO()), dry_run=True) == tmp_path / "tiny"
