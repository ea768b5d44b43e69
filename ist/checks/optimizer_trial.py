"""Try an optimizer: does it have state outside its per-parameter state, and does every step change parameters?

A worker creates a new optimizer for new neurons. Anything that the optimizer's class counts or accumulates in the
object itself would be lost without a message.
Where it sits: `ist/runs/rehearsal.py` calls it before a run.
Not here: per-parameter state (`ist/optimization/optimizers.py`), which is reset, kept or carried as configured.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ist.errors import ConfigError
from ist.optimization import optimizers
from ist.optimization.factory import plain_name
from ist.subnet.job import Job, assignments
from ist.tensors import checksum

_MOST_STEPS = 256
_DEEPEST = 4
_OWN = ("state", "param_groups", "defaults")


@dataclass(frozen=True)
class Trial:
    """The result of some steps.

    Attributes:
        outside: State outside the per-parameter state that a step changes, such as "its attribute 'count'"; and whether
            it is saved with the per-parameter state, which numbers and tensors are.
        period: Steps until parameters changed for the first time; None: they did not.
    """

    outside: Mapping[str, bool]
    period: int | None


def check_optimizer(job: Job, named: Mapping[str, nn.Parameter]) -> None:
    """Refuse, or warn of, an optimizer class that would lose state between rounds.

    Args:
        job: The run.
        named: A subnet's parameters with the gradients of a step; they do not change.

    Raises:
        ConfigError: It has state that cannot be carried, or would never change a parameter.
    """
    found = try_steps(job, named)
    if not found.outside and found.period == 1:
        return
    config, train = job.config, job.config.train
    name = plain_name(train.optimizer)
    keeps = f"{name} keeps {' and '.join(found.outside)}" if found.outside else name
    if not config.method_spec.needs_groups or (train.optimizer_state == "kept" and _same_neurons(job)):
        unsaved = [what for what, is_saved in found.outside.items() if not is_saved]
        if unsaved and any(config.checkpoint.is_due(number) for number in range(1, job.schedule.num_rounds)):
            warnings.warn(
                f"'train.optimizer.name': {name} keeps {' and '.join(unsaved)} outside its per-parameter state, which "
                "is not saved: it starts again when the run is resumed",
                stacklevel=2,
            )
        return
    if found.outside and train.optimizer_state == "carried":
        raise ConfigError(
            f"'train.optimizer_state' is 'carried', but {keeps} outside its per-parameter state, which cannot be split "
            "with a parameter: use 'reset', which creates a new optimizer in every round"
        )
    lengths = {len(span.steps) for span in job.schedule.spans[:-1] or job.schedule.spans}
    if found.period is None and max(lengths) <= _MOST_STEPS:
        raise ConfigError(
            f"'train.optimizer.name': {name} changes no parameter in a round's {max(lengths)} local steps, and every "
            "round has a new optimizer: nothing would be trained. Raise train.local_steps"
        )
    said = [f"{keeps} outside its per-parameter state, which starts again in every round"] if found.outside else []
    if found.period is not None and any(length % found.period for length in lengths):
        said.append(
            f"{name} changes parameters once in {found.period} steps, and gradients that it has not used at the end of "
            f"a round are lost: make train.local_steps ({train.local_steps}) a multiple of {found.period}"
        )
    if said:
        warnings.warn(
            f"'train.optimizer.name': {'; '.join(said)} (each worker creates a new optimizer for new neurons)",
            stacklevel=2,
        )


def _same_neurons(job: Job) -> bool:
    """Return whether every worker holds the same neurons in all rounds."""
    by_round = assignments(job)
    first = by_round.of(0)
    return all(
        all(map(np.array_equal, mine, before))
        for round_number in range(1, job.schedule.num_rounds)
        for mine, before in zip(by_round.of(round_number), first, strict=True)
    )


def try_steps(job: Job, named: Mapping[str, nn.Parameter]) -> Trial:
    """Make steps with a new optimizer on copies of parameters until one of them changes; see `Trial`."""
    with_gradients = {name: parameter for name, parameter in named.items() if parameter.grad is not None}
    copies = {name: nn.Parameter(_zeros_and_ones(parameter)) for name, parameter in named.items()}
    optimizer = job.task.make_optimizer(copies)
    own = {id(parameter): name for name, parameter in copies.items()}
    before = _outside(optimizer, own)
    is_still = not any(group.get("lr", 1.0) for group in optimizer.param_groups)
    start = {name: copies[name].detach().clone() for name in with_gradients}
    period = 1 if is_still else None
    for step in range(1, min(max(len(span.steps) for span in job.schedule.spans), _MOST_STEPS) + 1):
        optimizer.zero_grad(set_to_none=True)
        for name, parameter in with_gradients.items():
            gradient = torch.ones_like(copies[name])
            assert parameter.grad is not None
            given = gradient.to_sparse(1) if parameter.grad.is_sparse else gradient
            mine = copies[name]
            mine.grad = (
                given if mine.grad is None else mine.grad + given
            )  # the optimizer may leave gradients for its next step
        optimizer.step()
        if is_still or any(not torch.equal(start[name], copies[name]) for name in with_gradients):
            period = period or step
            break
    after = _outside(optimizer, own)
    changed = [what for what in {**before, **after} if before.get(what, _ABSENT) != after.get(what, _ABSENT)]
    saved = set(optimizers.named_extras(optimizer))
    return Trial({_said(what): optimizers.extra_name(*what) in saved for what in changed}, period)


_ABSENT = object()


def _zeros_and_ones(parameter: Tensor) -> Tensor:
    """Return values of which some change for a step of any size: a small step changes a 0, a relative one a 1."""
    values = torch.zeros(parameter.numel(), dtype=parameter.dtype)
    values[::2] = 1
    return values.view(parameter.shape)


def _outside(optimizer: torch.optim.Optimizer, own: Mapping[int, str]) -> dict[tuple[str, int | None], Any]:
    """Return an optimizer's attributes and parameter-group settings in comparable form, by (name, group or None)."""
    found: dict[tuple[str, int | None], Any] = {
        (name, None): _comparable(value, own) for name, value in vars(optimizer).items() if name not in _OWN
    }
    for number, group in enumerate(optimizer.param_groups):
        found |= {(name, number): _comparable(value, own) for name, value in group.items() if name != "params"}
    return found


def _comparable(value: Any, own: Mapping[int, str], depth: int = 0) -> Any:
    """Return a comparable form of a value: two values with equal visible content give equal forms."""
    if id(value) in own:
        return own[id(value)]
    if isinstance(value, Tensor):
        return (tuple(value.shape), checksum(value))
    if isinstance(value, np.ndarray):
        return (value.shape, value.tobytes())
    if value is None or isinstance(value, int | float | complex | str | bytes):
        return value
    if depth == _DEEPEST:
        return type(value).__name__
    if isinstance(value, Mapping):
        return [(_comparable(k, own, depth + 1), _comparable(v, own, depth + 1)) for k, v in value.items()]
    if isinstance(value, list | tuple | set | frozenset) or type(value).__name__ == "deque":
        return [_comparable(item, own, depth + 1) for item in value]
    return (type(value).__name__, _comparable(getattr(value, "__dict__", None), own, depth + 1))


def _said(what: tuple[str, int | None]) -> str:
    name, group = what
    return f"its attribute '{name}'" if group is None else f"'{name}' of parameter group {group}"
