"""What the sections of a configuration are made of.

Not here: any key (`ist/config/schema.py`, `ist/config/method.py`).
"""

import functools
from collections.abc import Mapping
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


def plain(value: Any) -> Any:
    """Return a value of a configuration as YAML and JSON can hold it.

    Python's callers may give more than that: a function or a class is named by its module and qualified name, which are
    the same in every process and at every start; numbers of NumPy and torch are numbers.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, functools.partial):
        return {"partial": plain(value.func), "args": plain(value.args), "keywords": plain(value.keywords)}
    numbers = getattr(value, "tolist", None)  # an array or a tensor; this module does without both packages
    if callable(numbers) and not isinstance(value, type):
        return numbers()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    named = value if isinstance(getattr(value, "__qualname__", None), str) else type(value)
    return f"{getattr(named, '__module__', None)}:{named.__qualname__}"


class Component(Section):
    """Something named, with its arguments."""

    name: str = Field(description="short name, or import path 'package.module:Name'")
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for it")
