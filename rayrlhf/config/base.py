"""What every section shares: unknown keys are errors, values are frozen, defaults live on the field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = ["Folder", "Fraction", "NonNegative", "NonNegativeInt", "Positive", "PositiveInt", "Section", "ZeroStage"]

# Numbers are strict: `true` is not 1 and "8" is not 8; an int is a fine float.
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]
ZeroStage = Annotated[int, Field(ge=0, le=3, strict=True)]


class Section(BaseModel):
    """A config section: strict about keys and types, immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)
