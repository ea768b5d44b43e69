"""The Python entry points: `ist.train` trains a user's network on the user's data; `ist.split` shows how it is split.

Where it sits: `ist/__init__.py` exports them; they build a job (`ist/runs/build.py`) and execute it
(`ist/runs/execute.py`).
Not here: the command line (`ist/cli/`), which builds the same job from a file.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Unpack

from ist.checks.gradient_reach import check_captured_network
from ist.config.partition import Exchange, Partition
from ist.config.recipe import Recipe
from ist.config.runtime import Checkpoint, Loader, Pool, Watch
from ist.config.schema import Evaluate, Optimizer, Schedule, Skew
from ist.evaluation.step_function import StepFunction
from ist.loops.part import Part
from ist.monitoring.callback import Callback
from ist.monitoring.display import Progress, check_progress
from ist.monitoring.observers import check_callbacks
from ist.network.compiled import uncompiled
from ist.network.copies import on_meta
from ist.network.modes import preserve_modes
from ist.network.supported import check_network
from ist.optimization.factory import MakeOptimizer
from ist.optimization.schedulers import MakeScheduler
from ist.rng import Purpose, seeded
from ist.runs.arguments import (
    Keywords,
    TrainKeys,
    given_data,
    optimizer_function,
    scheduler_function,
    split_config,
    train_config,
)
from ist.runs.build import loss_function, make_job, make_loop_job, split_network, start_of, step_function
from ist.runs.execute import device_of, execute, give_back, sole_run
from ist.runs.inspection import inspect_split
from ist.runs.loading.load import own_from_python
from ist.runs.open import FollowerPart
from ist.runs.preflight import check_result, folder_of_run
from ist.runs.rehearsal import rehearse
from ist.runs.split import Split, values_of
from ist.subnet.assignments import Assignments
from ist.subnet.job import Job


@dataclass(frozen=True)
class TrainResult:
    """The result of `ist.train`.

    Attributes:
        model: The given network, trained; on a rank that does not coordinate, unchanged.
        history: One record a round, as in metrics.jsonl; empty on a rank that does not coordinate.
        is_coordinator: Whether this process has the trained network.
        stopped_early: The reason why a callback has ended the run; None if it has run to its end, and on a rank that
            does not coordinate.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.ones(8, 2), torch.ones(8, 1))
        >>> result = ist.train(torch.nn.Linear(2, 1), data, loss="mse_loss", workers=1, rounds=3, progress=False)
        >>> [record["round"] for record in result.history], result.is_coordinator
        ([0, 1, 2], True)
    """

    model: nn.Module
    history: list[dict[str, Any]]
    is_coordinator: bool
    stopped_early: str | None = None


@sole_run()
@seeded(torch.device("cpu"), 0, Purpose.REHEARSAL)  # reading data must not change the state of the caller's generators
def train(
    model: nn.Module,
    data: Dataset[Any] | DataLoader[Any] | Callable[[int], Dataset[Any]] | None = None,
    *,
    workers: int | Mapping[str, int],
    local_steps: int = 50,
    rounds: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    step: str | StepFunction | None = None,
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | MakeOptimizer | Mapping[str, Any] = "SGD",
    schedule: str | Schedule | type[LRScheduler] | MakeScheduler | Mapping[str, Any] | None = None,
    shuffle: Literal["local", "global"] = "local",
    shard: Literal["assigned", "own"] = "assigned",
    skew: Skew | Mapping[str, Any] | None = None,
    test_data: Dataset[Any] | DataLoader[Any] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    loader: Loader | Mapping[str, Any] | None = None,
    loop: Callable[[Part], object] | None = None,
    example: Any = None,
    statistics: Iterable[Any] | None = None,
    partition: Partition | Mapping[str, Any] | None = None,
    exchange: Exchange | Mapping[str, Any] | None = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
    evaluate: Evaluate | Mapping[str, Any] | None = None,
    checkpoint: Checkpoint | Mapping[str, Any] | None = None,
    pool: Literal["auto", "inline", "torchrun", "ray"] | Pool | Mapping[str, Any] = "auto",
    watch: Watch | Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    run_dir: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    weights: str | Path | None = None,
    progress: Progress = True,
    **keywords: Unpack[Keywords],
) -> TrainResult:
    """Train a network with Independent Subnet Training.

    In a plain script, all workers train in this process, one after the other. Under torchrun, every process calls this
    function and is one of the workers; rank 0 has the trained network at the end.

    A process can run one `train` at a time. During the run, IST seeds the generators of torch, `random` and
    `numpy.random` for each round, and restores them at the end. Other threads should not draw from them meanwhile.

    Configuration sections are objects such as `ist.Partition(strategy="rolling")`, which editors and type checkers
    understand, or mappings of the same keys. `ist keys` explains every key.

    Args:
        model: Any network. It is trained in place, and its modules stay in their modes: a module in evaluation mode
            (such as a frozen batch norm) stays in it. A compiled network is trained uncompiled, unless
            `compile` names a backend. IST runs the network
            on two inputs of `data` to find its neuron groups.
        data: Pairs (input, target), or any items if `step` is given; they are assigned to the workers. A tuple as input
            gives positional arguments, a mapping gives keyword arguments. For items that do not stack, give
            `collate_fn`, or see `ist.BatchedDataset`. Of a `torch.utils.data.DataLoader`, its data set, batch size,
            collate function and loader processes are used. The run decides which samples are in a batch, so a loader
            with a sampler of its own is refused. Of a stream (an `IterableDataset`), item number i belongs to worker
            i % workers.
        workers: Number of subnets in a round. If neurons are assigned disjointly, at most the size of the smallest
            group. A range {"min": 2, "max": 16} allows workers to join and leave.
        local_steps: Optimizer steps of a worker in a round.
        rounds: Length of the run in rounds; give this or `epochs`.
        epochs: Length of the run in passes over the data.
        batch_size: Samples in one optimizer step of one worker, also if they are split into micro-batches
            (`accumulate`). Default: 32, or that of the loader in `data`.
        loss: Name of a function of torch.nn.functional, applied to the outputs or to their `logits`; or any mean loss
            of (outputs, targets). It must not hold `model`, because workers train submodels of it, nor own weights.
        step: A function of (network, batch) that returns the mean loss of the batch, instead of `loss`; or its import
            path. It gets each batch as it was collated, so items of `data` may be anything: tuples, mappings, single
            tensors. It calls the network that it gets, which is a submodel; not `model`. It is also used for the test
            loss, in evaluation mode and without gradients. It may also return (loss, {name: number}); `logged` names
            the numbers whose means are recorded.
        optimizer: A class of torch.optim or its name, with torch's default arguments (but lr 0.1 for SGD), or a
            `functools.partial` of a class; or `ist.Optimizer(name="AdamW", args={"lr": 3e-4})`, with exactly those
            arguments and, if given, with parameter groups (`ist.ParameterGroup`); or a function that makes an optimizer
            of a subnet's parameters, which it gets in a mapping by their names in `model`. It is called for every new
            subnet, and on stand-ins of all parameters without values. So it decides by a parameter's name, number of
            dims or dtype, not by its shape, and uses only the parameters that it gets.
        schedule: A class of torch.optim.lr_scheduler or its name, or `ist.Schedule` with its arguments; or a function
            that makes a scheduler of the optimizer that it gets; or `ist.Schedule(factor=...)` with a function of the
            local step that returns a factor of the learning rate. It advances with every local step, over the whole
            run, and applies to every parameter group. Default: the learning rate is constant.
        shuffle: 'local': a worker has a fixed part of the data; 'global': the data are reassigned every epoch.
        shard: 'own': each worker has a data set of its own, of any length, which is not sent. `data` is then a function
            of the worker's number that returns it, and is called in the worker's process; under torchrun it may also be
            the data set of this process. Needs `rounds`.
        skew: `ist.Skew(alpha=0.3)` gives each worker another mix of classes, for studies; see `ist.dirichlet_split`.
            Default: samples are assigned at random.
        test_data: Evaluated every round, if given; accuracy is reported if the targets are class numbers.
        collate_fn: Makes a batch (inputs, targets) of a list of items, such as one that pads them. Default: PyTorch's.
        loader: `ist.Loader(workers=4)` reads batches ahead of time, in four loader processes for each worker.
        loop: A training loop of your own, instead of `data`: a function that makes the steps of an `ist.Part`. It is
            called for each worker in each round, in the worker's process; on Ray, it must be picklable. `loss` is then
            used for `test_data` only. Under torchrun, `ist.join` keeps the loop in your script.
        example: With `loop` or `step`: inputs of a small batch (two samples), as the network accepts them: a tensor, a
            tuple of positional arguments, or a mapping of keyword arguments. With `step`, the default is an input of
            `data`.
        statistics: With `loop`: as in `ist.join`.
        partition: How neurons are assigned to workers. Default: each neuron to one worker, at random every round.
        exchange: The number of bits of exchanged weights. Default: the bits of the network's dtypes.
        recipe: Stages of the run, outer optimizer, average over rounds. Default: none of them.
        evaluate: How often the full network is evaluated, and with which metric.
        checkpoint: How often the run is saved in `run_dir`, and where else. Default: every round.
        pool: Which processes train: 'inline', 'torchrun', 'ray', or `ist.Pool` with further keys. 'auto', and a pool
            without a kind, is 'torchrun' under torchrun and 'inline' otherwise. 'ray' uses the cluster to which this
            process is connected, or the one at `ist.Pool(kind="ray", ray=ist.Ray(address=...))`, or starts one.
        watch: TensorBoard, Prometheus, and callbacks by name. Default: none of them.
        callbacks: Objects of subclasses of `ist.Callback`, such as those of `ist.callbacks`. They receive what happens
            in the run, in the process that coordinates, and may end it.
        run_dir: Folder for metrics, checkpoints and the trained network; default: nothing is written.
        resume: Whether to resume from the newest checkpoint in `run_dir`. Arguments that may change are those of
            `ist train --resume RUN --set KEY=VALUE`, such as `rounds`, `workers` and the optimizer's learning rate.
        seed: Seed of everything random except the network's initial weights, which are those of `model`; >= 0.
        weights: File or folder with the initial weights: a safetensors file, or a folder of transformers or of
            torch.distributed.checkpoint; they are read one tensor at a time. `model` may then be on the device 'meta',
            so that no process but the one that coordinates holds it. Default: the values of `model`.
        progress: Whether to show progress on stderr: a bar on a terminal or in a notebook, otherwise lines; 'tqdm': a
            bar of tqdm in any case.
        **keywords: Further keys of the section `train`: `logged`, `accumulate`, `autocast`, `clip_grad_norm`,
            `compile`, `min_workers`, `schedule_unit`, `optimizer_state`, `activation_scale`, `running_statistics`.
            Keywords of earlier versions are also accepted: mappings with the keys of a section (`data_options`,
            `train_options`, `evaluate_options`, `pool_options`, `checkpoint_options`, `watch_options`) or with
            arguments (`optimizer_args`, `schedule_args`).

    Returns:
        The trained network and the history.

    Raises:
        CallbackError: A callback fails.
        ConfigError: An argument is invalid, or another `train` or `split` is running in this process.
        DataError: The data cannot be assigned to the workers.
        ModelError: The network cannot be split among that many workers, or has batch norm and `loop` no `statistics`.
        LoopError: `loop` raises an exception, makes no step, or logs no loss.
        DivergedError: A worker returned a non-finite loss or weight.
        RunFolderError: `run_dir` cannot be written, or, with `resume`, contains no run, or an argument must not change.
        PoolError: Processes or actors could not be started or joined, or too many were lost.
        TypeError: An argument of that name does not exist.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> _ = torch.manual_seed(0)
        >>> inputs = torch.randn(256, 8)
        >>> data = TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> result = ist.train(
        ...     model, data, workers=4, local_steps=8, rounds=5, test_data=data, progress=False,
        ...     optimizer=ist.Optimizer(name="SGD", args={"lr": 0.1, "momentum": 0.9}),
        ...     exchange=ist.Exchange(up="int8", values="deltas"),
        ... )
        >>> result.history[-1]["accuracy"] > 0.9
        True

    Reference:
        B. Yuan et al., "Distributed Learning of Fully Connected Neural Networks using Independent Subnet Training",
        arXiv 1910.02120.
    """
    found = given_data(locals())
    config = train_config(found.given)
    check_progress(progress)
    check_callbacks(config, callbacks)
    check_captured_network(loss, model)
    check_captured_network(step, model)
    function = loss_function(loss) if isinstance(loss, str) else loss
    step_given = step_function(step) if isinstance(step, str) else step
    with uncompiled(model, config.train.compile) as plain, preserve_modes(plain):
        check_network(plain, is_split=True)
        start = start_of(plain, weights)
        check_result(config, plain, run_dir)
        test = found.given["test_data"]
        make, scheduler = optimizer_function(optimizer), scheduler_function(schedule)
        if loop is not None:
            job = make_loop_job(
                config, on_meta(plain), start.build, example, loop, statistics, test, function, optimizer=make,
                scheduler=scheduler, test_loader=found.test_loader, construct=start.construct, weights=start.weights,
            )  # fmt: skip
        else:
            own = own_from_python(config, found.given["data"]) if config.data.shard == "own" else None
            train_data = found.given["data"] if own is None else None
            job = make_job(
                config, on_meta(plain), start.build, train_data, test, function, example, make, scheduler,
                loader=found.loader, test_loader=found.test_loader, own=own,
                step=step_given, construct=start.construct, weights=start.weights,
            )  # fmt: skip
        return replace(_train(job, plain, run_dir, resume, progress, callbacks), model=model)


@sole_run()
@seeded(torch.device("cpu"), 0, Purpose.REHEARSAL)
def split(
    model: nn.Module,
    example: Any,
    *,
    workers: int,
    local_steps: int = 50,
    rounds: int = 1,
    optimizer: str | Optimizer | type[torch.optim.Optimizer] | MakeOptimizer | Mapping[str, Any] = "SGD",
    partition: Partition | Mapping[str, Any] | None = None,
    exchange: Exchange | Mapping[str, Any] | None = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
    pool: Literal["auto", "inline", "torchrun", "ray"] | Pool | Mapping[str, Any] = "auto",
    seed: int = 0,
    weights: str | Path | None = None,
    **keywords: Unpack[TrainKeys],
) -> Split:
    """Split a network as `train` does, and return its groups, shares, modules and bytes. Nothing is trained.

    Args:
        model: Any network; it is not changed. It may be on the device 'meta', where it needs no memory.
        example: Inputs of a batch of two samples, as the network accepts them: a tensor, a tuple of positional
            arguments, or a mapping of keyword arguments.
        workers: Number of subnets in a round.
        local_steps: Optimizer steps of a worker in a round; data-parallel training sends a gradient for each.
        rounds: Length of the run in rounds.
        optimizer: As in `train`; it affects the split if its state is carried.
        partition: How neurons are assigned to workers, as in `train`.
        exchange: The number of bits of exchanged weights, as in `train`.
        recipe: Stages of the run, as in `train`.
        pool: Which processes would train; this decides which messages cross a link.
        seed: Seed of the assignments; >= 0.
        weights: As in `train`; the network gets them when the split's modules need values.
        **keywords: Further keys of the section `train`, as in `train`.

    Returns:
        The split. Its groups, bytes and modules are those of `train` with the same arguments; `print` shows them.

    Raises:
        ConfigError: An argument is invalid, or a `train` or `split` is running in this process.
        DataError: `example` contains no tensor.
        ModelError: The network cannot be split among that many workers.
        TypeError: An argument of that name does not exist.

    Example:
        >>> from torch import nn, randn
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> split = ist.split(model, randn(2, 8), workers=4, exchange=ist.Exchange(up="int8", values="deltas"))
        >>> [(group.name, group.neurons, group.neurons_per_worker) for group in split.groups]
        [('0', 32, (8, 8, 8, 8))]
        >>> split.shares[0].parameters, split.shares[0].returned_bytes < split.shares[0].sent_bytes
        (90, True)
        >>> print(split)
        Sequential: 354 parameters, 1.4 kB; 4 workers, 50 local steps a round, 1 round
        Neuron groups...
    """
    config, make = split_config(locals()), optimizer_function(optimizer)
    with uncompiled(model) as plain, preserve_modes(plain):
        check_network(plain, is_split=True)
        start = start_of(plain, weights, is_trained=False)
        network, schedule = split_network(config, on_meta(plain), start.build, example, make, start.construct)
    held = Assignments(network, schedule, config.partition)

    def values() -> dict[str, Tensor]:
        start.build()
        return values_of(model)

    return Split(inspect_split(config, network, schedule, held, None), network, held, values)


def _train(
    job: Job,
    model: nn.Module,
    run_dir: str | Path | None,
    resume: bool,
    progress: Progress,
    callbacks: Sequence[Callback],
) -> TrainResult:
    """Rehearse a job and run it; see `train`."""
    device_before = device_of(model)
    rehearse(job)
    folder = folder_of_run(job, job.config, run_dir, resume)
    part = execute(job, folder, resume, progress, callbacks=callbacks)
    if isinstance(part, FollowerPart):
        return TrainResult(model, [], is_coordinator=False)
    give_back(part, model, device_before)
    return TrainResult(model, part.recorder.history, is_coordinator=True, stopped_early=part.recorder.stopped_early)
