"""Building blocks of the configuration's sections: types, the base class, and explanations of keys and errors.

Where it sits: `ist/config/schema.py`, `ist/config/methods.py`, `ist/config/partition.py` and `ist/config/recipe.py`
declare keys with these types.
Not here: the keys themselves.
"""

import difflib
import functools
import inspect
import json
import textwrap
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ist.errors import ConfigError
from ist.redact import holds_secret, redacted

PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]  # the range of the system's timers
Fraction = Annotated[float, Field(gt=0, le=1)]
Pattern = Annotated[str, Field(min_length=1)]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=100)]


class Section(BaseModel):
    """A mapping in the YAML file. Unknown keys and wrong types are errors; instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Add what `ist keys` explains to the docstring, for `help`."""
        lines = [f"{key} ({kind}; {default}): {meaning}" for key, kind, default, meaning in describe_keys(cls)]
        shown = [
            textwrap.fill(line, 110, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
            for line in lines
        ]
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Keys:", *shown])

    def __init__(self, /, **values: Any) -> None:
        """Create a section from Python; NumPy and torch numbers are accepted.

        Raises:
            ConfigError: A key is unknown or a value is not allowed; one line per mistake.
        """
        try:
            super().__init__(**python_numbers(values))
        except ValidationError as error:
            raise explained(error, type(self), f"ist.{type(self).__name__}") from (
                None if holds_secret(str(error)) else error
            )

    # pydantic itself creates nested sections, so that a mistake is reported once, with its full path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def python_numbers(value: Any) -> Any:
    """Convert NumPy and torch numbers in a nested value to Python numbers, and arrays to lists, as in YAML."""
    numbers = getattr(value, "tolist", None)  # this module imports neither package
    if callable(numbers) and not isinstance(value, type):
        return numbers()
    if isinstance(value, Mapping):
        return {key: python_numbers(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(python_numbers(item) for item in value)
    return value


def plain(value: Any) -> Any:
    """Convert a configuration value to types that YAML and JSON can represent.

    Values from Python may have other types. A function or class becomes its module and qualified name, which are the
    same in every process and in every run. NumPy and torch numbers become Python numbers.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, functools.partial):
        return {"partial": plain(value.func), "args": plain(value.args), "keywords": plain(value.keywords)}
    numbers = getattr(value, "tolist", None)  # an array or a tensor; this module imports neither package
    if callable(numbers) and not isinstance(value, type):
        return numbers()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    named = value if isinstance(getattr(value, "__qualname__", None), str) else type(value)
    return f"{getattr(named, '__module__', None)}:{named.__qualname__}"


ADDED_KEYS = (
    ("pool", "ranks_per_worker", 1),
    ("pool", "inside", "ddp"),
    ("pool", "store", "coordinator"),
    ("pool", "evaluation", None),
    ("pool", "message_buffers", None),
    ("partition", "rest", "absent"),
    ("exchange", "rest", "int4"),
    ("recipe", "merge_scale", {"own": 1.0, "shared": 1.0}),
)
"""(section, key, default) of keys that earlier versions do not have; with its default, a key does not count."""


def run_fingerprint(config: BaseModel) -> int:
    """Return a number that differs, in all likelihood, when two processes would not train the same thing the same way.

    Args:
        config: The whole configuration, `ist.config.schema.Config`. What may differ between the processes of a run is
            left out: paths, names, monitoring.
    """
    local: dict[str, Any] = {
        "output": True,
        "name": True,
        "compare": True,
        "checkpoint": True,
        "watch": True,
        "data": {"root", "loader"},
        "pool": {"allow_insecure"},
    }
    tree = plain(config.model_dump(exclude=local))
    # Absent from the configuration of earlier versions, whose states (`ist.join(state=)`) have their number.
    for section, key, value in ADDED_KEYS:
        if tree.get(section, {}).get(key) == value:
            del tree[section][key]
    for stage in tree.get("recipe", {}).get("stages", []):
        for key in ("rest", "merge_scale"):
            if stage.get(key) is None:
                stage.pop(key, None)
    return zlib.crc32(json.dumps(tree, sort_keys=True).encode())


def describe_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, description) for every key of a section and of its nested sections.

    An optional section and a list of sections have their own row. `N` in a key stands for the index of a list entry,
    counted from 0.
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
            where = "in each entry" if is_list else f"if {prefix}{name} is given"
            for key, kind, how, meaning in describe_keys(section, inside):
                yield key, kind, f"required {where}" if how == "required" else how, meaning
        else:
            kind = _type_name(field.annotation)
            yield f"{prefix}{name}", kind, default, field.description or ""


def _type_name(annotation: Any) -> str:
    """Return a type's name for a reader of YAML."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(parts[0])
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin in (Union, UnionType):
        return " or ".join(_type_name(part) for part in parts)
    if origin is Callable:
        return "function (from Python)"
    plain = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "any"}
    return plain.get(annotation) or {dict: "mapping", list: "list"}.get(origin or annotation, str(annotation))


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def explained(error: ValidationError, root: type[BaseModel], source: str) -> ConfigError:
    """Return an error with one line per mistake.

    Args:
        error: pydantic's error; its own message quotes values unredacted, including passwords.
        root: The section that could not be created.
        source: Origin of the values; each line starts with it.
    """
    lines = [" ".join(_explain(detail, root).splitlines()) for detail in error.errors()]  # a key may contain newlines
    return ConfigError("\n".join(redacted(f"{source}: {line}") for line in lines))


def short(text: str) -> str:
    """Return a text for a message: passwords removed, length limited."""
    text = redacted(text)  # before truncating, which could cut off the @ that marks a password
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


_SHOWN = 200
_OPTIMIZER_ARGS = ("lr", "momentum", "weight_decay", "betas")


def _explain(detail: ErrorDetails, root: type[BaseModel]) -> str:
    path = short(".".join(str(part) for part in detail["loc"]))
    value = detail["input"]
    if detail["type"] == "extra_forbidden":
        known = _known_keys(root, detail["loc"][:-1])
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        if "args" in known:  # a Component: its own arguments go into args
            near = near or [".".join(map(str, [*detail["loc"][:-1], "args", detail["loc"][-1]]))]
        inside = [dotted for dotted, *_ in describe_keys(root) if dotted.rpartition(".")[2] == path]
        is_optimizers = path in _OPTIMIZER_ARGS and "train" in root.model_fields
        near = near or (
            [f"train.optimizer.args.{path}"] if is_optimizers else sorted(inside, key=lambda k: k.count("."))
        )
        hint = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(sorted(known))}."
        return f"unknown key '{path}'. {hint}"
    if detail["type"] == "missing":
        return f"'{path}' is required"
    if detail["type"] == "model_type":
        keys = ", ".join(_known_keys(root, detail["loc"]))
        return f"'{path}' is {short(repr(value))} ({kind_of(value)}): expected a mapping with keys among {keys}"
    if detail["type"] == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"'{path}': {message}" if path else message
    return f"'{path}' is {short(repr(value))} ({kind_of(value)}): {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _known_keys(root: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    model = root
    for part in path:
        if isinstance(part, int):  # an index of a list
            continue
        section = _section_of(model.model_fields[str(part)])
        assert section is not None
        model = section
    return list(model.model_fields)


def kind_of(value: Any) -> str:
    """Return the name of a value's type for a reader of YAML."""
    names = {dict: "a mapping", list: "a list", str: "a string", int: "a whole number", float: "a number"}
    names |= {bool: "true/false", type(None): "nothing"}
    return names.get(type(value), type(value).__name__)


class Component(Section):
    """A named function or class and its keyword arguments."""

    name: str = Field(description="short name, or import path 'package.module:Name'")
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of this function or class")
