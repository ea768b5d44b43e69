"""Cut one worker's subnet out of the whole model, and put trained subnets back.

Where it sits: partition.py decides who owns which neurons; this file turns that into tensors and
back; `ist/training/coordinator.py` calls it once a round.
Law: reassemble(state, cuts, [extract(state, cut) for cut in cuts]) leaves state as it was, bit for bit.
Not here: choosing neurons (`partition.py`), training (`ist/training/worker.py`), moving bytes (`ist/pools/`).

Shape letters: N neurons of a group, n neurons one worker owns, O/I rows and columns of a weight,
o/i the same in a subnet.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ist.neurons.group import Group, Slot
from ist.rng import Indices
from ist.tensors import TensorSpec, is_finite

TensorCut = tuple[Indices | Tensor | None, ...]
"""For every dim of a tensor, the sorted positions that a worker holds; None: all of them. Tensors where `on_device`."""

Cut = Mapping[str, TensorCut]
"""A worker's part of every tensor, by name."""

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def positions(groups: Sequence[Group], specs: Mapping[str, TensorSpec], neurons: Sequence[Indices]) -> Cut:
    """Translate a worker's neurons into positions of every tensor.

    Args:
        groups: The network's neuron groups.
        specs: Every tensor that is trained.
        neurons: For each group, the sorted neuron numbers that the worker holds.

    Returns:
        For every name in `specs` of which the worker has a part, the positions of it.
    """
    cuts: dict[str, list[Indices | None]] = {name: [None] * len(spec.shape) for name, spec in specs.items()}
    for (name, dim), slots in _slots_by_dim(groups, specs).items():
        pieces = [slot.positions(neurons[number]) for number, slot in slots]
        shared = _uncovered([(slot, groups[number].size) for number, slot in slots], specs[name].shape[dim])
        parts = [*pieces, *([shared] if len(shared) else [])]
        ordered = len(parts) == 1 and slots[0][1].order is None
        held = parts[0] if ordered else np.sort(np.concatenate(parts))
        cuts[name][dim] = held if len(held) < specs[name].shape[dim] else None
    absent = absent_modules(groups, neurons)
    return {name: tuple(dims) for name, dims in cuts.items() if not _within(name, absent)}


def on_device(cuts: Sequence[Cut], device: torch.device) -> Sequence[Cut]:
    """Return cuts whose positions lie where the tensors do: on a GPU after one transfer, on the CPU as they are."""
    if device.type == "cpu":
        return cuts
    held = {id(dim): dim for cut in cuts for dims in cut.values() for dim in dims if isinstance(dim, np.ndarray)}
    if not held:
        return cuts
    joined = torch.from_numpy(np.concatenate(list(held.values()))).to(device)
    there = dict(zip(held, torch.split(joined, [len(dim) for dim in held.values()]), strict=True))
    return [{name: tuple(there.get(id(dim), dim) for dim in dims) for name, dims in cut.items()} for cut in cuts]


def absent_modules(groups: Sequence[Group], neurons: Sequence[Indices]) -> list[str]:
    """Return the paths of the modules that a worker does without, where whole modules are dealt."""
    return [
        path
        for group, held in zip(groups, neurons, strict=True)
        for number, path in enumerate(group.modules)
        if number not in set(held.tolist())
    ]


def _within(name: str, paths: Sequence[str]) -> bool:
    parameter = name.rpartition("@")[2]  # optimiser state is named after its parameter
    return any(parameter.startswith(f"{path}.") for path in paths)


def cut_specs(specs: Mapping[str, TensorSpec], cut: Cut) -> dict[str, TensorSpec]:
    """Return the specs of a worker's part of every tensor."""
    return {
        name: TensorSpec(
            tuple(size if held is None else len(held) for size, held in zip(spec.shape, cut[name], strict=True)),
            spec.dtype,
        )
        for name, spec in specs.items()
        if name in cut
    }


def exclusive_names(groups: Sequence[Group], specs: Mapping[str, TensorSpec]) -> frozenset[str]:
    """Return the tensors of which no entry has two holders, when every neuron has one owner.

    Those are the tensors with a dim that slots cover wholly.
    """
    covered = {
        name
        for (name, dim), slots in _slots_by_dim(groups, specs).items()
        if sum(slot.block * groups[number].size for number, slot in slots) == specs[name].shape[dim]
    }
    return frozenset(covered)


def extract(state: Mapping[str, Tensor], cut: Cut, into: Mapping[str, Tensor]) -> None:
    """Copy a worker's part of every tensor of `into` out of the whole model.

    Args:
        state: Whole tensors, contiguous.
        cut: The worker's positions.
        into: Contiguous tensors of the cut shapes, which are overwritten; may leave tensors out.
    """
    for name, part in into.items():
        _take(state[name], cut[name], part)


def reassemble(
    state: Mapping[str, Tensor],
    cuts: Sequence[Cut],
    trained: Iterable[tuple[int, Mapping[str, Tensor]]],
    exclusive: frozenset[str],
) -> None:
    """Write trained subnets into the whole model, in place.

    An entry that one worker returned takes its value; one that several returned takes their mean; one
    that nobody returned keeps its value.

    Args:
        state: Whole tensors, contiguous, overwritten.
        cuts: Every worker's positions.
        trained: (worker, tensors), in any order; an iterator is consumed as subnets arrive. The tensors must
            stay as they are until this returns; each is read once, before its part of `state` is written.
        exclusive: Tensors of which no entry has two holders; they are written at once.

    Reference: Yuan et al., arXiv 1910.02120, section 3 (disjoint parts); Liao and Kyrillidis,
    arXiv 2112.02668, Algorithm 1 (mean over those that trained an entry).
    """
    merge = Merge(state, cuts, exclusive)
    for worker, tensors in trained:
        merge.add(worker, tensors)
    merge.finish()


class Merge:
    """The merge of a round, subnet by subnet as they arrive; see `reassemble`.

    Args:
        state: Whole tensors, contiguous, overwritten.
        cuts: Every worker's positions.
        exclusive: Tensors of which no entry has two holders; `add` writes them at once.
    """

    def __init__(self, state: Mapping[str, Tensor], cuts: Sequence[Cut], exclusive: frozenset[str]) -> None:
        self._state = state
        self._cuts = cuts
        self._exclusive = exclusive
        self._returned: dict[int, Mapping[str, Tensor]] = {}
        self._holders: dict[str, list[int]] = {}

    def add(self, worker: int, tensors: Mapping[str, Tensor]) -> None:
        """Merge what a worker trained; `tensors` must stay as they are until `finish` returns."""
        self._returned[worker] = tensors
        for name in tensors:
            if name in self._exclusive:
                _put(self._state[name], self._cuts[worker][name], tensors[name])
            else:
                self._holders.setdefault(name, []).append(worker)

    def finish(self) -> None:
        """Merge the tensors that several workers hold: each entry becomes their mean."""
        for name, workers in self._holders.items():
            # In the order of workers, not of arrival: a sum of floats depends on its order.
            workers.sort()
            parts = (self._returned[worker][name] for worker in workers)
            _merge_mean(self._state[name], [self._cuts[worker][name] for worker in workers], parts)


def fill_part(whole: Tensor, cut: TensorCut, value: bool) -> None:
    """Write one value into a worker's part of a whole tensor."""
    whole[_mesh(cut, whole)] = value


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
    # NumPy's row-wise take is 2 to 3 times faster here than torch's indexing, but it knows no bfloat16:
    # copying needs only the width of an element.
    array: NDArray[np.int64] = tensor.detach().view(_INTEGER_OF_SIZE[tensor.element_size()]).numpy()
    return array


def _has_integers(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.element_size() in _INTEGER_OF_SIZE


def _take(whole: Tensor, cut: TensorCut, part: Tensor) -> None:
    dims = [dim for dim, held in enumerate(cut) if held is not None]
    if not dims:
        part.copy_(whole)
    elif not _has_integers(whole):
        if len(dims) == 1:
            torch.index_select(whole, dims[0], _index(cut, dims[0], whole), out=part)
        else:
            part.copy_(whole[_mesh(cut, whole)])
    else:
        source, target = _as_integers(whole), _as_integers(part)
        last = cut[dims[-1]]
        assert isinstance(last, np.ndarray)
        if len(dims) == 1:
            np.take(source, last, axis=dims[0], out=target, mode="clip")  # 'clip' skips a bounds-checked copy
        elif dims[0] == 0 and len(dims) == 2:
            assert isinstance(cut[0], np.ndarray)
            for row, target_row in zip(cut[0].tolist(), target, strict=True):
                np.take(source[row], last, axis=dims[1] - 1, out=target_row, mode="clip")
        else:
            part.copy_(whole[_mesh(cut, whole)])


def _put(whole: Tensor, cut: TensorCut, part: Tensor) -> None:
    dims = [dim for dim, held in enumerate(cut) if held is not None]
    if not dims:
        whole.copy_(part)
    elif not _has_integers(whole):
        if len(dims) == 1:
            whole.index_copy_(dims[0], _index(cut, dims[0], whole), part)
        else:
            whole[_mesh(cut, whole)] = part
    else:
        target, source = _as_integers(whole), _as_integers(part)
        last = cut[dims[-1]]
        assert isinstance(last, np.ndarray)
        if len(dims) == 1:
            target[(slice(None),) * dims[0] + (last,)] = source
        elif dims[0] == 0 and len(dims) == 2:
            assert isinstance(cut[0], np.ndarray)
            index = (slice(None),) * (dims[1] - 1) + (last,)
            for row, source_row in zip(cut[0].tolist(), source, strict=True):
                target[row][index] = source_row
        else:
            whole[_mesh(cut, whole)] = part


def _index(cut: TensorCut, dim: int, whole: Tensor) -> Tensor:
    held = cut[dim]
    if held is None:
        return torch.arange(whole.shape[dim], device=whole.device)
    return held if isinstance(held, Tensor) else torch.from_numpy(held).to(whole.device)


def _mesh(cut: TensorCut, whole: Tensor) -> tuple[Tensor, ...]:
    """Index tensors that broadcast against each other and select the cut."""
    return tuple(_index(cut, dim, whole).view(-1, *([1] * (whole.ndim - dim - 1))) for dim in range(whole.ndim))


def _merge_mean(whole: Tensor, cuts: Sequence[TensorCut], parts: Iterable[Tensor]) -> None:
    """Mean over holders, as old value + mean change: exact when nothing changed, unlike sum / count.

    `parts` may read `whole` while they are made, so that is written last.
    """
    if len(cuts) == 1 or whole.dtype == torch.bool:  # there is no mean of truth values: the first holder's counts
        for cut, part in reversed(list(zip(cuts, parts, strict=True))):
            _put(whole, cut, part)
        return
    has_infinities = not is_finite([whole])  # a mask: the difference of two infinities is not a number

    def moved(part: Tensor, before: Tensor) -> Tensor:
        return torch.where(part == before, 0, part - before) if has_infinities else part - before

    change = torch.zeros_like(whole, dtype=torch.promote_types(whole.dtype, torch.float32))
    if all(held is None for cut in cuts for held in cut):
        for part in parts:
            change += moved(part, whole)
        whole += change.div_(len(cuts)).to(whole.dtype)
        return
    merged = whole.clone()
    count = torch.zeros_like(whole, dtype=torch.int32)
    for cut, part in zip(cuts, parts, strict=True):
        index = _mesh(cut, whole)
        change[index] += moved(part, whole[index])
        count[index] += 1
        merged[index] = part
    mean = change.div_(count.clamp(min=1)).to(whole.dtype).add_(whole)
    whole.copy_(torch.where(count > 1, mean, merged))
