"""What the sections of a configuration are made of; which keys they have, and what is wrong with a value.

Not here: any key (`ist/config/schema.py`, `ist/config/method.py`).
"""

import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ist.config.redact import holds_secret, redacted
from ist.errors import ConfigError

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

    def __init__(self, /, **values: Any) -> None:
        """Make a section from Python; numbers may be NumPy's or torch's.

        Raises:
            ConfigError: A key is unknown, or its value is not allowed: one line for each.
        """
        try:
            super().__init__(**python_numbers(values))
        except ValidationError as error:
            raise explained(error, type(self), f"ist.{type(self).__name__}") from (
                None if holds_secret(str(error)) else error
            )

    # Sections inside other ones are made by pydantic itself, so that a mistake is told once, with its whole path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class Component(Section):
    """Something named, with its arguments."""

    name: str = Field(description="short name, or import path 'package.module:Name'")
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for it")


def python_numbers(value: Any) -> Any:
    """Return a nested value with numbers of NumPy and torch as Python's, and arrays as lists: as YAML has them."""
    numbers = getattr(value, "tolist", None)  # this module does without both packages
    if callable(numbers) and not isinstance(value, type):
        return numbers()
    if isinstance(value, Mapping):
        return {key: python_numbers(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(python_numbers(item) for item in value)
    return value


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


def describe_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, description) for every key of a section, and of the sections in it.

    A section that may be left out (null) and a list of sections have a row of their own. `N` in a key stands for the
    number of a list's entry, from 0.
    """
    for name, field in model.model_fields.items():
        section = _section_of(field)
        is_list = get_origin(field.annotation) is list
        if section is not None and not is_list and type(None) not in get_args(field.annotation):
            yield from describe_keys(section, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)}"
        if section is not None:
            yield f"{prefix}{name}", "list" if is_list else "mapping or null", default, field.description or ""
            inside = f"{prefix}{name}.N." if is_list else f"{prefix}{name}."
            where = "in each entry" if is_list else f"where {prefix}{name} is given"
            for key, kind, how, meaning in describe_keys(section, inside):
                yield key, kind, f"required {where}" if how == "required" else how, meaning
        else:
            kind = _type_name(field.annotation)
            yield f"{prefix}{name}", kind, default, field.description or ""


def _type_name(annotation: Any) -> str:
    """A type in the words of somebody who writes YAML."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(parts[0])
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin in (Union, UnionType):
        return " or ".join(_type_name(part) for part in parts)
    plain = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "any"}
    return plain.get(annotation) or {dict: "mapping", list: "list"}.get(origin or annotation, str(annotation))


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def explained(error: ValidationError, root: type[BaseModel], source: str) -> ConfigError:
    """Return an error with one line for each thing that is wrong.

    Args:
        error: What pydantic found; its own text quotes values as they are, passwords among them.
        root: The section that was to be made.
        source: Where its values are from, to begin each line with.
    """
    told = [" ".join(_explain(detail, root).splitlines()) for detail in error.errors()]  # a key may hold a line's end
    return ConfigError("\n".join(redacted(f"{source}: {line}") for line in told))


def short(text: str) -> str:
    """Return a text that may be shown: without passwords, and not without end."""
    text = redacted(text)  # before the end of a URL is cut off, by which it is known
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


_SHOWN = 200
_OF_OPTIMISERS = ("lr", "momentum", "weight_decay", "betas")


def _explain(detail: ErrorDetails, root: type[BaseModel]) -> str:
    path = short(".".join(str(part) for part in detail["loc"]))
    value = detail["input"]
    if detail["type"] == "extra_forbidden":
        known = _known_keys(root, detail["loc"][:-1])
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        if "args" in known:  # of something that is named, with its arguments
            near = near or [".".join(map(str, [*detail["loc"][:-1], "args", detail["loc"][-1]]))]
        inside = [dotted for dotted, *_ in describe_keys(root) if dotted.rpartition(".")[2] == path]
        is_optimizers = path in _OF_OPTIMISERS and "train" in root.model_fields
        near = near or (
            [f"train.optimizer.args.{path}"] if is_optimizers else sorted(inside, key=lambda k: k.count("."))
        )
        hint = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(sorted(known))}."
        return f"unknown key '{path}'. {hint}"
    if detail["type"] == "missing":
        return f"'{path}' is required"
    if detail["type"] == "model_type":
        keys = ", ".join(_known_keys(root, detail["loc"]))
        return f"'{path}' is {short(repr(value))} ({kind_of(value)}): expected a mapping with some of the keys {keys}"
    if detail["type"] == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"'{path}': {message}" if path else message
    return f"'{path}' is {short(repr(value))} ({kind_of(value)}): {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _known_keys(root: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    model = root
    for part in path:
        if isinstance(part, int):  # a place in a list
            continue
        section = _section_of(model.model_fields[str(part)])
        assert section is not None
        model = section
    return list(model.model_fields)


def kind_of(value: Any) -> str:
    """Return the type of a value in the words of somebody who writes YAML."""
    names = {dict: "a mapping", list: "a list", str: "a string", int: "a whole number", float: "a number"}
    names |= {bool: "true/false", type(None): "nothing"}
    return names.get(type(value), type(value).__name__)
