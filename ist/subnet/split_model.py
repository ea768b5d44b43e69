"""A network as it is split: its neuron groups, its tensors, and what follows for a worker that holds some neurons.

Where it sits: `ist/runs/build.py` makes it once in each process. `ist/subnet/assignments.py` says which neurons a
worker holds in a round; with these the coordinator asks here for cuts, a worker for its module, and checks for both.
Nothing here depends on the round, the worker or the pool.
Not here: values of tensors that are trained, messages (`ist/transport/endpoints.py`).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ist.neurons.find import Neurons, submodel_calls, submodel_sizes
from ist.neurons.group import Group
from ist.neurons.trace import dry_run
from ist.neurons.trial import SubnetTrial
from ist.optimization.optimizers import StateSlot
from ist.rng import Indices
from ist.subnet.cut import Cut, absent_modules, cut_specs, exclusive_names, extract, positions
from ist.subnet.module import Scale, SubmodelPlan, declared_sizes, input_scales, make_submodel
from ist.tensors import TensorSpec, constant_tensors, named_tensors, tensor_specs


@dataclass(frozen=True)
class SplitModel:
    """A network and its neuron groups; the same in every process.

    Attributes:
        template: The full network on the `meta` device, in the modes (`ist/network/modes.py`) in which it is trained.
        found: What is known of it: all its neuron groups, and attributes that are sizes.
        groups: The groups that are split, optimizer state included where it is carried.
        model_specs: Tensors of the network that travel both ways and merge.
        frozen_specs: Parameters that are not trained: they go to a worker that lacks them, and never back.
        state_slots: Tensors of an optimizer's state that are carried.
        state_specs: The same for every parameter, by name.
        constants: Values of tensors that are neither trained nor in the network's `state_dict`.
        declared: Sizes that the user declares (`partition.sizes`): pattern of module paths to attribute to tensor.
        activation_scale: Whether inputs of a worker's layers are scaled for the neurons that it lacks, and how.
    """

    template: nn.Module
    found: Neurons
    groups: tuple[Group, ...]
    model_specs: Mapping[str, TensorSpec]
    frozen_specs: Mapping[str, TensorSpec]
    state_slots: tuple[StateSlot, ...]
    state_specs: Mapping[str, TensorSpec]
    constants: Mapping[str, Tensor]
    declared: Mapping[str, Mapping[str, str]]
    activation_scale: Literal["none", "width", "folded"]

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor that travels both ways: the network's first, carried optimizer state behind."""
        return {**self.model_specs, **self.state_specs}

    @cached_property
    def everything(self) -> dict[str, TensorSpec]:
        """Every tensor of the network that has a name: those that travel, statistics, and constants."""
        constants = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in constant_tensors(self.template).items()}
        return tensor_specs(self.template, with_statistics=True) | constants

    @cached_property
    def exclusive(self) -> frozenset[str]:
        """The tensors of which no entry has two holders where no neuron has."""
        return exclusive_names(self.groups, self.specs)

    def cut(self, neurons: Sequence[Indices]) -> Cut:
        """Return the positions of a worker's part of every tensor that travels both ways.

        Args:
            neurons: For each group, the numbers that the worker holds: int64, sorted.
        """
        return positions(self.groups, self.specs, neurons)

    def frozen_cut(self, neurons: Sequence[Indices]) -> Cut:
        """Return the positions of a worker's part of every frozen parameter."""
        return positions(self.groups, self.frozen_specs, neurons) if self.frozen_specs else {}

    def plan(self, neurons: Sequence[Indices]) -> SubmodelPlan:
        """Return what the module of a worker looks like: shapes, sizes in attributes, scales, absent modules.

        Raises:
            ModelError: An integer attribute would need two values.
        """
        return self._plan(neurons, positions(self.groups, self.everything, neurons))

    def _plan(self, neurons: Sequence[Indices], cut: Cut) -> SubmodelPlan:
        held = {group.name: numbers for group, numbers in zip(self.groups, neurons, strict=True)}
        specs = cut_specs(self.everything, cut)
        declared = declared_sizes(self.template, self.declared, self.everything, specs)
        return SubmodelPlan(
            specs,
            submodel_sizes([size for size in self.found.sizes if size.origin not in declared], held) | declared,
            self._scales(neurons) if self.activation_scale == "width" else {},
            tuple(absent_modules(self.groups, neurons)),
            submodel_calls(self.found, held),
        )

    def module(self, neurons: Sequence[Indices], device: torch.device) -> nn.Module:
        """Return the module of a worker, without trained values; see `plan`."""
        cut = positions(self.groups, self.everything, neurons)
        plan = self._plan(neurons, cut)
        constants: dict[str, Tensor] = {}
        if device.type != "meta":
            held = {name: whole for name, whole in self.constants.items() if name in cut}
            constants = {name: torch.empty(plan.specs[name].shape, dtype=whole.dtype) for name, whole in held.items()}
            extract(held, cut, into=constants)
        return make_submodel(self.template, plan, device, constants)

    def folded_scales(self, neurons: Sequence[Indices]) -> dict[str, tuple[int, Scale]]:
        """Return by what a worker multiplies its part of a parameter while it trains it; see `input_scales`."""
        return self._scales(neurons) if self.activation_scale == "folded" else {}

    def _scales(self, neurons: Sequence[Indices]) -> dict[str, tuple[int, Scale]]:
        return input_scales(self.groups, neurons, self.template, self.everything)

    @cached_property
    def depends_on_which_neurons(self) -> bool:
        """Whether it matters for a worker's module which neurons it holds, and not only how many."""
        sliced = {slot.tensor for group in self.groups for slot in group.slots}
        has_modules = any(group.modules for group in self.groups)
        return has_modules or bool(sliced & set(constant_tensors(self.template))) or self._is_counted_in_part

    @property
    def _is_counted_in_part(self) -> bool:
        """Whether a number in a module says how many it holds of certain neurons of a group."""
        sizes = {group.name: group.size for group in self.groups}
        sizes_in_calls = [call.size for calls in self.found.resized.values() for call in calls]
        counts = [*(s.counted for s in self.found.sizes), *(s.counted for s in sizes_in_calls)]
        return any(
            name in sizes and len(set(np.bincount(numbers, minlength=sizes[name]).tolist())) > 1
            for counted in counts
            for name, numbers in counted.items()
        )


class ShapeKeys:
    """Tells when a worker's module can be used again: it is the same module while its key does not change.

    Args:
        split: The network.
    """

    def __init__(self, split: SplitModel) -> None:
        self._split = split
        self._by_position: dict[tuple[int, ...], bool] = {}

    def of(self, neurons: Sequence[Indices]) -> Hashable:
        """Return a key; while it does not change, the worker's module can be reused."""
        sizes = tuple(map(len, neurons))
        if sizes not in self._by_position:
            scales = self._split.plan(neurons).scales.values()
            self._by_position[sizes] = any(isinstance(scale, tuple) for _, scale in scales)
        if self._by_position[sizes] or self._split.depends_on_which_neurons:
            return tuple(tuple(held.tolist()) for held in neurons)
        return sizes


def try_submodel(
    split: SplitModel,
    build: Callable[[], nn.Module],
    example: Any,
    groups: Sequence[Group],
    neurons: Sequence[Indices],
    found: Neurons,
    trial: SubnetTrial | None = None,
) -> None:
    """Run a worker's module on an example, without values where that is possible.

    Args:
        split: The network.
        build: Makes a full network with initial weights, on the CPU.
        example: Inputs of a batch.
        groups: The groups that are split.
        neurons: For each of them, the neurons that are held.
        found: What is known of the network.
        trial: Watches the module.
    """
    on_meta = split.found.on_meta
    split = replace(split, groups=tuple(groups), found=found)
    held = {group.name: numbers for group, numbers in zip(groups, neurons, strict=True)}
    if trial is not None:
        trial.note_conflicts(held, declared_sizes(split.template, split.declared, split.everything, split.everything))
    where = torch.device("meta" if on_meta else "cpu")
    module = split.module(neurons, where)
    if where.type == "cpu":
        cut = positions(split.groups, split.everything, neurons)
        whole = {name: t.detach().contiguous() for name, t in named_tensors(build()).items() if name in cut}
        extract(whole, cut, into={n: t.data for n, t in named_tensors(module).items() if n in whole})
    dry_run(module, example, trial.watching(module, held) if trial is not None else None)
