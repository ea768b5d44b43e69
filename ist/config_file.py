"""Read a configuration file and its overrides into a `Config`.

Law: whatever is wrong ends here, as one `ConfigError` that names the file, the key,
the value and what is allowed.

YAML is read with the scalar rules of YAML 1.2: PyYAML follows 1.1, in which `1e-3`
is a string, `no` is false and `1:30` is ninety.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ist.config import Config
from ist.errors import ConfigError
from ist.redact import holds_secret, redacted


class _Yaml12Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the scalar rules of YAML 1.2's core schema and no duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing a key that stands twice (PyYAML keeps the last one in silence)."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain name", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
):
    _Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_Yaml12Loader.yaml_implicit_resolvers[""] = _Yaml12Loader.yaml_implicit_resolvers.pop("\0")


class _Yaml12Dumper(yaml.SafeDumper):
    """Quotes what `_Yaml12Loader` would not read back as text."""

    yaml_implicit_resolvers = _Yaml12Loader.yaml_implicit_resolvers


def _construct_int(_loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text: str = node.value
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


def _construct_float(_loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(inf|nan)", r"\1", node.value.lower()))


_Yaml12Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Yaml12Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document.

    Raises:
        ConfigError: The text is not YAML; the message names `source`, line and column.
    """
    try:
        return yaml.load(text, Loader=_Yaml12Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate a configuration file.

    Args:
        path: A YAML file.
        overrides: Strings `dotted.key=value`, the value in YAML; later ones win.

    Raises:
        ConfigError: The file is missing or malformed, or a key or value is not allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such configuration file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {_kind(tree)}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {redacted(override)}: expected dotted.key=value, such as train.local_steps=20")
        tree = _with_override(tree, key, parse_yaml(value, f"--set {redacted(override)}"))
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
        lines = [redacted(f"{source}: {_explain(detail)}") for detail in error.errors()]
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
        tree = _with_override(tree, key, value)
    return validate(tree, f"{source}: compare.overrides.{label}")


def dump_config(config: Config) -> str:
    """Return the configuration as YAML that `load_config` reads back to an equal `Config`."""
    return yaml.dump(config.model_dump(), Dumper=_Yaml12Dumper, sort_keys=False)


def describe_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, description) for every configuration key."""
    for name, field in model.model_fields.items():
        section = _section_of(field)
        if section is not None:
            yield from describe_keys(section, f"{prefix}{name}.")
        else:
            default = f"default {field.get_default(call_default_factory=True)}"
            if field.is_required():
                default = "required"
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
    head, dot, rest = key.partition(".")
    if not dot:
        return {**tree, head: value}
    child = tree.get(head)
    return {**tree, head: _with_value(child if isinstance(child, Mapping) else {}, rest, value)}


_OF_OPTIMISERS = ("lr", "momentum", "weight_decay", "betas")


def _explain(detail: ErrorDetails) -> str:
    path = ".".join(str(part) for part in detail["loc"])
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
        return f"'{path}' is {value!r} ({_kind(value)}): expected a mapping with some of the keys {keys}"
    if detail["type"] == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"'{path}': {message}" if path else message
    return f"'{path}' is {value!r} ({_kind(value)}): {detail['msg'][0].lower()}{detail['msg'][1:]}"


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
