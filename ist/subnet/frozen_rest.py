"""Make a worker's module that computes the full network, and of which the worker trains its own positions only.

A submodel (`module.py`) lacks all neurons that other workers hold. Here they are present but frozen: the module has the
full network's sizes. Of a tensor that is split, the worker has its own positions as a parameter, as in a submodel, and
all positions in encoded, read-only form: a few bits for each number (`exchange.rest`). A layer assembles the full
tensor when it runs and again in the backward pass, so no full-precision copy of the rest outlives a layer; the rest has
no gradient and no optimizer state.

Where it sits: `ist/training/worker.py` trains it in rounds with `partition.rest: frozen`; the encoded rest arrives
beside the subnet (`ist/transport/frozen_parameters.py`).
Law: gradients of a worker's own positions are those of the full network in which all other positions have their decoded
values.
Not here: which positions a worker holds (`cut.py`), how the rest is encoded (`ist/transport/codec.py`).

Reference: Filippova et al., Partial Parameter Updates, arXiv 2509.22418, compute the full network on every node and
update a fixed part of it there; here each round draws new parts, and what is not updated is rounded.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from ist.errors import ModelError
from ist.network.copies import copied
from ist.subnet.cut import Cut, TensorCut, read_part, write_part
from ist.subnet.module import bind, collect, replace_tensors
from ist.tensors import TensorSpec, memory_key, named_tensors

Decode = Callable[[], Tensor]
"""Returns the full tensor of which a worker trains a part: a new tensor at each call."""


@dataclass(frozen=True)
class Partly:
    """A full tensor of which a worker trains a part, in a round.

    Attributes:
        decode: Returns the full tensor, whose values at the worker's own positions are not used.
        cut: The worker's positions, on its device; None: it trains none.
    """

    decode: Decode
    cut: TensorCut | None

    def value(self, own: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """Return the full tensor, a new one, with a worker's values at its own positions.

        Args:
            own: The worker's part; None: it has none.
            dtype: The dtype of the result; None: that of the decoded tensor.
        """
        full = self.decode()
        full = full if dtype is None else full.to(dtype)
        if own is not None:
            assert self.cut is not None
            write_part(full, self.cut, own.detach().to(full.dtype).contiguous())
        return full

    def part_of(self, full: Tensor) -> Tensor:
        """Return the worker's part of a full tensor: a new tensor."""
        assert self.cut is not None
        full = full.resolve_conj().resolve_neg().contiguous()
        shape = [size if dim is None else len(dim) for size, dim in zip(full.shape, self.cut, strict=True)]
        part = full.new_empty(shape)
        read_part(full, self.cut, part)
        return part


class Parts(dict[str, Partly]):
    """The parts of a round, by name; a copy of a module shares them with the module."""

    def __deepcopy__(self, memo: object) -> "Parts":
        return self


@dataclass
class FullModule:
    """A module with the full network's sizes, whose parameters are a worker's own positions; see `make_full_module`.

    Attributes:
        module: The module. Its parameters have the shapes of the worker's parts.
        split: The names of tensors of which workers train a part or nothing.
        parts: The parts of the current round, by name; `bind` sets them.
    """

    module: nn.Module
    split: frozenset[str]
    parts: Parts = field(default_factory=Parts)

    def bind(self, trained: Mapping[str, Tensor], cut: Cut, rest: Mapping[str, Decode]) -> None:
        """Give the module the values of a round.

        Args:
            trained: The worker's part of every tensor that it trains; parameters become views of these.
            cut: The worker's positions in each of them.
            rest: For every name in `split`, the decoder of the full tensor.
        """
        self.parts.clear()
        for name in self.split:
            self.parts[name] = Partly(rest[name], cut.get(name))
        buffers = {name for name, _ in self.module.named_buffers()}
        bind(self.module, {name: tensor for name, tensor in trained.items() if name not in buffers & self.split})
        for path, child in self.module.named_modules():
            for short in list(child._buffers):
                name = _join(path, short)
                if name in self.split:  # small: the module has the full buffer, so that a forward can write to it
                    child._buffers[short] = self.parts[name].value(trained.get(name))

    def collect(self, trained: Mapping[str, Tensor]) -> None:
        """Copy what a forward has replaced, and the worker's part of buffers, into the bound tensors."""
        found = named_tensors(self.module)
        parameters = {name for name, _ in self.module.named_parameters()}
        whole = (trained.keys() & self.split) - parameters
        collect(self.module, {name: tensor for name, tensor in trained.items() if name not in whole})
        for name in whole & found.keys():
            trained[name].copy_(self.parts[name].part_of(found[name]))


def make_full_module(
    template: nn.Module,
    own: Mapping[str, TensorSpec],
    split: frozenset[str],
    device: torch.device,
    constants: Mapping[str, Tensor],
) -> FullModule:
    """Return a module that computes the full network and has a worker's own positions as parameters.

    Args:
        template: The full network on the `meta` device.
        own: The specs of the worker's part of every tensor that it trains.
        split: The names of tensors of which workers train a part or nothing; all others are trained as a whole.
        device: The module's device.
        constants: Values of tensors that are neither sent nor initialized here.

    Raises:
        ModelError: A layer has sparse gradients.
    """
    module = copied(template)
    made = FullModule(module, split)
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    assembled: list[tuple[nn.Module, dict[str, str]]] = []
    for path, child in module.named_modules():
        names = {short: first[id(p)] for short, p in child._parameters.items() if p is not None}
        names = {short: name for short, name in names.items() if name in split}
        if names and getattr(child, "sparse", False):
            raise ModelError(f"'{path}' has sparse gradients, which 'partition.rest: frozen' does not support")
        for short, name in names.items():
            if name not in own:
                child._parameters[short] = None
        assembled.append((child, names))
    parameters = {name for name, _ in module.named_parameters()}
    replace_tensors(module, {name: spec for name, spec in own.items() if name in parameters}, device, constants)
    for child, names in assembled:
        if names:
            _read_assembled(child, made.parts, names)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training:
            child.reset_running_stats()
    return made


_PARTS = "_parts_of_the_round"
"""The attribute of a module with the parts of the current round."""


def _read_assembled(child: nn.Module, parts: Parts, names: Mapping[str, str]) -> None:
    """Make a module read full tensors in place of some of its parameters.

    Args:
        child: The module.
        parts: The parts of the current round.
        names: The parameters: their names in the module, and in the network.
    """
    base = type(child)
    vars(child)[_PARTS] = parts  # not in the class, which the garbage collector frees late

    def reader(short: str) -> property:
        return property(lambda self: _assembled(self._parameters[short], vars(self)[_PARTS], names[short]))

    members: dict[str, Any] = {short: reader(short) for short in names}
    if isinstance(child, nn.RNNBase):
        members["_flat_weights"] = property(
            lambda self: [getattr(self, name) for name in self._flat_weights_names], lambda *_: None
        )
    fast = _FAST.get(f"{base.__module__}.{base.__qualname__}") if "weight" in names else None
    if fast is not None:
        members["forward"] = lambda self, x: fast(self, x, vars(self)[_PARTS][names["weight"]])
    else:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with _saved_encoded():
                return base.forward(self, *args, **kwargs)

        members["forward"] = forward
    child.__class__ = type(base.__name__, (base,), members)


class _Assemble(torch.autograd.Function):
    """The full tensor as a function of a worker's part of it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, part: Partly) -> Tensor:
        ctx.part = part
        return part.value(own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.part.part_of(grad), None


@dataclass(frozen=True)
class _Read:
    """A full tensor that has been read.

    Attributes:
        name: Its name.
        full: The tensor.
        version: Its version when it was read.
        part: How it was assembled.
        own: From which parameter.
    """

    name: str
    full: Tensor
    version: int
    part: Partly
    own: Tensor | None

    def check(self) -> None:
        """Check that nothing has been written to the tensor.

        Raises:
            ModelError: Something has.
        """
        if self.full._version != self.version or not torch.equal(self.full, self.part.value(self.own)):
            raise ModelError(
                f"the network or the step writes to '{self.name}', which would have no effect with 'partition.rest: "
                "frozen': what a layer reads is decoded for it. Compute with a changed copy instead, as in "
                "torch.nn.utils.parametrize, or set 'partition.rest' to absent"
            )


class _Running(threading.local):
    """What runs in this thread.

    Attributes:
        layers: For each layer that runs now, its assembled tensors by their memory.
        reads: What has been read outside a layer, and by the layer that runs now; None: it is not watched.
    """

    def __init__(self) -> None:
        self.layers: list[dict[Hashable, tuple[Partly, Tensor | None, torch.dtype]]] = []
        self.reads: list[_Read] | None = None


_running = _Running()


@contextmanager
def writes_refused() -> Iterator[None]:
    """Check that nothing is written to the full tensors that are read in the context; this costs their memory.

    Raises:
        ModelError: Something is.
    """
    _running.reads = []
    try:
        yield
        for read in _running.reads:
            read.check()
    finally:
        _running.reads = None


def _assembled(own: Tensor | None, parts: Parts, name: str) -> Tensor:
    part = parts[name]
    full: Tensor = part.value(None) if own is None else _Assemble.apply(own, part)  # type: ignore[no-untyped-call]
    if _running.layers:
        _running.layers[-1][memory_key(full)] = (part, own, full.dtype)
    if _running.reads is not None:
        _running.reads.append(_Read(name, full, full._version, part, own))
    return full


@contextmanager
def _saved_encoded() -> Iterator[None]:
    """Let autograd save how to assemble a full tensor again, instead of the tensor, while a layer runs."""
    _running.layers.append({})
    first = len(_running.reads or ())
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
        for read in (_running.reads or [])[first:]:
            read.check()
        del (_running.reads or [])[first:]
    finally:
        _running.layers.pop()


@dataclass(frozen=True)
class _Saved:
    part: Partly
    own: Tensor | None
    version: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _pack(tensor: Tensor) -> Tensor | _Saved:
    if tensor.layout != torch.strided:
        return tensor
    key = memory_key(tensor)
    found = next((made[key] for made in _running.layers if key in made), None)
    if found is None:
        return tensor
    part, own, dtype = found
    if tensor.is_conj() or tensor.is_neg() or tensor.dtype != dtype:  # views that strides do not describe
        return tensor
    version = 0 if own is None else own._version
    return _Saved(part, own, version, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: Tensor | _Saved) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    if saved.own is not None and saved.own._version != saved.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a "
            "parameter has changed between the forward and the backward pass"
        )
    return saved.part.value(saved.own, saved.dtype).as_strided(saved.size, saved.stride, saved.offset)


# The general way computes the gradient of the full weight. The layers below compute only that of a worker's own
# positions, which saves up to a third of a step's arithmetic.


class _Product(torch.autograd.Function):
    """`x @ full.T + bias`, or `x @ full + bias` if the weight is stored transposed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        own: Tensor | None,
        bias: Tensor | None,
        part: Partly,
        dtype: torch.dtype | None,
        is_in_out: bool,
    ) -> Tensor:
        full = part.value(own, dtype)
        ctx.part, ctx.dtype, ctx.is_in_out = part, dtype, is_in_out
        ins = _dim(part, 0 if is_in_out else 1)
        trains = own is not None and own.requires_grad
        ctx.save_for_backward(own, (x if ins is None else x.index_select(-1, ins)) if trains else None)
        return F.linear(x, full.t() if is_in_out else full, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own, x = ctx.saved_tensors
        to_x = to_own = to_bias = None
        if ctx.needs_input_grad[0]:
            full = ctx.part.value(own, ctx.dtype)
            to_x = grad @ (full.t() if ctx.is_in_out else full)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            outs = _dim(ctx.part, 1 if ctx.is_in_out else 0)
            of_own = rows if outs is None else rows.index_select(1, outs)
            inputs = x.reshape(-1, x.shape[-1])
            to_own = inputs.t() @ of_own if ctx.is_in_out else of_own.t() @ inputs
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(0)
        return to_x, to_own, to_bias, None, None, None


def _dim(part: Partly, dim: int) -> Tensor | None:
    found = None if part.cut is None else part.cut[dim]
    return found if found is None or isinstance(found, Tensor) else torch.from_numpy(found)


def _linear(module: Any, x: Tensor, part: Partly, is_in_out: bool = False) -> Tensor:
    own, bias, dtype = module._parameters["weight"], module.bias, None
    if torch.is_autocast_enabled(x.device.type):  # cast outside, so that gradients are cast back
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        own, bias = (None if tensor is None else tensor.to(dtype) for tensor in (own, bias))
    product: Tensor = _Product.apply(x, own, bias, part, dtype, is_in_out)  # type: ignore[no-untyped-call]
    return product


_FAST: Mapping[str, Callable[[Any, Tensor, Partly], Tensor]] = {
    "torch.nn.modules.linear.Linear": _linear,
    "transformers.pytorch_utils.Conv1D": lambda module, x, part: _linear(module, x, part, is_in_out=True),
}
"""By the name of a layer's class: how it runs."""


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
