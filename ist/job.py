"""Everything about a run that all its processes know: the network's shape, its groups, the data, the plan.

Where it sits: built once in each process from the configuration (or from a user's own objects); the
coordinator, the pools and the workers read it.
Not here: weights, except the initial ones that `initial_model` makes; running anything.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from ist import optim
from ist.config import Config
from ist.data import DATASETS, Splits
from ist.data.batches import Dealing, length
from ist.errors import ConfigError, DataError, ModelError
from ist.groups import Group, TensorSpec, tensor_specs
from ist.groups.sequential import sequential_groups
from ist.models import MODELS
from ist.partition import Assignment, assign, check_workers
from ist.pool.wire import Layout, layout_of
from ist.registry import call, resolve
from ist.rng import Purpose, torch_seed
from ist.subnet import Cut, cut_specs, exclusive_names, positions

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and how; the same in every process.

    Attributes:
        config: The validated configuration.
        template: The whole network on the `meta` device.
        build: Makes the whole network with its initial weights.
        splits: The data; `splits.test` may be None through the Python API.
        loss: Mean loss of (outputs, targets).
        groups: Neuron groups, optimiser state included where it is carried.
        model_specs: Tensors of the network that travel and merge.
        state_specs: Tensors of carried optimiser state.
        dealing: Which samples each step of each worker uses.
        settings: What the schedule sets at each step; empty without a schedule.
    """

    config: Config
    template: nn.Module
    build: Callable[[], nn.Module]
    train_data: Dataset[Any]
    test_data: Dataset[Any] | None
    loss: LossFunction
    groups: tuple[Group, ...]
    model_specs: dict[str, TensorSpec]
    state_slots: tuple[optim.StateSlot, ...]
    state_specs: dict[str, TensorSpec]
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
        return exclusive_names(self.groups, self.specs)

    def cuts(self, round_number: int) -> list[Cut]:
        """Return every worker's part of every tensor in a round."""
        return [positions(self.groups, self.specs, neurons) for neurons in self._assignment(round_number)]

    def narrow_specs(self, worker: int) -> dict[str, TensorSpec]:
        """Return the narrow spec of every entry of the network's `state_dict` for a worker.

        It is the same in every round: a worker's share never changes its size.
        """
        everything = tensor_specs(self.template, with_statistics=True)
        return cut_specs(everything, positions(self.groups, everything, self._assignment(0)[worker]))

    def layout(self, worker: int) -> Layout:
        """Return the layout of a worker's messages; the same in every round."""
        return layout_of(cut_specs(self.specs, positions(self.groups, self.specs, self._assignment(0)[worker])))

    def sent_names(self, round_number: int) -> list[str]:
        """Return the tensors that go to a worker: carried optimiser state does not exist before the first round."""
        return list(self.model_specs if round_number == 0 else self.specs)

    def _assignment(self, round_number: int) -> Assignment:
        return assign(self.groups, self.config.train.workers, self.config.seed, round_number)


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
            model = call(model_class, config.model.args, "model.args")
        if not isinstance(model, nn.Module):
            raise ConfigError(f"'model.name' is '{config.model.name}', which makes no torch.nn.Module")
        return model

    with torch.device("meta"):
        template = build()
    splits = _load_data(config)
    return make_job(config, template, build, splits.train, splits.test, loss_function(config.train.loss))


def make_job(
    config: Config,
    template: nn.Module,
    build: Callable[[], nn.Module],
    train_data: Dataset[Any],
    test_data: Dataset[Any] | None,
    loss: LossFunction,
) -> Job:
    """Build a job around objects that are already at hand; see `build_job` and `ist.train`.

    Raises:
        ConfigError: The optimiser or the schedule is wrong.
        DataError: The data cannot be dealt to the workers.
        ModelError: The network cannot be split among that many workers.
    """
    train = config.train
    groups = sequential_groups(template) if config.method == "ist" else ()
    if config.method == "ist":
        check_workers(groups, train.workers)
    model_specs = tensor_specs(template, with_statistics=train.running_statistics == "carried")
    parameters = {name: model_specs[name] for name, p in template.named_parameters() if p.requires_grad}
    if not parameters:
        raise ModelError("the network has no parameter that requires a gradient: nothing would be trained")
    carried = train.optimizer_state == "carried" and config.method == "ist"
    slots = optim.state_slots(train.optimizer) if carried else ()
    dealing = Dealing(length(train_data), train.workers, train.batch_size, config.seed)
    job = Job(
        config=config,
        template=copy.deepcopy(template).to("meta"),
        build=build,
        train_data=train_data,
        test_data=test_data,
        loss=loss,
        groups=optim.carried_groups(slots, groups, parameters),
        model_specs=model_specs,
        state_slots=slots,
        state_specs=optim.carried_specs(slots, parameters),
        dealing=dealing,
        settings=[],
    )
    optim.build_optimizer(train.optimizer, [nn.Parameter(torch.zeros(2, 3))])  # wrong arguments end here
    job.settings.extend(optim.schedule_settings(train.optimizer, train.schedule, job.total_steps))
    return job


def loss_function(name: str) -> LossFunction:
    """Return the loss that a configuration names.

    Raises:
        ConfigError: It is not known.
    """
    found = resolve(name, "train.loss", {}, functional)
    function: LossFunction = found() if isinstance(found, type) else found
    return function


def _load_data(config: Config) -> Splits:
    loader = resolve(config.data.name, "data.name", DATASETS)
    root = Path(config.data.root) if config.data.root is not None else None
    found = call(loader, {"root": root, **config.data.args}, "data.args")
    if not isinstance(found, tuple) or len(found) != 2:
        raise DataError(f"'data.name' is '{config.data.name}', which must return a pair (train, test) of data sets")
    return Splits(*found)
