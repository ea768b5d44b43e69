"""An optimizer's state as named tensors, and back.

A worker makes a new optimizer for each subnet that it did not hold in the round before. `train.optimizer_state` says
what happens to the state. `reset`: it starts fresh each round. `kept`: the worker stores it
(`ist/training/worker_state.py`). `carried`: each state tensor with the shape of its parameter (momentum, second
moments) is cut, sent and merged like the parameter, and scalars (step counts) are shared. A state tensor is named
after its parameter: `momentum_buffer@linear_1.weight`.

Where it sits: `ist/training/worker.py` loads and stores state, `ist/training/coordinator.py` merges it.
Not here: making an optimizer (`factory.py`), schedules (`step_settings.py`), cutting state (`ist/subnet/cut.py`),
sending it (`ist/transport/`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ist.config.schema import Optimizer
from ist.errors import CheckpointError, ConfigError
from ist.optimization.factory import (
    MakeOptimizer,
    is_users_function,
    optimizer_factory,
    plain_name,
    small_parameters,
    stepped,
)
from ist.tensors import TensorSpec, local_rows, sharded_like

_NUMBER = "#"


@dataclass(frozen=True)
class StateSlot:
    """One entry of an optimizer's per-parameter state.

    Attributes:
        key: The name of the entry.
        like_parameter: Whether it is a tensor with the shape of the parameter; otherwise it is a scalar.
        dtype: Its dtype; None for that of the parameter.
        initial: Its value before the first step.
    """

    key: str
    like_parameter: bool
    dtype: torch.dtype | None
    initial: float


StateSlots = Mapping[str, tuple[StateSlot, ...]]
"""By the name of each parameter that has state, its entries."""


def state_slots(spec: Optimizer, make: MakeOptimizer, dims: Mapping[str, int]) -> StateSlots:
    """Return the entries of an optimizer's state for each parameter, found by one step on small parameters.

    Args:
        spec: The section `train.optimizer`, for messages.
        make: Makes the optimizer.
        dims: The number of dims of every parameter, by its name.

    Returns:
        By the name of each parameter that has state, the entries of its state.

    Raises:
        ConfigError: The state cannot be carried with neurons: a tensor has another shape than its parameter or depends
            on the parameter's values.
    """
    named = small_parameters(dims)
    optimizer = stepped(spec, make, named, 0.0, 1)
    found = {name: _slots_of(plain_name(spec), optimizer, parameter) for name, parameter in named.items()}
    return {name: slots for name, slots in found.items() if slots}


def state_keys(spec: Optimizer, dims: Mapping[str, int]) -> frozenset[str]:
    """Return the names of an optimizer's state for some parameter, found by one step on small parameters.

    Args:
        spec: The section `train.optimizer`, which names a class.
        dims: The number of dims of every parameter, by its name.

    Raises:
        ConfigError: As for `ist.optimization.factory.try_optimizer`.
    """
    named = small_parameters(dims)
    optimizer = stepped(spec, optimizer_factory(spec), named, 1.0, 1)
    return frozenset(
        key for parameter in named.values() for key, value in optimizer.state[parameter].items() if value is not None
    )


def _slots_of(name: str, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[StateSlot, ...]:
    slots = []
    for key, value in optimizer.state[parameter].items():
        if value is None:
            continue
        tensor = torch.as_tensor(value)
        like = tensor.shape == parameter.shape
        if not isinstance(value, Tensor) or not (like or tensor.ndim == 0) or (tensor != tensor.flatten()[0]).any():
            raise ConfigError(
                f"'train.optimizer_state' is 'carried', but {name} stores '{key}', which cannot be cut together "
                "with its parameter: use 'reset'"
            )
        same_dtype = like and tensor.dtype == parameter.dtype
        slots.append(StateSlot(key, like, None if same_dtype else tensor.dtype, float(tensor.flatten()[0])))
    return tuple(slots)


def state_name(key: str, parameter: str) -> str:
    """Return the name of a parameter's state tensor in messages and checkpoints."""
    return f"{key}@{parameter}"


def carried_specs(slots: StateSlots, parameters: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the specs of all state tensors of the given parameters."""
    return {
        state_name(slot.key, name): TensorSpec(spec.shape if slot.like_parameter else (), slot.dtype or spec.dtype)
        for name, spec in parameters.items()
        for slot in slots.get(name, ())
    }


def initial_state(slots: StateSlots, specs: Mapping[str, TensorSpec], device: torch.device) -> dict[str, Tensor]:
    """Return the state tensors before the first step, for the names in `specs`."""
    values = {state_name(slot.key, name): slot.initial for name, entries in slots.items() for slot in entries}
    return {name: torch.full(spec.shape, values[name], dtype=spec.dtype, device=device) for name, spec in specs.items()}


def load_state(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    slots: StateSlots,
    state: Mapping[str, Tensor],
) -> None:
    """Load `state` into an optimizer; tensors with the shape of their parameter are used in place, not copied."""
    for name, parameter in named.items():
        for slot in slots.get(name, ()):
            tensor = state[state_name(slot.key, name)]
            scalar = tensor.to(scalar_device(optimizer, parameter), copy=True)
            optimizer.state[parameter][slot.key] = tensor if slot.like_parameter else scalar


def scalar_device(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.device:
    """Return the device on which an optimizer needs step counts: the CPU, unless it is fused or capturable."""
    settings: Mapping[str, Any] = next(
        (group for group in optimizer.param_groups if any(member is parameter for member in group["params"])), {}
    )
    on_device = settings.get("fused") or settings.get("capturable")
    return parameter.device if on_device else torch.device("cpu")


def store_state(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    slots: StateSlots,
    state: Mapping[str, Tensor],
) -> None:
    """Write an optimizer's state into the tensors of `state`: the inverse of `load_state`."""
    for name, parameter in named.items():
        for slot in slots.get(name, ()):
            target, source = state[state_name(slot.key, name)], optimizer.state[parameter].get(slot.key)
            if source is None:  # the parameter has had no gradient yet
                target.fill_(slot.initial)
            elif source.is_sparse:  # momentum of sparse gradients
                target.copy_(source.to_dense())
            elif target.data_ptr() != source.data_ptr():
                target.copy_(source)


def named_state(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return an optimizer's state as tensors by `state_name`; the names of plain numbers are marked with '#'.

    Of sharded state (FSDP), it has the rows that this process holds.
    The result includes state that a class stores in itself or in its parameter groups; see `named_extras`.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in named.items():
        for key, value in optimizer.state[parameter].items():
            found |= _named_value(key, name, value)
    for extra, value in named_extras(optimizer).items():
        key, _, owner = extra.partition("@")
        found |= _named_value(key, owner, value)
    return found


def _named_value(key: str, owner: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {state_name(key, owner): value.to_dense() if value.is_sparse else local_rows(value)}
    if isinstance(value, int | float):
        dtype = torch.float64 if isinstance(value, float) else None
        return {state_name(key + _NUMBER, owner): torch.tensor(value, dtype=dtype)}
    return {}


_OBJECT, _GROUP = ":optimizer", ":group-"
"""Used instead of a parameter's name: for attributes of the optimizer, and for settings of a parameter group."""


def extra_name(name: str, group: int | None) -> str:
    """Return the name of an optimizer's attribute, or of a setting of a parameter group."""
    return state_name(name, _OBJECT if group is None else f"{_GROUP}{group}")


def named_extras(optimizer: torch.optim.Optimizer) -> dict[str, int | float | Tensor]:
    """Return the numbers and tensors that a class stores outside per-parameter state, by `extra_name`.

    These are attributes that torch's own optimizers do not have, and settings of groups that differ from the defaults.
    """
    plain = vars(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    found = {
        extra_name(name, None): value
        for name, value in vars(optimizer).items()
        if name not in plain and isinstance(value, int | float | Tensor)
    }
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            default = optimizer.defaults.get(name)
            if isinstance(value, int | float | Tensor) and value is not default and not _equal(value, default):
                found[extra_name(name, number)] = value
    return found


def _equal(value: Any, other: Any) -> bool:
    return (
        bool(torch.equal(value, other)) if isinstance(value, Tensor) and isinstance(other, Tensor) else value == other
    )


def restore_named_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Load into an optimizer the state that `named_state` returned.

    Raises:
        CheckpointError: The state belongs to a parameter or parameter group that the optimizer does not have.
    """
    for full_name, tensor in state.items():
        key, _, name = full_name.partition("@")
        if name.startswith((_OBJECT, _GROUP)):
            _restore_extra(optimizer, key, name, tensor)
            continue
        if name not in named:
            raise CheckpointError(
                f"the checkpoint contains '{full_name}', which is not optimizer state of this network"
            )
        parameter = named[name]
        if key.endswith(_NUMBER):
            optimizer.state[parameter][key.removesuffix(_NUMBER)] = tensor.item()
            continue
        like_parameter = tensor.ndim > 0 or (parameter.ndim == 0 and key != "step")
        device = parameter.device if like_parameter else scalar_device(optimizer, parameter)
        value = tensor.to(device)
        optimizer.state[parameter][key] = sharded_like(value, parameter) if like_parameter else value


_SCHEDULED = ("lr", "momentum", "weight_decay")
"""Settings of a parameter group that schedules change."""

_ARGUMENT = re.compile(r"train\.optimizer\.(?:groups\.\d+\.)?args\.(.+)")


def without_changed_settings(state: Mapping[str, Tensor], changed: Iterable[str], spec: Optimizer) -> dict[str, Tensor]:
    """Leave out of a saved state the settings that `unchanged_names` leaves out; arguments as there."""
    return {name: state[name] for name in unchanged_names(state, changed, spec)}


def unchanged_names(state: Iterable[str], changed: Iterable[str], spec: Optimizer) -> list[str]:
    """Return the names of a saved state without settings of parameter groups that a changed configuration replaces.

    A changed argument replaces the setting of its name, also within another argument (`adamw.lr`). Any setting may
    depend on an argument of a user's function, so a changed one replaces all of them.

    Args:
        state: Names of `named_state`, with or without a prefix; other names stay.
        changed: The changed keys of the configuration.
        spec: The section `train.optimizer`.
    """
    changed = tuple(changed)
    replaced = {part for key in changed if (found := _ARGUMENT.match(key)) for part in found[1].split(".")}
    replaces_all = bool(replaced) and is_users_function(spec, None)
    if any(key.startswith(("train.schedule", "recipe.stages")) for key in changed):
        replaced |= set(_SCHEDULED)

    def is_replaced(name: str) -> bool:
        key, _, owner = name.partition("@")
        setting = key.rpartition("/")[2].removesuffix(_NUMBER)
        return owner.startswith(_GROUP) and (replaces_all or setting in replaced)

    return [name for name in state if not is_replaced(name)]


def _restore_extra(optimizer: torch.optim.Optimizer, key: str, owner: str, tensor: Tensor) -> None:
    is_number, key = key.endswith(_NUMBER), key.removesuffix(_NUMBER)
    value = tensor.item() if is_number else tensor.to(optimizer.param_groups[0]["params"][0].device)
    if owner == _OBJECT:
        setattr(optimizer, key, value)
        return
    number = int(owner.removeprefix(_GROUP))
    if number >= len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint contains '{key}' of parameter group {number}, which this optimizer does not have"
        )
    optimizer.param_groups[number][key] = value
