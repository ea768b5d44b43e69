"""Nested state of a user's object (a loader, a scheduler) as flat tensors, for safetensors files: no pickle.

Where it sits: workers save the state of the user's loaders so (`ist/loops/batch_source.py`).
Law: `unpack_state(pack_state(state)) == state`; a named tuple comes back as a tuple.
Not here: writing files (`ist/storage/checkpoint.py`).
"""

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TREE = "tree"
_KIND = "__kind__"


def pack_state(state: Any) -> dict[str, Tensor]:
    """Return a state as tensors by name.

    Args:
        state: None, bool, int, float, str, bytes, a tensor, a NumPy array, or lists, tuples and mappings of these.

    Raises:
        TypeError: It holds another type; the message names the type and where it is.

    Example:
        >>> sorted(pack_state({"epoch": 3, "rng": torch.zeros(2)}))
        ['0', 'tree']
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.ndarray):
            return {**plain(torch.from_numpy(value.copy()), path), _KIND: "array"}
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {_KIND: "tensor", "name": name}
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, bytes):
            return {_KIND: "bytes", "data": base64.b64encode(value).decode()}
        if isinstance(value, Mapping):
            pairs = [[plain(key, path), plain(item, f"{path}[{key!r}]")] for key, item in value.items()]
            return {_KIND: "mapping", "pairs": pairs}
        if isinstance(value, list | tuple):
            items = [plain(item, f"{path}[{number}]") for number, item in enumerate(value)]
            return {_KIND: "tuple", "items": items} if isinstance(value, tuple) else items
        raise TypeError(f"{path or 'it'} is a {type(value).__name__}")

    tree = json.dumps(plain(state, ""))
    return {**tensors, _TREE: torch.frombuffer(bytearray(tree.encode()), dtype=torch.uint8).clone()}


def unpack_state(tensors: Mapping[str, Tensor]) -> Any:
    """Undo `pack_state`."""

    def full(value: Any) -> Any:
        if isinstance(value, list):
            return [full(item) for item in value]
        if not isinstance(value, dict):
            return value
        kind = value[_KIND]
        if kind == "mapping":
            return {full(key): full(item) for key, item in value["pairs"]}
        if kind == "tuple":
            return tuple(full(item) for item in value["items"])
        if kind == "bytes":
            return base64.b64decode(value["data"])
        tensor = tensors[value["name"]].clone()
        return tensor.numpy() if kind == "array" else tensor

    return full(json.loads(bytes(tensors[_TREE].tolist())))
