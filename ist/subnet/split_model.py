"""A split network: its neuron groups and tensors, and the cut and module of a worker that holds some neurons.

Where it sits: `ist/runs/build.py` makes it once in each process. `ist/subnet/assignments.py` returns the neurons that a
worker holds in a round. With these, the coordinator gets cuts from here, a worker gets its module, checks get both.
Nothing here depends on the round, the worker or the pool.
Not here: values of trained tensors (`ist/subnet/stores/parameter_store.py`), messages (`ist/transport/endpoints.py`).
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ist.initialization.in_files import files_if_large
from ist.neurons.find import Neurons, submodel_calls, submodel_sizes
from ist.neurons.group import Group
from ist.neurons.trace import dry_run
from ist.neurons.trial import SubnetTrial
from ist.optimization.optimizers import StateSlots, state_name
from ist.rng import Indices
from ist.subnet.cut import Cut, absent_modules, cut_specs, exclusive_names, extract, positions
from ist.subnet.frozen_rest import FullModule, make_full_module
from ist.subnet.module import Scale, SubmodelPlan, declared_sizes, input_scales, make_submodel
from ist.tensors import TensorSpec, constant_tensors, named_tensors, tensor_specs


@dataclass(frozen=True)
class SplitModel:
    """A network and its neuron groups; the same in every process.

    Attributes:
        template: The full network on the `meta` device, in its modes for training (`ist/network/modes.py`).
        found: The result of tracing: all neuron groups, and attributes that are sizes.
        groups: The groups that are split; with carried optimizer state they include its tensors.
        model_specs: Tensors of the network that are sent, returned and merged.
        frozen_specs: Parameters that are not trained: they are sent to a worker that lacks them, and never returned.
        state_slots: Tensors of an optimizer's state that are carried, by parameter.
        state_specs: The specs of these tensors for every parameter, by name.
        constants: Values of tensors that are neither trained nor in the network's `state_dict`.
        declared: Sizes that the user declares (`partition.sizes`): pattern of module paths to attribute to tensor.
        activation_scale: Whether and how inputs of a worker's layers are scaled for the neurons that it lacks.
        num_logged: How many numbers a step logs; a message has a place for each (`train.logged`).
    """

    template: nn.Module
    found: Neurons
    groups: tuple[Group, ...]
    model_specs: Mapping[str, TensorSpec]
    frozen_specs: Mapping[str, TensorSpec]
    state_slots: StateSlots
    state_specs: Mapping[str, TensorSpec]
    constants: Mapping[str, Tensor]
    declared: Mapping[str, Mapping[str, str]]
    activation_scale: Literal["none", "width", "folded"]
    num_logged: int = 0

    @property
    def whole(self) -> "SplitModel":
        """The full split network: this one, unless it is a shard."""
        return self

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor that is sent and returned: first the network's, then carried optimizer state."""
        return {**self.model_specs, **self.state_specs}

    @cached_property
    def all_specs(self) -> dict[str, TensorSpec]:
        """Every named tensor of the network: parameters, buffers, statistics and constants."""
        constants = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in constant_tensors(self.template).items()}
        return tensor_specs(self.template, with_statistics=True) | constants

    @cached_property
    def exclusive(self) -> frozenset[str]:
        """The tensors in which no entry has two holders if no neuron has two."""
        return exclusive_names(self.groups, self.specs)

    def cut(self, neurons: Sequence[Indices]) -> Cut:
        """Return a worker's positions in every tensor that is sent and returned.

        Args:
            neurons: For each group, the neuron numbers that the worker holds: int64, sorted.
        """
        return positions(self.groups, self.specs, neurons)

    def frozen_cut(self, neurons: Sequence[Indices]) -> Cut:
        """Return a worker's positions in every frozen parameter."""
        return positions(self.groups, self.frozen_specs, neurons) if self.frozen_specs else {}

    def submodel_plan(self, neurons: Sequence[Indices]) -> SubmodelPlan:
        """Return the plan of a worker's module: shapes, sizes in attributes, scales, absent modules.

        Raises:
            ModelError: An integer attribute would need two different values.
        """
        return self._plan(neurons, positions(self.groups, self.all_specs, neurons))

    def _plan(self, neurons: Sequence[Indices], cut: Cut) -> SubmodelPlan:
        held = {group.name: numbers for group, numbers in zip(self.groups, neurons, strict=True)}
        specs = cut_specs(self.all_specs, cut)
        declared = declared_sizes(self.template, self.declared, self.all_specs, specs)
        return SubmodelPlan(
            specs,
            submodel_sizes([size for size in self.found.sizes if size.origin not in declared], held) | declared,
            self._scales(neurons) if self.activation_scale == "width" else {},
            tuple(absent_modules(self.groups, neurons)),
            submodel_calls(self.found, held),
        )

    def module(self, neurons: Sequence[Indices], device: torch.device) -> nn.Module:
        """Return a worker's module, without trained values; see `submodel_plan`."""
        cut = positions(self.groups, self.all_specs, neurons)
        plan = self._plan(neurons, cut)
        constants: dict[str, Tensor] = {}
        if device.type != "meta":
            full = {name: tensor for name, tensor in self.constants.items() if name in cut}
            constants = {name: torch.empty(plan.specs[name].shape, dtype=t.dtype) for name, t in full.items()}
            extract(full, cut, into=constants)
        return make_submodel(self.template, plan, device, constants)

    @cached_property
    def partly_held(self) -> frozenset[str]:
        """The tensors of the network that workers do not hold as a whole: they are split, or not trained."""
        sliced = {slot.tensor for group in self.groups for slot in group.slots}
        blocks = [path for group in self.groups for path in group.modules]
        return frozenset(
            name for name in self.model_specs if name in sliced or any(name.startswith(f"{path}.") for path in blocks)
        ) | frozenset(self.frozen_specs)

    def full_module(self, neurons: Sequence[Indices], device: torch.device) -> FullModule:
        """Return a worker's module for rounds in which the rest of the network is frozen, without trained values.

        Raises:
            ModelError: A layer does not support it.
        """
        own = cut_specs(self.model_specs, self.cut(neurons))
        return make_full_module(self.template, own, self.partly_held, device, self.constants)

    def folded_scales(self, neurons: Sequence[Indices]) -> dict[str, tuple[int, Scale]]:
        """Return the factors by which a worker multiplies its parameters while it trains them; see `input_scales`."""
        return self._scales(neurons) if self.activation_scale == "folded" else {}

    def _scales(self, neurons: Sequence[Indices]) -> dict[str, tuple[int, Scale]]:
        return input_scales(self.groups, neurons, self.template, self.all_specs)

    @cached_property
    def depends_on_which_neurons(self) -> bool:
        """Whether a worker's module depends on which neurons it holds, not only on how many."""
        sliced = {slot.tensor for group in self.groups for slot in group.slots}
        has_modules = any(group.modules for group in self.groups)
        return has_modules or bool(sliced & set(constant_tensors(self.template))) or self._is_counted_in_part

    @property
    def _is_counted_in_part(self) -> bool:
        """Whether a size in a module counts only some neurons of a group."""
        sizes = {group.name: group.size for group in self.groups}
        sizes_in_calls = [call.size for calls in self.found.resized.values() for call in calls]
        counts = [*(s.counted for s in self.found.sizes), *(s.counted for s in sizes_in_calls)]
        return any(
            name in sizes and len(set(np.bincount(numbers, minlength=sizes[name]).tolist())) > 1
            for counted in counts
            for name, numbers in counted.items()
        )


class ShapeKeys:
    """Keys that show whether a worker's module can be reused: with the same key it is the same module.

    Args:
        split: The split network.
    """

    def __init__(self, split: SplitModel) -> None:
        self._split = split
        self._by_position: dict[tuple[int, ...], bool] = {}

    def of(self, neurons: Sequence[Indices]) -> Hashable:
        """Return a key; while it does not change, the worker's module can be reused."""
        sizes = tuple(map(len, neurons))
        if sizes not in self._by_position:
            scales = self._split.submodel_plan(neurons).scales.values()
            self._by_position[sizes] = any(isinstance(scale, tuple) for _, scale in scales)
        if self._by_position[sizes] or self._split.depends_on_which_neurons:
            return tuple(tuple(numbers.tolist()) for numbers in neurons)
        return sizes


class HeldFractions:
    """The fraction of the network's parameters that a worker holds, computed once for each shape of its module.

    Args:
        split: The split network.
    """

    def __init__(self, split: SplitModel) -> None:
        self._split = split
        self._keys = ShapeKeys(split)
        self._parameters = [name for name, _ in split.template.named_parameters()]
        self._whole = sum(parameter.numel() for parameter in split.template.parameters())
        self._known: dict[Hashable, float] = {}

    def of(self, neurons: Sequence[Indices]) -> float:
        """Return the fraction, from 0 to 1, for a worker that holds these neurons of each group."""
        sizes = tuple(map(len, neurons))
        if sizes == tuple(group.size for group in self._split.groups):
            return 1.0
        key = self._keys.of(neurons)
        if key not in self._known:
            if len(self._known) > 64:  # shares of fixed sizes have few keys; with others every round has new ones
                self._known.clear()
            specs = self._split.submodel_plan(neurons).specs
            held = sum(math.prod(specs[name].shape) for name in self._parameters if name in specs)
            self._known[key] = held / self._whole
        return self._known[key]


def try_submodel(
    split: SplitModel,
    build: Callable[[], nn.Module],
    example: Any,
    groups: Sequence[Group],
    neurons: Sequence[Indices],
    found: Neurons,
    trial: SubnetTrial | None = None,
) -> None:
    """Run a worker's module on an example: without values on the `meta` device, if the network runs there.

    Args:
        split: The split network.
        build: Makes a full network with initial weights, on the CPU.
        example: Inputs of a batch.
        groups: The groups that are split.
        neurons: For each of them, the neurons that the worker holds.
        found: The result of tracing the network.
        trial: Observes the run.
    """
    on_meta = split.found.on_meta
    split = replace(split, groups=tuple(groups), found=found)
    held = {group.name: numbers for group, numbers in zip(groups, neurons, strict=True)}
    if trial is not None:
        trial.note_conflicts(held, declared_sizes(split.template, split.declared, split.all_specs, split.all_specs))
    device = torch.device("meta" if on_meta else "cpu")
    module = split.module(neurons, device)
    if device.type == "cpu":
        cut = positions(split.groups, split.all_specs, neurons)
        with files_if_large(split.template):
            full = {name: t.detach().contiguous() for name, t in named_tensors(build()).items() if name in cut}
            extract(full, cut, into={n: t.data for n, t in named_tensors(module).items() if n in full})
    dry_run(module, example, trial.watching(module, held) if trial is not None else None)


def carried_groups(
    slots: StateSlots, groups: Sequence[Group], parameters: Mapping[str, TensorSpec]
) -> tuple[Group, ...]:
    """Return the groups with slots for the optimizer state of their neurons, so that it is cut with them."""
    return tuple(
        replace(
            group,
            slots=group.slots
            + tuple(
                replace(slot, tensor=state_name(state.key, slot.tensor))
                for slot in group.slots
                if slot.tensor in parameters
                for state in slots.get(slot.tensor, ())
                if state.like_parameter
            ),
        )
        for group in groups
    )
