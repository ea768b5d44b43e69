"""Add the location to errors in a user's code: the sample, the module, the line.

Errors of this package, warnings, lost peers and out-of-memory errors pass unchanged: the user's code does not cause
them.

Where it sits: `ist/training/worker.py` and `ist/evaluation/evaluate.py` run networks and losses in these contexts.
Not here: errors in a data set (`ist/data/batches.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ist.data.batches import named_samples
from ist.data.nested import mapped, scores, tensors_in
from ist.errors import ConfigError, DataError, ISTError, ModelError, error_with_line, is_out_of_memory
from ist.rng import Indices

_MOST_SHOWN = 8


def is_peer_failure(error: BaseException) -> bool:
    """Return whether an error of torch.distributed reports a lost peer."""
    text = str(error)
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "Gloo", "NCCL", "onnection"))
    )


@contextmanager
def located(where: str) -> Iterator[None]:
    """Prefix the messages of errors in configuration, data or network with a location."""
    try:
        yield
    except (ConfigError, DataError, ModelError) as error:
        raise type(error)(f"{where}: {error}") from error


@contextmanager
def network_errors(network: nn.Module, what: str = "the network") -> Iterator[None]:
    """Turn an exception of a network's code into an error that names the module.

    Args:
        network: The network.
        what: The subject of the message, such as "the backward pass".

    Raises:
        ModelError: The network's code raised an exception.
    """
    try:
        yield
    except Exception as error:
        if _passes(error):
            raise
        raise ModelError(f"{what} fails{_in_module(error, network)}: {error_with_line(error)}") from error


@contextmanager
def loss_errors(numbers: Callable[[], Indices], metric: str | None = None) -> Iterator[None]:
    """Turn an exception of a loss or a metric into an error that names the samples of the batch.

    Args:
        numbers: Returns the numbers of the samples in the data set; called only after an error.
        metric: The name of the metric; None for the loss.

    Raises:
        DataError: The loss raised an exception.
        ConfigError: The metric raised an exception.
    """
    try:
        yield
    except Exception as error:
        if _passes(error):
            raise
        what, kind = (f"metric '{metric}'", ConfigError) if metric else ("the loss", DataError)
        raise kind(f"{what} of {named_samples(numbers())} fails: {error_with_line(error)}") from error


@contextmanager
def step_errors(network: nn.Module, numbers: Callable[[], Indices]) -> Iterator[None]:
    """Turn an exception of a user's `step` function into an error that names the module, or the samples of the batch.

    Args:
        network: The network that the function calls.
        numbers: Returns the numbers of the samples in the data set; called only after an error.

    Raises:
        ModelError: A module of the network raised the exception.
        DataError: The function raised it.
    """
    try:
        yield
    except Exception as error:
        if _passes(error):
            raise
        if where := _in_module(error, network):
            raise ModelError(f"the network fails{where}: {error_with_line(error)}") from error
        raise DataError(f"'train.step' fails for {named_samples(numbers())}: {error_with_line(error)}") from error


def loss_of(loss: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, numbers: Callable[[], Indices]) -> Tensor:
    """Return the loss of a batch; if it fails only for some of the samples, name the first of them.

    Args:
        loss: Mean loss of (outputs, targets).
        outputs: The network's outputs for the batch.
        targets: The targets of the batch.
        numbers: Returns the numbers of the samples in the data set; called only after an error.

    Raises:
        DataError: The loss fails for some samples; the message names the first of them, and its target.
    """
    try:
        return loss(outputs, targets)
    except Exception as error:
        if _passes(error):
            raise
        bad = _failing_alone(loss, outputs, targets, len(numbers()))
        if bad is None:
            raise
        sample, target = named_samples(numbers()[[bad]]), _target_text(_part(targets, bad), outputs)
        raise DataError(f"the loss of {sample} fails{target}: {error_with_line(error)}") from error


def _passes(error: Exception) -> bool:
    return isinstance(error, ISTError | Warning) or is_out_of_memory(error) or is_peer_failure(error)


def _in_module(error: BaseException, network: nn.Module) -> str:
    """Return the innermost module of the network whose code was running, for a message."""
    paths = {id(module): path for path, module in network.named_modules()}
    found, trace = None, error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if id(module) in paths and paths[id(module)]:
            found = module
        trace = trace.tb_next
    return f" in '{paths[id(found)]}' ({type(found).__name__.removeprefix('Scaled')})" if found is not None else ""


def _failing_alone(loss: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, size: int) -> int | None:
    """Return the first sample of a batch for which a loss fails; None if it fails for all or cannot be split."""
    tensors = [*tensors_in(outputs), *tensors_in(targets)]
    if not tensors or any(tensor.ndim == 0 or len(tensor) != size for tensor in tensors):
        return None
    failing = []
    for position in range(size):
        try:
            with torch.no_grad():
                loss(_part(outputs, position), _part(targets, position))
        except Exception:
            failing.append(position)
    return failing[0] if 0 < len(failing) < size else None


def _part(value: Any, position: int) -> Any:
    return mapped(value, lambda tensor: tensor[position : position + 1])


def _target_text(target: Any, outputs: Any) -> str:
    """Return a target's value for a message, and the valid class numbers if it is a class number."""
    if not isinstance(target, Tensor) or target.numel() > _MOST_SHOWN:
        return ""
    values = target[0].tolist()
    is_class = not target.is_floating_point() and target.ndim == 1
    found = scores(outputs) if is_class else None
    classes = f", where classes are 0 to {found.shape[1] - 1}" if found is not None and found.ndim == 2 else ""
    return f" (its target is {values}{classes})"
