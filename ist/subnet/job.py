"""Everything about a run that all its processes know: the network's shape, its groups, the data, the plan.

Where it sits: `ist/runs/build.py` builds it once in each process from the configuration (or from a user's own objects);
the coordinator, the pools and the workers read it.
Not here: weights, except the initial ones that `build` makes; running anything.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ist.config.partition import Partition
from ist.config.recipe import Outer
from ist.config.schema import Config
from ist.data.batches import Dealing
from ist.data.content import NOTHING, Content, content
from ist.evaluation.metrics import Metric
from ist.network.copies import copied
from ist.neurons.find import Neurons, submodel_calls, submodel_sizes
from ist.neurons.group import Group
from ist.neurons.trace import dry_run
from ist.neurons.trial import SubnetTrial
from ist.optimization import optimizers
from ist.optimization.stages import WHOLE_RUN, Span, spans
from ist.optimization.step_settings import StepSettings
from ist.rng import Indices
from ist.subnet.cut import Cut, absent_modules, cut_specs, exclusive_names, extract, positions
from ist.subnet.module import NarrowPlan, Scale, declared_sizes, input_scales, narrow_module
from ist.subnet.partition import Assignment, assign, at_stage, holds_everything, is_disjoint
from ist.tensors import TensorSpec, constant_tensors, named_tensors, tensor_specs

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and how; the same in every process.

    Attributes:
        config: The validated configuration.
        template: The whole network on the `meta` device, in the modes (`ist/network/modes.py`) in which it is trained.
        build: Makes the whole network with its initial weights, in the same modes.
        splits: The data; `splits.test` may be None through the Python API.
        loss: Mean loss of (outputs, targets).
        metric: What is reported beside it, if anything.
        example: Inputs of a batch of two, or of as many as a training step has where two do not do.
        found: What is known of the network: all its neuron groups, and attributes that are sizes.
        groups: Those that are split, optimiser state included where it is carried.
        model_specs: Tensors of the network that travel both ways and merge.
        frozen_specs: Parameters that are not trained: they go to a worker that lacks them, and never back.
        state_specs: Tensors of carried optimiser state.
        constants: Values of tensors that are neither trained nor in the network's `state_dict`.
        dealing: Which samples each step of each worker uses.
        settings: What the schedule sets at each step; empty without a schedule.
        group_of: For every parameter that is trained, the number of its group in an optimiser over all of them.
    """

    config: Config
    template: nn.Module
    build: Callable[[], nn.Module]
    train_data: Dataset[Any]
    test_data: Dataset[Any] | None
    loss: LossFunction
    metric: Metric | None
    example: Any
    found: Neurons
    groups: tuple[Group, ...]
    model_specs: dict[str, TensorSpec]
    frozen_specs: dict[str, TensorSpec]
    state_slots: tuple[optimizers.StateSlot, ...]
    state_specs: dict[str, TensorSpec]
    constants: dict[str, Tensor]
    dealing: Dealing
    settings: list[StepSettings]
    group_of: dict[str, int]

    @cached_property
    def spans(self) -> Sequence[Span]:
        """Every round of the run; the last may be shorter than others, and is merged like any other."""
        train = self.config.train
        total = train.epochs * self.dealing.steps_per_epoch if train.epochs is not None else None
        stages = self.config.recipe.stages if self.config.method_spec.needs_groups else ()
        return spans(stages, train.local_steps, train.rounds, total)

    @cached_property
    def contents(self) -> tuple[Content, Content]:
        """What a few items of the training data hold, and of the test data."""
        test = NOTHING if self.test_data is None else content(self.test_data, self.config.seed)
        return content(self.train_data, self.config.seed), test

    @property
    def total_steps(self) -> int:
        """Local steps of every worker in the whole run."""
        return self.spans[-1].steps.stop

    @property
    def num_rounds(self) -> int:
        """Rounds of the run."""
        return len(self.spans)

    def steps(self, round_number: int) -> range:
        """Return the numbers of a round's local steps."""
        return self.spans[round_number].steps

    def partition(self, round_number: int) -> Partition:
        """Return how neurons are dealt in a round."""
        stage = self.spans[round_number].stage if self.config.recipe.stages else WHOLE_RUN
        return at_stage(self.config.partition, stage.keep)

    def outer(self, round_number: int) -> Outer:
        """Return the outer step of a round."""
        return self.config.recipe.outer_of(self.spans[round_number].stage)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor that travels both ways: the network's first, carried optimiser state behind."""
        return {**self.model_specs, **self.state_specs}

    def exclusive(self, round_number: int) -> frozenset[str]:
        """Return the tensors of which no entry has two holders in a round."""
        return self._of_one_owner if is_disjoint(self.partition(round_number)) else frozenset()

    @cached_property
    def _of_one_owner(self) -> frozenset[str]:
        return exclusive_names(self.groups, self.specs)

    @cached_property
    def everything(self) -> dict[str, TensorSpec]:
        """Every tensor of the network that has a name: those that travel, statistics, and constants."""
        constants = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in constant_tensors(self.template).items()}
        return tensor_specs(self.template, with_statistics=True) | constants

    @property
    def main_round(self) -> int:
        """The first round of the stage that takes what is left of the run: neither warm-up nor finish."""
        if not self.config.recipe.stages:
            return 0
        return next(number for number, span in enumerate(self.spans) if span.stage.is_open)

    def looks(self, worker: int, round_number: int) -> Hashable:
        """Return what is the same for two rounds only if a worker's narrow network looks the same in both."""
        neurons = self.neurons(round_number)[worker]
        sizes = tuple(map(len, neurons))
        if self._by_position.get(sizes) is None:
            scales = self.plan_for(neurons).scales.values()
            self._by_position[sizes] = any(isinstance(scale, tuple) for _, scale in scales)
        if self._by_position[sizes] or self._is_chosen:
            return tuple(tuple(held.tolist()) for held in neurons)
        return sizes

    @cached_property
    def _by_position(self) -> dict[tuple[int, ...], bool]:
        return {}

    @cached_property
    def _is_chosen(self) -> bool:
        """Whether it matters for a narrow network which neurons a worker holds, and not only how many."""
        sliced = {slot.tensor for group in self.groups for slot in group.slots}
        dealt = any(group.modules for group in self.groups)
        return dealt or bool(sliced & set(constant_tensors(self.template))) or self._is_counted_in_part

    @property
    def _is_counted_in_part(self) -> bool:
        """Whether some number in a narrow network says how many it holds of certain neurons of a group."""
        sizes = {group.name: group.size for group in self.groups}
        sizes_in_calls = [call.size for calls in self.found.resized.values() for call in calls]
        counts = [*(s.counted for s in self.found.sizes), *(s.counted for s in sizes_in_calls)]
        return any(
            name in sizes and len(set(np.bincount(numbers, minlength=sizes[name]).tolist())) > 1
            for counted in counts
            for name, numbers in counted.items()
        )

    def with_workers(self, num_workers: int, capacities: tuple[float, ...] | None = None) -> "Job":
        """Return the same job for a round with another number of workers, or with other shares.

        Args:
            num_workers: Workers of the round, at most `config.train.workers`.
            capacities: One number for each of them, in place of `config.partition.capacities`; None: those.
        """
        config = self.config
        given = list(capacities) if capacities else config.partition.capacities
        if (num_workers, given) == (config.train.workers, config.partition.capacities):
            return self
        train = config.train.model_copy(update={"workers": num_workers})
        partition = config.partition.model_copy(update={"capacities": given})
        return replace(
            self,
            config=config.model_copy(update={"train": train, "partition": partition}),
            dealing=replace(self.dealing, num_workers=num_workers),
        )

    def for_workers(self) -> "Job":
        """Return what a worker needs of the job: not the initial weights, and not the test data."""
        return replace(self, build=_no_build, test_data=None)

    def build_copy(self) -> nn.Module:
        """Return a whole network with its initial weights, on the CPU, that is nobody else's."""
        return copied(self.build()).cpu()

    @cached_property
    def block_scales(self) -> dict[str, float]:
        """Where residual blocks are dealt: for each, the share of them that a worker holds; see `scaled_blocks`."""
        config = self.config
        shares = assign(self.groups, config.train.workers, config.seed, 0, config.partition)[0]
        return {
            path: len(held) / group.size
            for group, held in zip(self.groups, shares, strict=True)
            for path in group.modules
        }

    def folded_scales(self, worker: int, round_number: int) -> dict[str, tuple[int, Scale]]:
        """Return what a worker multiplies its part of a parameter by while it trains it; see `input_scales`."""
        if self.config.train.activation_scale != "folded":
            return {}
        return input_scales(self.groups, self.neurons(round_number)[worker], self.template, self.everything)

    def held_block_scales(self, round_number: int) -> dict[str, float]:
        """Return what a worker scales residual blocks by in a round: nothing, unless it trains all of them."""
        return self.block_scales if holds_everything(self.partition(round_number)) else {}

    def neurons(self, round_number: int) -> Assignment:
        """Return the neurons that each worker holds in a round, by group."""
        if round_number not in self._dealt:
            config = self.config
            while len(self._dealt) > 1:  # all workers of a process ask for the same round, and for the next one
                self._dealt.pop(next(iter(self._dealt)))
            self._dealt[round_number] = assign(
                self.groups, config.train.workers, config.seed, round_number, self.partition(round_number)
            )
        return self._dealt[round_number]

    @cached_property
    def _dealt(self) -> dict[int, Assignment]:
        return {}

    def cuts(self, round_number: int) -> list[Cut]:
        """Return every worker's part of every tensor in a round."""
        return [positions(self.groups, self.specs, neurons) for neurons in self.neurons(round_number)]

    def frozen_cut(self, worker: int, round_number: int) -> Cut:
        """Return a worker's part of every frozen parameter in a round."""
        if not self.frozen_specs:
            return {}
        return positions(self.groups, self.frozen_specs, self.neurons(round_number)[worker])

    def plan(self, worker: int, round_number: int) -> NarrowPlan:
        """Return what a worker's narrow network looks like in a round."""
        return self.plan_for(self.neurons(round_number)[worker])

    def plan_for(self, neurons: Sequence[Indices]) -> NarrowPlan:
        """Return what a narrow network with the given neurons of each group looks like.

        Raises:
            ModelError: An integer attribute would need two values.
        """
        return self._plan(neurons, positions(self.groups, self.everything, neurons))

    def _plan(self, neurons: Sequence[Indices], cut: Cut) -> NarrowPlan:
        held = {group.name: numbers for group, numbers in zip(self.groups, neurons, strict=True)}
        scaled = self.config.train.activation_scale == "width"
        specs = cut_specs(self.everything, cut)
        declared = declared_sizes(self.template, self.config.partition.sizes, self.everything, specs)
        return NarrowPlan(
            specs,
            submodel_sizes([size for size in self.found.sizes if size.origin not in declared], held) | declared,
            input_scales(self.groups, neurons, self.template, self.everything) if scaled else {},
            tuple(absent_modules(self.groups, neurons)),
            submodel_calls(self.found, held),
        )

    def narrow(self, neurons: Sequence[Indices], device: torch.device) -> nn.Module:
        """Return a narrow network with the given neurons of each group, without trained values; see `plan_for`."""
        cut = positions(self.groups, self.everything, neurons)
        plan = self._plan(neurons, cut)
        constants: dict[str, Tensor] = {}
        if device.type != "meta":
            held = {name: whole for name, whole in self.constants.items() if name in cut}
            constants = {name: torch.empty(plan.specs[name].shape, dtype=whole.dtype) for name, whole in held.items()}
            extract(held, cut, into=constants)
        return narrow_module(self.template, plan, device, constants)

    def try_out(
        self, groups: Sequence[Group], neurons: Sequence[Indices], found: Neurons, trial: SubnetTrial | None = None
    ) -> None:
        """Run a narrow network on the example, without values if that can be.

        Args:
            groups: The groups that are split.
            neurons: For each of them, the neurons that are held.
            found: What is known of the network.
            trial: Watches the network.
        """
        job = replace(self, groups=tuple(groups), found=found)
        held = {group.name: numbers for group, numbers in zip(groups, neurons, strict=True)}
        if trial is not None:
            declared = declared_sizes(job.template, job.config.partition.sizes, job.everything, job.everything)
            trial.note_conflicts(held, declared)
        where = torch.device("meta" if self.found.on_meta else "cpu")
        narrow = job.narrow(neurons, where)
        if where.type == "cpu":
            cut = positions(job.groups, job.everything, neurons)
            whole = {
                name: t.detach().contiguous() for name, t in named_tensors(self.build_copy()).items() if name in cut
            }
            extract(whole, cut, into={n: t.data for n, t in named_tensors(narrow).items() if n in whole})
        dry_run(narrow, self.example, trial.watching(narrow, held) if trial is not None else None)


def _no_build() -> nn.Module:
    raise AssertionError("a worker asked for initial weights, which it does not have")


def remote_workers(job: Job) -> range:
    """Return the workers whose messages cross a link, whose bytes are what IST sends, measured and foretold.

    Where rank 0 is a worker too (`pool.coordinator` trains), its own subnet crosses none. Workers that are all in one
    process count as they would in processes of their own. Ray's driver is no worker.
    """
    pool = job.config.pool
    trains = pool.coordinator == "trains" and pool.spec.coordinator_may_train
    return range(int(trains), job.config.train.workers)
