"""Find the integers of a network that say how wide something is, and what they must be in a narrow one.

While the network is traced, the integers that its modules hold (`num_heads`, `groups`, `split_size`, ...)
are replaced by integers that remember where they came from. Where one of them reaches an operator as
the size of something that carries neuron labels, its value in a narrow network is the number of
neurons held there.

Where it sits: `ist/groups/trace.py` puts the integers in place; `ist/groups/neurons.py` makes of them
what `ist/narrow.py` sets.
Not here: numbers that a forward computes from shapes (`ist/groups/calls.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Location = tuple[int | str, ...]
"""Where an integer is among the arguments of a call: a position or a name, then positions or the bound of a slice."""


class Origin(NamedTuple):
    """An integer attribute: of the module at `path`, or of its `config`."""

    path: str
    attribute: str
    of_config: bool = False

    def __str__(self) -> str:
        holder = f"{self.path or 'the network'}{'.config' if self.of_config else ''}"
        return f"'{self.attribute}' of {holder}"


class TracedInt(int):
    """An integer that remembers the attribute it is a multiple of."""

    origin: Origin
    factor: int

    @staticmethod
    def of(value: int, origin: Origin, factor: int = 1) -> "TracedInt":
        """Return `value`, which is `factor` times the attribute `origin`."""
        made = TracedInt(value)
        made.origin, made.factor = origin, factor
        return made

    def __mul__(self, other: Any) -> Any:
        """A multiple by a plain integer keeps its origin."""
        plain = type(other) is int and other > 0
        product = int(self) * (int(other) if isinstance(other, TracedInt) else other)
        return TracedInt.of(product, self.origin, self.factor * other) if plain else product

    __rmul__ = __mul__

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copies are plain integers."""
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __copy__(self) -> int:
        return int(self)


class Size(NamedTuple):
    """An integer argument of a torch function that is the size of an axis.

    Attributes:
        number: The integer as it was given.
        location: Where it is among the arguments.
        tensor: The tensor whose axis it is.
        axis: The axis.
        positions: Which positions of the axis it counts.
        in_shape: Whether it belongs to the shape that a tensor is brought into, of which one size may be -1.
    """

    number: int
    location: Location
    tensor: Tensor
    axis: int
    positions: range
    in_shape: bool = False


def plant(module: nn.Module) -> None:
    """Replace the integer attributes of a network's modules, and of their `config`s, by traced ones."""
    seen: set[int] = set()
    for path, child in module.named_modules():
        holders: list[tuple[Any, bool]] = [(child, False), (child.__dict__.get("config"), True)]
        for holder, of_config in holders:
            if holder is None or id(holder) in seen or not hasattr(holder, "__dict__"):
                continue
            seen.add(id(holder))
            for name, value in list(vars(holder).items()):
                if type(value) is int and not name.startswith("_"):
                    vars(holder)[name] = TracedInt.of(value, Origin(path, name, of_config))


def takes_sizes(function: Any) -> bool:
    """Return whether a torch function is one that `sizes_in` reads."""
    return getattr(function, "__name__", "") in _READERS


def sizes_in(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Iterator[Size]:
    """Yield the integers among the arguments of a torch function that are sizes of axes; -1 and the like left out."""
    reader = _READERS.get(getattr(function, "__name__", ""))
    if reader is not None:
        for size in reader(args, kwargs, result):
            if isinstance(size.number, int) and not isinstance(size.number, bool) and size.number >= 0:
                yield size


def with_sizes(
    args: Sequence[Any], kwargs: Mapping[str, Any], values: Mapping[Location, int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with other integers at some locations."""
    positional, named = list(args), dict(kwargs)
    for (first, *rest), value in values.items():
        if isinstance(first, int):
            positional[first] = _replaced(positional[first], rest, value)
        else:
            named[first] = _replaced(named[first], rest, value)
    return tuple(positional), named


def number_at(args: Sequence[Any], kwargs: Mapping[str, Any], location: Location) -> int:
    """Return the integer at a location among the arguments of a call."""
    first, *rest = location
    value = args[first] if isinstance(first, int) else kwargs[first]
    for step in rest:
        value = value[step] if isinstance(step, int) else getattr(value, step)
    number: int = value
    return number


def _replaced(value: Any, steps: Sequence[int | str], number: int) -> Any:
    if not steps:
        return number
    step, *rest = steps
    if isinstance(value, slice):
        bounds = {"start": value.start, "stop": value.stop, "step": value.step} | {step: number}
        return slice(bounds["start"], bounds["stop"], bounds["step"])
    items = list(value)
    assert isinstance(step, int)
    items[step] = _replaced(items[step], rest, number)
    return tuple(items) if isinstance(value, tuple) else items


_Found = Iterator[Size]
_Reader = Callable[[Sequence[Any], Mapping[str, Any], Any], _Found]


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, *names: str) -> tuple[Location, Any]:
    """Return where an argument is, and its value; None if it is not given."""
    if len(args) > position:
        return (position,), args[position]
    return next((((name,), kwargs[name]) for name in names if name in kwargs), ((), None))


def _listed(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, *names: str) -> list[tuple[Location, Any]]:
    """Return the integers of an argument that is a list, or all arguments from one on, with their locations."""
    location, value = _argument(args, kwargs, position, *names)
    if isinstance(value, tuple | list):
        return [((*location, number), item) for number, item in enumerate(value)]
    return [((number,), item) for number, item in enumerate(args) if number >= position]


def _shape(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, in_shape: bool) -> _Found:
    sizes = _listed(args, kwargs, 1, "shape", "size")
    lead = result.ndim - len(sizes)
    for axis, (location, size) in enumerate(sizes):
        yield Size(size, location, result, lead + axis, range(result.shape[lead + axis]), in_shape)


def _reshaped(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    yield from _shape(args, kwargs, result, in_shape=True)


def _expanded(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    yield from _shape(args, kwargs, result, in_shape=False)


def _unflattened(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    dim = _argument(args, kwargs, 1, "dim")[1]
    location, sizes = _argument(args, kwargs, 2, "sizes")
    for axis, size in enumerate(sizes):
        place = dim % args[0].ndim + axis
        yield Size(size, (*location, axis), result, place, range(result.shape[place]), in_shape=True)


def _split(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    location, sizes = _argument(args, kwargs, 1, "split_size_or_sections", "split_size", "split_sizes")
    dim = _argument(args, kwargs, 2, "dim")[1] or 0
    for number, part in enumerate(result):
        if not isinstance(sizes, int):
            yield Size(sizes[number], (*location, number), part, dim % part.ndim, range(part.shape[dim]))
        elif part.shape[dim] == sizes:  # the last part may be smaller
            yield Size(sizes, location, part, dim % part.ndim, range(part.shape[dim]))


def _indexed(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:  # noqa: ARG001 (one signature)
    source, index = args
    items: list[tuple[Location, Any]] = (
        [((1, number), item) for number, item in enumerate(index)] if isinstance(index, tuple) else [((1,), index)]
    )
    if any(item is Ellipsis for _, item in items):
        place = next(k for k, (_, item) in enumerate(items) if item is Ellipsis)
        consumed = sum(item is not None for _, item in items) - 1
        items[place : place + 1] = [((), slice(None))] * (source.ndim - consumed)
    axis = 0
    for location, item in items:
        if isinstance(item, slice):
            size = source.shape[axis]
            for name, bound in (("start", item.start), ("stop", item.stop)):
                if isinstance(bound, int) and 0 <= bound <= size:
                    yield Size(bound, (*location, name), source, axis, range(int(bound)))
        axis += item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else item is not None


def _narrowed(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    source, dim = args[0], _argument(args, kwargs, 1, "dim")[1] % args[0].ndim
    start, length = _argument(args, kwargs, 2, "start"), _argument(args, kwargs, 3, "length")
    if isinstance(start[1], int) and start[1] >= 0:
        yield Size(start[1], start[0], source, dim, range(int(start[1])))
    yield Size(length[1], length[0], result, dim, range(int(length[1])))


def _normalised(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    location, groups = _argument(args, kwargs, 1, "num_groups")
    if groups > 1:
        yield Size(groups, location, result, 1, range(0, result.shape[1], result.shape[1] // groups))


def _convolved(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    # Transposed convolutions have the same position: output_padding takes that of dilation.
    location, groups = _argument(args, kwargs, 6, "groups")
    weight = _argument(args, kwargs, 1, "weight")[1]
    axis = result.ndim - (weight.ndim - 1)
    channels = result.shape[axis]
    if groups is not None and groups > 1:
        yield Size(groups, location, result, axis, range(0, channels, channels // groups))


_READERS: dict[str, _Reader] = {
    **dict.fromkeys(("view", "reshape"), _reshaped),
    **dict.fromkeys(("expand", "broadcast_to"), _expanded),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolved),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolved),
    "unflatten": _unflattened,
    "__getitem__": _indexed,
    "narrow": _narrowed,
    "group_norm": _normalised,
}


class SizeLabels(NamedTuple):
    """An attribute, the multiple of it that was used, the final labels of the positions it counts, and who used it."""

    origin: Origin
    factor: int
    labels: Tensor
    user: str
