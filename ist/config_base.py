"""What the sections of a configuration are made of.

Not here: any key (`ist/config.py`, `ist/config_method.py`).
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]  # what the system's timers can take
Fraction = Annotated[float, Field(gt=0, le=1)]
Pattern = Annotated[str, Field(min_length=1)]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=100)]


class Section(BaseModel):
    """A mapping of the YAML file: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Component(Section):
    """Something named, with its arguments."""

    name: str = Field(description="short name, or import path 'package.module:Name'")
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for it")
