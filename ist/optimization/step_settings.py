"""The settings that a schedule gives each parameter group at each local step of a run.

A schedule covers the whole run. So it runs once in advance, on an optimizer over stand-ins for all parameters, and the
settings of every step are recorded. A worker's optimizer has only the parameters of a subnet: each of its parameter
groups gets the settings of the full network's group with the same parameters.

Where it sits: `ist/runs/build.py` records the settings; `ist/training/worker.py` applies them before each step.
Not here: making an optimizer (`factory.py`), the rounds of a run (`stages.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ist.config.schema import Schedule
from ist.errors import ConfigError, ModelError, error_with_line
from ist.optimization.factory import MakeOptimizer
from ist.optimization.schedulers import MakeScheduler, make_scheduler, shown_schedule
from ist.optimization.stages import Span

Settings = Mapping[str, Any]
"""The settings of one parameter group, such as {'lr': 0.1}."""

StepSettings = tuple[Settings, ...]
"""The settings of one step: an entry for each parameter group of the full network's optimizer."""

MAX_SCHEDULED_STEPS = 3_000_000
"""The most local steps of a run with a schedule: their settings take a gigabyte."""


def stand_ins(template: nn.Module, make: MakeOptimizer) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Return stand-ins for the trained parameters of a network, and an optimizer over them; neither takes memory.

    There is a stand-in for each parameter, because an optimizer may group its parameters by their shapes.

    Args:
        template: The full network, on the `meta` device.
        make: Makes the optimizer.

    Returns:
        The stand-ins by name, and the optimizer.

    Raises:
        ConfigError: The optimizer cannot be made.
    """
    trained = {name: parameter for name, parameter in template.named_parameters() if parameter.requires_grad}
    named = {name: nn.Parameter(torch.empty_like(parameter, device="meta")) for name, parameter in trained.items()}
    try:
        return named, make(named)
    except (ConfigError, NotImplementedError):  # some classes read devices or values: expand a single value
        named = {
            name: nn.Parameter(torch.zeros((), dtype=parameter.dtype).expand(parameter.shape))
            for name, parameter in trained.items()
        }
        return named, make(named)


def groups_by_name(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Return, for each parameter, the index of its parameter group in an optimizer."""
    names = {id(parameter): name for name, parameter in named.items()}
    return {
        names[id(parameter)]: number
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }


def group_settings(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Settings]:
    """Return the settings of each parameter's group in an optimizer, by the parameter's name."""
    settings = _settings_now(optimizer)
    return {name: settings[number] for name, number in groups_by_name(optimizer, named).items()}


def matching_groups(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], full: Mapping[str, int]
) -> list[int | None]:
    """Return, for each parameter group of a subnet's optimizer, the group of the full network that contains it.

    Args:
        optimizer: An optimizer over the parameters of a subnet, or of the full network.
        named: Its parameters by name.
        full: For each parameter of the full network, the index of its group.

    Returns:
        Indices of groups; None for a group without parameters.

    Raises:
        ModelError: A group of the optimizer has parameters from several groups of the full network, so that no
            schedule can apply to it.
    """
    found: list[int | None] = []
    names = {id(parameter): name for name, parameter in named.items()}
    for number, group in enumerate(optimizer.param_groups):
        full_groups = {names[id(parameter)]: full.get(names[id(parameter)]) for parameter in group["params"]}
        numbers = set(full_groups.values())
        if len(numbers) > 1:
            first, first_group = next(iter(full_groups.items()))
            other, other_group = next(pair for pair in full_groups.items() if pair[1] != first_group)
            raise ModelError(
                f"'train.optimizer.name': {type(optimizer).__name__} has '{first}' and '{other}' in one parameter "
                f"group ({number}) in a subnet, but in groups {first_group} and {other_group} in the full network: a "
                "schedule or a stage's lr_scale needs the same groups in both (group by name or by number of dims, "
                "not by size)"
            )
        found.append(numbers.pop() if numbers else None)
    return found


def apply_settings(
    optimizer: torch.optim.Optimizer, groups: Sequence[int | None], settings: Sequence[Settings]
) -> None:
    """Apply the settings of a step to an optimizer.

    Args:
        optimizer: The optimizer; its parameter groups are changed.
        groups: The result of `matching_groups`.
        settings: An entry for each parameter group of the full network's optimizer.
    """
    for group, number in zip(optimizer.param_groups, groups, strict=True):
        if number is not None:
            group.update(settings[number])


def schedule_settings(
    optimizer: torch.optim.Optimizer,
    schedule: Schedule | None,
    total_steps: int,
    given: MakeScheduler | None = None,
) -> list[StepSettings]:
    """Return the settings that a schedule gives at each local step of the run.

    Args:
        optimizer: An optimizer over stand-ins for all trained parameters; it is unusable afterwards.
        schedule: The section `train.schedule`, or None.
        total_steps: The number of local steps of the run.
        given: A user's function, which is used instead of the class or function that `schedule` names; None for none.

    Returns:
        For each step and each parameter group, the settings that the schedule changes at some step of the run; an
        empty list without a schedule.

    Raises:
        ConfigError: The schedule is unknown, fails, rejects its arguments, or needs a metric.
    """
    if schedule is None:
        return []
    _check_length(total_steps, "'train.schedule'")
    for group in optimizer.param_groups:  # a step visits every parameter, and one of each group is enough
        del group["params"][1:]
    own = _settings_now(optimizer)
    scheduler = make_scheduler(optimizer, schedule, total_steps, given)
    found: list[list[Settings]] = []
    for step in range(total_steps):
        found.append([_changed(*pair) for pair in zip(own, _settings_now(optimizer), strict=True)])
        if step + 1 < total_steps:
            optimizer.step()
            try:
                scheduler.step()
            except ConfigError:
                raise
            except ValueError as error:
                raise ConfigError(f"'train.schedule.args': {error} (the run has {total_steps} local steps)") from error
            except Exception as error:  # a user's class may raise anything, and some arguments are checked late
                raise ConfigError(
                    f"'train.schedule.args' {schedule.args}: step {step + 1} of {shown_schedule(schedule)} raises "
                    f"{error_with_line(error)}"
                ) from error
    # A setting that changes at any step is set at every step, also where it equals the optimizer's own value.
    base = [
        {key: values[key] for key in values if any(key in groups[number] for groups in found)}
        for number, values in enumerate(own)
    ]
    return [tuple({**own, **group} for own, group in zip(base, groups, strict=True)) for groups in found]


def _changed(own: Settings, now: Settings) -> Settings:
    """Return the learning rate of a group, and the settings that differ from the optimizer's own."""
    return {key: value for key, value in now.items() if key == "lr" or key not in own or own[key] != value}


def _settings_now(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Copy the settings of every group, because a schedule changes a learning rate in place if it is a tensor."""
    return [
        {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key not in ("params", "param_names", "initial_lr")
        }
        for group in optimizer.param_groups
    ]


def staged_settings(
    optimizer: torch.optim.Optimizer,
    settings: list[StepSettings],
    spans: Sequence[Span],
    unit: Literal["step", "round"],
) -> list[StepSettings]:
    """Return the settings at each local step of the run, with the learning-rate scales of its stages.

    Args:
        optimizer: An optimizer over stand-ins for all trained parameters, with the base settings in its groups.
        settings: The result of `schedule_settings`.
        spans: The rounds of the run.
        unit: 'step': settings change at every step; 'round': the settings of a round's first step hold for the round.

    Raises:
        ConfigError: A stage scales the learning rate of an optimizer without one.
    """
    if not settings and all(span.stage.lr_scale == 1 for span in spans):
        return settings
    if not settings:
        _check_length(spans[-1].steps.stop, "'lr_scale' of a stage")
        base = _settings_now(optimizer)
        if not all("lr" in group for group in base):
            raise ConfigError(f"'recipe.stages' has an 'lr_scale', but {type(optimizer).__name__} has no 'lr'")
        settings = [tuple({"lr": group["lr"]} for group in base)] * spans[-1].steps.stop
    found: list[StepSettings] = []
    for span in spans:
        scale = span.stage.lr_scale
        for step in span.steps:
            now = settings[span.steps.start if unit == "round" else step]
            found.append(tuple({**group, "lr": group["lr"] * scale} for group in now) if scale != 1 else now)
    return found


def _check_length(total_steps: int, what: str) -> None:
    if total_steps > MAX_SCHEDULED_STEPS:
        raise ConfigError(
            f"{what} is computed in advance for every local step, for at most {MAX_SCHEDULED_STEPS:,} of them, but the "
            f"run has {total_steps:,} ('train.rounds' or 'train.epochs'): make it shorter, or remove the schedule"
        )
