"""examples/one_ppo_step.py runs, docs/one_step.md shows what it prints, and the numbers are those worked by hand."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from rayrlhf import algorithms

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "one_step.md").read_text(encoding="utf-8")


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_ppo_step", ROOT / "examples" / "one_ppo_step.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def printed(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> str:
    example.main()
    return capsys.readouterr().out


def blocks(text: str) -> list[str]:
    """Cut at the headings "1. ...", "2. ..." of the steps."""
    return [block.strip() for block in re.split(r"(?m)^(?=\d+\. )", text)]


def cells(printed: str, block: int, row: str) -> list[str]:
    """Return the numbers of a row, or the one after the last = of a total such as "mean"."""
    lines = [line.strip() for line in blocks(printed)[block].splitlines()]
    [found] = [line for line in lines if re.match(rf"{row}( =|  +-?\d)", line)]
    return [found.split("=")[-1].strip()] if "=" in found else found.removeprefix(row).split()


def test_the_page_shows_exactly_what_the_script_prints(printed: str) -> None:
    shown = "\n\n".join(block.strip() for block in re.findall(r"```text\n(.*?)```", PAGE, flags=re.S))
    assert blocks(shown) == blocks(printed)
    assert len(blocks(printed)) == 1 + 10


def test_the_script_stops_when_the_product_gives_another_number(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = algorithms.kl_estimate
    monkeypatch.setattr(algorithms, "kl_estimate", lambda *args: right(*args) + 1e-4)
    with pytest.raises(AssertionError, match=r"has 0\.2001, by hand it is 0\.2$"):
        example.main()


def test_kl_and_rewards_are_those_worked_by_hand(printed: str) -> None:
    # B1: d = -1.5 + 2.0 = 0.5; k2 = 0.25 / 2; k3 = 0.60653 - 1 + 0.5
    assert cells(printed, 1, "B1")[2:] == ["0.5000", "0.1250", "0.1065"]
    # A2: d = -2.0 + 1.6 is negative; its reward is 0.1 * 0.4
    assert cells(printed, 1, "A2")[2] == "-0.4000"
    assert cells(printed, 2, "A2")[-1] == "0.0400"
    # A3, the last token: -0.1 * 0.4 + 1.0
    assert cells(printed, 2, "A3")[-1] == "0.9600"


def test_advantages_and_returns_are_those_worked_by_hand(printed: str) -> None:
    # B2: delta = -0.49 - (-0.2) = -0.29 = A
    # B1: delta = -0.05 - 0.2 - 0.1 = -0.35; A = -0.35 - 0.95 * 0.29 = -0.6255; return = -0.6255 + 0.1
    assert cells(printed, 3, "B1")[2:] == ["-0.3500", "-0.6255", "-0.5255"]
    # A3: 0.96 - 0.8 = 0.16.  A2: 0.04 + 0.8 - 0.5 = 0.34, + 0.95 * 0.16 = 0.492
    # A1: -0.02 + 0.5 - 0.4 = 0.08, + 0.95 * 0.492 = 0.5474; return = 0.5474 + 0.4
    assert cells(printed, 3, "A1")[2:] == ["0.0800", "0.5474", "0.9474"]


def test_whitening_is_that_worked_by_hand(printed: str) -> None:
    # (0.5474 + 0.492 + 0.16 - 0.6255 - 0.29) / 5 = 0.2839 / 5
    assert cells(printed, 4, "mean") == ["0.05678"]
    # squares: 0.299647 + 0.242064 + 0.0256 + 0.391250 + 0.0841 = 1.042661; / 5 = 0.208532; - 0.05678^2 = 0.205308
    assert cells(printed, 4, "variance") == ["0.20531"]
    # (0.5474 - 0.05678) / sqrt(0.205308) = 0.49062 / 0.453109;  (-0.6255 - 0.05678) / 0.453109
    assert cells(printed, 4, "A1")[-1] == "1.0828"
    assert cells(printed, 4, "B1")[-1] == "-1.5058"


def test_the_policy_loss_is_that_worked_by_hand(printed: str) -> None:
    # A1: e^0.3 = 1.34986 > 1.2 and A > 0, so held: -1.2 * 1.08278
    assert [cells(printed, 5, "A1")[i] for i in (1, 6, 7)] == ["1.3499", "-1.2993", "1.0000"]
    # B1: e^0.3 again, but A < 0, so free: 1.34986 * 1.50577
    assert [cells(printed, 5, "B1")[i] for i in (1, 6, 7)] == ["1.3499", "2.0326", "0.0000"]
    # A2: -0.90484 * 0.96052 = -0.86911.  A3: -0.74082 * 0.22780 = -0.16876.  B2: 0.8 * 0.76533 = 0.61227
    # (-1.29934 - 0.86911 - 0.16876 + 2.03258 + 0.61227) / 5 = 0.30764 / 5
    assert cells(printed, 5, "policy loss") == ["0.06153"]
    # four pretraining tokens: (2 + 1 + 3 + 2.5) / 4 = 2.125; 0.06153 + 0.5 * 2.125
    assert cells(printed, 7, "loss") == ["1.12403"]


def test_the_value_loss_is_that_worked_by_hand(printed: str) -> None:
    # A1: 0.7 is more than 0.2 from 0.4, so 0.6: (0.6 - 0.9474)^2 / 2 = 0.120687 / 2
    assert [cells(printed, 6, "A1")[i] for i in (2, 6, 7)] == ["0.6000", "0.0603", "1.0000"]
    # B2: 0.05 is held to 0.0, but (0.05 + 0.49)^2 = 0.2916 is more than 0.49^2 = 0.2401
    assert [cells(printed, 6, "B2")[i] for i in (2, 6, 7)] == ["0.0000", "0.1458", "0.0000"]
    # A2: 0.392^2 = 0.153664.  A3: 0.26^2 = 0.0676.  B1: 0.5255^2 = 0.276150
    # (0.120687 + 0.153664 + 0.0676 + 0.276150 + 0.2916) / 10
    assert cells(printed, 6, "value loss") == ["0.09097"]


def test_the_other_losses_and_estimators_are_those_worked_by_hand(printed: str) -> None:
    # log(1 + e^-0.5) = log 1.606531 = 0.474077; log(1 + e^-1) = log 1.367879 = 0.313262; the tie makes no third
    assert cells(printed, 8, "loss") == ["0.39367"]
    # log 2, and log(1 + e^-0.2) = log 1.818731
    assert cells(printed, 9, "start")[-1] == "0.6931"
    assert cells(printed, 9, "later")[-1] == "0.5981"
    # mean 1, variance (1 + 1) / 4: (2 - 1) / sqrt(0.5); the others' mean is (0 + 1 + 1) / 3: 2 - 2 / 3
    assert cells(printed, 10, "p1")[1:] == ["1.4142", "0.6667", "1.3333"]
    assert cells(printed, 10, "q1")[1::2] == ["0.0000", "0.0000"]
