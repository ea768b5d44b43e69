"""Make the learning-rate scheduler that a configuration or a user's function describes.

Where it sits: `step_settings.py` runs the scheduler in advance and records its settings.
Not here: applying settings to the optimizer of a subnet (`step_settings.py`).
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch.optim import lr_scheduler

from ist.config.registry import call, resolve
from ist.config.schema import FROM_PYTHON, TOTAL_STEPS, Schedule
from ist.errors import ConfigError, ISTError, error_with_line, is_out_of_memory

MakeScheduler = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
"""Makes a scheduler of the given optimizer, which has the run's parameter groups but only a stand-in in each.

The scheduler runs once, before the run starts, over all local steps of the run. So it may change settings of the
optimizer's parameter groups, and it must not depend on values of parameters or on the progress of training.
"""


def make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: Schedule, total_steps: int, given: MakeScheduler | None
) -> lr_scheduler.LRScheduler:
    """Make the scheduler of a run.

    Args:
        optimizer: The optimizer whose settings it changes.
        schedule: The section `train.schedule`.
        total_steps: The number of local steps of the run.
        given: A user's function, which is used instead; None for none.

    Raises:
        ConfigError: The schedule is unknown, fails, rejects its arguments, or needs a metric.
    """
    args = {key: total_steps if value == TOTAL_STEPS else value for key, value in schedule.args.items()}
    where = shown_schedule(schedule)
    if schedule.factor is not None:
        return lr_scheduler.LambdaLR(optimizer, _factor(schedule.factor, args, where))
    if given is not None:
        made = _called(given, optimizer, {}, where)
    else:
        assert schedule.name is not None
        found = resolve(schedule.name, "train.schedule.name", {}, lr_scheduler)
        if found is lr_scheduler.ReduceLROnPlateau:
            _refuse_plateau(where)
        if not isinstance(found, type):
            made = _called(found, optimizer, args, where)
        elif issubclass(found, lr_scheduler.LRScheduler):
            made = call(found, {"optimizer": optimizer, **args}, "train.schedule.args")
        else:
            raise ConfigError(f"{where}, which is not an LRScheduler")
    if isinstance(made, lr_scheduler.ReduceLROnPlateau):
        _refuse_plateau(where)
    if not isinstance(made, lr_scheduler.LRScheduler):
        raise ConfigError(f"{where}, which returns a {type(made).__name__}: {_EXPECTED}")
    if getattr(made, "optimizer", optimizer) is not optimizer:
        raise ConfigError(f"{where}, which returns a scheduler of another optimizer: {_EXPECTED}")
    return made


_EXPECTED = (
    "it is called with an optimizer and returns an LRScheduler of it; a function of the step that returns a factor of "
    "the learning rate goes into ist.Schedule(factor=...) or train.schedule.factor"
)


def _refuse_plateau(where: str) -> None:
    raise ConfigError(f"{where}: ReduceLROnPlateau needs a metric at each step, which is not supported")


def _called(function: Any, optimizer: torch.optim.Optimizer, args: Mapping[str, Any], where: str) -> Any:
    """Call a user's function with an optimizer and its own arguments.

    Raises:
        ConfigError: It does not accept them, or raises an error.
    """
    try:
        return function(optimizer, **args)
    except ISTError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"{where}, which raises {error_with_line(error)}: {_EXPECTED}") from error


def _factor(function: str | Callable[..., float], args: Mapping[str, Any], where: str) -> Callable[[int], Any]:
    """Return a function of the step alone that checks what the user's function returns.

    Raises:
        ConfigError: The function is unknown, or does not accept the arguments.
    """
    found = resolve(function, "train.schedule.factor", {}) if isinstance(function, str) else function
    try:
        inspect.signature(found).bind(0, **args)
    except TypeError as error:
        raise ConfigError(
            f"{where}, which does not accept a step and 'train.schedule.args' {dict(args)}: {error}"
        ) from error
    except ValueError:
        pass  # some builtins have no signature: the call itself checks the arguments
    return partial(_checked_factor, found, args, where)


def _checked_factor(function: Callable[..., Any], args: Mapping[str, Any], where: str, step: int) -> Any:
    try:
        value = function(step, **args)
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise ConfigError(f"{where}, which raises {error_with_line(error)} for step {step}") from error
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ConfigError(f"{where}, which returns {value!r} for step {step}: return a finite number")
    return value


def shown_schedule(schedule: Schedule) -> str:
    """Return the schedule's name for a message: the key and its value, or the argument of `ist.train`."""
    if schedule.factor is not None:
        name = schedule.factor if isinstance(schedule.factor, str) else getattr(schedule.factor, "__name__", "")
        return f"'train.schedule.factor' is '{name or type(schedule.factor).__name__}'"
    assert schedule.name is not None
    if schedule.name.startswith(FROM_PYTHON):
        return f"schedule is {schedule.name.removeprefix(FROM_PYTHON)}"
    return f"'train.schedule.name' is '{schedule.name}'"
