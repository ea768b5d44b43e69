"""A user's `step` function: it computes the loss of a whole batch, whatever the batch is.

Where it sits: the local steps (`ist/loops/local_step.py`) and `evaluate.py` call `step_loss`, if the task has a step
function instead of a loss of (outputs, targets); `ist/runs/build.py` finds the network's inputs in a batch.
Not here: optimizer steps.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ist.errors import ConfigError
from ist.network.failures import step_errors
from ist.rng import Indices

StepFunction = Callable[[nn.Module, Any], Any]
"""Computes the mean loss of a batch from (network, batch): a tensor with one number; or a mapping with 'loss' and other
values; or a pair of the loss and a mapping of other values."""

_WHAT = "return the mean loss of the batch, a tensor with one number, or a mapping with 'loss'"

Values = Mapping[str, Tensor | float]
"""Numbers by name; tensors have one number and no gradient."""


@dataclass(frozen=True)
class BatchLoss:
    """What a step function computes of a batch.

    Attributes:
        loss: The mean loss, shape ().
        values: The other numbers that it returns: means over the batch.
    """

    loss: Tensor
    values: Values


def step_loss(step: StepFunction, network: nn.Module, batch: Any, numbers: Callable[[], Indices]) -> BatchLoss:
    """Return the mean loss of a batch, and the other numbers that the function returns.

    Args:
        step: The user's function.
        network: The network.
        batch: A batch as it was collated, on the network's device.
        numbers: Returns the numbers of its samples in the data set, for messages.

    Raises:
        ConfigError: The function returns something else than a loss, or a loss without gradient where gradients are on.
        DataError: The function raises an exception.
        ModelError: The network raises one.
    """
    with step_errors(network, numbers):
        result = step(network, batch)
    others: Mapping[Any, Any] = {}
    if isinstance(result, Mapping):
        if "loss" not in result:
            names = ", ".join(map(str, result)) or "nothing"
            raise ConfigError(f"'train.step' returns a {type(result).__name__} with {names}: {_WHAT}")
        result, others = result["loss"], {name: value for name, value in result.items() if name != "loss"}
    elif isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        result, others = result
    if not isinstance(result, Tensor):
        raise ConfigError(f"'train.step' returns a {type(result).__name__}: {_WHAT}")
    if result.numel() != 1:
        raise ConfigError(f"'train.step' returns a loss of shape {tuple(result.shape)}: {_WHAT}, such as loss.mean()")
    if not result.is_floating_point():
        raise ConfigError(f"'train.step' returns a loss of {result.dtype}, which has no gradient: {_WHAT}")
    if torch.is_grad_enabled() and not result.requires_grad:
        raise ConfigError(
            "'train.step' returns a loss without gradient: compute it from the outputs of the network that the "
            "function gets, without detach(), item() or torch.no_grad()"
        )
    values = {
        str(name): value.detach().reshape(()) if isinstance(value, Tensor) else float(value)
        for name, value in others.items()
        if (isinstance(value, Tensor) and value.numel() == 1) or isinstance(value, int | float)
    }
    return BatchLoss(result.reshape(()), values)


def checked_values(values: Values, names: Sequence[str]) -> Values:
    """Return the numbers that a step function returns beside the loss, in the order of `train.logged`.

    Args:
        values: The numbers by name.
        names: The names in `train.logged`.

    Raises:
        ConfigError: The two do not have the same names.
    """
    if missing := [name for name in names if name not in values]:
        found = f"returns only {_listed(values)}" if values else "returns no number beside the loss"
        raise ConfigError(
            f"'train.logged' names '{missing[0]}', but 'train.step' {found}: let it return all in every step"
        )
    if further := [name for name in values if name not in names]:
        raise ConfigError(
            f"'train.step' returns {_listed(further)} beside the loss, but 'train.logged' does not name it: add it to "
            f"have its mean recorded in each round (logged: {[*names, *further]}), or do not return it"
        )
    return {name: values[name] for name in names}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def network_inputs(network: nn.Module, batch: Any) -> Any:
    """Return the inputs of a network in a batch: of a pair its first half, of a mapping the arguments of the forward.

    A single tensor is the input itself. Of a mapping, keys that the forward does not have are left out, and optional
    labels, from which networks of transformers would compute a loss.

    Args:
        network: The network; only the signature of its forward is used.
        batch: A batch as it was collated.

    Raises:
        ConfigError: The batch is something else, or lacks an argument that the forward needs.
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0]
    if not isinstance(batch, Mapping):
        parts = f" of {len(batch)} parts" if isinstance(batch, tuple | list) else ""
        raise ConfigError(f"a batch of the data is a {type(batch).__name__}{parts}, {_UNCLEAR}")
    parameters = inspect.signature(network.forward).parameters
    named = {
        name: batch[name]
        for name, parameter in parameters.items()
        if name in batch
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and not ("label" in name and parameter.default is None)
    }
    if not named and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(batch)
    missing = [
        name
        for name, parameter in parameters.items()
        if name not in named
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if missing or not named:
        needs = f"'{missing[0]}'" if missing else "other arguments"
        keys = ", ".join(f"'{key}'" for key in batch)
        raise ConfigError(
            f"a batch of the data has {keys}, but the forward of {type(network).__name__} needs {needs}, {_UNCLEAR}"
        )
    return named


_UNCLEAR = (
    "so the inputs that the network gets are unclear: give ist.train the inputs of a batch of two samples (example=); "
    "in a configuration use data whose items are pairs (input, target), or mappings of the forward's arguments"
)
