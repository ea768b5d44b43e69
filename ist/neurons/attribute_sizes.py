"""Find the integer attributes of a network that are sizes, so that a submodel can get other values.

During a trace, the integers that modules hold (`num_heads`, `groups`, `split_size`, ...) are replaced by
integers that remember their origin. If such an integer reaches an operator as the size of an axis with neuron
labels, its value in a submodel is the number of neurons that the submodel holds there.

Where it sits: `ist/neurons/trace.py` inserts the integers; `ist/neurons/find.py` computes their values in a
submodel; `ist/subnet/module.py` sets them.
Not here: numbers that a forward computes from shapes (`ist/neurons/tracing/call_sites.py`).
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Location = tuple[int | str, ...]
"""The location of an integer in the arguments of a call: a position or a name, then indices or a bound of a slice."""


Step = tuple[str, Any]
"""One step into a value: ("attribute", name) of an object, or ("item", key) of a mapping or a sequence."""


class Origin(NamedTuple):
    """An integer of a network: an attribute of the module at `path`, or something inside this attribute."""

    path: str
    attribute: str
    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        holder = self.path or "the network"
        if not self.steps:
            return f"'{self.attribute}' of {holder}"
        inside = "".join(f".{key}" if kind == "attribute" else f"[{key!r}]" for kind, key in self.steps[:-1])
        return f"'{self.steps[-1][1]}' of {holder}.{self.attribute}{inside}"


class TracedInt(int):
    """An integer that remembers the attribute of which it is a multiple."""

    origin: Origin
    factor: int

    @staticmethod
    def of(value: int, origin: Origin, factor: int = 1) -> "TracedInt":
        """Return `value`, which is `factor` times the attribute `origin`."""
        made = TracedInt(value)
        made.origin, made.factor = origin, factor
        return made

    def __mul__(self, other: Any) -> Any:
        """Multiply; a product with a plain integer keeps its origin."""
        plain = type(other) is int and other > 0
        product = int(self) * (int(other) if isinstance(other, TracedInt) else other)
        return TracedInt.of(product, self.origin, self.factor * other) if plain else product

    __rmul__ = __mul__

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Pickle as a plain integer."""
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __copy__(self) -> int:
        return int(self)


class Size(NamedTuple):
    """An integer argument of a torch function that is the size of an axis.

    Attributes:
        number: The integer that was passed.
        location: Its location in the arguments.
        tensor: The tensor that has the axis.
        axis: The axis.
        positions: The positions of the axis that it counts.
        in_shape: Whether it is part of a shape argument (as of `view`), in which one size may be -1.
    """

    number: int
    location: Location
    tensor: Tensor
    axis: int
    positions: range
    in_shape: bool = False


_MODULES_OWN = frozenset(vars(nn.Module()))
_DEEPEST, _LONGEST = 3, 64


def insert_traced_integers(module: nn.Module) -> None:
    """Replace the integers in a network's modules by traced ones, in place.

    These are attributes of modules, of their `config` and of other plain settings objects, and items of lists, tuples
    and dictionaries of moderate length.
    """
    seen: set[int] = set()
    for path, child in module.named_modules():
        for name, value in list(vars(child).items()):
            if name not in _MODULES_OWN:
                vars(child)[name] = _with_traced_integers(value, Origin(path, name), seen)


def _with_traced_integers(value: Any, origin: Origin, seen: set[int]) -> Any:
    """Return a value with its integers replaced; settings objects, lists and dictionaries change in place."""
    if type(value) is int:
        return TracedInt.of(value, origin)
    if len(origin.steps) >= _DEEPEST or (not isinstance(value, tuple) and id(value) in seen):
        return value
    if _is_settings(value, origin):
        seen.add(id(value))
        for name, item in list(vars(value).items()):
            vars(value)[name] = _with_traced_integers(item, _inside(origin, "attribute", name), seen)
    elif isinstance(value, dict | list | tuple) and len(value) <= _LONGEST:
        seen.add(id(value))
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        made = {key: _with_traced_integers(item, _inside(origin, "item", key), seen) for key, item in items}
        if isinstance(value, tuple):
            return _tuple_like(value, list(made.values())) if any(made[k] is not item for k, item in items) else value
        for key, item in items:
            if made[key] is not item:
                value[key] = made[key]
    return value


def _is_settings(value: Any, origin: Origin) -> bool:
    """Whether an object is a plain collection of settings: a dataclass, a namespace, or a module's `config`."""
    if isinstance(value, type | Tensor | nn.Module) or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    named = is_dataclass(value) or isinstance(value, SimpleNamespace | argparse.Namespace)
    return named or (origin.attribute == "config" and not origin.steps)


def _inside(origin: Origin, kind: str, key: Any) -> Origin:
    return origin._replace(steps=(*origin.steps, (kind, key)))


def _tuple_like(value: tuple[Any, ...], items: list[Any]) -> Any:
    return type(value)(items) if type(value) in (tuple, torch.Size) else type(value)(*items)


def set_integer(module: nn.Module, origin: Origin, number: int) -> None:
    """Set an integer of a network, in place."""
    holder = vars(module.get_submodule(origin.path))
    holder[origin.attribute] = _with_integer(holder[origin.attribute], origin.steps, number)


def _with_integer(value: Any, steps: Sequence[Step], number: int) -> Any:
    if not steps:
        return number
    (kind, key), *rest = steps
    if kind == "attribute":
        vars(value)[key] = _with_integer(vars(value)[key], rest, number)
    elif isinstance(value, tuple):
        items = list(value)
        items[key] = _with_integer(items[key], rest, number)
        return _tuple_like(value, items)
    else:
        value[key] = _with_integer(value[key], rest, number)
    return value


def forget_sizes() -> None:
    """Clear einops' cache of computed sizes: it would return those of an equal integer of another module."""
    computed = getattr(sys.modules.get("einops.einops"), "_reconstruct_from_shape", None)
    forget = getattr(computed, "cache_clear", None)
    if forget is not None:
        forget()


def takes_sizes(function: Any) -> bool:
    """Return whether a torch function is one that `sizes_in` reads."""
    return getattr(function, "__name__", "") in _READERS


def makes_constants(function: Any) -> bool:
    """Return whether a torch function makes a tensor from sizes alone."""
    return getattr(function, "__name__", "") in _FACTORIES


def sizes_in(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Iterator[Size]:
    """Yield the integer arguments of a torch function that are sizes of axes; negative ones (-1) are skipped."""
    reader = _READERS.get(getattr(function, "__name__", ""))
    if reader is not None:
        for size in reader(args, kwargs, result):
            if isinstance(size.number, int) and not isinstance(size.number, bool) and size.number >= 0:
                yield size


def with_sizes(
    args: Sequence[Any], kwargs: Mapping[str, Any], values: Mapping[Location, int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with the integers at some locations replaced."""
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


_Sizes = Iterator[Size]
_Reader = Callable[[Sequence[Any], Mapping[str, Any], Any], _Sizes]


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, *names: str) -> tuple[Location, Any]:
    """Return the location and the value of an argument; the value is None if the argument is not passed."""
    if len(args) > position:
        return (position,), args[position]
    return next((((name,), kwargs[name]) for name in names if name in kwargs), ((), None))


def _listed(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, *names: str) -> list[tuple[Location, Any]]:
    """Return the integers of a list argument, or all arguments from `position` on, with their locations."""
    location, value = _argument(args, kwargs, position, *names)
    if isinstance(value, tuple | list):
        return [((*location, number), item) for number, item in enumerate(value)]
    return [((number,), item) for number, item in enumerate(args) if number >= position]


def _shape(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, in_shape: bool) -> _Sizes:
    sizes = _listed(args, kwargs, 1, "shape", "size")
    lead = result.ndim - len(sizes)
    for axis, (location, size) in enumerate(sizes):
        yield Size(size, location, result, lead + axis, range(result.shape[lead + axis]), in_shape)


def _reshaped(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Sizes:
    yield from _shape(args, kwargs, result, in_shape=True)


def _expanded(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Sizes:
    yield from _shape(args, kwargs, result, in_shape=False)


def _unflattened(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Sizes:
    dim = _argument(args, kwargs, 1, "dim")[1]
    location, sizes = _argument(args, kwargs, 2, "sizes")
    for axis, size in enumerate(sizes):
        place = dim % args[0].ndim + axis
        yield Size(size, (*location, axis), result, place, range(result.shape[place]), in_shape=True)


def _split(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Sizes:
    location, sizes = _argument(args, kwargs, 1, "split_size_or_sections", "split_size", "split_sizes")
    dim = _argument(args, kwargs, 2, "dim")[1] or 0
    for number, part in enumerate(result):
        if not isinstance(sizes, int):
            yield Size(sizes[number], (*location, number), part, dim % part.ndim, range(part.shape[dim]))
        elif part.shape[dim] == sizes:  # the last part may be smaller
            yield Size(sizes, location, part, dim % part.ndim, range(part.shape[dim]))


def _indexed(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Sizes:  # noqa: ARG001 (one signature)
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


def _narrowed(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Sizes:
    source, dim = args[0], _argument(args, kwargs, 1, "dim")[1] % args[0].ndim
    start, length = _argument(args, kwargs, 2, "start"), _argument(args, kwargs, 3, "length")
    if isinstance(start[1], int) and start[1] >= 0:
        yield Size(start[1], start[0], source, dim, range(int(start[1])))
    yield Size(length[1], length[0], result, dim, range(int(length[1])))


def _normalized(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Sizes:
    location, groups = _argument(args, kwargs, 1, "num_groups")
    if groups > 1:
        yield Size(groups, location, result, 1, range(0, result.shape[1], result.shape[1] // groups))


def _convolved(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Sizes:
    # The position is the same for transposed convolutions: output_padding is where dilation is otherwise.
    location, groups = _argument(args, kwargs, 6, "groups")
    weight = _argument(args, kwargs, 1, "weight")[1]
    axis = result.ndim - (weight.ndim - 1)
    channels = result.shape[axis]
    if groups is not None and groups > 1:
        yield Size(groups, location, result, axis, range(0, channels, channels // groups))


def _made(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Sizes:
    for axis, (location, size) in enumerate(_listed(args, kwargs, 0, "size")[: result.ndim]):
        yield Size(size, location, result, axis, range(result.shape[axis]))


def _made_like(args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> _Sizes:
    for axis, (location, size) in enumerate(_listed(args, kwargs, 1, "size")[: result.ndim]):
        yield Size(size, location, result, axis, range(result.shape[axis]))


_FACTORIES: dict[str, _Reader] = {
    **dict.fromkeys(("zeros", "ones", "full", "empty", "rand", "randn"), _made),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _made_like),
}

_READERS: dict[str, _Reader] = {
    **_FACTORIES,
    **dict.fromkeys(("view", "reshape"), _reshaped),
    **dict.fromkeys(("expand", "broadcast_to"), _expanded),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolved),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolved),
    "unflatten": _unflattened,
    "__getitem__": _indexed,
    "narrow": _narrowed,
    "group_norm": _normalized,
}


class SizeLabels(NamedTuple):
    """An attribute that was used as a size.

    Attributes:
        origin: The attribute.
        factor: The multiple of it that was used.
        labels: The final labels of the positions that it counts.
        user: The path of the module that used it.
    """

    origin: Origin
    factor: int
    labels: Tensor
    user: str
