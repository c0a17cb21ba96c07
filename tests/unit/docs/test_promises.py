"""What README and docs promise of the code itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def lines_of_code(path: Path) -> int:
    """Without blank lines, comments and docstrings (of attributes too)."""
    source = path.read_text(encoding="utf-8")
    prose: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(1 for i, line in lines if line.strip() and not line.strip().startswith("#") and i not in prose)


def test_driver_algorithms_weights_and_engines_can_be_read_in_one_sitting() -> None:
    packages = ("driver", "algorithms", "weights", "engines")
    files = [path for package in packages for path in (ROOT / "rayrlhf" / package).rglob("*.py")]
    assert sum(map(lines_of_code, files)) < 3000


def test_no_file_is_longer_than_400_lines() -> None:
    files = [p for folder in ("rayrlhf", "benchmarks", "examples") for p in (ROOT / folder).rglob("*.py")]
    files += (ROOT / "rayrlhf" / "evaluation" / "report" / "static").iterdir()
    assert not [str(p) for p in files if len(p.read_text(encoding="utf-8").splitlines()) > 400]


def test_no_metric_is_explained_twice() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("## pretrain")[0]
    names = [name for row in re.findall(r"^\| (`.*?) \|", page, flags=re.M) for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) == len(set(names)) > 40
