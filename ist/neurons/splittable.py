"""Find out which groups can be split: run small submodels and drop the groups that make them fail.

A forward may compare a shape with a number that no attribute gives. Then the attention of that class cannot have
fewer heads, while its feed-forward layers can still be split. So a submodel runs on the `meta` device first (no memory,
no arithmetic), with the sizes of its calls corrected where they are wrong (`ist/neurons/trial.py`). If it fails, each
group is tried separately. Groups that fail are not split, and a warning names them.

Where it sits: `ist/runs/build.py` calls it, with the same result in every process.
Not here: whether a submodel that runs computes the right values (`ist/checks/verify.py`).
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ist.errors import ModelError, error_with_line, first_line
from ist.neurons.find import Neurons
from ist.neurons.group import Group
from ist.neurons.trial import SubnetTrial, related_modules
from ist.rng import Indices

FAILURES = (
    RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError, KeyError, ArithmeticError,
    ModelError,
)  # fmt: skip
"""The exceptions that a forward raises when its sizes do not match."""


RunSubmodel = Callable[[Sequence[Group], Sequence[Indices], Neurons, "SubnetTrial | None"], object]
"""Runs the submodel in which the given groups are split and the given neurons of each are held; raises if it fails."""


def splittable_groups(
    groups: Sequence[Group], neurons: Neurons, run_submodel: RunSubmodel
) -> tuple[tuple[Group, ...], Neurons]:
    """Return the groups that can be split in a network of this class, and how its submodels get their sizes.

    Args:
        groups: The groups to split.
        neurons: The neurons of the network.
        run_submodel: Called with groups, the neurons held of each, the neurons of the network, and the trial that
            observes the run (or None).

    Returns:
        The splittable groups, and `neurons` with the calls whose sizes a submodel replaces.

    Raises:
        ModelError: No group can be split.
    """
    if any(group.modules for group in groups):
        return tuple(groups), neurons
    reason, refined = _attempt(groups, neurons, run_submodel)
    if reason is None:
        return tuple(groups), refined
    alike: dict[str, list[Group]] = {}
    for group in groups:  # the same part of every layer usually fails in all of them
        alike.setdefault(re.sub(r"\d+", "*", group.name), []).append(group)
    splittable: list[Group] = []
    reasons: dict[str, str] = {}
    for members in alike.values():
        reason, result = _attempt([*splittable, *members], neurons, run_submodel)
        if reason is None:
            splittable, refined = [*splittable, *members], result
            continue
        for group in members:
            reason, result = _attempt([*splittable, group], neurons, run_submodel)
            if reason is None:
                splittable, refined = [*splittable, group], result
            else:
                reasons[group.name] = reason
    if not splittable:
        name, reason = next(iter(reasons.items()))
        raise ModelError(
            f"a submodel of this class fails ('{name}': {reason}). Its forward depends on a number that could not be "
            "changed to the submodel's size; docs/groups.md says what to do"
        )
    for name, reason in reasons.items():
        warnings.warn(
            f"'{name}' is not split: a submodel with fewer of these neurons fails ({reason}). Add it to "
            "partition.exclude to silence this warning",
            stacklevel=2,
        )
    return tuple(group for group in groups if group.name not in reasons), refined


def _attempt(groups: Sequence[Group], neurons: Neurons, run_submodel: RunSubmodel) -> tuple[str | None, Neurons]:
    """Split some groups; return the reason for a failure or None, and the neurons with the sizes of calls settled."""
    plain = replace(neurons, calls=(), sites={})
    for with_attributes in (False, True):
        reason, refined, resized = _search(groups, neurons, run_submodel, with_attributes)
        if not resized:
            return reason, plain
        if reason is None:
            return None, refined
    return (None, plain) if _failure(groups, plain, run_submodel) is None else (reason, plain)


def _search(
    groups: Sequence[Group], neurons: Neurons, run_submodel: RunSubmodel, with_attributes: bool
) -> tuple[str | None, Neurons, frozenset[str]]:
    """Find the modules whose calls need replaced sizes; return the reason for a failure, the neurons, these modules."""
    resized: frozenset[str] = frozenset()
    while True:
        trial = SubnetTrial(neurons, resized, with_attributes)
        reason = _failure(groups, trial.neurons, run_submodel, trial)
        further = related_modules(neurons, trial.mismatched) - resized
        if not further:
            break
        resized |= further
    refined = neurons
    if resized and reason is None:
        try:
            refined = trial.result()
        except ModelError as error:
            reason = str(error)
        else:
            reason = _failure(groups, refined, run_submodel)
    return reason, refined, resized


def _failure(
    groups: Sequence[Group], neurons: Neurons, run_submodel: RunSubmodel, trial: SubnetTrial | None = None
) -> str | None:
    """Run the smallest submodel and one of about half the neurons; return the reason if one fails."""
    for held in ([np.array([group.size // 2]) for group in groups], [np.arange(-(-g.size // 2)) for g in groups]):
        try:
            run_submodel(groups, held, neurons, trial)
        except FAILURES as error:
            return first_line(error) if isinstance(error, ModelError) else error_with_line(error)
    return None
