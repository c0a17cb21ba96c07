"""What the plan says of wrong input, and of what it takes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from rayrlhf.config import load_config
from rayrlhf.errors import ConfigError, ModelError
from rayrlhf.planning.assumptions import assumptions_for
from rayrlhf.planning.catalogue import shape_named
from rayrlhf.planning.command import asked_of, plan_of
from rayrlhf.planning.show import show_plan

ROOT = Path(__file__).parents[3]


def test_a_gpu_does_no_more_than_it_is_rated_at() -> None:
    for name in ("mfu_train", "decode_bandwidth", "link_share"):
        with pytest.raises(ConfigError, match=rf"{name} is 3(.|\n)*above 0 to 1"):
            assumptions_for("gpu").changed({name: 3.0}, "--assume")
        assert assumptions_for("cpu").changed({name: 3.0}, "--calibrate")[name] == 3.0


def test_a_plan_says_how_many_of_the_nodes_it_takes() -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    show_plan(console, plan_of(asked_of(load_config(ROOT / "configs/instructgpt/175b.yaml"))))
    assert "400 GPUs (50 of 64 nodes)" in console.export_text()


def test_a_model_that_is_not_there_is_told_with_what_a_form_takes_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a folder without config\.json"):
        shape_named(str(tmp_path), "plan.shapes.policy")
    with pytest.raises(ModelError, match=r"the keys of a Hugging Face config as workload\.models\.policy"):
        shape_named("nothing-like-it", "workload.models.policy")
    with pytest.raises(ModelError, match=r"its shape in plan\.shapes"):
        shape_named("nothing-like-it", "model.path")
