"""Every error the package raises on purpose, in one tree.

    RayRLHFError
    ├── ConfigError (ValueError)          a config cannot be run; found before any actor starts
    ├── DataError (ValueError)            a data file or record is wrong; names file and line
    ├── ModelError (ValueError)           a model or tokenizer does not fit its role
    ├── ResourceError (RuntimeError)      the cluster lacks what the config asks for
    ├── ActorError (RuntimeError)         a remote actor failed
    │   ├── ActorLost                     ... its process is gone, and another may take its place
    │   │   └── ActorTimeout (TimeoutError)   ... or it did not answer before its deadline
    │   └── DataLost                      ... since what it was to work on went with a node
    ├── WeightSyncError (RuntimeError)    a publish could not be verified
    │   └── PolicyMovedOn                 ... since the policy has learned after that version
    ├── CheckpointError (RuntimeError)    a checkpoint is damaged, or not of this run
    ├── LedgerError (ValueError)          a ledger contradicts itself: samples were lost or doubled
    ├── TrainingError (RuntimeError)      a run-time guard found training numerically broken
    └── Stopped                           somebody asked the run to end; it can be resumed

The first four are the user's to mend: the CLI prints them as one message and exits with 2. All of them
hold only strings, so they survive pickling across a Ray boundary.
"""

from __future__ import annotations

import re

__all__ = [
    "USER_ERRORS",
    "ActorError",
    "ActorLost",
    "ActorTimeout",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DataLost",
    "LedgerError",
    "ModelError",
    "PolicyMovedOn",
    "RayRLHFError",
    "ResourceError",
    "Stopped",
    "TrainingError",
    "WeightSyncError",
    "printable",
]


# Controls but tab and line end, what turns the direction of writing, and halves of a pair, which no console can write.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with what would steer a terminal, or cannot be written to one, as an escape: files name their fields."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class RayRLHFError(Exception):
    """Root of the tree: one message that names the place, and a hint that names the cure."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = printable(message)
        self.hint = printable(hint)

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ConfigError(RayRLHFError, ValueError):
    """A config is malformed, contradicts itself, or names something that does not exist."""


class DataError(RayRLHFError, ValueError):
    """A data file is missing or malformed, or a record in it cannot be used."""


class ModelError(RayRLHFError, ValueError):
    """A model, head or tokenizer does not fit the role it is asked to play."""


class ResourceError(RayRLHFError, RuntimeError):
    """The cluster (or this machine) lacks CPUs, GPUs or memory that the config asks for."""


class ActorError(RayRLHFError, RuntimeError):
    """A remote actor failed; the message names its role, rank and phase."""

    role = ""
    """whose it was"""


class ActorLost(ActorError):
    """A remote actor's process is gone or hangs; a new one may take its place."""


class ActorTimeout(ActorLost, TimeoutError):
    """A remote call passed its deadline; the message names role, rank and phase."""


class DataLost(ActorError):
    """Objects of Ray's store went with the node that held them; what they were made from has to be done again."""


class WeightSyncError(RayRLHFError, RuntimeError):
    """A weight publish failed its fingerprint, coverage or log-prob probe."""


class PolicyMovedOn(WeightSyncError):
    """An engine that came late asked for a version that the policy is no longer."""


class CheckpointError(RayRLHFError, RuntimeError):
    """A checkpoint is damaged or missing, or belongs to a run with other settings."""


class LedgerError(RayRLHFError, ValueError):
    """A run's ledger contradicts itself; the message names the line."""


class TrainingError(RayRLHFError, RuntimeError):
    """A run-time guard stopped training: NaN loss, or a ratio that should be 1 and is not."""


class Stopped(RayRLHFError):
    """The run was asked to end (SIGTERM) and has saved what `--resume` goes on from."""


USER_ERRORS = (ConfigError, DataError, ModelError, ResourceError)
