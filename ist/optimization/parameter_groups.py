"""Parameter groups that a configuration describes: which parameters have settings of their own, and which settings.

Where it sits: `factory.py` splits the groups of every optimizer that it makes; `ist/runs/build.py` checks once that
every group has parameters.
Not here: groups that a user's class or function makes itself, which are split like any other.
"""

import copy
import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from ist.config.schema import ParameterGroup
from ist.errors import ConfigError
from ist.optimization.muon import PART

_KEY = "train.optimizer.groups"
_NOT_SETTINGS = ("params", "param_names", "initial_lr", PART)


def split_groups(
    groups: Sequence[ParameterGroup], optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> None:
    """Split the parameter groups of a new optimizer as a configuration describes.

    Each group becomes several: one for each entry of `groups`, in their order, and last one for all other parameters.
    A group without parameters is left out.

    Args:
        groups: The entries; a parameter is in the first that matches it.
        optimizer: The optimizer; its parameter groups are replaced.
        named: Its parameters, by their names in the full network.

    Raises:
        ConfigError: An entry has a setting that the optimizer's groups do not have.
    """
    if not groups:
        return
    names = {id(parameter): name for name, parameter in named.items()}
    found = []
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        parts: list[list[nn.Parameter]] = [[] for _ in range(len(groups) + 1)]
        for parameter in group["params"]:
            number = _group_of(groups, names[id(parameter)], parameter.ndim)
            parts[len(groups) if number is None else number].append(parameter)
        for number, part in enumerate(parts):
            own = copy.deepcopy(groups[number].args) if number < len(groups) else {}
            if part:
                _check_settings(number, own, settings, type(optimizer).__name__)
                found.append({"params": part, **settings, **own})
                if "param_names" in group:
                    found[-1]["param_names"] = [names[id(parameter)] for parameter in part]
    optimizer.param_groups[:] = found


def check_groups(groups: Sequence[ParameterGroup], dims: Mapping[str, int]) -> None:
    """Check that every group has parameters, and that every pattern matches some.

    Args:
        groups: The groups.
        dims: The number of dims of each trained parameter of the full network, by its name.

    Raises:
        ConfigError: A pattern matches no parameter, or a group has none.
    """
    for number, group in enumerate(groups):
        for pattern in group.match:
            if not any(fnmatchcase(name, pattern) for name in dims):
                near = _near(pattern, dims)
                raise ConfigError(
                    f"'{_KEY}.{number}.match' has '{pattern}', which matches no trained parameter: {near}"
                )
        matched = [name for name, number_of_dims in dims.items() if _is_in(group, name, number_of_dims)]
        if not matched:
            patterns = f" that match {group.match}" if group.match else ""
            raise ConfigError(
                f"'{_KEY}.{number}.max_dims' is {group.max_dims}, but all trained parameters{patterns} have more dims"
            )
        if all(_group_of(groups, name, dims[name]) != number for name in matched):
            first = _group_of(groups, matched[0], dims[matched[0]])
            raise ConfigError(
                f"'{_KEY}.{number}' has no parameters, because earlier groups take all that it matches "
                f"('{matched[0]}' is in group {first}): put narrower groups first"
            )


def _is_in(group: ParameterGroup, name: str, dims: int) -> bool:
    has_name = not group.match or any(fnmatchcase(name, pattern) for pattern in group.match)
    return has_name and (group.max_dims is None or dims <= group.max_dims)


def _group_of(groups: Sequence[ParameterGroup], name: str, dims: int) -> int | None:
    return next((number for number, group in enumerate(groups) if _is_in(group, name, dims)), None)


def _check_settings(number: int, own: Mapping[str, object], settings: Mapping[str, object], optimizer: str) -> None:
    known = [key for key in settings if key not in _NOT_SETTINGS]
    for key in own:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"its settings are {', '.join(known)}"
            raise ConfigError(f"'{_KEY}.{number}.args' has '{key}', which {optimizer} does not have: {hint}")


def _near(pattern: str, names: Mapping[str, int]) -> str:
    near = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3) or list(names)[:3]
    return f"names are {', '.join(map(repr, near))}{', ...' if len(near) < len(names) else ''}"
