"""Train a subnet on all ranks of a worker: by PyTorch's DistributedDataParallel, or by its `fully_shard` (FSDP2).

Every rank of a worker has the worker's message, and so the same subnet module with the same values. `DDPInside` wraps
this module: each rank makes every step on its own part of the worker's batch, and gradients are averaged.
`FSDPInside` trains a sharded copy of it, and gathers the trained values into the module at the end of a round.
Where it sits: `ist/training/worker.py` opens it around the local steps of a round.
Law: the ranks of a worker end a round with the same values, those of one rank with the whole batch, to rounding.
Not here: the groups of ranks (`ist/distributed/worker_group.py`), the parts of a batch (`ist/data/loading/loader.py`).
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from ist.config.schema import Config
from ist.distributed.process_group import peer_errors
from ist.distributed.worker_group import WorkerGroup
from ist.network.copies import copied, like
from ist.subnet.stores.shards import owned_rows
from ist.tensors import local_rows

Named = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Opened:
    """A subnet module that is ready for the local steps of a round.

    Attributes:
        model: The module whose forward and backward pass train the subnet, on all ranks.
        network: The module in it that has the paths of the network: `model` itself, or what DDP wraps.
        named: Its trained parameters, by their names in the full network.
    """

    model: nn.Module
    network: nn.Module
    named: Named


class Inside(Protocol):
    """How the ranks of a worker train its subnet."""

    def open(self, module: nn.Module) -> Opened:
        """Return the module to train for a round.

        Args:
            module: The subnet module, with the values with which the round starts; all ranks have the same.
        """
        ...

    def close(self, module: nn.Module) -> None:
        """Write the trained values into the subnet module that `open` has got, on every rank."""
        ...

    def sent_bytes(self, steps: int, passes: int) -> int:
        """Return the bytes that all ranks of the worker together send to each other in a round.

        Args:
            steps: Optimizer steps of the round.
            passes: Forward and backward passes in a step.
        """
        ...


def opened(inside: Inside | None, module: nn.Module) -> Opened:
    """Return the module to train for a round: that of `Inside.open`, or the subnet module itself if there is none."""
    return inside.open(module) if inside is not None else Opened(module, module, trained_parameters(module))


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def distributed(module: nn.Module, **options: Any) -> DistributedDataParallel:
    """Return a module wrapped by DDP, which leaves its buffers alone."""
    # Newer versions of torch have renamed the option.
    names = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **{**options, option: False})


class DDPInside:
    """Every rank holds the whole subnet, and gradients are averaged; an `Inside`.

    Args:
        group: The ranks of the worker.

    Reference: Li et al., "PyTorch Distributed", VLDB 2020.
    """

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self._module: nn.Module | None = None
        self._wrapped: DistributedDataParallel | None = None

    def open(self, module: nn.Module) -> Opened:
        """Return the module wrapped by DDP; the wrapper stays while the module is the same."""
        if self._wrapped is None or self._module is not module:
            with peer_errors("a worker's ranks start together"):
                # Every rank has the same values: nothing is broadcast.
                self._wrapped = distributed(module, process_group=self._group.group, init_sync=False)
            self._module = module
        return Opened(self._wrapped, module, trained_parameters(module))

    def close(self, module: nn.Module) -> None:
        """Do nothing: the wrapper has trained the module itself."""

    def sent_bytes(self, steps: int, passes: int) -> int:  # noqa: ARG002  # only the last pass of a step sends
        """Return the bytes of `ddp_bytes`."""
        assert self._module is not None
        return ddp_bytes(self._group.size, steps, _nbytes(trained_parameters(self._module).values()))


class FSDPInside:
    """Parameters, gradients and optimizer state are sharded over the ranks during the steps; an `Inside`.

    Each item of a `ModuleList` or `Sequential` of the network is gathered for its forward and backward pass only; all
    other parameters are gathered for the whole pass.

    Args:
        group: The ranks of the worker.

    Reference: Zhao et al., "PyTorch FSDP", VLDB 2023.
    """

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self._mesh = DeviceMesh.from_group(group.group, group.device.type)
        self._module: nn.Module | None = None
        self._sharded: nn.Module | None = None
        self._freed_bytes = 0

    def open(self, module: nn.Module) -> Opened:
        """Return a sharded copy of the module with its values; the copy stays while the module is the same."""
        if self._sharded is None or self._module is not module:
            self._module, self._sharded = module, self._shard(module)
        sharded = self._sharded
        ours = dict(module.named_parameters())
        with torch.no_grad():
            for name, parameter in sharded.named_parameters():
                rows = owned_rows(len(ours[name]), self._group.rank, self._group.size)
                local_rows(parameter).copy_(ours[name].data[rows.start : rows.stop])
            buffers = dict(module.named_buffers())
            for name, buffer in sharded.named_buffers():
                buffer.copy_(buffers[name])
        return Opened(sharded, sharded, trained_parameters(sharded))

    def close(self, module: nn.Module) -> None:
        """Gather the trained values, one parameter at a time, and write them into the module."""
        assert self._sharded is not None
        ours = dict(module.named_parameters())
        buffers = dict(module.named_buffers())
        with torch.no_grad(), peer_errors("a worker's ranks gather its subnet"):
            for name, parameter in self._sharded.named_parameters():
                ours[name].data.copy_(parameter.full_tensor())  # type: ignore[attr-defined]  # a DTensor
            for name, buffer in self._sharded.named_buffers():
                buffers[name].copy_(buffer)

    def sent_bytes(self, steps: int, passes: int) -> int:
        """Return the bytes of `fsdp_bytes`."""
        assert self._module is not None
        held, trained = _nbytes(self._module.parameters()), _nbytes(trained_parameters(self._module).values())
        is_gloo = self._group.backend == "gloo"
        return fsdp_bytes(self._group.size, steps * passes, held, self._freed_bytes, trained, is_gloo)

    def _shard(self, module: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import fully_shard  # slow to import

        # Without values: the copy of a whole subnet is never in memory.
        empty = {id(value): like(value, torch.empty_like(value, device="meta")) for value in module.parameters()}
        sharded = copied(module, empty)
        self._freed_bytes = 0
        for block in _blocks(sharded):
            self._freed_bytes += _nbytes(block.parameters())
            fully_shard(block, mesh=self._mesh)
        fully_shard(sharded, mesh=self._mesh)
        return sharded.to_empty(device=self._group.device)


def ddp_bytes(ranks: int, steps: int, trained: int) -> int:
    """Return the bytes that the k ranks of a worker send each other in a round, to average P bytes of gradients.

    An all-reduce in a ring sends 2 (k - 1) P in a step.
    """
    return steps * 2 * (ranks - 1) * trained


def fsdp_bytes(ranks: int, passes: int, held: int, freed: int, trained: int, is_gloo: bool) -> int:
    """Return the bytes that the k ranks of a worker send each other in a round, if they shard P bytes of parameters.

    Each pass gathers all parameters, gathers the F bytes of those that were freed again for the backward pass, and sums
    the T bytes of gradients where they belong: (k - 1) (P + F + T). All parameters are gathered once more at the end of
    the round. PyTorch's gloo sums gradients on all ranks, which takes 2 (k - 1) T.

    Args:
        ranks: k.
        passes: Forward and backward passes of the round.
        held: P, the bytes of all parameters.
        freed: F, the bytes of those that are gathered for the time of their use only.
        trained: T, the bytes of those that are trained.
        is_gloo: Whether the ranks communicate by gloo.
    """
    return (ranks - 1) * (passes * (held + freed + (2 if is_gloo else 1) * trained) + held)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost items of lists of modules that hold parameters which nothing outside them uses."""
    users: dict[int, int] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    inside: set[int] = set()
    for module in network.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or id(module) in inside:
            continue
        for block in module:
            inside |= {id(within) for within in block.modules()}
            own = [parameter for within in block.modules() for parameter in within.parameters(recurse=False)]
            if own and all(users[id(parameter)] == sum(p is parameter for p in own) for parameter in own):
                yield block


def inside_of(config: Config, group: WorkerGroup | None) -> Inside | None:
    """Return how the ranks of a worker train its subnet; None if the worker has one rank."""
    if group is None:
        return None
    return FSDPInside(group) if config.pool.inside == "fsdp" else DDPInside(group)
