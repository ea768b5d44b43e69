"""Run a network once on an example, and learn which positions of its tensors belong together.

The network runs unchanged, on the `meta` device (no memory, no arithmetic), or on the CPU if its forward reads
values. Two torch modes observe it: one sees every elementary operator and applies the rules of
`ist/neurons/rules/operators.py`; the other sees every torch function with the arguments that the module passed,
and records which attributes are sizes (`ist/neurons/attribute_sizes.py`).

We trace elementary operators instead of using `torch.export` because the trace shows the integers that come from
attributes, needs no support for control flow, and works the same in all versions of torch.

Where it sits: `ist/neurons/find.py` makes neuron groups from the trace.
Not here: what an operator does to labels (`ist/neurons/rules/`), the recorded steps (`ist/neurons/tracing/`).
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
from ist.initialization.in_files import files_if_large, warn_if_large
from ist.network.copies import copied, on_meta
from ist.neurons.attribute_sizes import (
    Size,
    SizeLabels,
    TracedInt,
    forget_sizes,
    insert_traced_integers,
    makes_constants,
    sizes_in,
    takes_sizes,
)
from ist.neurons.rules.joins import TraceState, Value, with_parameter
from ist.neurons.rules.operator_call import Call
from ist.neurons.rules.operators import labels_of_results
from ist.neurons.rules.parameter_views import ParameterView
from ist.neurons.tracing.call_sites import Call as SizedCall
from ist.neurons.tracing.call_sites import ModuleStack
from ist.neurons.tracing.code_location import users_line
from ist.neurons.tracing.labels import FREE, FROZEN, Activation
from ist.neurons.tracing.shared_draws import Draws, fixed_draws
from ist.neurons.tracing.tape import Step, influenced, needed, step_of, storages, tensors_of
from ist.neurons.tracing.untaken_paths import Detour, OnDetour, detours
from ist.neurons.tracing.values_read import reads_that_matter
from ist.tensors import constant_tensors, named_tensors

_RANDOM = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}


_MADE = {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "empty_like"}


class WithoutRandomness(TorchFunctionMode):
    """Turns dropout off and makes every Bernoulli mask 1, also in training mode.

    So every unit takes part in the comparison. All other random draws are the same in every run
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
    """A size argument of a call, and the labels of the positions that it counts (None if they are not known)."""

    call: SizedCall
    size: Size | None
    labels: Tensor | None
    where: str


@dataclass(frozen=True)
class Traced:
    """The result of a trace.

    Attributes:
        state: The labels, and which of them are joined.
        sizes: Attributes that are sizes of labeled axes.
        calls: Every size argument of a call, with the labels that it counts and the line of the code.
        unknown: Operators without a rule, and where each first ran: module and line of the network's code.
        on_meta: Whether the network ran without values.
        causes: Operators that prevent a split: operator, module and line, in the order in which they ran.
        unreached: Parameters that neither the example nor a detour reached.
        detours: The detours that reached further parameters.
    """

    state: TraceState
    sizes: list[SizeLabels]
    calls: list[CallLabels]
    unknown: dict[str, str]
    on_meta: bool
    causes: list[str]
    unreached: list[str]
    detours: list[Detour]


_MOST_OVERWRITTEN = 2_000_000
"""A write to a view of more elements than this is not followed: the written labels are not split."""

MOST_RUNS, MOST_MISSES = 20, 5
"""A network with random branches runs at most MOST_RUNS times, until every parameter has been reached. It stops early
after MOST_MISSES runs in a row that reach no further parameter."""

MOST_DETOURS = 100
"""The most detours that are tried to reach further parameters (`ist/neurons/tracing/untaken_paths.py`)."""


def trace(template: nn.Module, example: Any, build: Any = None) -> Traced:
    """Trace a network.

    Args:
        template: The network, on any device.
        example: The input of its forward: a tensor, a tuple of positional or a mapping of keyword arguments.
        build: Makes the network with values; called only if the forward depends on values.

    Raises:
        ModelError: The forward fails on the example.
    """
    try:
        return _trace(on_meta(template), _floats_on_meta(example))
    except Exception as error:  # a forward that reads values may fail in any way without them
        if build is None:
            raise ModelError(f"the network fails on the example: {first_line(error)}") from error
        reason = first_line(error)

    def fresh() -> nn.Module:
        return without_inner_dropout(copied(build()).cpu())

    inputs = moved(example, torch.device("cpu"))
    with files_if_large(template):
        network = fresh()
        try:
            with comparable(), fixed_draws(Draws(0)), torch.no_grad():
                call_model(network, inputs)
        except Exception as error:  # whatever a forward raises
            raise ModelError(
                f"the network fails on an example of the data: {type(error).__name__}: {first_line(error)}"
            ) from error
        warn_if_large(template, f"the forward fails without values ({reason})", "let it not read values")
        del network  # before another is built
        return _trace(fresh(), inputs, fresh)


def dry_run(module: nn.Module, example: Any, watched: AbstractContextManager[Any] | None = None) -> None:
    """Run a network without gradients and without randomness, as a trace does.

    Args:
        module: A network, on `meta` or on the CPU.
        example: The input of its forward, on the CPU.
        watched: A context that is entered last, while the network runs.
    """
    on_meta = all(parameter.is_meta for parameter in module.parameters())
    integers = _MetaAndIntegers()  # type: ignore[no-untyped-call]
    with comparable(), integers, torch.no_grad(), watched or nullcontext():
        call_model(module, _floats_on_meta(example) if on_meta else example)


def _floats_on_meta(example: Any) -> Any:
    return mapped(example, lambda tensor: tensor.to("meta" if tensor.is_floating_point() else "cpu"))


def _trace(module: nn.Module, example: Any, fresh: Callable[[], nn.Module] | None = None) -> Traced:
    """Run a network, and give labels to everything that its outputs depend on.

    Args:
        module: The network.
        example: The input of its forward.
        fresh: Builds the network with values once more; None for a network without values.
    """
    without_inner_dropout(module)
    recorder = _Recorder()
    constants = constant_tensors(module)
    recorder.state.positions.buffers = {name for name, _ in module.named_buffers()} | set(constants)
    named = named_tensors(module) | constants
    for name, tensor in named.items():
        recorder.set_labels(tensor, recorder.state.positions.view(name, tuple(tensor.shape)))
    insert_traced_integers(module)
    recorder.recurrent = {path for path, child in module.named_modules() if isinstance(child, nn.RNNBase)}
    for tensor in tensors_in(example):
        recorder.set_labels(tensor, recorder.state.labels.constant(tuple(tensor.shape), FROZEN))
    outputs: list[Tensor] = []
    reads, taken = set[int](), list[Detour]()
    unreached = [name for name, _ in module.named_parameters()]
    misses = 0
    for run in range(MOST_RUNS):
        draws, start, calls = Draws(run), len(recorder.steps), list(recorder.calls)
        new_outputs = recorder.record(module, example, draws, None)
        still = recorder.unreached(module)
        if run and len(still) == len(unreached):
            del recorder.steps[start:]
            recorder.calls, misses = calls, misses + 1
        else:
            outputs, unreached, steps, misses = outputs + new_outputs, still, recorder.steps[start:], 0
            recorder.state.runs += 1
            if fresh is not None:
                depends = influenced(steps, named.values())
                suspects = [n for n, step in enumerate(steps) if step.value is not None and depends[n]]
                found = reads_that_matter(steps, suspects, run, fresh, lambda network: _plainly(network, example))
                reads |= {start + number for number in found}
        if not unreached or misses == MOST_MISSES or not (draws.made or draws.others):
            break
    for detour in islice(detours(steps), MOST_DETOURS if unreached else 0):
        start, calls = len(recorder.steps), list(recorder.calls)
        try:
            new_outputs = recorder.record(module, example, Draws(run), detour)
        except Exception:  # a forward on a path that it never takes may fail in any way
            new_outputs = []
        still = recorder.unreached(module)
        if new_outputs and len(still) < len(unreached):
            outputs, taken, unreached = outputs + new_outputs, [*taken, detour], still
            recorder.state.runs += 1
        else:
            del recorder.steps[start:]
            recorder.calls = calls
        if not unreached:
            break
    forget_sizes()
    recorder.freeze_if_empty = bool(unreached)
    # A submodel also runs operators whose result is unused, so those that apply a weight to an activation count.
    stored = storages(named.values())
    applied = {n for n, step in enumerate(recorder.steps) if step.reads & stored and step.reads - stored}
    recorder.replay(needed(recorder.steps, [*outputs, *tensors_of(module)], reads | applied))
    for tensor in outputs:
        recorder.freeze(tensor)
    recorder.state.settle()
    on_meta = all(parameter.is_meta for parameter in module.parameters())
    return Traced(
        recorder.state, *recorder.size_labels(), recorder.unknown, on_meta, list(recorder.causes), unreached, taken
    )


def _plainly(module: nn.Module, example: Any) -> Any:
    with comparable():
        return call_model(module, example)


@contextmanager
def comparable() -> Iterator[None]:
    """Run networks without randomness, and without fused kernels, which hide their elementary operators."""
    fast, one_dnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(WithoutRandomness())
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
    """Run an operator: on `meta` if one of its arguments is there, otherwise with values.

    Positions, masks and other integers keep their values, because a forward may read them.
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


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every elementary operator, and holds the labels of every tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = TraceState()
        self.stack = ModuleStack()
        self.recurrent: set[str] = set()  # torch's recurrent modules: one state tensor holds all their layers
        self.unknown: dict[str, str] = {}
        self.calls: list[tuple[SizedCall, list[Size], str]] = []
        self.steps: list[Step] = []
        self.freeze_if_empty = False  # whether to freeze what is selected for zero samples: other code may read it
        self.causes: dict[str, None] = {}
        self._values: dict[int, Value] = {}
        self._objects: dict[int, Tensor] = {}  # holds each tensor: its id is unique only while it lives
        self._sharing: dict[int, list[int]] = {}  # ids of the tensors in the same memory
        self._bases: set[int] = set()  # ids of tensors that were made to be filled, not of views of them

    def set_labels(self, tensor: Tensor, value: Value) -> None:
        """Store a tensor's labels."""
        if id(tensor) not in self._values:
            self._objects[id(tensor)] = tensor
            (storage,) = storages([tensor])
            self._sharing.setdefault(storage, []).append(id(tensor))
        self._values[id(tensor)] = value

    def labels_of(self, tensor: Tensor) -> Value:
        """Return a tensor's labels; a tensor that no recorded operator made counts as a constant of fixed size."""
        found = self._values.get(id(tensor)) or self._values.get(self._same(tensor))
        return self.state.labels.constant(tuple(tensor.shape), FROZEN) if found is None else found

    def _same(self, tensor: Tensor) -> int:
        """Return the id of a known tensor that is the same view of the same memory, such as another Python object."""
        (storage,) = storages([tensor])
        for other in self._sharing.get(storage, ()) if tensor.layout == torch.strided else ():
            known = self._objects[other]
            places = [(t.shape, t.stride(), t.storage_offset()) for t in (tensor, known)]
            if known.dtype == tensor.dtype and places[0] == places[1]:
                return other
        return id(tensor)

    def freeze(self, tensor: Tensor) -> None:
        """Make every worker hold all of a tensor."""
        value = self.labels_of(tensor)
        if isinstance(value, ParameterView):
            self.state.positions.freeze(value)
        else:
            self.state.labels.freeze(value.core)

    def size_labels(self) -> tuple[list[SizeLabels], list[CallLabels]]:
        """Return the recorded attributes and the calls with sizes, with the labels of the positions that they count."""
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
        """Return the final labels along an axis of a tensor; None if they are not known or the tensor is a constant."""
        value = self._values.get(id(tensor)) or self._values.get(self._same(tensor))
        if isinstance(value, ParameterView):
            labels = self.state.positions.along(value, axis)
            return None if labels is None else self.state.labels.roots(labels)
        if not isinstance(value, Activation) or self.state.labels.is_free(value):
            return None
        core = self.state.labels.reduced(value).core
        along = core.movedim(axis, 0).reshape(core.shape[axis], -1)[:, 0]
        if len(along) == 1:  # not cut along this axis
            along = torch.full([value.shape[axis]], FROZEN)
        return self.state.labels.roots(along)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and record it."""
        schema = func._schema.arguments
        raw = dict(zip([argument.name for argument in schema], args, strict=False)) | (kwargs or {})
        result = _run(func, raw)
        raw = {argument.name: argument.default_value for argument in schema if argument.has_default_value()} | raw
        self.steps.append(step_of(func, raw, result, self.stack.path, users_line()))
        return result

    def record(self, module: nn.Module, example: Any, draws: Draws, detour: Detour | None) -> list[Tensor]:
        """Run a network, record its steps, and return its outputs.

        Args:
            module: The network.
            example: The input of its forward.
            draws: Its random draws.
            detour: How its path through the forward is changed.
        """
        known, self.stack, before = {call.path for call, _, _ in self.calls}, ModuleStack(), len(self.calls)
        with ExitStack() as contexts:
            modes: list[Any] = [comparable(), fixed_draws(draws), OnDetour(detour) if detour else nullcontext()]
            for mode in [*modes, self.stack.watching(module), _Arguments(self), self, torch.no_grad()]:
                contexts.enter_context(mode)
            outputs = list(tensors_in(call_model(module, example)))
        # A submodel is compared with the calls of one run; a later run adds only calls of modules not yet reached.
        self.calls[before:] = [call for call in self.calls[before:] if call[0].path not in known]
        return outputs

    def unreached(self, module: nn.Module) -> list[str]:
        """Return the parameters that no step has read; a step for zero samples does not count."""
        reached = frozenset[int]().union(*[step.reads for step in self.steps if not step.is_empty])
        return [name for name, p in module.named_parameters() if p.numel() and not storages([p]) & reached]

    def replay(self, chosen: Sequence[bool]) -> None:
        """Apply the rules of the chosen steps, in order."""
        for step, is_chosen in zip(self.steps, chosen, strict=True):
            if is_chosen:
                before = self._free_labels(step)
                self._apply(step)
                self._note_cause(step, before)

    def _apply(self, step: Step) -> None:
        """Apply an operator's rule."""
        raw = step.arguments
        if step.is_empty:
            self._apply_to_empty(step)
            return
        results = [
            tensor if tensor.shape == shape else torch.empty(shape, device="meta")
            for tensor, shape in zip(step.results, step.shapes, strict=True)
        ]
        call = Call(step.operator, {name: self._replaced(item) for name, item in raw.items()}, raw, results)
        try:
            found = labels_of_results(self.state, call) if results else None
        except (IndexError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            # The rule does not support these arguments: treat the operator like one without a rule.
            self.unknown.setdefault(f"{step.operator} ({type(error).__name__} in its rule)", _where(step))
            found = None
        if found is None:
            if results and not any(name.startswith(str(step.operator)) for name in self.unknown):
                self.unknown[str(step.operator)] = _where(step)
            for tensor in tensors_in(raw):
                self.freeze(tensor)
            found = [self.state.labels.constant(tuple(item.shape), FROZEN) for item in results]
        is_base = call.name in _MADE or (
            call.name in ("detach", "alias") and any(id(tensor) in self._bases for tensor in tensors_in(raw))
        )
        for tensor, value in zip(step.results, found, strict=False):
            self._write(tensor, value)
            if is_base:
                self._bases.add(id(tensor))

    def _apply_to_empty(self, step: Step) -> None:
        """Give labels to the results of an operator on a tensor without elements, such as an expert without samples."""
        full = [tensor for tensor in tensors_in(list(step.arguments.values())) if tensor.numel()]
        for tensor, shape in zip(step.results, step.shapes, strict=True):
            same = [other for other in full if other.shape == shape]
            if not math.prod(shape) or not same:
                if self.freeze_if_empty:
                    for other in full:
                        self.freeze(other)
                self.set_labels(tensor, self.state.labels.constant(shape, FROZEN))
            else:  # an empty tensor was added to it or written into it, so its labels stay
                self.set_labels(tensor, self.labels_of(same[0]))

    def _free_labels(self, step: Step) -> list[Tensor]:
        """Return, for each argument of an operator, its distinct labels that can be split among workers."""
        values = [self.labels_of(tensor) for tensor in tensors_in(list(step.arguments.values()))]
        cores = [value.core for value in values if isinstance(value, Activation)]
        if not cores:  # a function of parameters only
            labels_at = self.state.positions.of
            cores = [labels_at[v.name, dim] for v in values if isinstance(v, ParameterView) for dim in v.planes]
        found = [torch.unique(self.state.labels.roots(core)) for core in cores]
        return [labels[labels > FREE] for labels in found]

    def _note_cause(self, step: Step, before: Sequence[Tensor]) -> None:
        """Record an operator that freezes neurons, or joins several into one."""
        for labels in before:
            after = torch.unique(self.state.labels.roots(labels))
            if len(labels) > 1 and (len(after) < len(labels) or bool((after <= FREE).any())):
                self.causes.setdefault(f"{step.operator} in {_where(step)}")
                return

    def _write(self, tensor: Tensor, value: Value) -> None:
        """Store the labels of an operator's result, which may overwrite a tensor that had other labels."""
        before = self._values.get(id(tensor))
        if isinstance(before, ParameterView) and self.state.positions.is_constant(before):
            before = self.state.labels.constant(before.shape, FREE)
        if isinstance(before, ParameterView) and isinstance(value, Activation):
            # A parameter or buffer keeps its cut when it is written to (scales that the first batch sets, say).
            if not self.state.labels.is_free(value):
                with_parameter(self.state, value, before)
            value = before
        if isinstance(before, Activation) and isinstance(value, Activation):
            same = bool((self.state.labels.roots(before.core) == value.core).all())
            (storage,) = storages([tensor])
            sharing = self._sharing[storage]
            if not same and not self._bases.issuperset(sharing):
                if not self._overwrite(tensor, value, sharing):
                    # The labels of the other views of this memory cannot be updated, so freeze both.
                    self.state.labels.freeze(value.core)
                    self.state.labels.freeze(before.core)
                    value = self.state.labels.reduced(value)
            elif not same:
                self._values |= dict.fromkeys(sharing, value)
        self.set_labels(tensor, value)

    def _overwrite(self, tensor: Tensor, value: Activation, sharing: Sequence[int]) -> bool:
        """Update the labels of all views of some memory after a write to one; return whether that is possible."""
        views = [self._objects[number] for number in sharing]
        size = max(_end(view) for view in views)
        values = [self.labels_of(view) for view in views]
        owned = any(isinstance(v, ParameterView) and not self.state.positions.is_constant(v) for v in values)
        if owned or size > _MOST_OVERWRITTEN or len({view.dtype for view in views}) > 1:
            return False
        labels, places = torch.full([size], FREE), torch.arange(size)
        for view, known in [*zip(views, values, strict=True), (tensor, value)]:
            if isinstance(known, Activation):  # a constant has no labels yet
                labels[places.as_strided(view.shape, view.stride(), view.storage_offset())] = known.full
        for number, view in zip(sharing, views, strict=True):
            part = labels.as_strided(view.shape, view.stride(), view.storage_offset())
            known = self.state.labels.activation(part.clone(), value.depth)
            self._values[number] = self.state.labels.filled(known, range(len(view.shape)))
        return True

    def _replaced(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self.labels_of(item)
        return [self._replaced(part) for part in item] if isinstance(item, list | tuple) else item


def _where(step: Step) -> str:
    """Return the module and the line of the network's code that called an operator."""
    return f"{step.path or 'the network itself'}{f' ({step.line})' if step.line else ''}"


def _end(view: Tensor) -> int:
    """Return the number of elements of a view's memory up to the end of the view."""
    return 1 + int(view.storage_offset()) + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))


class _Arguments(TorchFunctionMode):
    """Sees every torch function with the arguments that the network's code passed."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and record the sizes among its arguments."""
        forget_sizes()
        result = func(*args, **(kwargs or {}))
        if takes_sizes(func):
            frame = sys._getframe(1)
            found = list(sizes_in(func, args, kwargs or {}, result))
            call = self._recorder.stack.call(frame)
            self._recorder.calls.append((call, found, users_line()))
            sized = {size.axis for size in found if isinstance(size.number, TracedInt)}
            if sized and makes_constants(func) and call.path not in self._recorder.recurrent:
                self._recorder.state.sized |= dict.fromkeys(storages([result]), sized)
        return result
