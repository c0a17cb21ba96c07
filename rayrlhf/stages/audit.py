"""`rayrlhf audit`: is every sample of a run accounted for exactly once? Needs neither torch nor Ray."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayrlhf.checkpoint.ledger import History
from rayrlhf.stages.ledger import audit_run

__all__ = ["show_audit"]


def show_audit(run: Path, console: Console) -> None:
    """A table of what became of the run's samples.

    Raises:
        DataError: the run has no ledger.
        LedgerError: naming file and line of its first contradiction.
    """
    for arm, history in audit_run(run).items():
        console.print(_table(arm, history))
    console.print("every sample is accounted for exactly once", highlight=False)


def _table(arm: str | None, history: History) -> Table:
    table = Table("", "", title=f"ppo {arm}" if arm else "ppo", show_header=False)
    reasons = sorted(history.quarantined.items(), key=lambda item: (-item[1], item[0]))
    last = history.accounted(len(history.steps)).frontier
    rows = {
        "steps": f"{len(history.steps)}{'' if history.ended else ', not at its end'}",
        "samples": f"{last}, from the first to sample {last - 1}" if last else "0",
        "trained": str(history.trained),
        "quarantined": str(history.quarantined.total()),
        **{f"  {reason}": str(count) for reason, count in reasons},
        "rollbacks": str(history.rollbacks),
        "steps done again": str(history.redone),
    }
    for name, value in rows.items():
        table.add_row(Text(name), value)  # a reason may look like markup
    return table
