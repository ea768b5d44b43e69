"""Build a `Job`, from a configuration or from a network and data in memory.

Where it sits: `ist/runs/preflight.py` (the command line) and `ist/api.py` build the job here.
Not here: the class `Job` (`ist/subnet/job.py`), running it (`ist/runs/execute.py`).
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from ist.config.registry import call, resolve
from ist.config.runtime import Loader
from ist.config.schema import Config
from ist.data.batched import WholeBatches
from ist.data.batches import ShardedSampler, as_numbered, fetch, is_empty, is_stream, length
from ist.data.loading.loader import LoaderSettings
from ist.data.loading.stream import StreamSampler
from ist.data.nested import scores
from ist.data.registry import Splits
from ist.data.shards.dirichlet import class_numbers
from ist.data.shards.unequal import OwnData, OwnSampler, Sampler, SkewedSampler
from ist.distributed.environment import is_launched, is_rank_zero
from ist.errors import ConfigError, DataError, ModelError
from ist.evaluation.evaluate import batch_norms
from ist.evaluation.losses import LOSSES
from ist.evaluation.metrics import METRICS, Metric
from ist.evaluation.step_function import StepFunction, network_inputs
from ist.evaluation.task import NO_SAMPLES, GivenWeights, LossFunction, Task
from ist.export.initial_weights import open_weights
from ist.initialization.constants import built_without_parameters, constants
from ist.initialization.fill import built_with, fill
from ist.initialization.in_files import built_whole
from ist.initialization.on_meta import is_on_meta, restore_constants
from ist.loops.part import Part
from ist.models import MODELS
from ist.network.compiled import check_backend, without_compilation
from ist.network.copies import copied, on_meta
from ist.network.modes import enter_training_modes, set_modes
from ist.network.supported import check_network, check_values
from ist.neurons.find import Neurons, find_neurons
from ist.neurons.select import split_groups
from ist.neurons.splittable import splittable_groups
from ist.optimization import optimizers
from ist.optimization.factory import (
    MakeOptimizer,
    dims_of,
    optimizer_factory,
    try_optimizer,
    warn_of_untrained,
)
from ist.optimization.schedule import Schedule, run_spans
from ist.optimization.schedulers import MakeScheduler
from ist.optimization.step_settings import groups_by_name, schedule_settings, staged_settings, stand_ins
from ist.rng import Purpose, seeded
from ist.runs.loading.load import collated, following_worker, has_other_coordinator, load_data, load_own, own_worker
from ist.subnet.job import Job, for_one_worker
from ist.subnet.partition import check_workers
from ist.subnet.split_model import SplitModel, carried_groups, try_submodel
from ist.tensors import tensor_specs


def build_job(config: Config, splits: Splits | None = None) -> Job:
    """Build the job that a configuration describes.

    Args:
        config: The configuration.
        splits: The data, if they are already loaded (`load_data`).

    Raises:
        ConfigError: A name or an argument in the configuration is wrong.
        DataError: The data set is missing, malformed or too small.
        ModelError: The network cannot be split among that many workers.
    """
    make = partial(build_network, config)
    template = _template(make)
    weights = given_weights(template, config.model.weights, "model.weights")

    def build() -> nn.Module:
        model = make() if weights is None else built_with(make, weights())
        check_values(model)
        return model

    step = step_function(config.train.step)
    made = partial(make_job, config, template, build, step=step, construct=make, weights=weights)
    loss = loss_function(config.train.loss)
    if config.data.shard == "own":
        splits, own = load_own(config)
        if has_other_coordinator(config) and (theirs := load_data(config)).train is None:
            _check_without_data(config, template, theirs.test, None)
        return made(splits.train, splits.test, loss, own=own)
    splits = collated(config, splits or load_data(config))
    job = made(splits.train, splits.test, loss)
    worker = following_worker(config)
    return job if worker is None else for_one_worker(job, worker)


def build_network(config: Config) -> nn.Module:
    """Build the network that a configuration names, with random weights from the run's seed.

    Raises:
        ConfigError: The name or an argument is wrong.
        ModelError: IST cannot train the network.
    """
    model_class = resolve(config.model.name, "model.name", MODELS)
    with seeded(torch.device("cpu"), config.seed, Purpose.MODEL):
        model = _make(model_class, config.model.args)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"'model.name' is '{config.model.name}', which returns a {type(model).__name__}, not a torch.nn.Module"
        )
    model = without_compilation(model, config.train.compile)
    check_network(model, is_split=config.method_spec.needs_groups)
    return model


def network_template(config: Config) -> nn.Module:
    """Return the network that a configuration names on the `meta` device, without values.

    Raises:
        ConfigError: The name or an argument is wrong.
        ModelError: IST cannot train the network.
    """
    return _template(partial(build_network, config))


@seeded(torch.device("cpu"), 0, Purpose.REHEARSAL)  # every process must find the same groups
def make_job(
    config: Config,
    template: nn.Module,
    build: Callable[[], nn.Module],
    train_data: Dataset[Any] | None,
    test_data: Dataset[Any] | None,
    loss: LossFunction,
    example: Any = None,
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    loader: LoaderSettings | None = None,
    test_loader: LoaderSettings | None = None,
    own: OwnData | None = None,
    step: StepFunction | None = None,
    construct: Callable[[], nn.Module] | None = None,
    weights: GivenWeights | None = None,
) -> Job:
    """Build a job from a network and data in memory; see `build_job` and `ist.train`.

    Args:
        config: The configuration.
        template: The network, on any device; its values are not used.
        build: Builds the network with its initial weights.
        train_data: A map-style data set of pairs (input, target); None: only with `own`, in a process that has none.
        test_data: A map-style data set for evaluation; None: the network is not evaluated.
        loss: Mean loss of (outputs, targets).
        example: The inputs of a batch; None: they come from `train_data`, or else from `test_data`.
        optimizer: Makes the optimizers, instead of what the configuration names; see `ist/optimization/factory.py`.
        scheduler: Makes the scheduler, instead of what the configuration names; see `ist/optimization/schedulers.py`.
        loader: How batches of the training data are read; None: as the configuration says.
        test_loader: How batches of the test data are read; None: like those of the training data.
        own: The data sets that workers have of their own; None: all workers read `train_data`.
        step: Computes the loss of a whole batch, instead of `loss`; items of the data may then be anything.
        construct: Builds the network without the given weights, which its constants do not need; None: `build` does.
        weights: Opens the weights that the network starts with, as `build` does; None: `build` initializes it.

    Raises:
        ConfigError: The optimizer or the schedule is wrong, or a step has fewer samples than micro-batches.
        DataError: The data cannot be assigned to the workers.
        ModelError: The network cannot be split among that many workers.
    """
    template, build = _in_modes(template, build)
    _check_ranks(config, template)
    worker = 0 if own is None else own_worker(config)
    if own is not None and worker is not None:
        train_data = own(worker)
    train_data = as_numbered(NO_SAMPLES if train_data is None else train_data, config.seed)
    if config.chooses_merge_scale and is_stream(train_data):
        raise ConfigError(_no_auto_scale("the training data are a stream, from which no batch can be drawn"))
    sampler = _sampler(config, train_data) if own is None else _own_sampler(config, own, worker)
    _check_micro_batches(config, sampler)
    if config.train.compile is not None:
        check_backend(config.train.compile)
    metric = metric_named(config.evaluate.metric)
    if own is not None and is_empty(train_data):
        _check_without_data(config, template, test_data, example)
    if step is not None:
        train_data, test_data = WholeBatches(train_data), None if test_data is None else WholeBatches(test_data)
    examples = test_data if is_empty(train_data) and test_data is not None else train_data
    found, example = _found(config, template, build, examples, example)
    make = optimizer_factory(config.train.optimizer, optimizer)
    split = _split_model(config, template, build, example, found, make, construct)
    loader = loader or _loader_settings(config.data.loader)
    task = Task(
        build, train_data, test_data, loss, metric, example, config.seed, make, loader, test_loader or loader,
        own_data=own, worker=worker, step=step, weights=weights,
    )  # fmt: skip
    return Job(config, task, split, _schedule(config, template, sampler, make, optimizer, scheduler))


def _loader_settings(section: Loader) -> LoaderSettings:
    return LoaderSettings(
        section.workers, section.prefetch, section.pin_memory, section.timeout_s or 0, section.start_method
    )


@seeded(torch.device("cpu"), 0, Purpose.REHEARSAL)
def _no_auto_scale(why: str) -> str:
    return (
        "'recipe.merge_scale' is 'auto', which the coordinator chooses by the loss of the full network on training "
        f"data, but {why}: give a number, such as 0.5"
    )


def make_loop_job(
    config: Config,
    template: nn.Module,
    build: Callable[[], nn.Module],
    example: Any,
    loop: Callable[[Part], object],
    statistics: Iterable[Any] | None = None,
    test_data: Dataset[Any] | None = None,
    loss: LossFunction | None = None,
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    test_loader: LoaderSettings | None = None,
    construct: Callable[[], nn.Module] | None = None,
    weights: GivenWeights | None = None,
) -> Job:
    """Build a job whose local steps the user's own loop makes, on data of its own; see `ist.join`.

    Args:
        config: The configuration, with the length of the run in rounds.
        template: The network, on any device.
        build: Builds the network with its initial weights.
        example: The inputs of a batch.
        loop: Makes the local steps of a part.
        statistics: Inputs of batches for the running statistics of batch norm; None: the network has no batch norm.
        test_data: A map-style data set for evaluation; None for none.
        loss: Mean loss of (outputs, targets) for evaluation on `test_data`.
        optimizer: As for `make_job`.
        scheduler: As for `make_job`.
        test_loader: As for `make_job`.
        construct: As for `make_job`.
        weights: As for `make_job`.

    Raises:
        ConfigError: The optimizer or the schedule is wrong, or the scale of merged updates is 'auto'.
        ModelError: The network cannot be split among that many workers, or has batch norm and no statistics.
    """
    train = config.train
    if config.chooses_merge_scale:
        raise ConfigError(_no_auto_scale("your own loop reads the data and computes the loss"))
    template, build = _in_modes(template, build)
    _check_ranks(config, template)
    if statistics is None and train.running_statistics == "reestimate" and (norms := batch_norms(template)):
        raise ModelError(
            f"'{next(iter(norms))}' is a batch norm, whose running statistics are re-estimated from training inputs: "
            "give statistics=an iterable of input batches, or running_statistics='carried'"
        )
    make = optimizer_factory(train.optimizer, optimizer)
    found = find_neurons(template, example, build)
    split = _split_model(config, template, build, example, found, make, construct)
    # A sampler needs a number of samples; the split and the number of rounds do not depend on it.
    sampler = ShardedSampler(train.workers * train.batch_size, train.workers, train.batch_size, config.seed)
    task = Task(
        build, NO_SAMPLES, test_data, loss or _no_loss, metric_named(config.evaluate.metric), example,
        config.seed, make, LoaderSettings(), test_loader or LoaderSettings(), loop=loop, statistics=statistics,
        weights=weights,
    )  # fmt: skip
    return Job(config, task, split, _schedule(config, template, sampler, make, optimizer, scheduler))


def _no_loss(outputs: Any, targets: Any) -> Tensor:  # noqa: ARG001
    raise AssertionError("the user's own loop computes the loss")


@seeded(torch.device("cpu"), 0, Purpose.REHEARSAL)
def split_network(
    config: Config,
    template: nn.Module,
    build: Callable[[], nn.Module],
    example: Any,
    optimizer: MakeOptimizer | None = None,
    construct: Callable[[], nn.Module] | None = None,
) -> tuple[SplitModel, Schedule]:
    """Return the split of a network and the schedule of a run, without data; see `ist.split`.

    Args:
        config: The configuration, with the length of the run in rounds.
        template: The network, on any device.
        build: Builds the network with its initial weights.
        example: The inputs of a batch.
        optimizer: As for `make_job`.
        construct: As for `make_job`.

    Raises:
        ConfigError: The optimizer is wrong.
        ModelError: The network cannot be split among that many workers.
    """
    template, build = _in_modes(template, build)
    train = config.train
    make = optimizer_factory(train.optimizer, optimizer)
    found = find_neurons(template, example, build)
    split = _split_model(config, template, build, example, found, make, construct)
    # A sampler needs a number of samples; the split does not depend on it.
    sampler = ShardedSampler(train.workers * train.batch_size, train.workers, train.batch_size, config.seed)
    return split, _schedule(config, template, sampler, make, optimizer)


def _check_micro_batches(config: Config, sampler: Sampler) -> None:
    """Check that every micro-batch of every step has a sample, for each number of workers that a round may have.

    Raises:
        ConfigError: A step has fewer samples than micro-batches.
    """
    train = config.train
    for workers in range(train.min_workers or train.workers, train.workers + 1):
        smallest = replace(sampler, num_workers=workers).smallest_batch
        ranks = config.pool.ranks_per_worker
        if isinstance(ranks, int) and ranks > 1 and smallest < ranks * train.accumulate:
            raise ConfigError(
                f"'pool.ranks_per_worker' is {ranks} and 'train.accumulate' is {train.accumulate}, but a step of a "
                f"worker has as few as {smallest} samples ('train.batch_size' is {train.batch_size}): each rank needs "
                f"a sample in every micro-batch, {ranks * train.accumulate} in all. 'train.batch_size' counts the "
                "samples of all ranks of a worker"
            )
        if smallest < train.accumulate:
            raise ConfigError(
                f"'train.accumulate' is {train.accumulate}, but a step has as few as {smallest} samples "
                f"('train.batch_size' is {train.batch_size}): set 'train.accumulate' to at most {smallest}; "
                "'train.batch_size' counts all samples of an optimizer step"
            )


def _check_ranks(config: Config, template: nn.Module) -> None:
    """Check that several ranks can train the network together, each on its part of a batch.

    Raises:
        ConfigError: This version of torch cannot shard it.
        ModelError: A batch norm would normalize over the part.
    """
    if config.pool.ranks_per_worker != 1 and config.pool.inside == "fsdp" and torch.__version__ < "2.6":
        raise ConfigError(
            f"'pool.inside' is 'fsdp', which needs torch 2.6 or newer, but this is {torch.__version__}: use 'ddp'"
        )
    norms = [path for path, module in template.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if config.pool.ranks_per_worker != 1 and norms:
        raise ModelError(
            f"'{norms[0]}' is a batch norm, which normalizes over the samples of one process, but "
            f"'pool.ranks_per_worker' is {config.pool.ranks_per_worker!r}, so a process has a part of a batch only: "
            "use a norm of single samples (GroupNorm, LayerNorm), set the batch norm to evaluation mode, or set "
            "'pool.ranks_per_worker' to 1"
        )


def _in_modes(template: nn.Module, build: Callable[[], nn.Module]) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """Return the template on the `meta` device, and a `build` whose networks have the modes of training."""
    template = on_meta(template)
    modes = enter_training_modes(template)
    if not template.training:
        warnings.warn(
            "the network is in evaluation mode and is trained in this mode: without dropout, and with fixed batch norm "
            "statistics. To change that, call model.train() first (in the function that creates the network)",
            stacklevel=3,
        )

    def build_in_modes() -> nn.Module:
        model = build()
        set_modes(model, modes)
        return model

    return template, build_in_modes


def _found(
    config: Config, template: nn.Module, build: Callable[[], nn.Module], data: Dataset[Any], example: Any
) -> tuple[Neurons, Any]:
    """Return the network's neurons, and the example with which they were found; None: it is made of the data.

    Raises:
        ModelError: The network fails on the example.
    """
    given, example = example, example_inputs(template, data) if example is None else example
    if not config.method_spec.needs_groups:
        return Neurons((), (), {}), example
    try:
        return find_neurons(template, example, build), example
    except ModelError:
        if given is not None or config.train.batch_size <= 2:
            raise
        # Some networks need more than two samples, such as those that normalize parts of a batch.
        example = example_inputs(template, data, config.train.batch_size)
        return find_neurons(template, example, build), example


def _split_model(
    config: Config,
    template: nn.Module,
    build: Callable[[], nn.Module],
    example: Any,
    found: Neurons,
    make: MakeOptimizer,
    construct: Callable[[], nn.Module] | None = None,
) -> SplitModel:
    """Return the split of the network; arguments as in `make_job`.

    Raises:
        ConfigError: The optimizer's state cannot be carried.
        ModelError: The network cannot be split among that many workers.
    """
    train, is_split = config.train, config.method_spec.needs_groups
    groups = split_groups(found, template, config.partition) if is_split else ()
    specs = tensor_specs(template, with_statistics=train.running_statistics == "carried")
    parameters = {name: specs[name] for name, p in template.named_parameters() if p.requires_grad}
    frozen = {name: specs[name] for name, p in template.named_parameters() if not p.requires_grad}
    if not parameters:
        raise ModelError(
            "no parameter of the network requires a gradient, so nothing would be trained: call requires_grad_() on "
            "the parameters to train"
        )
    carried = train.optimizer_state == "carried" and is_split
    slots = optimizers.state_slots(train.optimizer, make, dims_of(template)) if carried else {}
    split = SplitModel(
        template=template,
        found=found,
        groups=groups,
        model_specs={name: spec for name, spec in specs.items() if name not in frozen},
        frozen_specs=frozen,
        state_slots=slots,
        state_specs=optimizers.carried_specs(slots, parameters),
        constants=constants(template, construct or build),
        declared=config.partition.sizes,
        activation_scale=train.activation_scale,
        num_logged=len(train.logged),
    )
    if not is_split:
        return split
    if groups and train.workers > 1:
        trial = partial(try_submodel, split, lambda: copied(build()).cpu(), example)
        groups, found = splittable_groups(groups, found, trial)
    else:
        found = replace(found, calls=(), sites={})
    check_workers(groups, train.workers, config.partition, found.causes)
    return replace(split, found=found, groups=carried_groups(slots, groups, parameters))


def _sampler(config: Config, data: Dataset[Any]) -> Sampler:
    """Return the assignment of samples to workers and steps.

    Raises:
        ConfigError: The data set is a stream, and a key needs its length, or a sample's number.
        DataError: There are fewer samples than workers, or `data.skew` finds no class numbers.
    """
    workers, batch_size = config.train.workers, config.train.batch_size
    if is_stream(data):
        _check_stream(config)
        return StreamSampler(workers, batch_size, config.seed)
    if config.data.skew is not None:
        return SkewedSampler(class_numbers(data), config.data.skew.alpha, workers, batch_size, config.seed)
    return ShardedSampler(length(data), workers, batch_size, config.seed, config.data.shuffle)


def _check_stream(config: Config) -> None:
    """Check that the configuration is one for a stream.

    Raises:
        ConfigError: A key needs the length of the data, or the number of a sample.
    """
    train, data = config.train, config.data
    for key, value, is_set, remedy in (
        ("train.epochs", train.epochs, train.epochs is not None, "has no length: give 'train.rounds'"),
        ("data.shuffle", data.shuffle, data.shuffle != "local", "has its own order: leave it out"),
        ("data.skew", data.skew, data.skew is not None, "cannot be assigned by classes: leave it out"),
        ("data.loader.workers", data.loader.workers, data.loader.workers > 1, "is read in order: set it to 1 or 0"),
    ):
        if is_set:
            raise ConfigError(
                f"'{key}' is {value}, but the training data are a stream (IterableDataset), which {remedy}"
            )


def _own_sampler(config: Config, own: OwnData, worker: int | None) -> OwnSampler:
    return OwnSampler(own, worker, config.train.workers, config.train.batch_size, config.seed)


def _check_without_data(config: Config, template: nn.Module, test_data: Dataset[Any] | None, example: Any) -> None:
    """Check that a coordinator without training data does not need any.

    Raises:
        DataError: It has no test data either, so it has no example of the inputs.
        ModelError: It would have to re-estimate batch norm's running statistics.
    """
    where = f"'data.shard' is 'own', and the coordinator does not train (pool '{config.pool.kind}'): it has no"
    if test_data is None and example is None:
        raise DataError(
            f"{where} data to run the network once, to find its neuron groups: give test data, or let the loader "
            "return a few samples as training data for worker None"
        )
    if config.train.running_statistics == "reestimate" and batch_norms(template):
        raise ModelError(
            f"{where} training data to re-estimate the running statistics of batch norm: set "
            "'train.running_statistics' to 'carried', or let the loader return some samples as training data for "
            "worker None"
        )


def _schedule(
    config: Config,
    template: nn.Module,
    sampler: Sampler,
    make: MakeOptimizer,
    given: MakeOptimizer | None,
    scheduler: MakeScheduler | None = None,
) -> Schedule:
    """Return the schedule of a run.

    Raises:
        ConfigError: The optimizer or the learning-rate schedule is wrong, or some stages leave no rounds for another.
    """
    train = config.train
    try_optimizer(train.optimizer, given, make, dims_of(template))
    named, optimizer = stand_ins(template, make)
    warn_of_untrained(train.optimizer, optimizer, named)
    group_of = groups_by_name(optimizer, named)  # before the schedule runs, because it may replace entries
    rounds = run_spans(config, sampler)
    settings = schedule_settings(optimizer, train.schedule, rounds[-1].steps.stop, scheduler)
    staged = staged_settings(optimizer, settings, rounds, train.schedule_unit)
    return Schedule(rounds, config.recipe, sampler, staged, group_of)


def example_inputs(network: nn.Module, data: Dataset[Any], size: int = 2) -> Any:
    """Return a network's inputs in a batch of `size` samples, or of all samples if there are fewer.

    Raises:
        ConfigError: The data are whole batches, and it is unclear what in them is an input.
        DataError: The samples cannot be collated.
    """
    inputs = fetch(data, np.arange(size if is_stream(data) else min(size, length(data))), torch.device("cpu"))[0]
    return network_inputs(network, inputs) if isinstance(data, WholeBatches) else inputs


def loss_function(name: str) -> LossFunction:
    """Return the loss that a configuration names.

    Raises:
        ConfigError: The name is unknown.
    """
    found = resolve(name, "train.loss", LOSSES, functional)
    function: LossFunction = call(found, {}, "train.loss") if isinstance(found, type) else found
    if ":" in name:
        return function
    return lambda outputs, targets: function(scores(outputs), targets)


def step_function(name: str | None) -> StepFunction | None:
    """Return the step function that a configuration names; None if it names none.

    Raises:
        ConfigError: It cannot be imported, or is a class.
    """
    if name is None:
        return None
    found = resolve(name, "train.step", {})
    if isinstance(found, type):
        raise ConfigError(f"'train.step' is '{name}', a class: expected a function of (network, batch)")
    function: StepFunction = found
    return function


def given_weights(template: nn.Module, path: str | Path | None, where: str) -> GivenWeights | None:
    """Return a function that opens the weights that a network starts with; None if none are given.

    A process that leads a run opens them here, so that errors come early. No other process needs the files.

    Args:
        template: The network, on any device.
        path: The file or folder; None: none is given.
        where: The name of the key or argument, for messages.

    Raises:
        ConfigError: The file or folder cannot be read, or belongs to another network.
    """
    if path is None:
        return None
    opened = cache(partial(open_weights, Path(path), template, where))
    if not is_launched() or is_rank_zero():
        opened()
    return opened


class Start(NamedTuple):
    """How a network that is passed from Python starts.

    Attributes:
        build: Returns the network with its initial values.
        construct: Returns it, perhaps without the values of its `state_dict`.
        weights: Opens the weights that it gets from files; None: it has values.
    """

    build: Callable[[], nn.Module]
    construct: Callable[[], nn.Module]
    weights: GivenWeights | None


def start_of(network: nn.Module, path: str | Path | None, is_trained: bool = True) -> Start:
    """Return how a network that is passed from Python starts; it gets given weights when they are needed.

    A network on `meta` at once gets its tensors that are not in its `state_dict`, because no file has them.

    Args:
        network: The network. Only a network that gets weights, or is not trained, may be on `meta`.
        path: The file or folder with its weights; None: it has values.
        is_trained: Whether it is trained, so that it needs values.

    Raises:
        ConfigError: The file or folder cannot be read, or belongs to another network.
        ModelError: The network is on `meta` and gets no values.
    """
    weights = given_weights(network, path, "weights")
    is_filled = weights is None
    if is_on_meta(network) and not (is_trained and is_filled):
        restore_constants(network)
    else:
        check_values(network)

    def build() -> nn.Module:
        nonlocal is_filled
        if weights is not None and not is_filled:
            fill(network, weights())
            is_filled = True
        check_values(network)
        return network

    return Start(build, lambda: network, weights)


def metric_named(name: str) -> Metric | None:
    """Return the metric that a configuration names; None for 'none'.

    Raises:
        ConfigError: The name is unknown, or is not a metric.
    """
    if name == "none":
        return None
    found = resolve(name, "evaluate.metric", METRICS, is_called=False)
    if not isinstance(found, Metric):
        raise ConfigError(f"'evaluate.metric' is '{name}', which is a {type(found).__name__}, not an ist.Metric")
    return found


def _make(model_class: Any, args: Mapping[str, Any]) -> Any:
    """Create a network from its arguments, or from those of its `config_class` if it has one (transformers).

    Key-value caches are switched off unless the arguments request them: generation uses them, training does not.
    """
    config_class = getattr(model_class, "config_class", None)
    if config_class is None or "config" in args:
        return call(model_class, args, "model.args")
    settings = call(config_class, args, "model.args")
    if "use_cache" not in args and getattr(settings, "use_cache", False):
        settings.use_cache = False
    return call(model_class, {"config": settings}, "model.args")


def _template(make: Callable[[], nn.Module]) -> nn.Module:
    """Return the network on the `meta` device: built there, or with values if its constructor reads values.

    Args:
        make: Builds the network.
    """
    try:
        with torch.device("meta"):
            return make()
    except (RuntimeError, NotImplementedError, ConfigError):
        pass
    try:
        return on_meta(built_without_parameters(make))
    except Exception:  # a constructor that needs values of parameters may fail in any way without them
        remedy = "do not use values of parameters or random numbers in the constructor"
        return on_meta(built_whole(make, "the network cannot be created without values", remedy))
