"""The rows of every tensor that each rank owns, if the full network is stored in shards.

A sharded store has no process that holds the network: each of n ranks owns about 1/n of the rows (dim 0) of every
tensor. A shard looks like a small split network: it has the same tensors with fewer rows, and a worker's cut in it is
the worker's cut in the full network, without the rows that other ranks own. So a coordinator of a shard cuts, merges
and optimizes it as one coordinator does with the full network.
Law: a worker's part of a tensor is the concatenation of its parts of all shards, in the order of the owners.
Where it sits: `ist/pools/shard_pool.py` exchanges pieces of subnets between owners and workers.
Not here: which neurons a worker holds (`ist/subnet/assignments.py`), sending (`ist/pools/`).

Shape letters: R rows of a full tensor, n owners, c = ceil(R / n) rows of a shard; the last shards may have fewer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from ist.rng import Indices
from ist.subnet.cut import Cut, TensorCut
from ist.subnet.split_model import SplitModel
from ist.tensors import Shape, TensorSpec


def owned_rows(rows: int, owner: int, owners: int) -> range:
    """Return the rows of a tensor that a rank owns: chunks of equal size, as of `torch.chunk` and of FSDP2.

    >>> [list(owned_rows(5, owner, 3)) for owner in range(3)]
    [[0, 1], [2, 3], [4]]
    """
    each = -(-rows // owners)
    return range(min(rows, owner * each), min(rows, (owner + 1) * each))


def shard_shape(shape: Shape, owner: int, owners: int) -> Shape:
    """Return the shape of a rank's shard of a tensor; rank 0 owns numbers without dims, other shards of it are empty.

    >>> shard_shape((5, 7), 2, 3), shard_shape((), 0, 3), shard_shape((), 2, 3)
    ((1, 7), (), (0,))
    """
    if not shape:
        return () if owner == 0 else (0,)
    return (len(owned_rows(shape[0], owner, owners)), *shape[1:])


def rows_within(spec: TensorSpec, cut: TensorCut, owner: int, owners: int) -> slice:
    """Return which rows of a worker's part of a tensor come from an owner's shard.

    Args:
        spec: The full tensor; it has dims.
        cut: The worker's positions in it, in NumPy arrays.
        owner: The owner.
        owners: The number of owners.
    """
    owned = owned_rows(spec.shape[0], owner, owners)
    if cut[0] is None:
        return slice(owned.start, owned.stop)
    start, stop = np.searchsorted(cut[0], (owned.start, owned.stop)).tolist()
    return slice(start, stop)


@dataclass(frozen=True, kw_only=True)
class ModelShard(SplitModel):
    """An owner's shard of a split network; see `shard_of`.

    Attributes:
        full: The full split network.
        owner: The rank that owns this shard.
        owners: The number of owners.
    """

    full: SplitModel
    owner: int
    owners: int

    @property
    def whole(self) -> SplitModel:
        """The full split network."""
        return self.full

    @cached_property
    def exclusive(self) -> frozenset[str]:
        """The tensors in which no entry has two holders if no neuron has two."""
        return self.full.exclusive

    def cut(self, neurons: Sequence[Indices]) -> Cut:
        """Return a worker's positions in this shard's rows of every tensor that is sent and returned."""
        return self.within(self.full.cut(neurons))

    def frozen_cut(self, neurons: Sequence[Indices]) -> Cut:
        """Return a worker's positions in this shard's rows of every frozen parameter."""
        return self.within(self.full.frozen_cut(neurons))

    def within(self, cut: Cut) -> Cut:
        """Return a cut of the full network in this shard's rows; tensors of which it has no such row are absent."""
        specs = self.full.specs | dict(self.full.frozen_specs)
        found: dict[str, TensorCut] = {}
        for name, dims in cut.items():
            shape = specs[name].shape
            if not shape:
                if self.owner == 0:
                    found[name] = dims
                continue
            owned = owned_rows(shape[0], self.owner, self.owners)
            rows = dims[0]
            if rows is not None:
                assert isinstance(rows, np.ndarray)  # before `on_device`
                rows = rows[rows_within(specs[name], dims, self.owner, self.owners)] - owned.start
            if len(owned if rows is None else rows):
                found[name] = (rows, *dims[1:])
        return found


def shard_of(split: SplitModel, owner: int, owners: int) -> ModelShard:
    """Return an owner's shard of a split network."""

    def shards(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        return {name: TensorSpec(shard_shape(spec.shape, owner, owners), spec.dtype) for name, spec in specs.items()}

    values = {field.name: getattr(split, field.name) for field in fields(SplitModel)}
    values |= {name: shards(values[name]) for name in ("model_specs", "frozen_specs", "state_specs")}
    return ModelShard(**values, full=split, owner=owner, owners=owners)
