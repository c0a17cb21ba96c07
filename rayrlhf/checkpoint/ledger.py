"""The ledger of a PPO run: what became of each sample, one JSON object a line, each flushed before the run goes on.

    begin        what the samples are: seed, prompts, samples a prompt, batch size
    step         a step whose weights are published: the samples it trained on, and those quarantined, with the reason
    checkpoint   a checkpoint of that step is on the disk
    rollback     to that step, by its checkpoint (0: to the start): steps after it do not count, and are done again
    end          the run is done

    {"n": 7, "event": "step", "step": 3, "trained": [[sample, epoch, prompt, index], ...], "quarantined": []}

Samples are numbered from 0 (see `SampleOrder`): a number says which epoch, prompt and sample of the prompt it is. `n`
is the line's own number, so that no line is lost unseen. With several arms each has its own history, and its name in
every line. The last line may be torn, by a kill in the middle of a write: it does not count.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rayrlhf.checkpoint.disk import flush
from rayrlhf.errors import CheckpointError, LedgerError

__all__ = ["LEDGER", "Accounted", "Facts", "History", "Lines", "Order", "append", "audit", "read_lines"]

LEDGER = "ledger.jsonl"
# No run holds more in memory; whoever altered a ledger may say so.
MOST_PROMPTS = 2**26
Order = Callable[[int], tuple[int, int, int]]
"""Of a sample's number: its epoch, prompt id, and index among the prompt's samples of that epoch."""


@dataclass(frozen=True, slots=True)
class Accounted:
    """The numbers of samples that were trained on or quarantined: all below `frontier`, and those of `above`."""

    frontier: int = 0
    above: frozenset[int] = frozenset()

    def __contains__(self, sample: int) -> bool:
        return sample < self.frontier or sample in self.above

    def plus(self, samples: Iterable[int]) -> Accounted:
        frontier, above = self.frontier, self.above.union(samples)
        while frontier in above:
            frontier += 1
        return Accounted(frontier, frozenset(sample for sample in above if sample >= frontier))

    def to_state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        return {"frontier": self.frontier, "above": sorted(self.above)}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the samples of a run are."""

    seed: int
    prompts: tuple[tuple[int, int], ...]
    """prompt ids, as ranges [start, stop)"""
    samples_per_prompt: int
    batch_size: int

    @classmethod
    def of(cls, seed: int, prompt_ids: Sequence[int], samples_per_prompt: int, batch_size: int) -> Facts:
        ranges: list[tuple[int, int]] = []
        for prompt in prompt_ids:
            if ranges and ranges[-1][1] == prompt:
                ranges[-1] = ranges[-1][0], prompt + 1
            else:
                ranges.append((prompt, prompt + 1))
        return cls(seed, tuple(ranges), samples_per_prompt, batch_size)

    @property
    def prompt_ids(self) -> list[int]:
        return list(chain.from_iterable(range(start, stop) for start, stop in self.prompts))


@dataclass(frozen=True, slots=True)
class _Step:
    line: int
    reasons: Mapping[str, int]
    """how many samples were quarantined, by reason"""
    accounted: Accounted
    """with this step"""


@dataclass
class History:
    """What the lines of one run (one arm) come to: rolled back steps are not in it."""

    facts: Facts
    order: Order = field(compare=False)
    steps: list[_Step] = field(default_factory=list)
    covered: set[int] = field(default_factory=lambda: {0})
    """steps that can be gone on from"""
    rollbacks: int = 0
    redone: int = 0
    """steps that a rollback took back"""
    ended: bool = False

    @property
    def trained(self) -> int:
        return len(self.steps) * self.facts.batch_size

    @property
    def quarantined(self) -> Counter[str]:
        """How many samples, by reason."""
        return sum((Counter(step.reasons) for step in self.steps), Counter())

    def accounted(self, step: int) -> Accounted:
        return self.steps[step - 1].accounted if step else Accounted()

    def take(self, line: int, event: Mapping[str, Any]) -> None:
        """Raises ValueError: the event contradicts those before it. KeyError, TypeError: it is not an event."""
        kind, step = event["event"], event["step"]
        if self.ended and kind not in ("checkpoint", "rollback"):
            raise ValueError(f"{kind} comes after the end: nothing but a rollback may")
        if kind == "step":
            self._take_step(line, step, event["trained"], event["quarantined"])
        elif kind == "checkpoint":
            if not 1 <= step <= len(self.steps):
                raise ValueError(f"a checkpoint of step {step}, and the last step is {len(self.steps)}")
            self.covered.add(step)
        elif kind == "rollback":
            self._roll_back(step)
        elif kind == "end":
            if step != len(self.steps):
                raise ValueError(f"the run ends with step {step}, and the last step is {len(self.steps)}")
            self.ended = True
        else:
            raise ValueError(f"{kind!r} is no event")

    def _take_step(self, line: int, step: int, trained: Sequence[Any], quarantined: Sequence[Any]) -> None:
        before, size = self.accounted(len(self.steps)), self.facts.batch_size
        if step != len(self.steps) + 1:
            raise ValueError(f"step {step} comes after step {len(self.steps)}")
        if len(trained) != size:
            raise ValueError(f"step {step} trained on {len(trained)} samples, a batch is {size}")
        seen = set[int]()
        for sample, *place in [*trained, *(entry[:4] for entry in quarantined)]:
            if sample < 0:
                raise ValueError(f"there is no sample {sample}")
            if sample in seen or sample in before:
                raise ValueError(f"{self.name(sample)} is accounted for a second time")
            if tuple(place) != self.order(sample):
                raise ValueError(f"sample {sample} stands as {_place(*place)}, and is {_place(*self.order(sample))}")
            seen.add(sample)
        repeats = self.facts.samples_per_prompt
        for group, count in Counter(entry[0] // repeats for entry in trained).items():
            if count != repeats:
                raise ValueError(
                    f"of the {repeats} samples to a prompt from {self.name(group * repeats)}, {count} count"
                )
        reasons = Counter(str(reason) for *_, reason in quarantined)
        self.steps.append(_Step(line, reasons, before.plus(seen)))

    def _roll_back(self, step: int) -> None:
        if step not in self.covered:
            raise ValueError(f"a rollback to step {step}, of which there is no checkpoint")
        self.rollbacks += 1
        self.redone += len(self.steps) - step
        del self.steps[step:]
        self.covered = {covered for covered in self.covered if covered <= step}
        self.ended = False

    def hole(self) -> tuple[int, str] | None:
        """The first sample that was passed over, and the line that did."""
        last = self.accounted(len(self.steps))
        for step in self.steps if last.above else ():
            if step.accounted.above and step.accounted.frontier == last.frontier:
                return step.line, f"{self.name(last.frontier)} is missing, and later ones are there"
        return None

    def name(self, sample: int) -> str:
        return f"sample {sample} ({_place(*self.order(sample))})"


def _place(epoch: int, prompt: int, index: int) -> str:
    return f"epoch {epoch}, prompt {prompt}, index {index}"


@dataclass
class Lines:
    """A ledger, read."""

    arms: dict[str | None, History] = field(default_factory=dict)
    """by name; None where there is one run"""
    count: int = 0
    size: int = 0
    """bytes of the whole lines; what follows is torn"""


def read_lines(path: Path, order_of: Callable[[Facts], Order]) -> Lines:
    """Replay a ledger; nothing where there is none.

    Raises:
        LedgerError: naming the first line that contradicts those before it.
    """
    found = Lines()
    if path.exists():
        for line, event in _whole_lines(path, found):
            try:
                if event["n"] != line:
                    raise ValueError(f"this is line {event['n']} of the ledger: lines were lost, doubled or moved")
                arm = event.get("arm")
                if event["event"] == "begin":
                    if arm in found.arms:
                        raise ValueError("the run begins a second time")
                    prompts = tuple((int(start), int(stop)) for start, stop in event["prompts"])
                    if not 0 < sum(stop - start for start, stop in prompts) <= MOST_PROMPTS:
                        raise ValueError(f"its prompts are none, or over {MOST_PROMPTS}")
                    facts = Facts(event["seed"], prompts, event["samples_per_prompt"], event["batch_size"])
                    found.arms[arm] = History(facts, order_of(facts))
                elif arm not in found.arms:
                    raise ValueError(f"{event['event']} comes before the run begins")
                else:
                    found.arms[arm].take(line, event)
            except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
                raise _contradiction(path, line, f"this is not a line of a ledger ({error!r})") from None
            except ValueError as error:
                raise _contradiction(path, line, str(error)) from None
    return found


def audit(path: Path, order_of: Callable[[Facts], Order]) -> dict[str | None, History]:
    """The final history of each arm, in which every sample up to the last one drawn is accounted for exactly once.

    Raises:
        LedgerError: naming the first line that contradicts that.
    """
    arms = read_lines(path, order_of).arms
    if holes := [hole for history in arms.values() if (hole := history.hole())]:
        raise _contradiction(path, *min(holes))
    return arms


def append(path: Path, event: Mapping[str, Any]) -> None:
    """Write one line, on the disk when this returns.

    Raises:
        CheckpointError: it cannot be written.
    """
    line = (json.dumps(event, separators=(",", ":")) + "\n").encode()
    try:
        new = not path.exists()
        with open(path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if new:
            flush(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error})", "make room for it, then go on with --resume"
        ) from None


def _whole_lines(path: Path, found: Lines) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's number and event; a last one that is torn is left out."""
    torn = 0
    with open(path, "rb") as file:
        for line, text in enumerate(file, start=1):
            if torn:
                raise _contradiction(path, torn, "this line is torn, and others follow")
            if not text.endswith(b"\n"):
                torn = line
                continue
            event = _parsed(text)
            if event is None:
                raise _contradiction(path, line, "this is not a line of a ledger")
            found.count, found.size = line, found.size + len(text)
            yield line, event


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def _contradiction(path: Path, line: int, what: str) -> LedgerError:
    return LedgerError(
        f"{path}:{line}: {what}",
        "samples were lost or doubled, or the file was changed: this run's account cannot be trusted",
    )
