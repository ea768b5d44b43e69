"""Run a network once on an example, and learn which positions of its tensors belong together.

The network runs as it is, on the `meta` device (no memory, no arithmetic), or on the CPU if its
forward looks at values. Two of torch's modes watch it: one sees every elementary operator and
applies the rules of `ist/groups/rules.py`; the other sees every torch function with the arguments as
the module gave them, and notes which attributes are sizes (`ist/groups/sizes.py`).

Tracing elementary operators as they run was chosen over `torch.export` because it shows the integers
that come from attributes, needs no support of control flow, and works alike in all versions of torch.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ist.copies import copied
from ist.data.nested import call_model, mapped, moved, tensors_in
from ist.errors import ModelError, first_line
from ist.groups import named_tensors, on_meta
from ist.groups.call import Call
from ist.groups.combine import Scene, Value
from ist.groups.labels import FROZEN, Activation
from ist.groups.parameters import ParameterView
from ist.groups.rules import labels_of_results
from ist.groups.sizes import Size, SizeLabels, plant, sizes_in

_RANDOM = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}


_MADE = {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "empty_like"}


class WithoutChance(TorchFunctionMode):
    """Turns dropout off and makes every Bernoulli mask 1, in training mode too.

    So every unit takes part in the comparison. What else is random is drawn alike (`ist/groups/draws.py`).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace a random function."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _RANDOM:
            return args[0] if args else kwargs["input"]
        if name == "bernoulli_":
            return args[0].fill_(1)
        if name == "rrelu":
            lower, upper = (*args[1:3], *[kwargs[k] for k in ("lower", "upper") if k in kwargs], 1 / 8, 1 / 3)[:2]
            return torch.nn.functional.leaky_relu(args[0] if args else kwargs["input"], (lower + upper) / 2)
        if name == "scaled_dot_product_attention":
            args, kwargs = args[:4], {"dropout_p": 0.0, **kwargs} | {"dropout_p": 0.0}
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Traced:
    """What a trace found.

    Attributes:
        scene: Labels, and which are joined.
        sizes: Attributes that are sizes of labelled axes.
        unknown: Operators without a rule, and the module where each was first met.
        on_meta: Whether the network ran without values.
    """

    scene: Scene
    sizes: list[SizeLabels]
    unknown: dict[str, str]
    on_meta: bool


def trace(template: nn.Module, example: Any, build: Any = None) -> Traced:
    """Trace a network.

    Args:
        template: The network, on any device.
        example: What its forward takes: a tensor, a tuple of positional or a mapping of keyword arguments.
        build: Makes the network with values; used if its forward depends on values.

    Raises:
        ModelError: The forward fails on the example.
    """
    try:
        return _trace(on_meta(template), _floats_on_meta(example))
    except Exception as error:  # a forward that looks at values may fail in any way without them
        if build is None:
            raise ModelError(f"the network fails on the example: {first_line(error)}") from error
    try:
        return _trace(copied(build()).cpu(), moved(example, torch.device("cpu")))
    except Exception as error:  # whatever a forward raises
        raise ModelError(
            f"the network fails on an example of the data: {type(error).__name__}: {first_line(error)}"
        ) from error


def try_out(module: nn.Module, example: Any) -> None:
    """Run a network without gradients and without chance, as it would be traced.

    Args:
        module: A network, on `meta` or on the CPU.
        example: What its forward takes, on the CPU.
    """
    on_meta = all(parameter.is_meta for parameter in module.parameters())
    integers = _MetaAndIntegers()  # type: ignore[no-untyped-call]
    with comparable(), integers, torch.no_grad():
        call_model(module, _floats_on_meta(example) if on_meta else example)


def _floats_on_meta(example: Any) -> Any:
    return mapped(example, lambda tensor: tensor.to("meta" if tensor.is_floating_point() else "cpu"))


def _trace(module: nn.Module, example: Any) -> Traced:
    without_inner_dropout(module)
    watch = _Watch()
    watch.scene.atoms.buffers = {name for name, _ in module.named_buffers()}
    for name, tensor in named_tensors(module).items():
        watch.know(tensor, watch.scene.atoms.view(name, tuple(tensor.shape)))
    plant(module)
    for tensor in tensors_in(example):
        watch.know(tensor, watch.scene.labels.constant(tuple(tensor.shape), FROZEN))
    with comparable(), _modules(module, watch), _Arguments(watch), watch, torch.no_grad():
        outputs = call_model(module, example)
    for tensor in tensors_in(outputs):
        watch.freeze(tensor)
    watch.scene.settle()
    on_meta = all(parameter.is_meta for parameter in module.parameters())
    return Traced(watch.scene, watch.size_labels(), watch.unknown, on_meta)


@contextmanager
def comparable() -> Iterator[None]:
    """Let networks run without chance, and without fused kernels that hide what they do."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(WithoutChance())
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def without_inner_dropout(module: nn.Module) -> nn.Module:
    """Turn off, in place, the dropout of modules that apply it inside a fused function, and return the module."""
    for child in module.modules():
        if isinstance(child, nn.RNNBase | nn.MultiheadAttention):
            child.dropout = 0.0
    return module


@contextmanager
def _modules(module: nn.Module, watch: "_Watch") -> Iterator[None]:
    """Let the watch know which module is running, for messages."""

    def leave(*_: Any) -> None:
        watch.path.pop()

    handles = []
    for path, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(lambda *_, path=path: watch.path.append(path)))
        handles.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(func: Any, arguments: dict[str, Any]) -> Any:
    """Run an operator: on `meta` if an argument is there, and else for real.

    Positions, masks and other integers keep their values: a forward may look at them.
    """
    meta = torch.device("meta")
    where = {tensor.device.type for tensor in tensors_in(arguments)}
    if "meta" not in where:
        result = func(**arguments)
        if arguments.get("device") == meta and not result.is_floating_point():
            result = func(**arguments | {"device": torch.device("cpu")})
        return result
    if where == {"meta"}:
        return func(**arguments)
    target = arguments.get("self")
    result = func(**moved(arguments, meta))
    writes = func._schema.is_mutable and isinstance(target, Tensor) and target.device != meta
    return target if writes else result


class _MetaAndIntegers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators as `_run` does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        names = [argument.name for argument in func._schema.arguments]
        return _run(func, dict(zip(names, args, strict=False)) | (kwargs or {}))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every elementary operator, and keeps the labels of every tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scene = Scene()
        self.path: list[str] = []
        self.unknown: dict[str, str] = {}
        self.sizes: list[Size] = []
        self._values: dict[int, Value] = {}
        self._kept: list[Tensor] = []  # an id is good only while its tensor lives
        self._sharing: dict[int, list[int]] = {}  # ids of the tensors in the same memory
        self._whole: set[int] = set()  # ids of tensors that were made to be filled, not of views of them

    def know(self, tensor: Tensor, value: Value) -> None:
        """Note a tensor's labels."""
        if id(tensor) not in self._values:
            self._kept.append(tensor)
            self._sharing.setdefault(tensor.untyped_storage()._cdata, []).append(id(tensor))
        self._values[id(tensor)] = value

    def value(self, tensor: Tensor) -> Value:
        """Return a tensor's labels; what was not seen being made is a constant, of a fixed size."""
        found = self._values.get(id(tensor))
        return self.scene.labels.constant(tuple(tensor.shape), FROZEN) if found is None else found

    def freeze(self, tensor: Tensor) -> None:
        """Let nobody be without any part of a tensor."""
        value = self.value(tensor)
        if isinstance(value, ParameterView):
            self.scene.atoms.freeze(value)
        else:
            self.scene.labels.freeze(value.core)

    def size_labels(self) -> list[SizeLabels]:
        """Return the sizes that were met, with the labels of what they count."""
        found = []
        for origin, factor, tensor, axis, positions in self.sizes:
            value = self._values.get(id(tensor))
            if isinstance(value, Activation):
                core = self.scene.labels.reduced(value).core
                along = core.movedim(axis, 0).reshape(core.shape[axis], -1)[:, 0]
                if len(along) == 1:  # not cut along this axis
                    along = torch.full([value.shape[axis]], FROZEN)
                found.append(SizeLabels(origin, factor, self.scene.labels.roots(along[list(positions)])))
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and apply its rule."""
        schema = func._schema.arguments
        raw = dict(zip([argument.name for argument in schema], args, strict=False)) | (kwargs or {})
        result = _run(func, raw)
        raw = {argument.name: argument.default_value for argument in schema if argument.has_default_value()} | raw
        results = [
            item for item in (result if isinstance(result, tuple | list) else [result]) if isinstance(item, Tensor)
        ]
        call = Call(func, {name: self._replaced(item) for name, item in raw.items()}, raw, results)
        found = labels_of_results(self.scene, call) if results else None
        if found is None:
            if results:
                self.unknown.setdefault(str(func), self.path[-1] if self.path else "")
            for tensor in tensors_in(raw):
                self.freeze(tensor)
            found = [self.scene.labels.constant(tuple(item.shape), FROZEN) for item in results]
        made_whole = call.name in _MADE or (
            call.name in ("detach", "alias") and any(id(tensor) in self._whole for tensor in tensors_in(raw))
        )
        for tensor, value in zip(results, found, strict=False):
            self._write(tensor, value)
            if made_whole:
                self._whole.add(id(tensor))
        return result

    def _write(self, tensor: Tensor, value: Value) -> None:
        """Note an operator's result, which may have been written over a tensor that had other labels."""
        before = self._values.get(id(tensor))
        if isinstance(before, Activation) and isinstance(value, Activation):
            same = bool((self.scene.labels.roots(before.core) == value.core).all())
            sharing = self._sharing[tensor.untyped_storage()._cdata]
            if not same and not self._whole.issuperset(sharing):
                # Views of the same memory have labels of their own, which this write cannot change.
                self.scene.labels.freeze(value.core)
                self.scene.labels.freeze(before.core)
                value = self.scene.labels.reduced(value)
            elif not same:
                self._values |= dict.fromkeys(sharing, value)
        self.know(tensor, value)

    def _replaced(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self.value(item)
        return [self._replaced(part) for part in item] if isinstance(item, list | tuple) else item


class _Arguments(TorchFunctionMode):
    """Sees every torch function with its arguments as the network's code gave them."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and note the traced integers among its arguments."""
        result = func(*args, **(kwargs or {}))
        self._watch.sizes.extend(sizes_in(func, args, kwargs or {}, result))
        return result
