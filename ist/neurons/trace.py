"""Run a network once on an example, and learn which positions of its tensors belong together.

The network runs as it is, on the `meta` device (no memory, no arithmetic), or on the CPU if its
forward looks at values. Two of torch's modes watch it: one sees every elementary operator and
applies the rules of `ist/neurons/rules/operators.py`; the other sees every torch function with the arguments as
the module gave them, and notes which attributes are sizes (`ist/neurons/attribute_sizes.py`).

Tracing elementary operators as they run was chosen over `torch.export` because it shows the integers
that come from attributes, needs no support of control flow, and works alike in all versions of torch.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ist.data.nested import call_model, mapped, moved, tensors_in
from ist.errors import ModelError, first_line
from ist.network.copies import copied, on_meta
from ist.neurons.attribute_sizes import (
    Size,
    SizeLabels,
    TracedInt,
    forget_sizes,
    makes_constants,
    plant,
    sizes_in,
    takes_sizes,
)
from ist.neurons.rules.joins import Scene, Value, with_parameter
from ist.neurons.rules.operator_call import Call
from ist.neurons.rules.operators import labels_of_results
from ist.neurons.rules.parameter_views import ParameterView
from ist.neurons.tracing.call_sites import Call as SizedCall
from ist.neurons.tracing.call_sites import Running
from ist.neurons.tracing.code_location import users_line
from ist.neurons.tracing.labels import FREE, FROZEN, Activation
from ist.neurons.tracing.shared_draws import Draws, fixed_draws
from ist.neurons.tracing.tape import Step, influenced, needed, step_of, storages, tensors_of
from ist.neurons.tracing.untaken_paths import Detour, OnDetour, detours
from ist.neurons.tracing.values_read import reads_that_matter
from ist.tensors import constant_tensors, named_tensors

_RANDOM = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}


_MADE = {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "empty_like"}


class WithoutChance(TorchFunctionMode):
    """Turns dropout off and makes every Bernoulli mask 1, in training mode too.

    So every unit takes part in the comparison. What else is random is drawn alike
    (`ist/neurons/tracing/shared_draws.py`).
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


class CallLabels(NamedTuple):
    """A size that a call was given, and the labels of the positions that it counts; none if that is not known."""

    call: SizedCall
    size: Size | None
    labels: Tensor | None
    where: str


@dataclass(frozen=True)
class Traced:
    """What a trace found.

    Attributes:
        scene: Labels, and which are joined.
        sizes: Attributes that are sizes of labelled axes.
        calls: Every size that a call was given, with the labels of what it counts and the line of the code.
        unknown: Operators without a rule, and where each was first met: module and line of the network's code.
        on_meta: Whether the network ran without values.
        causes: What keeps neurons whole: operator, module and line, in the order in which they were met.
        unreached: Parameters that the example did not reach, on no detour either.
        detours: The detours on which further parameters were reached.
    """

    scene: Scene
    sizes: list[SizeLabels]
    calls: list[CallLabels]
    unknown: dict[str, str]
    on_meta: bool
    causes: list[str]
    unreached: list[str]
    detours: list[Detour]


_MOST_OVERWRITTEN = 2_000_000
"""Where views of larger memory are written to, what is written stays whole."""

MOST_RUNS, MOST_MISSES = 20, 5
"""A network that takes branches by chance is run so many times, until all of its parameters have been reached; and not
again after so many runs in a row that reached no further one."""

MOST_DETOURS = 100
"""So many detours are tried where parameters have not been reached (`ist/neurons/tracing/untaken_paths.py`)."""


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

    def fresh() -> nn.Module:
        return without_inner_dropout(copied(build()).cpu())

    inputs = moved(example, torch.device("cpu"))
    try:
        with comparable(), fixed_draws(Draws(0)), torch.no_grad():
            call_model(fresh(), inputs)
    except Exception as error:  # whatever a forward raises
        raise ModelError(
            f"the network fails on an example of the data: {type(error).__name__}: {first_line(error)}"
        ) from error
    return _trace(fresh(), inputs, fresh)


def try_out(module: nn.Module, example: Any, watched: AbstractContextManager[Any] | None = None) -> None:
    """Run a network without gradients and without chance, as it would be traced.

    Args:
        module: A network, on `meta` or on the CPU.
        example: What its forward takes, on the CPU.
        watched: Entered last while it runs.
    """
    on_meta = all(parameter.is_meta for parameter in module.parameters())
    integers = _MetaAndIntegers()  # type: ignore[no-untyped-call]
    with comparable(), integers, torch.no_grad(), watched or nullcontext():
        call_model(module, _floats_on_meta(example) if on_meta else example)


def _floats_on_meta(example: Any) -> Any:
    return mapped(example, lambda tensor: tensor.to("meta" if tensor.is_floating_point() else "cpu"))


def _trace(module: nn.Module, example: Any, fresh: Callable[[], nn.Module] | None = None) -> Traced:
    """Run a network, and give labels to what its outputs depend on.

    Args:
        module: The network.
        example: What its forward takes.
        fresh: Makes the network with values anew, if it has values.
    """
    without_inner_dropout(module)
    watch = _Watch()
    constants = constant_tensors(module)
    watch.scene.atoms.buffers = {name for name, _ in module.named_buffers()} | set(constants)
    named = named_tensors(module) | constants
    for name, tensor in named.items():
        watch.know(tensor, watch.scene.atoms.view(name, tuple(tensor.shape)))
    plant(module)
    watch.recurrent = {path for path, child in module.named_modules() if isinstance(child, nn.RNNBase)}
    for tensor in tensors_in(example):
        watch.know(tensor, watch.scene.labels.constant(tuple(tensor.shape), FROZEN))
    outputs: list[Tensor] = []
    reads, taken = set[int](), list[Detour]()
    unreached = [name for name, _ in module.named_parameters()]
    misses = 0
    for run in range(MOST_RUNS):
        draws, start, calls = Draws(run), len(watch.steps), list(watch.calls)
        found_there = watch.follow(module, example, draws, None)
        still = watch.unreached(module)
        if run and len(still) == len(unreached):
            del watch.steps[start:]
            watch.calls, misses = calls, misses + 1
        else:
            outputs, unreached, steps, misses = outputs + found_there, still, watch.steps[start:], 0
            watch.scene.runs += 1
            if fresh is not None:
                depends = influenced(steps, named.values())
                suspects = [n for n, step in enumerate(steps) if step.value is not None and depends[n]]
                found = reads_that_matter(steps, suspects, run, fresh, lambda network: _plainly(network, example))
                reads |= {start + number for number in found}
        if not unreached or misses == MOST_MISSES or not (draws.made or draws.others):
            break
    for detour in islice(detours(steps), MOST_DETOURS if unreached else 0):
        start, calls = len(watch.steps), list(watch.calls)
        try:
            found_there = watch.follow(module, example, Draws(run), detour)
        except Exception:  # a forward that was led astray may fail in any way
            found_there = []
        still = watch.unreached(module)
        if found_there and len(still) < len(unreached):
            outputs, taken, unreached = outputs + found_there, [*taken, detour], still
            watch.scene.runs += 1
        else:
            del watch.steps[start:]
            watch.calls = calls
        if not unreached:
            break
    forget_sizes()
    watch.whole_where_empty = bool(unreached)
    # What applies a weight to an activation runs in a narrow network too, whether or not its result is used.
    stored = storages(named.values())
    applied = {n for n, step in enumerate(watch.steps) if step.reads & stored and step.reads - stored}
    watch.replay(needed(watch.steps, [*outputs, *tensors_of(module)], reads | applied))
    for tensor in outputs:
        watch.freeze(tensor)
    watch.scene.settle()
    on_meta = all(parameter.is_meta for parameter in module.parameters())
    return Traced(watch.scene, *watch.size_labels(), watch.unknown, on_meta, list(watch.causes), unreached, taken)


def _plainly(module: nn.Module, example: Any) -> Any:
    with comparable():
        return call_model(module, example)


@contextmanager
def comparable() -> Iterator[None]:
    """Let networks run without chance, and without fused kernels that hide what they do."""
    fast, one_dnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(WithoutChance())
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(one_dnn)


def without_inner_dropout(module: nn.Module) -> nn.Module:
    """Turn off, in place, the dropout of modules that apply it inside a fused function, and return the module."""
    for child in module.modules():
        if isinstance(child, nn.RNNBase | nn.MultiheadAttention):
            child.dropout = 0.0
    return module


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
    """Notes every elementary operator, and keeps the labels of every tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scene = Scene()
        self.running = Running()
        self.recurrent: set[str] = set()  # modules whose states torch makes: of one tensor for all layers
        self.unknown: dict[str, str] = {}
        self.calls: list[tuple[SizedCall, list[Size], str]] = []
        self.steps: list[Step] = []
        self.whole_where_empty = False  # whether what was selected, without a sample, may be read elsewhere
        self.causes: dict[str, None] = {}
        self._values: dict[int, Value] = {}
        self._objects: dict[int, Tensor] = {}  # an id is good only while its tensor lives
        self._sharing: dict[int, list[int]] = {}  # ids of the tensors in the same memory
        self._whole: set[int] = set()  # ids of tensors that were made to be filled, not of views of them

    def know(self, tensor: Tensor, value: Value) -> None:
        """Note a tensor's labels."""
        if id(tensor) not in self._values:
            self._objects[id(tensor)] = tensor
            (storage,) = storages([tensor])
            self._sharing.setdefault(storage, []).append(id(tensor))
        self._values[id(tensor)] = value

    def value(self, tensor: Tensor) -> Value:
        """Return a tensor's labels; what was not seen being made is a constant, of a fixed size."""
        found = self._values.get(id(tensor)) or self._values.get(self._same(tensor))
        return self.scene.labels.constant(tuple(tensor.shape), FROZEN) if found is None else found

    def _same(self, tensor: Tensor) -> int:
        """Return the id of a known tensor that is the same piece of memory: `torch.zeros` returns another object."""
        (storage,) = storages([tensor])
        for other in self._sharing.get(storage, ()) if tensor.layout == torch.strided else ():
            known = self._objects[other]
            places = [(t.shape, t.stride(), t.storage_offset()) for t in (tensor, known)]
            if known.dtype == tensor.dtype and places[0] == places[1]:
                return other
        return id(tensor)

    def freeze(self, tensor: Tensor) -> None:
        """Let nobody be without any part of a tensor."""
        value = self.value(tensor)
        if isinstance(value, ParameterView):
            self.scene.atoms.freeze(value)
        else:
            self.scene.labels.freeze(value.core)

    def size_labels(self) -> tuple[list[SizeLabels], list[CallLabels]]:
        """Return the attributes and the calls with sizes that were met, with the labels of what they count."""
        attributes, calls = [], []
        for call, sizes, where in self.calls:
            calls.append(CallLabels(call, None, None, where))
            for size in sizes:
                labels = self._labels_along(size.tensor, size.axis)
                counted = None if labels is None else labels[list(size.positions)]
                calls.append(CallLabels(call, size, counted, where))
                if counted is not None and isinstance(size.number, TracedInt):
                    attributes.append(SizeLabels(size.number.origin, size.number.factor, counted, call.path))
        return attributes, calls

    def _labels_along(self, tensor: Tensor, axis: int) -> Tensor | None:
        """Return the final labels along an axis of a tensor; None if they are not known, or it is a constant."""
        value = self._values.get(id(tensor)) or self._values.get(self._same(tensor))
        if isinstance(value, ParameterView):
            atoms = self.scene.atoms.along(value, axis)
            return None if atoms is None else self.scene.labels.roots(atoms)
        if not isinstance(value, Activation) or self.scene.labels.is_free(value):
            return None
        core = self.scene.labels.reduced(value).core
        along = core.movedim(axis, 0).reshape(core.shape[axis], -1)[:, 0]
        if len(along) == 1:  # not cut along this axis
            along = torch.full([value.shape[axis]], FROZEN)
        return self.scene.labels.roots(along)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note it."""
        schema = func._schema.arguments
        raw = dict(zip([argument.name for argument in schema], args, strict=False)) | (kwargs or {})
        result = _run(func, raw)
        raw = {argument.name: argument.default_value for argument in schema if argument.has_default_value()} | raw
        self.steps.append(step_of(func, raw, result, self.running.path, users_line()))
        return result

    def follow(self, module: nn.Module, example: Any, draws: Draws, detour: Detour | None) -> list[Tensor]:
        """Run a network, note its steps, and return its outputs.

        Args:
            module: The network.
            example: What its forward takes.
            draws: Its random draws.
            detour: How its way is changed.
        """
        known, self.running, before = {call.path for call, _, _ in self.calls}, Running(), len(self.calls)
        with ExitStack() as stack:
            modes: list[Any] = [comparable(), fixed_draws(draws), OnDetour(detour) if detour else nullcontext()]
            for mode in [*modes, self.running.watching(module), _Arguments(self), self, torch.no_grad()]:
                stack.enter_context(mode)
            outputs = list(tensors_in(call_model(module, example)))
        # A narrow network is held against the calls of one run: of another run, those of modules that it did not reach.
        self.calls[before:] = [call for call in self.calls[before:] if call[0].path not in known]
        return outputs

    def unreached(self, module: nn.Module) -> list[str]:
        """Return the parameters that no step has read, but perhaps for no samples at all."""
        reached = frozenset[int]().union(*[step.reads for step in self.steps if not step.is_empty])
        return [name for name, p in module.named_parameters() if p.numel() and not storages([p]) & reached]

    def replay(self, wanted: Sequence[bool]) -> None:
        """Apply the rules of the steps that are wanted, in their order."""
        for step, is_wanted in zip(self.steps, wanted, strict=True):
            if is_wanted:
                before = self._free_labels(step)
                self._apply(step)
                self._note_cause(step, before)

    def _apply(self, step: Step) -> None:
        """Apply an operator's rule."""
        raw = step.arguments
        if step.is_empty:
            self._apply_to_nothing(step)
            return
        results = [
            tensor if tensor.shape == shape else torch.empty(shape, device="meta")
            for tensor, shape in zip(step.results, step.shapes, strict=True)
        ]
        call = Call(step.operator, {name: self._replaced(item) for name, item in raw.items()}, raw, results)
        try:
            found = labels_of_results(self.scene, call) if results else None
        except (IndexError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            # Arguments that the rule does not foresee: as for an operator without a rule.
            self.unknown.setdefault(f"{step.operator} ({type(error).__name__} in its rule)", _where(step))
            found = None
        if found is None:
            if results and not any(name.startswith(str(step.operator)) for name in self.unknown):
                self.unknown[str(step.operator)] = _where(step)
            for tensor in tensors_in(raw):
                self.freeze(tensor)
            found = [self.scene.labels.constant(tuple(item.shape), FROZEN) for item in results]
        made_whole = call.name in _MADE or (
            call.name in ("detach", "alias") and any(id(tensor) in self._whole for tensor in tensors_in(raw))
        )
        for tensor, value in zip(step.results, found, strict=False):
            self._write(tensor, value)
            if made_whole:
                self._whole.add(id(tensor))

    def _apply_to_nothing(self, step: Step) -> None:
        """Give labels to what an operator makes of a tensor without elements, such as an expert's samples."""
        full = [tensor for tensor in tensors_in(list(step.arguments.values())) if tensor.numel()]
        for tensor, shape in zip(step.results, step.shapes, strict=True):
            same = [other for other in full if other.shape == shape]
            if not math.prod(shape) or not same:
                if self.whole_where_empty:
                    for other in full:
                        self.freeze(other)
                self.know(tensor, self.scene.labels.constant(shape, FROZEN))
            else:  # nothing was added to it, or written into it
                self.know(tensor, self.value(same[0]))

    def _free_labels(self, step: Step) -> list[Tensor]:
        """Return, for each argument of an operator, the different labels that a worker may be without."""
        values = [self.value(tensor) for tensor in tensors_in(list(step.arguments.values()))]
        cores = [value.core for value in values if isinstance(value, Activation)]
        if not cores:  # a function of parameters only
            atoms = self.scene.atoms.of
            cores = [atoms[v.name, dim] for v in values if isinstance(v, ParameterView) for dim in v.planes]
        found = [torch.unique(self.scene.labels.roots(core)) for core in cores]
        return [labels[labels > FREE] for labels in found]

    def _note_cause(self, step: Step, before: Sequence[Tensor]) -> None:
        """Note an operator that makes neurons whole, or one of many."""
        for labels in before:
            after = torch.unique(self.scene.labels.roots(labels))
            if len(labels) > 1 and (len(after) < len(labels) or bool((after <= FREE).any())):
                self.causes.setdefault(f"{step.operator} in {_where(step)}")
                return

    def _write(self, tensor: Tensor, value: Value) -> None:
        """Note an operator's result, which may have been written over a tensor that had other labels."""
        before = self._values.get(id(tensor))
        if isinstance(before, ParameterView) and self.scene.atoms.is_constant(before):
            before = self.scene.labels.constant(before.shape, FREE)
        if isinstance(before, ParameterView) and isinstance(value, Activation):
            # A parameter or buffer that is written to, such as scales that the first batch sets, is cut as before.
            if not self.scene.labels.is_free(value):
                with_parameter(self.scene, value, before)
            value = before
        if isinstance(before, Activation) and isinstance(value, Activation):
            same = bool((self.scene.labels.roots(before.core) == value.core).all())
            (storage,) = storages([tensor])
            sharing = self._sharing[storage]
            if not same and not self._whole.issuperset(sharing):
                if not self._overwrite(tensor, value, sharing):
                    # Views of the same memory have labels of their own, which this write cannot change.
                    self.scene.labels.freeze(value.core)
                    self.scene.labels.freeze(before.core)
                    value = self.scene.labels.reduced(value)
            elif not same:
                self._values |= dict.fromkeys(sharing, value)
        self.know(tensor, value)

    def _overwrite(self, tensor: Tensor, value: Activation, sharing: Sequence[int]) -> bool:
        """Give all views of some memory the labels that they have after one was written; return whether that can be."""
        views = [self._objects[number] for number in sharing]
        size = max(_end(view) for view in views)
        values = [self.value(view) for view in views]
        owned = any(isinstance(v, ParameterView) and not self.scene.atoms.is_constant(v) for v in values)
        if owned or size > _MOST_OVERWRITTEN or len({view.dtype for view in views}) > 1:
            return False
        labels, places = torch.full([size], FREE), torch.arange(size)
        for view, known in [*zip(views, values, strict=True), (tensor, value)]:
            if isinstance(known, Activation):  # a constant has no labels yet
                labels[places.as_strided(view.shape, view.stride(), view.storage_offset())] = known.full
        for number, view in zip(sharing, views, strict=True):
            part = labels.as_strided(view.shape, view.stride(), view.storage_offset())
            known = self.scene.labels.activation(part.clone(), value.depth)
            self._values[number] = self.scene.labels.filled(known, range(len(view.shape)))
        return True

    def _replaced(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self.value(item)
        return [self._replaced(part) for part in item] if isinstance(item, list | tuple) else item


def _where(step: Step) -> str:
    """Return the module and the line of the network's code that called an operator."""
    return f"{step.path or 'the network itself'}{f' ({step.line})' if step.line else ''}"


def _end(view: Tensor) -> int:
    """Return how much of its memory, in elements, lies before the end of a view."""
    return 1 + int(view.storage_offset()) + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))


class _Arguments(TorchFunctionMode):
    """Sees every torch function with its arguments as the network's code gave them."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and note the sizes among its arguments."""
        forget_sizes()
        result = func(*args, **(kwargs or {}))
        if takes_sizes(func):
            frame = sys._getframe(1)
            found = list(sizes_in(func, args, kwargs or {}, result))
            call = self._watch.running.call(frame)
            self._watch.calls.append((call, found, users_line()))
            sized = {size.axis for size in found if isinstance(size.number, TracedInt)}
            if sized and makes_constants(func) and call.path not in self._watch.recurrent:
                self._watch.scene.sized |= dict.fromkeys(storages([result]), sized)
        return result
