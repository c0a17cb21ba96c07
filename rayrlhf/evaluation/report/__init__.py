"""`rayrlhf report RUN [RUN...]`: what a run did, as one HTML file that needs no server and no network.

    run's folder ─► folder.py ─► arms, series, densities, answers, signs ─► structure.py ─► page.py ─► report.html
                    (tolerant)   (one plain JSON structure, and nothing else)             (static/ inlined)

Nothing here imports torch or Ray: a report of a run from another machine takes a second anywhere.
"""

from __future__ import annotations

from rayrlhf.evaluation.report.page import write_report

__all__ = ["write_report"]
