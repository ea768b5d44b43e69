"""Any `torch.optim` optimiser and schedule by name, and the optimiser's state as named tensors.

A worker makes a new optimiser for a subnet that it has not held in the round before. The schedule belongs to the
whole run, so it is played once on a stand-in parameter, and every step's settings are read off.

State is reset each round; or kept by the worker, whose own it then is (`ist/kept.py`); or carried: then
each state tensor that is shaped like its parameter (momentum, second moments) is cut, sent and merged
as the parameter is, and scalars (step counts) are shared. Names: `momentum_buffer@linear_1.weight`.
Not here: moving anything (subnet.py, pool/).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ist.config import TOTAL_STEPS
from ist.config_base import Component
from ist.errors import CheckpointError, ConfigError
from ist.groups import Group, TensorSpec
from ist.registry import call, resolve
from ist.stages import Span

Settings = Mapping[str, Any]
"""What a schedule sets for one step, such as {'lr': 0.1}."""

_SAMPLE_SHAPE = (2, 3)
_NUMBER = "#"


@dataclass(frozen=True)
class StateSlot:
    """One entry of an optimiser's per-parameter state."""

    key: str
    like_parameter: bool
    dtype: torch.dtype | None
    initial: float


def build_optimizer(spec: Component, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Make an optimiser.

    Raises:
        ConfigError: It is not known, refuses its arguments, or needs a closure.
    """
    cls = resolve(spec.name, "train.optimizer.name", {}, torch.optim)
    if cls is torch.optim.LBFGS:
        raise ConfigError(
            "'train.optimizer.name' is 'LBFGS', which evaluates the loss several times a step: not supported"
        )
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(f"'train.optimizer.name' is '{spec.name}', which is not a torch.optim.Optimizer")
    made = call(cls, {"params": parameters, **spec.args}, "train.optimizer.args")
    assert isinstance(made, torch.optim.Optimizer)
    return made


def schedule_settings(optimizer: Component, schedule: Component | None, total_steps: int) -> list[Settings]:
    """Return what the schedule sets at each local step of the run.

    Args:
        optimizer: The optimiser, whose arguments give the base settings.
        schedule: Class of torch.optim.lr_scheduler and its arguments, or None.
        total_steps: Local steps of the run.

    Returns:
        For every step, the settings that differ from the optimiser's own somewhere in the run; an empty
        list without a schedule.

    Raises:
        ConfigError: The schedule is not known, refuses its arguments, or needs a metric.
    """
    if schedule is None:
        return []
    stand_in = build_optimizer(optimizer, _stand_in())
    cls = resolve(schedule.name, "train.schedule.name", {}, torch.optim.lr_scheduler)
    if cls is torch.optim.lr_scheduler.ReduceLROnPlateau:
        raise ConfigError("'train.schedule.name' is 'ReduceLROnPlateau', which needs a metric each step: not supported")
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.lr_scheduler.LRScheduler)):
        raise ConfigError(f"'train.schedule.name' is '{schedule.name}', which is not an LRScheduler")
    args = {key: total_steps if value == TOTAL_STEPS else value for key, value in schedule.args.items()}
    scheduler = call(cls, {"optimizer": stand_in, **args}, "train.schedule.args")
    settings: list[dict[str, Any]] = []
    for step in range(total_steps):
        settings.append({k: v for k, v in stand_in.param_groups[0].items() if k not in ("params", "initial_lr")})
        if step + 1 < total_steps:
            stand_in.step()
            try:
                scheduler.step()
            except ValueError as error:
                raise ConfigError(f"'train.schedule.args': {error} (the run has {total_steps} local steps)") from error
    varying = {key for key in settings[0] if any(entry[key] != settings[0][key] for entry in settings)} | {"lr"}
    return [{key: entry[key] for key in varying} for entry in settings]


def staged_settings(
    optimizer: Component, settings: list[Settings], spans: Sequence[Span], unit: Literal["step", "round"]
) -> list[Settings]:
    """Return what is set at each local step of the run, its stages considered.

    Args:
        optimizer: The optimiser, whose arguments give the base settings.
        settings: What `schedule_settings` gave.
        spans: The run's rounds.
        unit: Whether settings change every step, or are those of a round's first step throughout it.

    Raises:
        ConfigError: A stage scales the learning rate of an optimiser that has none.
    """
    if not settings and all(span.stage.lr_scale == 1 for span in spans):
        return settings
    if not settings:
        group = build_optimizer(optimizer, _stand_in()).param_groups[0]
        if "lr" not in group:
            raise ConfigError(f"'recipe.stages' has an 'lr_scale', but {optimizer.name} has no 'lr'")
        settings = [{"lr": group["lr"]}] * spans[-1].steps.stop
    found: list[Settings] = []
    for span in spans:
        for step in span.steps:
            now = settings[span.steps.start if unit == "round" else step]
            found.append({**now, "lr": now["lr"] * span.stage.lr_scale} if span.stage.lr_scale != 1 else now)
    return found


def state_slots(spec: Component) -> tuple[StateSlot, ...]:
    """Return what state an optimiser keeps for a parameter, found by making one step on a small one.

    Raises:
        ConfigError: The state cannot be carried with neurons: a tensor of another shape than its
            parameter, or one that starts from the parameter's values.
    """
    (parameter,) = _stand_in()
    parameter.data.uniform_(1, 2, generator=torch.Generator().manual_seed(0))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(spec, [parameter])
    optimizer.param_groups[0]["weight_decay"] = 0.0  # state from gradients alone, which are zero
    optimizer.step()
    slots = []
    for key, value in optimizer.state[parameter].items():
        if value is None:
            continue
        tensor = torch.as_tensor(value)
        like = tuple(tensor.shape) == _SAMPLE_SHAPE
        if not isinstance(value, Tensor) or not (like or tensor.ndim == 0) or (tensor != tensor.flatten()[0]).any():
            raise ConfigError(
                f"'train.optimizer_state' is 'carried', but {spec.name} keeps '{key}', which cannot be cut along "
                "with its parameter: use 'reset'"
            )
        same_dtype = like and tensor.dtype == parameter.dtype
        slots.append(StateSlot(key, like, None if same_dtype else tensor.dtype, float(tensor.flatten()[0])))
    return tuple(slots)


def state_name(key: str, parameter: str) -> str:
    """Return the name under which a parameter's state tensor travels and is saved."""
    return f"{key}@{parameter}"


def carried_specs(slots: Sequence[StateSlot], parameters: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the specs of all state tensors of the given parameters."""
    return {
        state_name(slot.key, name): TensorSpec(spec.shape if slot.like_parameter else (), slot.dtype or spec.dtype)
        for name, spec in parameters.items()
        for slot in slots
    }


def carried_groups(
    slots: Sequence[StateSlot], groups: Sequence[Group], parameters: Mapping[str, TensorSpec]
) -> tuple[Group, ...]:
    """Return groups whose neurons take their optimiser state with them."""
    return tuple(
        replace(
            group,
            slots=group.slots
            + tuple(
                replace(slot, tensor=state_name(state.key, slot.tensor))
                for slot in group.slots
                if slot.tensor in parameters
                for state in slots
                if state.like_parameter
            ),
        )
        for group in groups
    )


def initial_state(
    slots: Sequence[StateSlot], specs: Mapping[str, TensorSpec], device: torch.device
) -> dict[str, Tensor]:
    """Return whole state tensors as they are before any step, for the names in `specs`."""
    values = {slot.key: slot.initial for slot in slots}
    return {
        name: torch.full(spec.shape, values[name.partition("@")[0]], dtype=spec.dtype, device=device)
        for name, spec in specs.items()
    }


def load_state(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    slots: Sequence[StateSlot],
    state: Mapping[str, Tensor],
) -> None:
    """Give an optimiser the state in `state`; tensors shaped like their parameter are used in place, not copied."""
    for name, parameter in named.items():
        for slot in slots:
            tensor = state[state_name(slot.key, name)]
            scalar = tensor.to(scalar_device(optimizer, parameter), copy=True)
            optimizer.state[parameter][slot.key] = tensor if slot.like_parameter else scalar


def scalar_device(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.device:
    """Return where an optimiser wants step counts: on the CPU, unless it is fused or capturable."""
    settings = optimizer.param_groups[0]
    beside = settings.get("fused") or settings.get("capturable")
    return parameter.device if beside else torch.device("cpu")


def store_state(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    slots: Sequence[StateSlot],
    state: Mapping[str, Tensor],
) -> None:
    """Write an optimiser's state into the tensors of `state`, the inverse of `load_state`."""
    for name, parameter in named.items():
        for slot in slots:
            target, source = state[state_name(slot.key, name)], optimizer.state[parameter].get(slot.key)
            if source is None:  # it has had no gradient yet
                target.fill_(slot.initial)
            elif target.data_ptr() != source.data_ptr():
                target.copy_(source)


def named_state(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return an optimiser's state by `state_name`: tensors, and plain numbers as tensors whose names say so."""
    found: dict[str, Tensor] = {}
    for name, parameter in named.items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                found[state_name(key, name)] = value
            elif isinstance(value, int | float):
                found[state_name(key + _NUMBER, name)] = torch.tensor(
                    value, dtype=torch.float64 if isinstance(value, float) else None
                )
    return found


def restore_named_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Give an optimiser the state that `named_state` returned.

    Raises:
        CheckpointError: It holds something of no parameter of these.
    """
    for full_name, tensor in state.items():
        key, _, name = full_name.partition("@")
        if name not in named:
            raise CheckpointError(f"the checkpoint holds '{full_name}', which is no optimiser state of this network")
        parameter = named[name]
        if key.endswith(_NUMBER):
            optimizer.state[parameter][key.removesuffix(_NUMBER)] = tensor.item()
            continue
        like_parameter = tensor.ndim > 0 or (parameter.ndim == 0 and key != "step")
        device = parameter.device if like_parameter else scalar_device(optimizer, parameter)
        optimizer.state[parameter][key] = tensor.to(device)


def _stand_in() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(_SAMPLE_SHAPE))]
