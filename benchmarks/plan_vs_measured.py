"""How far off is `rayrlhf plan` on this machine? Its memory and its seconds beside real processes.

    python benchmarks/plan_vs_measured.py memory [--cases policy-30M-z3x2,...] [--json]
    python benchmarks/plan_vs_measured.py time [--cases 10M:32:128,...] [--json]

See plan_memory.py and plan_time.py for what is measured; plan_vs_published.py compares with what others published.
"""

from __future__ import annotations

import typer
from plan_memory import main as memory
from plan_time import main as time

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, help=__doc__)
    app.command("memory")(memory)
    app.command("time")(time)
    app()
