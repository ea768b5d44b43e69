"""Read a configuration file and its overrides into a `Config`.

Law: whatever is wrong ends here, as one `ConfigError` that names the file, the key,
the value and what is allowed.

Not here: YAML itself (`ist/config/yaml_text.py`), what a key means (`ist/config/schema.py`).
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ist.config.base import plain
from ist.config.redact import holds_secret, redacted
from ist.config.schema import Config
from ist.config.yaml_text import MAX_DEPTH, dump_yaml, parse_yaml, read_text
from ist.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate a configuration file.

    Args:
        path: A YAML file.
        overrides: Strings `dotted.key=value`, the value in YAML; later ones win. In a key a number stands for an entry
            of a list, from 0: `recipe.stages.0.rounds=3`.

    Raises:
        ConfigError: The file is missing or malformed, or a key or value is not allowed.
    """
    tree = parse_yaml(read_text(path), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {_kind(tree)}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {_short(override)}: expected dotted.key=value, such as train.local_steps=20")
        source = f"--set {_short(override)}"
        try:
            tree = _with_override(tree, key, parse_yaml(value, source))
        except ConfigError as error:
            raise ConfigError(str(error) if str(error).startswith(source) else f"{source}: {error}") from error
    config = validate(tree, str(path))
    return with_methods(config, config.compare.methods, str(path))


def validate(tree: Mapping[str, Any], source: str) -> Config:
    """Turn plain values into a `Config`; `source` names their origin in error messages.

    Raises:
        ConfigError: One line for each thing that is wrong.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        told = [" ".join(_explain(detail).splitlines()) for detail in error.errors()]  # a key may hold a line's end
        lines = [redacted(f"{source}: {line}") for line in told]
        # pydantic's own text quotes values as they are
        raise ConfigError("\n".join(lines)) from (None if holds_secret(str(error)) else error)


def with_methods(config: Config, methods: Sequence[str], source: str) -> Config:
    """Return the configuration with other methods to compare, each checked together with its overrides.

    Raises:
        ConfigError: An override does not fit.
    """
    changed = validate(
        {**config.model_dump(), "compare": {**config.compare.model_dump(), "methods": list(methods)}}, source
    )
    for method in methods:
        config_for_method(changed, method, source)
    return changed


def config_for_method(config: Config, label: str, source: str = "configuration") -> Config:
    """Return the configuration with which `ist compare` runs one of its entries: a method, or a label for one."""
    tree: dict[str, Any] = {**config.model_dump(), "method": label, "label": label}
    for key, value in config.compare.overrides.get(label, {}).items():
        try:
            tree = _with_override(tree, key, value)
        except ConfigError as error:
            raise ConfigError(f"{source}: compare.overrides.{label}: {error}") from error
    return validate(tree, f"{source}: compare.overrides.{label}")


def dump_config(config: Config) -> str:
    """Return the configuration as YAML that `load_config` reads back to an equal `Config`, where values are `plain`."""
    return dump_yaml(plain(config.model_dump()))


def describe_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, description) for every configuration key.

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


def _with_override(tree: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set a key; a new length of the run, in epochs or in rounds, takes the place of the old one."""
    other = {"train.epochs": "train.rounds", "train.rounds": "train.epochs"}.get(key)
    if other is not None and value is not None:
        tree = _with_value(tree, other, None)
    return _with_value(tree, key, value)


def _with_value(tree: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set a key; where there is a list on the way to it, a number stands for one of its entries, from 0.

    Raises:
        ConfigError: The list has no such entry.
    """
    parts = key.split(".")
    if len(parts) > MAX_DEPTH:
        raise ConfigError(f"'{_short(key)}' has {len(parts)} parts: no key has more than {MAX_DEPTH}")
    root: dict[str, Any] = dict(tree)
    node: dict[str, Any] | list[Any] = root
    for number, part in enumerate(parts):
        place: Any = part
        if isinstance(node, list):
            if not (part.isdecimal() and len(part) < 10 and int(part) < len(node)):
                raise ConfigError(
                    f"'{_short(key)}': '{'.'.join(parts[:number])}' is a list of {len(node)} entries: expected the "
                    f"number of one of them, from 0, in place of '{_short(part)}'"
                )
            place = int(part)
        if number + 1 == len(parts):
            node[place] = value
            break
        child = node.get(place) if isinstance(node, dict) else node[place]
        made: dict[str, Any] | list[Any] = list(child) if isinstance(child, list) else {}
        if isinstance(child, Mapping):
            made = dict(child)
        node[place] = made
        node = made
    return root


def _short(text: str) -> str:
    text = redacted(text)  # before the end of a URL is cut off, by which it is known
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


_SHOWN = 200
_OF_OPTIMISERS = ("lr", "momentum", "weight_decay", "betas")


def _explain(detail: ErrorDetails) -> str:
    path = _short(".".join(str(part) for part in detail["loc"]))
    value = detail["input"]
    if detail["type"] == "extra_forbidden":
        known = _known_keys(detail["loc"][:-1])
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        if "args" in known:  # of something that is named, with its arguments
            near = near or [f"{path.rpartition('.')[0]}.args.{detail['loc'][-1]}"]
        inside = [dotted for dotted, *_ in describe_keys() if dotted.rpartition(".")[2] == path]
        near = near or ([f"train.optimizer.args.{path}"] if path in _OF_OPTIMISERS else inside)
        hint = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(sorted(known))}."
        return f"unknown key '{path}'. {hint}"
    if detail["type"] == "missing":
        return f"'{path}' is required"
    if detail["type"] == "model_type":
        keys = ", ".join(_known_keys(detail["loc"]))
        return f"'{path}' is {_short(repr(value))} ({_kind(value)}): expected a mapping with some of the keys {keys}"
    if detail["type"] == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"'{path}': {message}" if path else message
    return f"'{path}' is {_short(repr(value))} ({_kind(value)}): {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _known_keys(path: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        if isinstance(part, int):  # a place in a list
            continue
        section = _section_of(model.model_fields[str(part)])
        assert section is not None
        model = section
    return list(model.model_fields)


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "a string", int: "a whole number", float: "a number"}
    names |= {bool: "true/false", type(None): "nothing"}
    return names.get(type(value), type(value).__name__)
