"""The network of a sharded store as a module: an owner's rows of it, or the whole without values.

Where it sits: every owner makes its network of rows. The process that evaluates and saves makes the full network; it
fetches the values from the owners (`shard_store.py` under torchrun, `ray_shards/method.py` on Ray).
Not here: where the values are.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ist.network.copies import copied, like
from ist.network.lazy_tensor import make_lazy
from ist.network.versions import check_unchanged, versions
from ist.subnet.split_model import SplitModel
from ist.subnet.stores.shards import ModelShard
from ist.tensors import TensorSpec, constant_tensors, named_tensors
from ist.training.average import PREFIX as AVERAGE
from ist.training.outer_optimizer import PREFIX as OUTER


class StoredSpecs:
    """The full shapes of the tensors that are stored in shards, by their names in a checkpoint.

    Args:
        split: The full split network.
    """

    def __init__(self, split: SplitModel) -> None:
        self._specs = {**split.specs, **split.frozen_specs}
        first: dict[int, str] = {}
        state = split.template.state_dict(keep_vars=True)
        self._first_names = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}

    def __call__(self, name: str) -> TensorSpec | None:
        """Return the full shape and dtype of a tensor in shards; None for a tensor that every owner has as a whole.

        Args:
            name: A tensor of the network, of carried optimizer state, of the outer optimizer or of the average.
        """
        own = name.removeprefix(OUTER).removeprefix(f"{AVERAGE}module.")
        return self._specs.get(self._first_names.get(own, own))


def shard_network(shard: ModelShard, rows: Mapping[str, Tensor]) -> nn.Module:
    """Return a network whose parameters and buffers have only the rows of a shard; it cannot compute anything.

    Args:
        shard: The shard.
        rows: By name, the shard's rows, and buffers that every rank has as a whole.
    """
    values = {**shard.constants, **rows}
    named = {**constant_tensors(shard.template), **named_tensors(shard.template)}
    memo = {id(tensor): like(tensor, values[name]) for name, tensor in named.items() if name in values}
    return copied(shard.template, memo)


def lazy_network(split: SplitModel, values: Callable[[str], Tensor], buffers: Mapping[str, Tensor]) -> nn.Module:
    """Return the full network on the CPU, whose parameters have no values: operators fetch them, one at a time.

    Args:
        split: The full split network.
        values: Fetches the values of a parameter.
        buffers: The persistent buffers, which the network shares.
    """
    buffers = {**{name: tensor.clone() for name, tensor in split.constants.items()}, **buffers}
    tensors = {**dict(split.template.named_buffers()), **constant_tensors(split.template)}
    memo = {id(tensor): like(tensor, buffers[name]) for name, tensor in tensors.items() if name in buffers}
    return make_lazy(copied(split.template, memo), values)


class MethodInShards(ABC):
    """The full network of a method that stores it in shards, on the process that evaluates and saves it.

    Args:
        split: The full split network.
        spec: The full shapes of the tensors in shards.
        prefix: The prefix, in a checkpoint, of the tensors of the method's network.
        device: The device on which the full network is evaluated.
        evaluation: Whether the network is evaluated in `layers`, or gathered as a `whole` (`pool.evaluation`).
    """

    def __init__(
        self,
        split: SplitModel,
        spec: StoredSpecs,
        prefix: str,
        device: torch.device,
        evaluation: Literal["layers", "whole"],
    ) -> None:
        self._split = split
        self._spec = spec
        self._prefix = prefix
        self._device = device
        self._is_whole = evaluation == "whole"
        self._full: nn.Module | None = None
        self._ended: nn.Module | None = None
        self._versions: dict[str, int] = {}

    @abstractmethod
    def checkpoint_state(self) -> Mapping[str, Tensor]:
        """Return every tensor that the method needs to resume; one that is asked for is gathered."""

    @abstractmethod
    def own_buffer(self, name: str) -> Tensor:
        """Return a buffer of the method's network that is not in shards."""

    @property
    def model(self) -> nn.Module:
        """The full network with its current values: gathered whenever this is read, or fetched by its operators.

        After the end of the run, it is the trained network; see `end`.
        """
        if self._ended is not None:
            return self._ended
        state = self.checkpoint_state()
        if self._is_whole:
            return self._whole(state)
        return lazy_network(self._split, lambda name: state[self._prefix + name], self._buffers(state))

    def end(self, saved: Callable[[str], Tensor] | None) -> None:
        """Keep the trained network.

        Args:
            saved: Reads the trained parameters, which nobody can gather later; None: they are gathered now.
        """
        state = self.checkpoint_state()
        if saved is None:
            self._ended = self._whole(state)
        else:
            self._ended = lazy_network(self._split, saved, self._buffers(state))

    def _buffers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the persistent buffers: those in shards are gathered; re-estimated statistics are this process's own.

        They are shared with the network that is saved.
        """
        constants = constant_tensors(self._split.template)
        names = [name for name, _ in self._split.template.named_buffers() if name not in constants]
        return {
            name: self.own_buffer(name) if self._spec(name) is None else state[self._prefix + name] for name in names
        }

    def _whole(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Return the full network with all values, in the same memory in every call.

        Raises:
            ModelError: Since the last call, a forward or a function has changed a parameter of this copy.
        """
        if self._full is None:
            self._full = self._split.module([np.arange(group.size) for group in self._split.groups], self._device)
        check_unchanged(self._full, self._versions, "pool.evaluation 'whole' evaluates a copy of it")
        buffers = self._buffers(state)
        with torch.no_grad():
            for path, child in self._full.named_modules():
                for name in child._buffers:
                    full_name = f"{path}.{name}" if path else name
                    if full_name in buffers:
                        child._buffers[name] = buffers[full_name].to(self._device)
            for name, tensor in self._full.named_parameters():
                tensor.copy_(state[self._prefix + name])
        self._versions = versions(self._full)
        return self._full
