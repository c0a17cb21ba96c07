"""What every section shares: unknown keys are errors, values are frozen, defaults live on the field."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from rayrlhf.config.limits import shown

__all__ = [
    "Folder",
    "Fraction",
    "NonNegative",
    "NonNegativeInt",
    "PathOrName",
    "Positive",
    "PositiveInt",
    "Section",
    "ZeroStage",
    "path_or_name",
]

LARGEST_INT, LARGEST = 2**53, 1e30
# Bytes of a file's name on any file system in use, and of a path: a folder and a file in it stay under Linux's 4096.
MOST_NAME, MOST_PATH = 255, 2000


def path_or_name(text: str) -> str:
    """`text` itself, once it is sure that it can be looked up as a path, be there one or not.

    Raises:
        ValueError: naming what was found and the cure; without it the system would, in the midst of a run.
    """
    _expanded(Path(text))
    return text


def _expanded(path: Path) -> Path:
    """As `path_or_name`, with ~ and ~user as the home folder that they stand for."""
    found = f"found {shown(str(path))}"
    if "\0" in str(path):
        raise ValueError(f"{found}; no path holds a NUL: take it out")
    if len(os.fsencode(path)) > MOST_PATH:
        raise ValueError(f"{found}; a path of more than {MOST_PATH} bytes: shorten it")
    if any(len(os.fsencode(part)) > MOST_NAME for part in path.parts):
        raise ValueError(f"{found}; the name of a file or folder holds at most {MOST_NAME} bytes: shorten it")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(
            f"{found}; {path.parts[0]} is nobody's home folder on this machine: write the whole path"
        ) from None


# Numbers are strict: `true` is not 1 and "8" is not 8; an int is a fine float.
# None is so large that what is computed from it overflows.
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INT, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST_INT, strict=True)]
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False, strict=True)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
Folder = Annotated[Path, AfterValidator(_expanded)]
# A folder or file, or what is no path: a name on the hub, a module.
PathOrName = Annotated[str, AfterValidator(path_or_name)]
ZeroStage = Annotated[int, Field(ge=0, le=3, strict=True)]


class Section(BaseModel):
    """A config section: strict about keys and types, immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)
