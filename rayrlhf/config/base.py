"""What every section shares: unknown keys are errors, values are frozen, defaults live on the field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = ["Folder", "Fraction", "NonNegative", "NonNegativeInt", "Positive", "PositiveInt", "Section", "ZeroStage"]

LARGEST_INT, LARGEST = 2**53, 1e30
# Numbers are strict: `true` is not 1 and "8" is not 8; an int is a fine float.
# None is so large that what is computed from it overflows.
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INT, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST_INT, strict=True)]
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False, strict=True)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]
ZeroStage = Annotated[int, Field(ge=0, le=3, strict=True)]


class Section(BaseModel):
    """A config section: strict about keys and types, immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)
