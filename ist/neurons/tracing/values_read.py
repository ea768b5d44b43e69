"""Values that a forward reads from tensors (`item()`, `bool()`, `float()`), and whether the outputs depend on them.

A check (`assert h.isfinite().all()`) or a printed mean does not prevent a split; a value that enters a computation
or chooses a branch does. Each value is changed in a separate run: if the outputs stay the same, or the network's own
`raise` or `assert` fires, the outputs do not depend on the value.

Where it sits: `ist/neurons/trace.py` calls it for networks that run with values.
Not here: forcing the branches that a value chooses (`untaken_paths.py`).
"""

import linecache
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ist.data.nested import tensors_in
from ist.neurons.tracing.shared_draws import Draws, fixed_draws
from ist.neurons.tracing.tape import Step
from ist.neurons.tracing.untaken_paths import other_values

MOST_READS = 100
"""The most values that are tried, in up to three runs each; further values count as ones that matter."""


def reads_that_matter(
    steps: Sequence[Step],
    suspects: Sequence[int],
    seed: int,
    fresh: Callable[[], nn.Module],
    run: Callable[[nn.Module], Any],
) -> set[int]:
    """Return the indices of the steps whose value the outputs depend on.

    Args:
        steps: The steps of one run of a network.
        suspects: Indices of steps that read a value which depends on parameters.
        seed: The seed of the run's random draws.
        fresh: Builds the network once more.
        run: Runs it, and returns its outputs.
    """
    if not suspects:
        return set()
    turns = {number: turn for turn, number in enumerate(n for n, step in enumerate(steps) if step.value is not None)}

    def outputs(turn: int, value: Any) -> list[Tensor]:
        network = fresh()
        with fixed_draws(Draws(seed)), _Altered(turn, value), torch.no_grad():
            return list(tensors_in(run(network)))

    plain = outputs(-1, None)
    matter = set(suspects[MOST_READS:])
    for number in suspects[:MOST_READS]:
        for value in other_values(steps[number].value or 0):
            try:
                found = outputs(turns[number], value)
            except Exception as error:  # whatever a forward raises
                matters = not _is_check(error)
            else:
                matters = not _are_same(plain, found)
            if matters:
                matter.add(number)
                break
    return matter


def _are_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)
    )


def _is_check(error: Exception) -> bool:
    """Whether a `raise` or `assert` statement raised an error, not an operator that got wrong arguments."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return bool(re.search(r"\b(raise|assert)\b", linecache.getline(last.filename, last.lineno or 0)))


class _Altered(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Changes one of the values that the network reads."""

    def __init__(self, turn: int, value: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._turn, self._value, self._seen = turn, value, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, bool | int | float):
            self._seen += 1
            return self._value if self._seen - 1 == self._turn else result
        return result
