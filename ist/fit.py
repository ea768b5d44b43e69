"""Leave whole what a narrow network of the class cannot do without.

A network's forward may hold a number that no attribute gives, such as a reshape to the width of its input.
Then narrow attention of that class is not possible, while its feed-forward layers may be. So a narrow
network is run on the `meta` device before anything else (no memory, no arithmetic); if it fails, each group
is tried alone, and those that fail are not split. A warning names them.

Where it sits: `ist/job.py` calls it when a job is made, in every process alike.
Not here: whether what runs is right (`ist/verify.py`).
"""

import re
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from ist.errors import ModelError, first_line
from ist.groups import Group
from ist.rng import Indices

FAILURES = (
    RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError, KeyError, ArithmeticError,
    ModelError,
)  # fmt: skip
"""What a forward that does not fit raises."""


def fitting_groups(
    groups: Sequence[Group], runs: Callable[[Sequence[Group], Sequence[Indices]], object]
) -> tuple[Group, ...]:
    """Return the groups that can be split in a network of its class.

    Args:
        groups: The groups that are to be split.
        runs: Runs a narrow network in which some groups are split and each worker holds the given neurons of them;
            raises if it fails.

    Raises:
        ModelError: None of them can.
    """
    if any(group.modules for group in groups) or _failure(groups, runs) is None:
        return tuple(groups)
    alike: dict[str, list[Group]] = {}
    for group in groups:  # the same part of every layer mostly fails in all of them
        alike.setdefault(re.sub(r"\d+", "*", group.name), []).append(group)
    fitting: list[Group] = []
    reasons: dict[str, str] = {}
    for members in alike.values():
        if _failure([*fitting, *members], runs) is None:
            fitting += members
            continue
        for group in members:
            reason = _failure([*fitting, group], runs)
            if reason is None:
                fitting.append(group)
            else:
                reasons[group.name] = reason
    if not fitting:
        name, reason = next(iter(reasons.items()))
        raise ModelError(
            f"a narrow network of this class fails ('{name}': {reason}). Its forward depends on a number that could "
            "not be narrowed; docs/groups.md tells what can be done"
        )
    for name, reason in reasons.items():
        warnings.warn(
            f"'{name}' is not split: a network with fewer of these neurons fails ({reason}). Put it into "
            "partition.exclude to say that this is known",
            stacklevel=2,
        )
    return tuple(group for group in groups if group.name not in reasons)


def _failure(groups: Sequence[Group], runs: Callable[[Sequence[Group], Sequence[Indices]], object]) -> str | None:
    """Run the smallest cut and about half; return why one fails."""
    for held in ([np.array([group.size // 2]) for group in groups], [np.arange(-(-g.size // 2)) for g in groups]):
        try:
            runs(groups, held)
        except FAILURES as error:
            return first_line(error)
    return None
