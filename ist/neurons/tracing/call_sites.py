"""Calls of torch functions, named by the place in the code that makes them.

A forward may compute a size from a shape, as in `y.view(B, T, C)` with `B, T, C = x.size()`. No attribute can
make such a number narrow, but the call can be recognised when it is made again: by the chain of code positions
from the module's forward to the call. A narrow network then makes exactly that call with another number.

Where it sits: `ist/neurons/trace.py` notes the calls of the whole network, `ist/neurons/trial.py` finds out which of
them need another number, `ist/subnet/call_sizes.py` gives it to them.
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

Site = tuple[tuple[str, str, int, int], ...]
"""From the call outwards to the module's forward: module name, function, its first line, instruction."""

_MODULE_FILE = nn.Module.__call__.__code__.co_filename


@dataclass(frozen=True)
class CallSize:
    """An integer argument of a call that is the size of an axis, and what it counts.

    Attributes:
        call: The call.
        location: Which of its arguments.
        size: The integer in the whole network, on the example.
        counted: For each group, by name, the neurons at the counted positions.
        in_shape: Whether the argument may be -1.
        where: File and line, for messages.
    """

    call: "Call"
    location: Location
    size: int
    counted: Mapping[str, NDArray[np.int64]]
    in_shape: bool
    where: str

    @property
    def in_proportion(self) -> bool:
        """Whether everything that is counted is split, so that multiples of the integer are narrowed alike."""
        return sum(map(len, self.counted.values())) == self.size

    def narrow(self, held: Mapping[str, NDArray[np.int64]]) -> int:
        """Return the integer in a narrow network on the same example.

        Args:
            held: For each group that is split, by name, the neurons that a worker holds.
        """
        split = [(numbers, held[name]) for name, numbers in self.counted.items() if name in held]
        return self.size - sum(int((~np.isin(numbers, owned)).sum()) for numbers, owned in split)


class Call(NamedTuple):
    """One call of a torch function while a network is watched.

    Attributes:
        path: The module whose forward makes the call.
        turn: How many times this module had run before.
        site: Where in the code.
        visit: How many times this run of it had made the call before.
    """

    path: str
    turn: int
    site: Site
    visit: int


class Resize(NamedTuple):
    """What happens to one integer of a call.

    Attributes:
        location: Which of its arguments.
        whole: The integer in the whole network, on the example.
        narrow: What it becomes; None: -1.
        in_proportion: Whether other integers change in proportion, as with another number of samples.
    """

    location: Location
    whole: int
    narrow: int | None
    in_proportion: bool


Resizes = Mapping[Site, Sequence[Sequence[Resize]]]
"""For each place in a module's code that calls a function with sizes: what becomes of them, the same at every visit
if there is one entry, and otherwise an entry for each visit."""


class _Run(NamedTuple):
    path: str
    turn: int
    visits: Counter[Site]


class Running:
    """Which modules of a network are running, and which calls they have made."""

    def __init__(self) -> None:
        self._turns: Counter[str] = Counter()
        self._stack: list[_Run] = [_Run("", -1, Counter())]

    @property
    def path(self) -> str:
        """The innermost module that is running."""
        return self._stack[-1].path

    def call(self, frame: FrameType) -> Call:
        """Return which call the innermost module makes, and count it.

        Args:
            frame: The code that calls.
        """
        path, turn, visits = self._stack[-1]
        site, _ = site_of(frame)
        visits[site] += 1
        return Call(path, turn, site, visits[site] - 1)

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Follow which module is running."""

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


def site_of(frame: FrameType | None, forward: CodeType | None = None) -> tuple[Site, bool]:
    """Return where in the code of a running module a call is made.

    Args:
        frame: The code that calls.
        forward: The code in which the search ends, if it comes before the call of a module.

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
