"""Paths through a forward that the example does not take: an expert that gets no sample, an early exit.

A *detour* forces such a path. A branch that depends on a value gets another value; an empty selection
(`x[mask]`, `nonzero`) selects the first row instead, so that the code after it runs. The results of a detour are
never used: they are only traced (`ist/neurons/trace.py`) and compared (`ist/checks/verify.py`).
Not here: random branches, which several runs with other seeds reach (`ist/neurons/trace.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ist.neurons.tracing.tape import Step


@dataclass(frozen=True)
class Detour:
    """A change to one run that forces an untaken path.

    Attributes:
        value: The value that the network reads instead; None: values stay, only empty selections change.
        turn: The index of the read that gets this value; None: every read of a bool.
    """

    value: bool | int | float | None = None
    turn: int | None = None


def detours(steps: Sequence[Step]) -> Iterator[Detour]:
    """Yield the detours of a run, the most promising first."""
    reads = [step.value for step in steps if step.value is not None]
    yield Detour()
    if any(isinstance(value, bool) for value in reads):
        yield Detour(True)
        yield Detour(False)
    for turn, value in enumerate(reads):
        for other in other_values(value):
            yield Detour(other, turn)


def other_values(value: bool | int | float) -> list[bool | int | float]:
    """Return values that may lead to another branch."""
    if isinstance(value, bool):
        return [not value]
    return [value + 1, 0, -1] if isinstance(value, int) else [1.5 * value + 0.1, 1e9, -1e9]


class OnDetour(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes a network take a detour."""

    def __init__(self, detour: Detour) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._detour, self._reads = detour, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        name = str(func.overloadpacket.__name__)
        if name in ("index", "index_put", "index_put_"):
            args = (args[0], [not_empty(index) for index in args[1]], *args[2:])
        result = func(*args, **(kwargs or {}))
        if name == "nonzero" and not result.is_meta and len(result) == 0 and args[0].numel():
            return result.new_zeros((1, result.shape[1]))
        if isinstance(result, bool | int | float):
            self._reads += 1
            return self._read(result)
        return result

    def _read(self, value: bool | int | float) -> bool | int | float:
        forced = self._detour.value
        if forced is None:
            return value
        turn = self._detour.turn
        chosen = isinstance(value, bool) if turn is None else turn == self._reads - 1
        return forced if chosen else value


def not_empty(index: Tensor | None) -> Tensor | None:
    """Return a mask that selects at least one element: the first, if the given mask selects none."""
    if index is None or index.dtype != torch.bool or index.is_meta or index.any() or not index.numel():
        return index
    filled = index.clone()
    filled.view(-1)[0] = True
    return filled
