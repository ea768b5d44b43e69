"""What a schedule sets at every local step of a run, for every parameter group.

The schedule belongs to the whole run, so it is played once on an optimiser over stand-ins of all parameters, and every
step's settings are read off, for each of its parameter groups. A worker has the parameters of a subnet: each group of
its optimiser gets the settings of that group of the whole network which has the same parameters.
Not here: making an optimiser (`optimizers.py`), which rounds there are (`stages.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ist.config.base import Component
from ist.config.registry import call, resolve
from ist.config.schema import TOTAL_STEPS
from ist.errors import ConfigError, ModelError, said_at
from ist.optimization.optimizers import build_optimizer
from ist.optimization.stages import Span

Settings = Mapping[str, Any]
"""What a schedule sets for a parameter group, such as {'lr': 0.1}."""

StepSettings = tuple[Settings, ...]
"""What a schedule sets for one step: an entry for each parameter group of the whole network's optimiser."""

MAX_SCHEDULED_STEPS = 3_000_000
"""Most local steps of a run with a schedule: their settings take a gigabyte."""


def stand_ins(template: nn.Module, spec: Component) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Return parameters like those of a network that are trained, and an optimiser over them; neither takes memory.

    An optimiser class may put its parameters into several groups, by their shapes: so all of them are there.

    Args:
        template: The whole network, on the `meta` device.
        spec: The optimiser.

    Raises:
        ConfigError: As `build_optimizer`.
    """
    trained = {name: parameter for name, parameter in template.named_parameters() if parameter.requires_grad}
    named = {name: nn.Parameter(torch.empty_like(parameter, device="meta")) for name, parameter in trained.items()}
    try:
        return named, build_optimizer(spec, list(named.values()))
    except (ConfigError, NotImplementedError):  # some look at devices or values: one value, wherever it is read
        named = {
            name: nn.Parameter(torch.zeros((), dtype=parameter.dtype).expand(parameter.shape))
            for name, parameter in trained.items()
        }
        return named, build_optimizer(spec, list(named.values()))


def groups_by_name(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Return the number of the parameter group in which an optimiser has each parameter."""
    names = {id(parameter): name for name, parameter in named.items()}
    return {
        names[id(parameter)]: number
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }


def matching_groups(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], whole: Mapping[str, int]
) -> list[int | None]:
    """Return, for every parameter group of a subnet's optimiser, the whole network's group that it is a part of.

    Args:
        optimizer: Over the parameters of a subnet, or of the whole network.
        named: Those parameters.
        whole: For every parameter of the whole network, the number of its group.

    Returns:
        Numbers of groups; None for a group without parameters.

    Raises:
        ModelError: The optimiser puts parameters of a subnet together that it has in different groups in the whole
            network, so that no schedule can be followed.
    """
    found: list[int | None] = []
    names = {id(parameter): name for name, parameter in named.items()}
    for number, group in enumerate(optimizer.param_groups):
        belongs = {names[id(parameter)]: whole.get(names[id(parameter)]) for parameter in group["params"]}
        numbers = set(belongs.values())
        if len(numbers) > 1:
            first, at = next(iter(belongs.items()))
            other, elsewhere = next(pair for pair in belongs.items() if pair[1] != at)
            raise ModelError(
                f"'train.optimizer.name': {type(optimizer).__name__} has '{first}' and '{other}' in one parameter "
                f"group ({number}) in a subnet, but in groups {at} and {elsewhere} in the whole "
                "network: a schedule or a stage's lr_scale needs the same groups in both (group by name or by number "
                "of dims, not by size)"
            )
        found.append(numbers.pop() if numbers else None)
    return found


def apply_settings(
    optimizer: torch.optim.Optimizer, groups: Sequence[int | None], settings: Sequence[Settings]
) -> None:
    """Set what a schedule says for a step.

    Args:
        optimizer: Whose parameter groups are changed.
        groups: As `matching_groups` returns them.
        settings: One entry for each parameter group of the whole network's optimiser.
    """
    for group, number in zip(optimizer.param_groups, groups, strict=True):
        if number is not None:
            group.update(settings[number])


def schedule_settings(
    optimizer: torch.optim.Optimizer, schedule: Component | None, total_steps: int
) -> list[StepSettings]:
    """Return what the schedule sets at each local step of the run.

    Args:
        optimizer: One over stand-ins of all parameters that are trained; of no use afterwards.
        schedule: Class of torch.optim.lr_scheduler and its arguments, or None.
        total_steps: Local steps of the run.

    Returns:
        For every step and every parameter group, the settings that differ from the optimiser's own somewhere in the
        run; an empty list without a schedule.

    Raises:
        ConfigError: The schedule is not known, refuses its arguments, or needs a metric.
    """
    if schedule is None:
        return []
    _check_length(total_steps, "'train.schedule'")
    cls = resolve(schedule.name, "train.schedule.name", {}, torch.optim.lr_scheduler)
    if cls is torch.optim.lr_scheduler.ReduceLROnPlateau:
        raise ConfigError("'train.schedule.name' is 'ReduceLROnPlateau', which needs a metric each step: not supported")
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.lr_scheduler.LRScheduler)):
        raise ConfigError(f"'train.schedule.name' is '{schedule.name}', which is not an LRScheduler")
    for group in optimizer.param_groups:  # a step looks at every parameter: one of each group is enough
        del group["params"][1:]
    args = {key: total_steps if value == TOTAL_STEPS else value for key, value in schedule.args.items()}
    own = _settings_now(optimizer)
    scheduler = call(cls, {"optimizer": optimizer, **args}, "train.schedule.args")
    found: list[list[Settings]] = []
    for step in range(total_steps):
        found.append([_changed(*pair) for pair in zip(own, _settings_now(optimizer), strict=True)])
        if step + 1 < total_steps:
            optimizer.step()
            try:
                scheduler.step()
            except ValueError as error:
                raise ConfigError(f"'train.schedule.args': {error} (the run has {total_steps} local steps)") from error
            except Exception as error:  # its class may be anybody's, and some arguments are looked at late
                raise ConfigError(
                    f"'train.schedule.args' {schedule.args}: step {step + 1} of {schedule.name} raises {said_at(error)}"
                ) from error
    # What is the optimiser's own at one step may follow another value: it is set there too.
    base = [
        {key: values[key] for key in values if any(key in groups[number] for groups in found)}
        for number, values in enumerate(own)
    ]
    return [tuple({**kept, **group} for kept, group in zip(base, groups, strict=True)) for groups in found]


def _changed(own: Settings, now: Settings) -> Settings:
    """Return the learning rate of a group, and whatever is not as the optimiser had it."""
    return {key: value for key, value in now.items() if key == "lr" or key not in own or own[key] != value}


def _settings_now(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Copy the settings of every group: a schedule changes a rate that is a tensor in place."""
    return [
        {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key not in ("params", "initial_lr")
        }
        for group in optimizer.param_groups
    ]


def staged_settings(
    optimizer: torch.optim.Optimizer,
    settings: list[StepSettings],
    spans: Sequence[Span],
    unit: Literal["step", "round"],
) -> list[StepSettings]:
    """Return what is set at each local step of the run, its stages considered.

    Args:
        optimizer: One over stand-ins of all parameters that are trained, whose groups have the base settings.
        settings: What `schedule_settings` gave.
        spans: The run's rounds.
        unit: Whether settings change every step, or are those of a round's first step throughout it.

    Raises:
        ConfigError: A stage scales the learning rate of an optimiser that has none.
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
            f"{what} is worked out for every local step beforehand, at most {MAX_SCHEDULED_STEPS:,}, but the "
            f"run has {total_steps:,} ('train.rounds' or 'train.epochs'): shorten it, or leave the schedule out"
        )
