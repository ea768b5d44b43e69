"""Find what a configuration names: a registered short name, or an import path `package.module:Name`.

Not here: the names themselves (each room registers its own table).
"""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ist.errors import ConfigError


def resolve(name: str, key: str, short_names: Mapping[str, str], module: ModuleType | None = None) -> Any:
    """Return the object that `name` stands for.

    Args:
        name: A key of `short_names`, an attribute of `module`, or `package.module:Name`.
        key: The configuration key, for messages.
        short_names: Registered names and the import paths they stand for.
        module: A library module whose attributes may be named directly, such as `torch.optim`.

    Raises:
        ConfigError: The name is not known, or its import fails.
    """
    if ":" in name or name in short_names:
        return _import(short_names.get(name, name), f"'{key}' is '{name}'")
    if module is not None and not name.startswith("_") and callable(getattr(module, name, None)):
        return getattr(module, name)
    known = [*short_names, *([n for n in vars(module) if not n.startswith("_")] if module else [])]
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    near = near or sorted(candidate for candidate in by_lower if candidate.startswith(name.lower()))
    package, dot, attribute = name.rpartition(".")
    if near:
        hint = f"did you mean '{by_lower[near[0]]}'?"
    elif dot:
        hint = f"did you mean '{package}:{attribute}'?"
    else:
        hint = f"known are {', '.join(sorted(short_names))}." if short_names else "not known."
    where = f" an attribute of {module.__name__}," if module else ""
    raise ConfigError(f"'{key}' is '{name}': {hint} Or give{where} an import path 'package.module:Name'")


def call(function: Any, args: Mapping[str, Any], key: str) -> Any:
    """Call `function(**args)`, with a `ConfigError` that names `key` if the arguments do not fit.

    Raises:
        ConfigError: A keyword is unknown or missing, or its value is refused.
    """
    try:
        inspect.signature(function).bind(**args)
    except TypeError as error:
        name = getattr(function, "__name__", str(function))
        raise ConfigError(f"'{key}' does not fit {name}{inspect.signature(function)}: {error}") from error
    except ValueError:
        pass  # some builtins have no signature: the call itself will tell
    try:
        return function(**args)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"'{key}' was refused: {error}") from error


def _import(path: str, what: str) -> Any:
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(f"{what}: expected 'package.module:Name'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{what}, which does not import: {error}") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ConfigError(f"{what}: module '{module_name}' has no '{attribute}'") from error
