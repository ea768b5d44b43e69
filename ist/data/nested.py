"""Nested inputs and outputs of networks: a tensor, or tensors in tuples, lists, mappings and dataclasses.

A forward gets a tensor as its only argument, the items of a tuple or a list as positional arguments, and the items of
a mapping as keyword arguments.

Where it sits: all code that passes inputs to a network or reads its outputs uses it.
Not here: making batches (`batches.py`).
"""

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ist.errors import DataError


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in a nested value, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a nested value with a function applied to each tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        found = {key: mapped(item, change) for key, item in value.items()}
        if not isinstance(value, UserDict):
            return found
        same = copy.copy(value)  # a BatchEncoding of transformers, which has attributes as well
        same.update(found)
        return same
    if isinstance(value, tuple | list):
        items = [mapped(item, change) for item in value]
        return type(value)(*items) if isinstance(value, tuple) and type(value) is not tuple else type(value)(items)
    return value


def moved(value: Any, device: torch.device) -> Any:
    """Return a nested value with its tensors on a device."""
    return mapped(value, lambda tensor: tensor.to(device, non_blocking=True))


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Return the outputs of a network for a batch of inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def scores(outputs: Any) -> Tensor:
    """Return the tensor that a loss or a metric uses: the outputs, their `logits`, or their first tensor.

    Raises:
        DataError: The outputs are neither a tensor nor contain one of these.
    """
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor):
        found = outputs[0]
    if not isinstance(found, Tensor):
        raise DataError(
            f"the network returns a {type(outputs).__name__} without 'logits': set train.loss to a loss function that "
            "takes it ('package.module:function')"
        )
    return found
