"""One call of an operator, as the rules see it.

Where it sits: `ist/neurons/trace.py` makes it; the rules read it.
Not here: the rules (`operators.py`), the recorded steps (`ist/neurons/tracing/tape.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ist.neurons.rules.joins import TraceState, Value, mix
from ist.neurons.rules.parameter_views import ParameterView
from ist.neurons.tracing.labels import FREE, FROZEN, Activation, Shape
from ist.neurons.tracing.tape import storages


class Call(NamedTuple):
    """One operator call.

    Attributes:
        operator: For instance `torch.ops.aten.addmm.default`.
        args: Arguments by name; tensors are replaced by their labels, lists of tensors by lists of labels.
        raw: The same arguments with the original tensors.
        results: The tensors that it returned.
    """

    operator: Any
    args: dict[str, Any]
    raw: dict[str, Any]
    results: list[Tensor]

    @property
    def name(self) -> str:
        """The name of the operator without namespace and overload, and without the `_` of an in-place variant."""
        name = str(self.operator.overloadpacket.__name__)
        return name[:-1] if name.endswith("_") and not name.endswith("__") else name

    @property
    def values(self) -> list[Value]:
        """The labels of the tensor arguments, in order."""
        flat = [item for value in self.args.values() for item in (value if isinstance(value, list) else [value])]
        return [item for item in flat if isinstance(item, Activation | ParameterView)]

    def shape(self, number: int = 0) -> Shape:
        """The shape of a result."""
        return tuple(self.results[number].shape)

    def dims(self, value: Value) -> set[int]:
        """The dims that argument `dim` names, counted from 0; all dims if it is not passed."""
        dim = self.args.get("dim")
        ndim = max(1, len(value.shape))
        if dim is None or dim == []:
            return set(range(len(value.shape)))
        return {d % ndim for d in ([dim] if isinstance(dim, int) else dim)}


Rule = Callable[[TraceState, Call], Sequence[Value]]


def free(state: TraceState, call: Call) -> Sequence[Value]:
    """Results that are constants of any width, or of widths that come from attributes."""
    sized = [state.sized[memory] for memory in storages(call.results) if memory in state.sized]
    if sized and len(call.results) == 1:
        return [state.positions.constant(call.shape(), sized[0])]
    return [state.labels.constant(tuple(result.shape), FREE) for result in call.results]


def frozen(state: TraceState, call: Call) -> Sequence[Value]:
    """Results that every worker holds in full."""
    return [state.labels.constant(tuple(result.shape), FROZEN) for result in call.results]


def resized(state: TraceState, call: Call, dims: set[int]) -> Sequence[Value]:
    """Mix along some dims, whose size may change."""
    mixed = state.activation(mix(state, call.values[0], dims))
    core = mixed.core
    for dim in dims:
        core = core.narrow(dim, 0, 1)
    return [state.labels.activation(core.expand(result.shape), mixed.depth) for result in call.results]
