"""Leave whole what a narrow network of the class cannot do without.

A network's forward may compare its shapes with a number that no attribute gives. Then narrow attention of that class is
not possible, while its feed-forward layers may be. So a narrow network is run on the `meta` device before anything else
(no memory, no arithmetic), with the sizes of its calls corrected where they are wrong (`ist/neurons/trial.py`); if it
fails, each group is tried alone, and those that fail are not split. A warning names them.

Where it sits: `ist/subnet/job.py` calls it when a job is made, in every process alike.
Not here: whether what runs is right (`ist/checks/verify.py`).
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ist.errors import ModelError, first_line, said_at
from ist.neurons.find import Found
from ist.neurons.group import Group
from ist.neurons.trial import Trial, spread
from ist.rng import Indices

FAILURES = (
    RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError, KeyError, ArithmeticError,
    ModelError,
)  # fmt: skip
"""What a forward that does not fit raises."""


Runs = Callable[[Sequence[Group], Sequence[Indices], Found, "Trial | None"], object]


def fitting_groups(groups: Sequence[Group], found: Found, runs: Runs) -> tuple[tuple[Group, ...], Found]:
    """Return the groups that can be split in a network of its class, and how.

    Args:
        groups: The groups that are to be split.
        found: What is known of the network.
        runs: Runs a narrow network in which some groups are split and each worker holds the given neurons of them,
            perhaps as part of a trial; raises if it fails.

    Returns:
        The groups, and what is known of the network with the calls that are made with other sizes.

    Raises:
        ModelError: None of them can.
    """
    if any(group.modules for group in groups):
        return tuple(groups), found
    reason, fitted = _attempt(groups, found, runs)
    if reason is None:
        return tuple(groups), fitted
    alike: dict[str, list[Group]] = {}
    for group in groups:  # the same part of every layer mostly fails in all of them
        alike.setdefault(re.sub(r"\d+", "*", group.name), []).append(group)
    fitting: list[Group] = []
    reasons: dict[str, str] = {}
    for members in alike.values():
        reason, result = _attempt([*fitting, *members], found, runs)
        if reason is None:
            fitting, fitted = [*fitting, *members], result
            continue
        for group in members:
            reason, result = _attempt([*fitting, group], found, runs)
            if reason is None:
                fitting, fitted = [*fitting, group], result
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
    return tuple(group for group in groups if group.name not in reasons), fitted


def _attempt(groups: Sequence[Group], found: Found, runs: Runs) -> tuple[str | None, Found]:
    """Find out how a network with some groups split computes its sizes; return why it fails, or how it works."""
    plain = replace(found, calls=(), sites={})
    for with_attributes in (False, True):
        reason, fitted, resized = _search(groups, found, runs, with_attributes)
        if not resized:
            return reason, plain
        if reason is None:
            return None, fitted
    return (None, plain) if _failure(groups, plain, runs) is None else (reason, plain)


def _search(
    groups: Sequence[Group], found: Found, runs: Runs, with_attributes: bool
) -> tuple[str | None, Found, frozenset[str]]:
    """Find the modules whose calls need given sizes; return why it fails, how it works, and these modules."""
    resized: frozenset[str] = frozenset()
    while True:
        trial = Trial(found, resized, with_attributes)
        reason = _failure(groups, trial.found, runs, trial)
        further = spread(found, trial.mismatched) - resized
        if not further:
            break
        resized |= further
    fitted = found
    if resized and reason is None:
        try:
            fitted = trial.result()
        except ModelError as error:
            reason = str(error)
        else:
            reason = _failure(groups, fitted, runs)
    return reason, fitted, resized


def _failure(groups: Sequence[Group], found: Found, runs: Runs, trial: Trial | None = None) -> str | None:
    """Run the smallest cut and about half; return why one fails."""
    for held in ([np.array([group.size // 2]) for group in groups], [np.arange(-(-g.size // 2)) for g in groups]):
        try:
            runs(groups, held, found, trial)
        except FAILURES as error:
            return first_line(error) if isinstance(error, ModelError) else said_at(error)
    return None
