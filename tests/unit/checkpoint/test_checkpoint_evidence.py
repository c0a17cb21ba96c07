"""What is left of a step that was stopped."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rayrlhf.checkpoint import evidence
from rayrlhf.checkpoint.evidence import write_tensors


def test_views_shared_memory_and_any_number_type_are_written(tmp_path: Path) -> None:
    whole = torch.arange(6).reshape(2, 3)
    tensors = {"a": whole.T, "b": whole, "c": torch.tensor([True]), "d": torch.ones(2, dtype=torch.bfloat16)}
    path, fault = write_tensors(tmp_path / "new" / "folder", "value-3", tensors, {"loss": math.inf, "rank": 3})
    assert fault == ""
    assert path == tmp_path / "new" / "folder" / "value-3.safetensors"
    assert load_file(path)["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert load_file(path)["d"].tolist() == [1.0, 1.0]
    assert json.loads(path.with_suffix(".json").read_text()) == {"loss": "inf", "rank": 3}


def test_a_full_disk_is_reported_and_leaves_no_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evidence.Path, "write_bytes", full)
    path, fault = write_tensors(tmp_path, "policy-0", {"a": torch.ones(1)}, {})
    assert "No space left on device" in fault
    assert not path.exists()
    assert not list(tmp_path.iterdir())
