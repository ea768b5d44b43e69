"""Calls of torch functions, identified by the place in the code that makes them.

A forward may compute a size from a shape, as in `y.view(B, T, C)` with `B, T, C = x.size()`. No attribute controls
such a number, but the call can be recognized in another run by the chain of code positions from the module's
forward to the call. A submodel then makes exactly that call with another number.

Where it sits: `ist/neurons/trace.py` records the calls of the full network, `ist/neurons/trial.py` finds out which
of them need another number, `ist/subnet/call_sizes.py` replaces it.
Not here: sizes that are attributes (`ist/neurons/attribute_sizes.py`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ist.neurons.attribute_sizes import Location

CallSite = tuple[tuple[str, str, int, int], ...]
"""The frames from the call outwards to the module's forward: module name, function, its first line, instruction."""

_MODULE_FILE = nn.Module.__call__.__code__.co_filename


@dataclass(frozen=True)
class CallSize:
    """An integer argument of a call that is the size of an axis, and the neurons that it counts.

    Attributes:
        call: The call.
        location: The location of the integer in the arguments.
        size: The integer in the full network, on the example.
        counted: For each group, by name, the neurons at the counted positions.
        in_shape: Whether the argument may be -1.
        where: 'file:line' of the network's code, for messages.
    """

    call: "Call"
    location: Location
    size: int
    counted: Mapping[str, NDArray[np.int64]]
    in_shape: bool
    where: str

    @property
    def in_proportion(self) -> bool:
        """Whether every counted position is split, so that multiples of the integer shrink by the same factor."""
        return sum(map(len, self.counted.values())) == self.size

    def in_submodel(self, held: Mapping[str, NDArray[np.int64]]) -> int:
        """Return the integer in a worker's submodel on the same example.

        Args:
            held: For each group that is split, by name, the neurons that a worker holds.
        """
        split = [(numbers, held[name]) for name, numbers in self.counted.items() if name in held]
        return self.size - sum(int((~np.isin(numbers, owned)).sum()) for numbers, owned in split)


class Call(NamedTuple):
    """One call of a torch function in a recorded run.

    Attributes:
        path: The module whose forward makes the call.
        turn: How many times this module ran before.
        site: The place in the code.
        visit: How many times this run of the module made the call before.
    """

    path: str
    turn: int
    site: CallSite
    visit: int


class Resize(NamedTuple):
    """The replacement of one integer argument of a call.

    Attributes:
        location: The location of the integer in the arguments.
        full: The integer in the full network, on the example.
        submodel: The integer in the submodel; None: -1, which torch infers.
        in_proportion: Whether other values of the integer (as with another number of samples) scale by the same factor.
    """

    location: Location
    full: int
    submodel: int | None
    in_proportion: bool


Resizes = Mapping[CallSite, Sequence[Sequence[Resize]]]
"""For each place in a module's code that calls a function with sizes, their replacements: one entry if they are the
same at every visit, otherwise one entry per visit."""


class _Run(NamedTuple):
    path: str
    turn: int
    visits: Counter[CallSite]


class ModuleStack:
    """The modules of a network whose forward is running, and the calls that they have made."""

    def __init__(self) -> None:
        self._turns: Counter[str] = Counter()
        self._stack: list[_Run] = [_Run("", -1, Counter())]

    @property
    def path(self) -> str:
        """The path of the innermost running module."""
        return self._stack[-1].path

    def call(self, frame: FrameType) -> Call:
        """Return the call that the innermost module makes, and count it.

        Args:
            frame: The frame of the calling code.
        """
        path, turn, visits = self._stack[-1]
        site, _ = site_of(frame)
        visits[site] += 1
        return Call(path, turn, site, visits[site] - 1)

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Track which module is running, by hooks that are removed afterwards."""

        def enter(path: str) -> None:
            self._stack.append(_Run(path, self._turns[path], Counter()))
            self._turns[path] += 1

        def leave(*_: Any) -> None:
            self._stack.pop()

        handles = []
        for path, child in module.named_modules():
            handles.append(child.register_forward_pre_hook(lambda *_, path=path: enter(path)))
            handles.append(child.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def site_of(frame: FrameType | None, forward: CodeType | None = None) -> tuple[CallSite, bool]:
    """Return where in the code of a running module a call is made.

    Args:
        frame: The frame of the calling code.
        forward: The code at which the search ends, if it comes before the call of a module.

    Returns:
        The site, and whether `forward` was reached.
    """
    steps: list[tuple[str, str, int, int]] = []
    while frame is not None:
        code = frame.f_code
        if code is forward:
            return tuple(steps), True
        if code.co_filename == _MODULE_FILE:
            break
        steps.append((frame.f_globals.get("__name__", ""), code.co_name, code.co_firstlineno, frame.f_lasti))
        frame = frame.f_back
    return tuple(steps), False
