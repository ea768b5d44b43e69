"""Find the integers of a network that say how wide something is, and what they must be in a narrow one.

While the network is traced, the integers that its modules hold (`num_heads`, `groups`, `split_size`, ...)
are replaced by integers that remember where they came from. Where one of them reaches an operator as
the size of something that carries neuron labels, its value in a narrow network is the number of
neurons held there.

Where it sits: `ist/groups/trace.py` puts the integers in place; `ist/groups/neurons.py` makes of them
what `ist/narrow.py` sets.
Not here: numbers that a forward computes from shapes; if such a number is wrong in a narrow network, the
check at the start (`ist/verify.py`) finds it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


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
    """An attribute that was used as the size of an axis.

    Attributes:
        origin: The attribute.
        factor: The size is this multiple of it.
        tensor: The tensor whose axis it is.
        axis: The axis.
        positions: Which positions of the axis it counts.
    """

    origin: Origin
    factor: int
    tensor: Tensor
    axis: int
    positions: range


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


def sizes_in(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Iterator[Size]:
    """Yield the traced integers among the arguments of a torch function that are sizes of labelled axes."""
    reader = _READERS.get(getattr(function, "__name__", ""))
    if reader is None:
        return
    for number, tensor, axis, positions in reader(args, kwargs, result):
        if isinstance(number, TracedInt):
            yield Size(number.origin, number.factor, tensor, axis, positions)


_Found = Iterator[tuple[Any, Tensor, int, range]]
_Reader = Callable[[Sequence[Any], Mapping[str, Any], Any], _Found]


def _shaped(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    shape = args[1:] if len(args) > 1 else (kwargs.get("shape", kwargs.get("size", ())),)
    sizes = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else list(shape)
    lead = result.ndim - len(sizes)
    for axis, size in enumerate(sizes):
        yield size, result, lead + axis, range(result.shape[lead + axis])


def _unflattened(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    dim = kwargs["dim"] if "dim" in kwargs else args[1]
    sizes = kwargs["sizes"] if "sizes" in kwargs else args[2]
    for axis, size in enumerate(sizes):
        place = dim % args[0].ndim + axis
        yield size, result, place, range(result.shape[place])


def _split(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    sizes = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size"))
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    for number, part in enumerate(result):
        size = sizes if isinstance(sizes, int) else sizes[number]
        yield size, part, dim % part.ndim, range(part.shape[dim])


def _indexed(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:  # noqa: ARG001 (one signature)
    source, index = args
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [item for item in items if not isinstance(item, Tensor)]:
        place = next(k for k, item in enumerate(items) if item is Ellipsis)
        consumed = sum(item is not None for item in items) - 1
        items[place : place + 1] = [slice(None)] * (source.ndim - consumed)
    axis = 0
    for item in items:
        if isinstance(item, slice):
            size = source.shape[axis]
            for bound in (item.start, item.stop):
                if isinstance(bound, TracedInt) and 0 <= bound <= size:
                    yield bound, source, axis, range(int(bound))
        axis += item is not None


def _narrowed(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    source, dim, start, length = [*args, *[kwargs[k] for k in ("dim", "start", "length") if k in kwargs]][:4]
    dim %= source.ndim
    yield start, source, dim, range(int(start))
    yield length, result, dim, range(int(length))


def _normalised(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    groups = kwargs.get("num_groups", args[1] if len(args) > 1 else 1)
    if groups > 1:
        yield groups, result, 1, range(0, result.shape[1], result.shape[1] // groups)


def _convolved(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    groups = given.get("groups", 1)
    axis = result.ndim - (given["weight"].ndim - 1)
    channels = result.shape[axis]
    if groups > 1:
        yield groups, result, axis, range(0, channels, channels // groups)


def _convolved_transposed(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Found:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    yield from _convolved((), {"weight": given["weight"], "groups": given.get("groups", 1)}, result)


_READERS: dict[str, _Reader] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), _shaped),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolved),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolved_transposed),
    "unflatten": _unflattened,
    "__getitem__": _indexed,
    "narrow": _narrowed,
    "group_norm": _normalised,
}


class SizeLabels(NamedTuple):
    """An attribute, the multiple of it that was used, and the final labels of the positions it counts."""

    origin: Origin
    factor: int
    labels: Tensor
