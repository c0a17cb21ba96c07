"""The ledger that a PPO run writes and goes on from; checkpoint/ledger.py says what its lines are, and checks them.

Imports neither torch nor Ray: `rayrlhf audit` reads a ledger anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrlhf.checkpoint.ledger import LEDGER, Accounted, Facts, History, append, audit, read_lines
from rayrlhf.checkpoint.store import Checkpoint
from rayrlhf.data.batching import SampleOrder
from rayrlhf.errors import CheckpointError, DataError, LedgerError

if TYPE_CHECKING:
    from rayrlhf.driver.protocols import ScoredBatch

__all__ = ["Ledger", "audit_run"]

CURE = "bring the run's own ledger back, or leave --resume out to start anew (this run's folder then moves aside)"


class Ledger:
    """The lines of one PPO run (of one arm), in the file of its folder. Implements the driver's `Ledger`."""

    accounted: Accounted
    """with the last step"""

    def __init__(self, folder: Path, facts: Facts, arm: str | None = None) -> None:
        self._path = folder / LEDGER
        self._facts = facts
        self._order = _order_of(facts)
        self._mark = {} if arm is None else {"arm": arm}
        self._arm = arm

    def start_from(self, found: Checkpoint | None) -> Accounted:
        """Begin; or go on from a checkpoint (None: anew), and take back all steps after it.

        Returns:
            The samples that count: those that `PromptStream` leaves out.

        Raises:
            CheckpointError: the ledger is missing, contradicts itself, or is not that of the checkpoint.
        """
        history, step = self._read(), found.step if found else 0
        if found is not None:
            self._check(history, found)
        if history is None:
            facts = {name: getattr(self._facts, name) for name in self._facts.__slots__}
            self._write("begin", **facts)
        elif history.steps or history.ended:
            if step not in history.covered:  # the run was ended between the checkpoint and its line
                self.checkpoint(step)
            self._write("rollback", step=step)
        self.accounted = history.accounted(step) if history else Accounted()
        return self.accounted

    def step(self, step: int, batch: ScoredBatch) -> None:
        """The step's weights are published."""
        trained = sorted(self._entry(info.sample_id, info.prompt_id) for info in batch.rollouts.infos)
        out = sorted((*self._entry(sample.sample_id, sample.prompt_id), sample.reason) for sample in batch.quarantined)
        self._write("step", step=step, trained=trained, quarantined=out)
        self.accounted = self.accounted.plus([sample for sample, *_ in trained]).plus([sample for sample, *_ in out])

    def checkpoint(self, step: int) -> None:
        """It is on the disk."""
        self._write("checkpoint", step=step)

    def end(self, step: int) -> None:
        """The run is done."""
        self._write("end", step=step)

    def _entry(self, sample: int, prompt: int) -> tuple[int, int, int, int]:
        epoch, _, index = self._order(sample)
        return sample, epoch, prompt, index

    def _write(self, event: str, **details: Any) -> None:
        append(self._path, {"n": self._lines + 1, "event": event, **self._mark, **details})
        self._lines += 1

    def _read(self) -> History | None:
        """This run's part; a line that is torn is cut off."""
        try:
            found = read_lines(self._path, _order_of)
        except LedgerError as error:
            raise CheckpointError(error.message, CURE) from None
        if self._path.exists() and self._path.stat().st_size > found.size:
            os.truncate(self._path, found.size)  # flushed with the next line
        self._lines = found.count
        return found.arms.get(self._arm)

    def _check(self, history: History | None, found: Checkpoint) -> None:
        if history is None:
            raise CheckpointError(f"{self._path} is missing or empty, and {found.folder} goes on from it", CURE)
        if history.facts != self._facts:
            raise CheckpointError(f"{self._path} is another run's: it began with {history.facts}", CURE)
        if found.step > len(history.steps):
            raise CheckpointError(f"{self._path} ends with step {len(history.steps)}, before {found.folder}", CURE)
        mine, other = history.accounted(found.step).to_state(), found.state.get("accounted")
        if mine != other:
            raise CheckpointError(
                f"{self._path} and {found.folder} do not account for the same samples at step {found.step}: {mine} "
                f"and {other}",
                CURE,
            )


def audit_run(run: Path) -> dict[str | None, History]:
    """The final history of a run, by arm, in which every sample is accounted for exactly once.

    Raises:
        DataError: there is no ledger.
        LedgerError: naming file and line of the first contradiction.
    """
    path = run / LEDGER
    arms = audit(path, _order_of)
    if not arms:
        raise DataError(
            f"{path} is {'empty' if path.exists() else 'not there'}",
            "name the folder of a run with a PPO stage, such as runs/demo",
        )
    return arms


def _order_of(facts: Facts) -> SampleOrder:
    return SampleOrder(facts.prompt_ids, facts.seed, facts.samples_per_prompt)
