"""Everything about a run that all its processes know: the network's shape, its groups, the data, the plan.

Where it sits: built once in each process from the configuration (or from a user's own objects); the
coordinator, the pools and the workers read it.
Not here: weights, except the initial ones that `initial_model` makes; running anything.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from ist import optim
from ist.config import Config
from ist.data import DATASETS, Splits
from ist.data.batches import Dealing, fetch, length
from ist.data.nested import scores
from ist.errors import ConfigError, DataError, ModelError
from ist.fit import fitting_groups
from ist.groups import Group, TensorSpec, constant_tensors, named_tensors, on_meta, tensor_specs
from ist.groups.neurons import Found, find_neurons, narrow_sizes
from ist.groups.select import split_groups
from ist.groups.trace import try_out
from ist.losses import LOSSES
from ist.models import MODELS
from ist.narrow import NarrowPlan, declared_sizes, input_scales, narrow_module
from ist.partition import Assignment, assign, check_workers, is_disjoint, sizes_vary
from ist.pool.coding import Route, make_route, sent_bytes
from ist.pool.wire import Layout, layout_of
from ist.registry import call, resolve
from ist.rng import Indices, Purpose, torch_seed
from ist.subnet import Cut, absent_modules, cut_specs, exclusive_names, extract, positions

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and how; the same in every process.

    Attributes:
        config: The validated configuration.
        template: The whole network on the `meta` device.
        build: Makes the whole network with its initial weights.
        splits: The data; `splits.test` may be None through the Python API.
        loss: Mean loss of (outputs, targets).
        example: Inputs of a batch of two.
        found: What is known of the network: all its neuron groups, and attributes that are sizes.
        groups: Those that are split, optimiser state included where it is carried.
        model_specs: Tensors of the network that travel and merge.
        state_specs: Tensors of carried optimiser state.
        constants: Values of tensors that are neither trained nor in the network's `state_dict`.
        dealing: Which samples each step of each worker uses.
        settings: What the schedule sets at each step; empty without a schedule.
    """

    config: Config
    template: nn.Module
    build: Callable[[], nn.Module]
    train_data: Dataset[Any]
    test_data: Dataset[Any] | None
    loss: LossFunction
    example: Any
    found: Found
    groups: tuple[Group, ...]
    model_specs: dict[str, TensorSpec]
    state_slots: tuple[optim.StateSlot, ...]
    state_specs: dict[str, TensorSpec]
    constants: dict[str, Tensor]
    dealing: Dealing
    settings: list[optim.Settings]

    @cached_property
    def total_steps(self) -> int:
        """Local steps of every worker in the whole run."""
        train = self.config.train
        if train.rounds is not None:
            return train.rounds * train.local_steps
        assert train.epochs is not None
        return train.epochs * self.dealing.steps_per_epoch

    @property
    def num_rounds(self) -> int:
        """Rounds of the run; the last may be shorter, and is merged like any other."""
        return -(-self.total_steps // self.config.train.local_steps)

    def steps(self, round_number: int) -> range:
        """Return the numbers of a round's local steps."""
        tau = self.config.train.local_steps
        return range(round_number * tau, min((round_number + 1) * tau, self.total_steps))

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor that travels: the network's first, carried optimiser state behind."""
        return {**self.model_specs, **self.state_specs}

    @cached_property
    def exclusive(self) -> frozenset[str]:
        """Tensors of which no entry has two holders."""
        return exclusive_names(self.groups, self.specs) if is_disjoint(self.config.partition) else frozenset()

    @cached_property
    def everything(self) -> dict[str, TensorSpec]:
        """Every tensor of the network that has a name: those that travel, statistics, and constants."""
        constants = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in constant_tensors(self.template).items()}
        return tensor_specs(self.template, with_statistics=True) | constants

    @cached_property
    def is_fixed(self) -> bool:
        """Whether a worker's narrow network looks the same in every round."""
        partition = self.config.partition
        if sizes_vary(partition) or partition.strategy == "blocks":
            return False
        sliced = {slot.tensor for group in self.groups for slot in group.slots}
        by_position = any(
            isinstance(scale, tuple)
            for worker in range(self.config.train.workers)
            for _, scale in self.plan(worker, 0).scales.values()
        )
        return not by_position and not sliced & set(constant_tensors(self.template))

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
        return copy.deepcopy(self.build()).cpu()

    @cached_property
    def block_scales(self) -> dict[str, float]:
        """Where residual blocks are dealt: for each, the share of them that a worker holds; see `scaled_blocks`."""
        shares = self.neurons(0)[0]
        return {
            path: len(held) / group.size
            for group, held in zip(self.groups, shares, strict=True)
            for path in group.modules
        }

    def neurons(self, round_number: int) -> Assignment:
        """Return the neurons that each worker holds in a round, by group."""
        if round_number not in self._dealt:
            config = self.config
            self._dealt.clear()  # all workers of a process ask for the same round
            self._dealt[round_number] = assign(
                self.groups, config.train.workers, config.seed, round_number, config.partition
            )
        return self._dealt[round_number]

    @cached_property
    def _dealt(self) -> dict[int, Assignment]:
        return {}

    def cuts(self, round_number: int) -> list[Cut]:
        """Return every worker's part of every tensor in a round."""
        return [positions(self.groups, self.specs, neurons) for neurons in self.neurons(round_number)]

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
            narrow_sizes([size for size in self.found.sizes if size.origin not in declared], held) | declared,
            input_scales(self.groups, neurons, self.template, self.everything) if scaled else {},
            tuple(absent_modules(self.groups, neurons)),
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

    def try_out(self, groups: Sequence[Group], neurons: Sequence[Indices]) -> None:
        """Run a narrow network on the example, without values if that can be."""
        job = replace(self, groups=tuple(groups))
        where = torch.device("meta" if self.found.on_meta else "cpu")
        narrow = job.narrow(neurons, where)
        if where.type == "cpu":
            cut = positions(job.groups, job.everything, neurons)
            whole = {
                name: t.detach().contiguous() for name, t in named_tensors(self.build_copy()).items() if name in cut
            }
            extract(whole, cut, into={n: t.data for n, t in named_tensors(narrow).items() if n in whole})
        try_out(narrow, self.example)

    def layout(self, worker: int, round_number: int) -> Layout:
        """Return the layout of what a worker trains in a round."""
        neurons = self.neurons(round_number)[worker]
        return layout_of(cut_specs(self.specs, positions(self.groups, self.specs, neurons)))

    def route(self, worker: int, round_number: int) -> Route:
        """Return what a worker's messages look like in a round."""
        return make_route(self.layout(worker, round_number), self.config.exchange)

    def sent_names(self, layout: Layout, round_number: int) -> list[str]:
        """Return the tensors that go to a worker: carried optimiser state does not exist before the first round."""
        return [name for name in layout.specs if round_number > 0 or name in self.model_specs]

    def sent_bytes(self, route: Route, round_number: int) -> int:
        """Return how much of the message to a worker is sent; see `sent_names`."""
        return sent_bytes(route, self.sent_names(route.plain, round_number))


def build_job(config: Config) -> Job:
    """Build the job that a configuration describes.

    Raises:
        ConfigError: A name or an argument in it is wrong.
        DataError: The data set is missing, malformed or too small.
        ModelError: The network cannot be split among that many workers.
    """
    model_class = resolve(config.model.name, "model.name", MODELS)

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(config.seed, Purpose.MODEL))
            model = _make(model_class, config.model.args)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"'model.name' is '{config.model.name}', which makes no torch.nn.Module")
        return model

    template = _template(build)
    splits = _load_data(config)
    return make_job(config, template, build, splits.train, splits.test, loss_function(config.train.loss))


def make_job(
    config: Config,
    template: nn.Module,
    build: Callable[[], nn.Module],
    train_data: Dataset[Any],
    test_data: Dataset[Any] | None,
    loss: LossFunction,
    example: Any = None,
) -> Job:
    """Build a job around objects that are already at hand; see `build_job` and `ist.train`.

    Args are as in `Job`; `template` may be on any device, and `example` is by default made of `train_data`.

    Raises:
        ConfigError: The optimiser or the schedule is wrong.
        DataError: The data cannot be dealt to the workers.
        ModelError: The network cannot be split among that many workers.
    """
    train = config.train
    example = example_inputs(train_data) if example is None else example
    template = on_meta(template).train()
    found, groups = Found((), (), {}), tuple[Group, ...]()
    if config.method == "ist":
        found = find_neurons(template, example, build)
        groups = split_groups(found, template, config.partition)
    model_specs = tensor_specs(template, with_statistics=train.running_statistics == "carried")
    parameters = {name: model_specs[name] for name, p in template.named_parameters() if p.requires_grad}
    if not parameters:
        raise ModelError("the network has no parameter that requires a gradient: nothing would be trained")
    carried = train.optimizer_state == "carried" and config.method == "ist"
    slots = optim.state_slots(train.optimizer) if carried else ()
    dealing = Dealing(length(train_data), train.workers, train.batch_size, config.seed)
    job = Job(
        config=config,
        template=template,
        build=build,
        train_data=train_data,
        test_data=test_data,
        loss=loss,
        example=example,
        found=found,
        groups=groups,
        model_specs=model_specs,
        state_slots=slots,
        state_specs=optim.carried_specs(slots, parameters),
        constants=_constants(template, build),
        dealing=dealing,
        settings=[],
    )
    if config.method == "ist":
        groups = fitting_groups(groups, job.try_out) if groups and train.workers > 1 else groups
        check_workers(groups, train.workers, config.partition)
        job = replace(job, groups=optim.carried_groups(slots, groups, parameters))
    optim.build_optimizer(train.optimizer, [nn.Parameter(torch.zeros(2, 3))])  # wrong arguments end here
    job.settings.extend(optim.schedule_settings(train.optimizer, train.schedule, job.total_steps))
    return job


def example_inputs(data: Dataset[Any]) -> Any:
    """Return the inputs of a batch of two samples (or of one, if there is just one).

    Raises:
        DataError: They cannot be put together.
    """
    try:
        return fetch(data, np.arange(min(2, length(data))), torch.device("cpu"))[0]
    except (TypeError, RuntimeError, ValueError) as error:
        raise DataError(
            f"two items of {type(data).__name__} do not make a batch of (input, target): {error}"
        ) from error


def loss_function(name: str) -> LossFunction:
    """Return the loss that a configuration names.

    Raises:
        ConfigError: It is not known.
    """
    found = resolve(name, "train.loss", LOSSES, functional)
    function: LossFunction = found() if isinstance(found, type) else found
    if ":" in name:
        return function
    return lambda outputs, targets: function(scores(outputs), targets)


def _make(model_class: Any, args: Mapping[str, Any]) -> Any:
    """Make a network from its arguments, or from those of its `config_class`, where it has one (transformers).

    Caches of keys and values are switched off unless asked for: they serve generation, not training.
    """
    config_class = getattr(model_class, "config_class", None)
    if config_class is None or "config" in args:
        return call(model_class, args, "model.args")
    settings = call(config_class, args, "model.args")
    if "use_cache" not in args and getattr(settings, "use_cache", False):
        settings.use_cache = False
    return call(model_class, {"config": settings}, "model.args")


def _no_build() -> nn.Module:
    raise AssertionError("a worker asked for initial weights, which it does not have")


def _constants(template: nn.Module, build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    if not constant_tensors(template):
        return {}
    return {name: tensor.detach().clone().cpu() for name, tensor in constant_tensors(build()).items()}


def _template(build: Callable[[], nn.Module]) -> nn.Module:
    """Return the network on the `meta` device: built there, or moved there if it looks at values while it is built."""
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError, ConfigError):
        return on_meta(build())


def _load_data(config: Config) -> Splits:
    loader = resolve(config.data.name, "data.name", DATASETS)
    root = Path(config.data.root) if config.data.root is not None else None
    found = call(loader, {"root": root, **config.data.args}, "data.args")
    if not isinstance(found, tuple) or len(found) != 2:
        raise DataError(f"'data.name' is '{config.data.name}', which must return a pair (train, test) of data sets")
    return Splits(*found)
