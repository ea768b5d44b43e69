"""Resolve names in a configuration: a registered short name, or an import path `package.module:Name`.

Where it sits: `ist/runs/build.py` and the rooms that build objects from a configuration call `resolve` and `call`.
Not here: the short names themselves; each room has its own table.
"""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ist.errors import ConfigError, ISTError, error_with_line, is_out_of_memory


def resolve(
    name: str, key: str, short_names: Mapping[str, str], module: ModuleType | None = None, is_called: bool = True
) -> Any:
    """Return the object that `name` refers to.

    Args:
        name: A key of `short_names`, an attribute of `module`, or `package.module:Name`.
        key: The configuration key, for messages.
        short_names: Registered short names and their import paths.
        module: A library module whose attributes may be named directly, such as `torch.optim`.
        is_called: Whether the object must be a function or a class.

    Raises:
        ConfigError: The name is unknown, its import fails, or the object must be callable and is not.
    """
    if ":" in name or name in short_names:
        found = _import(short_names.get(name, name), f"'{key}' is '{name}'")
        if is_called and not callable(found):
            raise ConfigError(f"'{key}' is '{name}', a {type(found).__name__}: expected a function or a class")
        return found
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
        hint = f"known names: {', '.join(sorted(short_names))}." if short_names else "unknown name."
    where = f" an attribute of {module.__name__} or" if module else ""
    raise ConfigError(f"'{key}' is '{name}': {hint} You can also give{where} an import path 'package.module:Name'")


def call(function: Any, args: Mapping[str, Any], key: str) -> Any:
    """Call `function(**args)`; turn failures into a `ConfigError` that names `key`.

    Raises:
        ConfigError: An argument is unknown, missing or refused, or the function raises any other error. Errors of this
            package and out-of-memory errors pass through unchanged.
    """
    try:
        inspect.signature(function).bind(**args)
    except TypeError as error:
        name = getattr(function, "__name__", str(function))
        raise ConfigError(f"'{key}' does not match {name}{inspect.signature(function)}: {error}") from error
    except ValueError:
        pass  # some builtins have no signature: the call itself checks the arguments
    try:
        return function(**args)
    except ISTError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        if is_out_of_memory(error):
            raise  # the arguments are not the cause; the code that set a limit names it
        if isinstance(error, TypeError | ValueError | RuntimeError):
            raise ConfigError(f"'{key}' was refused: {error}") from error
        name = getattr(function, "__name__", str(function))
        raise ConfigError(f"'{key}': {name} raises {error_with_line(error)}") from error


def _import(path: str, what: str) -> Any:
    module_name, colon, attribute = path.partition(":")
    if not colon or not attribute or not all(module_name.split(".")):
        raise ConfigError(f"{what}: expected 'package.module:Name'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{what}, but the import fails: {error}") from error
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise ConfigError(f"{what}, but the import fails: {error_with_line(error)}") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ConfigError(f"{what}: module '{module_name}' has no '{attribute}'") from error
    except Exception as error:  # a module may define __getattr__
        raise ConfigError(f"{what}: '{attribute}' of module '{module_name}' raises {error_with_line(error)}") from error
