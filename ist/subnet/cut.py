"""Extract one worker's subnet from the full model, and merge trained subnets back into it.

Where it sits: `partition.py` assigns neurons; this file translates them into positions of tensors, copies the values
out, and merges trained ones. `ist/training/coordinator.py` uses it in every round.
Law: extracting every worker's part and reassembling the parts leaves the state as it was, bit for bit.
Not here: assigning neurons (`partition.py`), training (`ist/training/worker.py`), sending bytes (`ist/pools/`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ist.neurons.group import Group, Slot
from ist.rng import Indices
from ist.tensors import TensorSpec, is_finite

TensorCut = tuple[Indices | Tensor | None, ...]
"""For each dim of a tensor, the sorted positions that a worker holds; None: all. `on_device` makes them tensors."""

Cut = Mapping[str, TensorCut]
"""A worker's positions in each tensor, by name."""

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def positions(groups: Sequence[Group], specs: Mapping[str, TensorSpec], neurons: Sequence[Indices]) -> Cut:
    """Translate a worker's neurons into positions of every tensor.

    Args:
        groups: The network's neuron groups.
        specs: The spec of every tensor, by name.
        neurons: For each group, the sorted neuron numbers that the worker holds.

    Returns:
        The positions in each tensor of `specs`, except tensors of modules that the worker does not hold.
    """
    cuts: dict[str, list[Indices | None]] = {name: [None] * len(spec.shape) for name, spec in specs.items()}
    for (name, dim), slots in _slots_by_dim(groups, specs).items():
        pieces = [slot.positions(neurons[number]) for number, slot in slots]
        shared = _uncovered([(slot, groups[number].size) for number, slot in slots], specs[name].shape[dim])
        parts = [*pieces, *([shared] if len(shared) else [])]
        ordered = len(parts) == 1 and slots[0][1].order is None
        indices = parts[0] if ordered else np.sort(np.concatenate(parts))
        cuts[name][dim] = indices if len(indices) < specs[name].shape[dim] else None
    absent = absent_modules(groups, neurons)
    return {name: tuple(dims) for name, dims in cuts.items() if not _within(name, absent)}


def on_device(cuts: Sequence[Cut], device: torch.device) -> Sequence[Cut]:
    """Return cuts whose positions are on the device of the tensors: on a GPU after one transfer, on a CPU unchanged."""
    if device.type == "cpu":
        return cuts
    arrays = {id(dim): dim for cut in cuts for dims in cut.values() for dim in dims if isinstance(dim, np.ndarray)}
    if not arrays:
        return cuts
    joined = torch.from_numpy(np.concatenate(list(arrays.values()))).to(device)
    moved = dict(zip(arrays, torch.split(joined, [len(dim) for dim in arrays.values()]), strict=True))
    return [{name: tuple(moved.get(id(dim), dim) for dim in dims) for name, dims in cut.items()} for cut in cuts]


def absent_modules(groups: Sequence[Group], neurons: Sequence[Indices]) -> list[str]:
    """Return the paths of the modules that a worker does not hold, if whole modules are assigned."""
    return [
        path
        for group, indices in zip(groups, neurons, strict=True)
        for number, path in enumerate(group.modules)
        if number not in set(indices.tolist())
    ]


def _within(name: str, paths: Sequence[str]) -> bool:
    parameter = name.rpartition("@")[2]  # optimizer state is named after its parameter
    return any(parameter.startswith(f"{path}.") for path in paths)


def cut_specs(specs: Mapping[str, TensorSpec], cut: Cut) -> dict[str, TensorSpec]:
    """Return the specs of a worker's part of every tensor."""
    return {
        name: TensorSpec(
            tuple(size if dim is None else len(dim) for size, dim in zip(spec.shape, cut[name], strict=True)),
            spec.dtype,
        )
        for name, spec in specs.items()
        if name in cut
    }


def exclusive_names(groups: Sequence[Group], specs: Mapping[str, TensorSpec]) -> frozenset[str]:
    """Return the tensors in which no entry has two holders if every neuron has one owner.

    These are the tensors with a dim that slots cover completely.
    """
    covered = {
        name
        for (name, dim), slots in _slots_by_dim(groups, specs).items()
        if sum(slot.block * groups[number].size for number, slot in slots) == specs[name].shape[dim]
    }
    return frozenset(covered)


def extract(state: Mapping[str, Tensor], cut: Cut, into: Mapping[str, Tensor]) -> None:
    """Copy a worker's part of each tensor from the full model into the tensor of that name in `into`.

    Args:
        state: Full tensors, contiguous.
        cut: The worker's positions.
        into: Contiguous tensors of the parts' shapes, overwritten; it need not hold every tensor.
    """
    for name, part in into.items():
        read_part(state[name], cut[name], part)


@dataclass(frozen=True)
class UpdateScale:
    """Factors of the updates that a merge makes: it writes old + factor * (merged - old).

    Attributes:
        names: The tensors whose updates are scaled.
        own: The factor for an entry that one worker returned.
        shared: The factor for an entry that several workers returned, whose update is their mean.
    """

    names: frozenset[str] = frozenset()
    own: float = 1.0
    shared: float = 1.0

    def factors(self, name: str) -> tuple[float, float]:
        """Return the factors (own, shared) of a tensor."""
        return (self.own, self.shared) if name in self.names else (1.0, 1.0)


NOT_SCALED = UpdateScale()


def reassemble(
    state: Mapping[str, Tensor],
    cuts: Sequence[Cut],
    trained: Iterable[tuple[int, Mapping[str, Tensor]]],
    exclusive: frozenset[str],
    scale: UpdateScale = NOT_SCALED,
) -> None:
    """Merge trained subnets into the full model, in place.

    An entry that one worker returned gets that value. An entry that several workers returned gets their mean. An entry
    that no worker returned does not change. `scale` moves entries by a multiple of this update instead.

    Args:
        state: Full tensors, contiguous, overwritten.
        cuts: Every worker's positions.
        trained: (worker, tensors), in any order; an iterator is consumed as subnets arrive. The tensors must not change
            until this returns; each is read once, before its part of `state` is written.
        exclusive: Tensors in which no entry has two holders; they are written immediately.
        scale: The factors of the updates.

    Reference: Yuan et al., arXiv 1910.02120, section 3 (disjoint parts); Liao and Kyrillidis, arXiv 2112.02668,
    Algorithm 1 (mean over the workers that trained an entry).
    """
    merge = Merge(state, cuts, exclusive, scale)
    for worker, tensors in trained:
        merge.add(worker, tensors)
    merge.finish()


class Merge:
    """The merge of a round, subnet by subnet as they arrive; see `reassemble`.

    Args:
        state: Full tensors, contiguous, overwritten.
        cuts: Every worker's positions.
        exclusive: Tensors in which no entry has two holders; `add` writes them immediately.
        scale: The factors of the updates.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        cuts: Sequence[Cut],
        exclusive: frozenset[str],
        scale: UpdateScale = NOT_SCALED,
    ) -> None:
        self._state = state
        self._cuts = cuts
        self._exclusive = exclusive
        self._scale = scale
        self._returned: dict[int, Mapping[str, Tensor]] = {}
        self._holders: dict[str, list[int]] = {}

    def add(self, worker: int, tensors: Mapping[str, Tensor], are_lasting: bool = True) -> None:
        """Merge a worker's trained tensors.

        Args:
            worker: The worker.
            tensors: Its tensors.
            are_lasting: Whether they stay as they are until `finish` returns; if not, what `finish` reads is copied.
        """
        shared = [name for name in tensors if name not in self._exclusive]
        self._returned[worker] = tensors if are_lasting else {name: tensors[name].clone() for name in shared}
        for name in tensors:
            if name in self._exclusive:
                own, _ = self._scale.factors(name)
                _put_scaled(self._state[name], self._cuts[worker][name], tensors[name], own)
            else:
                self._holders.setdefault(name, []).append(worker)

    def finish(self) -> None:
        """Merge the tensors that may have several holders: each entry becomes the mean of its holders."""
        for name, workers in self._holders.items():
            # Add in the order of workers, not of arrival: a sum of floats depends on the order.
            workers.sort()
            parts = (self._returned[worker][name] for worker in workers)
            cuts = [self._cuts[worker][name] for worker in workers]
            _merge_mean(self._state[name], cuts, parts, *self._scale.factors(name))


def fill_part(full: Tensor, cut: TensorCut, value: bool) -> None:
    """Write one value into a worker's part of a full tensor."""
    full[_mesh(cut, full)] = value


def _slots_by_dim(
    groups: Sequence[Group], specs: Mapping[str, TensorSpec]
) -> dict[tuple[str, int], list[tuple[int, Slot]]]:
    found: dict[tuple[str, int], list[tuple[int, Slot]]] = {}
    for number, group in enumerate(groups):
        for slot in group.slots:
            if slot.tensor in specs:
                found.setdefault((slot.tensor, slot.dim), []).append((number, slot))
    return found


def _uncovered(slots: Sequence[tuple[Slot, int]], size: int) -> Indices:
    free = np.ones(size, bool)
    for slot, num_neurons in slots:
        free[slot.positions(np.arange(num_neurons))] = False
    return np.flatnonzero(free)


def _as_integers(tensor: Tensor) -> NDArray[np.int64]:
    # NumPy's row-wise take is 2 to 3 times faster here than torch's indexing. It does not support bfloat16, but a copy
    # needs only the width of an element.
    array: NDArray[np.int64] = tensor.detach().view(_INTEGER_OF_SIZE[tensor.element_size()]).numpy()
    return array


def _has_integers(tensor: Tensor) -> bool:
    # Other classes, as of tensors without values, have no NumPy array.
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return is_plain and tensor.device.type == "cpu" and tensor.element_size() in _INTEGER_OF_SIZE


def read_part(full: Tensor, cut: TensorCut, part: Tensor) -> None:
    """Copy a worker's part of a full tensor into `part`; both are contiguous and of one dtype."""
    dims = [dim for dim, indices in enumerate(cut) if indices is not None]
    if not dims:
        part.copy_(full)
    elif not _has_integers(full):
        if len(dims) == 1:
            torch.index_select(full, dims[0], _index(cut, dims[0], full), out=part)
        else:
            part.copy_(full[_mesh(cut, full)])
    else:
        source, target = _as_integers(full), _as_integers(part)
        last = cut[dims[-1]]
        assert isinstance(last, np.ndarray)
        if len(dims) == 1:
            np.take(source, last, axis=dims[0], out=target, mode="clip")  # 'clip' skips a bounds-checked copy
        elif dims[0] == 0 and len(dims) == 2:
            assert isinstance(cut[0], np.ndarray)
            for row, target_row in zip(cut[0].tolist(), target, strict=True):
                np.take(source[row], last, axis=dims[1] - 1, out=target_row, mode="clip")
        else:
            part.copy_(full[_mesh(cut, full)])


def write_part(full: Tensor, cut: TensorCut, part: Tensor) -> None:
    """Write a worker's part into a full tensor: the inverse of `read_part`."""
    dims = [dim for dim, indices in enumerate(cut) if indices is not None]
    if not dims:
        full.copy_(part)
    elif not _has_integers(full):
        if len(dims) == 1:
            full.index_copy_(dims[0], _index(cut, dims[0], full), part)
        else:
            full[_mesh(cut, full)] = part
    else:
        target, source = _as_integers(full), _as_integers(part)
        last = cut[dims[-1]]
        assert isinstance(last, np.ndarray)
        if len(dims) == 1 and dims[0] == full.ndim - 1 > 0:  # more than ten times as fast as NumPy's assignment
            full.detach().scatter_(dims[0], torch.from_numpy(last).expand(part.shape), part.detach())
        elif len(dims) == 1:
            target[(slice(None),) * dims[0] + (last,)] = source
        elif dims[0] == 0 and len(dims) == 2:
            assert isinstance(cut[0], np.ndarray)
            index = (slice(None),) * (dims[1] - 1) + (last,)
            for row, source_row in zip(cut[0].tolist(), source, strict=True):
                target[row][index] = source_row
        else:
            full[_mesh(cut, full)] = part


def _index(cut: TensorCut, dim: int, full: Tensor) -> Tensor:
    indices = cut[dim]
    if indices is None:
        return torch.arange(full.shape[dim], device=full.device)
    return indices if isinstance(indices, Tensor) else torch.from_numpy(indices).to(full.device)


def _mesh(cut: TensorCut, full: Tensor) -> tuple[Tensor, ...]:
    """Return index tensors that broadcast against each other and select the worker's part."""
    return tuple(_index(cut, dim, full).view(-1, *([1] * (full.ndim - dim - 1))) for dim in range(full.ndim))


def _put_scaled(full: Tensor, cut: TensorCut, part: Tensor, factor: float) -> None:
    """Write a worker's part of a tensor, with its update scaled."""
    if factor != 1:
        before = torch.empty(part.shape, dtype=full.dtype, device=full.device)
        read_part(full, cut, before)
        part = _scaled(before, part, factor)
    write_part(full, cut, part)


def _scaled(before: Tensor, after: Tensor, factor: float) -> Tensor:
    """Return before + factor * (after - before); what has not changed stays the same, bit for bit."""
    if factor == 1:
        return after
    precise = torch.promote_types(before.dtype, torch.float32)
    # One operator at a time: a fused one would round the same number differently in tensors of other shapes.
    moved = (after.to(precise) - before.to(precise)).mul_(factor).add_(before.to(precise)).to(before.dtype)
    return torch.where(after == before, before, moved)


def _merge_mean(
    full: Tensor, cuts: Sequence[TensorCut], parts: Iterable[Tensor], own: float = 1.0, shared: float = 1.0
) -> None:
    """Write the mean over holders as old value + mean change: unlike sum / count, this is exact if nothing changed.

    `parts` may read `full` as they are produced, so `full` is written last. `own` and `shared` are the factors of the
    change of an entry with one holder, and with several.
    """
    if len(cuts) == 1 or full.dtype == torch.bool:  # truth values have no mean: the first holder's value is written
        for cut, part in reversed(list(zip(cuts, parts, strict=True))):
            _put_scaled(full, cut, part, own)
        return
    has_infinities = not is_finite([full])  # as in a mask: the difference of two infinities is NaN

    def moved(part: Tensor, before: Tensor) -> Tensor:
        return torch.where(part == before, 0, part - before) if has_infinities else part - before

    change = torch.zeros_like(full, dtype=torch.promote_types(full.dtype, torch.float32))
    if all(indices is None for cut in cuts for indices in cut):
        for part in parts:
            change += moved(part, full)
        full += change.div_(len(cuts)).mul_(shared).to(full.dtype)
        return
    merged = full.clone()
    count = torch.zeros_like(full, dtype=torch.int32)
    for cut, part in zip(cuts, parts, strict=True):
        index = _mesh(cut, full)
        before = full[index]
        change[index] += moved(part, before)
        count[index] += 1
        merged[index] = _scaled(before, part, own)
    mean = change.div_(count.clamp(min=1)).mul_(shared).to(full.dtype).add_(full)
    full.copy_(torch.where(count > 1, mean, merged))
