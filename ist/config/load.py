"""Read a configuration file and its overrides into a `Config`.

Where it sits: the command line and `ist/storage/run_folder.py` load configurations here; `ist/api.py` validates here.
Law: every mistake in a configuration becomes one `ConfigError` that names the file, the key, the value and the allowed
values.
Not here: YAML itself (`ist/config/yaml_text.py`), the meaning of keys (`ist/config/schema.py`).
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ist.config.base import explained, kind_of, plain, short
from ist.config.methods import RENAMED, method_spec
from ist.config.runtime import Pool
from ist.config.schema import Config
from ist.config.yaml_text import MAX_DEPTH, dump_yaml, parse_yaml, read_text
from ist.errors import ConfigError
from ist.redact import holds_secret


def load_config(path: Path, overrides: Sequence[str] = (), is_saved: bool = False) -> Config:
    """Read, override and validate a configuration file.

    Warns of keys of earlier versions, which it reads under their new names.

    Args:
        path: A YAML file.
        overrides: Strings `dotted.key=value`, the value in YAML; later ones win. A number in a key selects an entry of
            a list, counted from 0: `recipe.stages.0.rounds=3`.
        is_saved: Whether a run wrote the file, with every key that there was; nobody has to change it: no warnings.

    Raises:
        ConfigError: The file is missing or malformed, or a key or value is not allowed.
    """
    return parse_config(read_text(path), str(path), overrides, is_saved)


def parse_config(text: str, source: str, overrides: Sequence[str] = (), is_saved: bool = False) -> Config:
    """Parse, override and validate the text of a configuration; `source` names its origin in messages.

    Args and errors are those of `load_config`.
    """
    tree = parse_yaml(text, source)
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected a mapping of keys to values, found {kind_of(tree)}")
    tree, old_keys = with_current_keys(tree, source)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {short(override)}: expected dotted.key=value, such as train.local_steps=20")
        option = f"--set {short(override)}"
        try:
            tree, of_value = with_current_keys(_with_override(tree, key, parse_yaml(value, option)), option)
        except ConfigError as error:
            raise ConfigError(str(error) if str(error).startswith(option) else f"{option}: {error}") from error
        old_keys += [(option, key)] if key in RENAMED else of_value
    config = validate(tree, source)
    if not is_saved:
        for where, old in old_keys:
            warnings.warn(f"{where}: '{old}' is now called '{RENAMED[old]}': rename it", FutureWarning, stacklevel=2)
    return with_methods(config, config.compare.methods, source)


def overridden_keys(overrides: Sequence[str]) -> list[str]:
    """Return the keys that overrides set, by their current names, and the keys that they remove."""
    keys = [RENAMED.get(key, key) for key in (override.partition("=")[0] for override in overrides)]
    return [*keys, *(_INSTEAD[key] for key in keys if key in _INSTEAD)]


def validate(tree: Mapping[str, Any], source: str) -> Config:
    """Turn plain values into a `Config`; `source` names their origin in error messages.

    Raises:
        ConfigError: One line per mistake.
    """
    try:
        return Config.model_validate(with_current_keys(tree, source)[0])
    except ValidationError as error:
        raise explained(error, Config, source) from (None if holds_secret(str(error)) else error)


def with_current_keys(tree: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Give keys of earlier versions their new names.

    Returns:
        The tree, and each old key in it with the place where it is. Those in compare.overrides are among them; they get
        their new names when they are applied.

    Raises:
        ConfigError: A key is there under both names.
    """
    current, found = dict(tree), list[tuple[str, str]]()
    for old, new in RENAMED.items():
        section, _, last = old.rpartition(".")
        holder = _value_at(current, section)
        target = _value_at(current, new.rpartition(".")[0])
        if not isinstance(holder, Mapping) or last not in holder or not isinstance(target or {}, Mapping):
            continue
        if _value_at(current, new) is not None:
            raise ConfigError(f"{source}: '{old}' is the old name of '{new}', and both are there: leave '{old}' out")
        current = _with_value(current, section, {key: value for key, value in holder.items() if key != last})
        current = _with_value(current, new, holder[last])
        found.append((source, old))
    overrides = _value_at(current, "compare.overrides")
    for label, changes in overrides.items() if isinstance(overrides, Mapping) else ():
        keys = changes if isinstance(changes, Mapping) else ()
        found += [(f"{source}: compare.overrides.{label}", key) for key in keys if key in RENAMED]
    return current, found


def _value_at(tree: Mapping[str, Any], key: str) -> Any:
    """Return what a tree of mappings holds under a dotted key, None if nothing."""
    found: Any = tree
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def with_methods(config: Config, methods: Sequence[str], source: str) -> Config:
    """Return the configuration with these methods to compare; check each method with its overrides.

    Raises:
        ConfigError: An override is not valid.
    """
    changed = validate(
        {**config.model_dump(), "compare": {**config.compare.model_dump(), "methods": list(methods)}}, source
    )
    for method in methods:
        config_for_method(changed, method, source)
    return changed


def config_for_method(config: Config, label: str, source: str = "configuration") -> Config:
    """Return the configuration that `ist compare` uses for one entry: a method, or a label with its own `method`."""
    tree: dict[str, Any] = {**config.model_dump(), "method": label, "label": label}
    for key, value in config.compare.overrides.get(label, {}).items():
        try:
            tree = _with_override(tree, key, value)
        except ConfigError as error:
            raise ConfigError(f"{source}: compare.overrides.{label}: {error}") from error
    spec = method_spec(str(tree["method"]))
    if not (spec.needs_groups and spec.has_coordinator):  # its ranks hold the full network
        for key in ("store", "store_replicas", "evaluation"):
            if f"pool.{key}" not in config.compare.overrides.get(label, {}):
                tree = _with_override(tree, f"pool.{key}", Pool.model_fields[key].default)
    return validate(tree, f"{source}: compare.overrides.{label}")


def dump_config(config: Config) -> str:
    """Return the configuration as YAML. If all values are `plain`, `load_config` reads it back to an equal `Config`."""
    return dump_yaml(plain(config.model_dump()))


_INSTEAD = {"train.epochs": "train.rounds", "train.rounds": "train.epochs"}
"""Keys that replace each other."""


def _with_override(tree: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set a key, also by an old name; setting one of `train.epochs` and `train.rounds` removes the other."""
    key = RENAMED.get(key, key)
    other = _INSTEAD.get(key)
    if other is not None and value is not None:
        tree = _with_value(tree, other, None)
    return _with_value(tree, key, value)


def _with_value(tree: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set a key; a number in the key selects an entry of a list, counted from 0.

    Raises:
        ConfigError: The list has no such entry.
    """
    parts = key.split(".")
    if len(parts) > MAX_DEPTH:
        raise ConfigError(f"'{short(key)}' has {len(parts)} parts: expected at most {MAX_DEPTH}")
    root: dict[str, Any] = dict(tree)
    node: dict[str, Any] | list[Any] = root
    for number, part in enumerate(parts):
        place: Any = part
        if isinstance(node, list):
            if not (part.isdecimal() and len(part) < 10 and int(part) < len(node)):
                raise ConfigError(
                    f"'{short(key)}': '{'.'.join(parts[:number])}' is a list of {len(node)} entries: expected an "
                    f"index from 0, found '{short(part)}'"
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
