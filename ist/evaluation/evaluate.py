"""Evaluate the full network.

Batch norm's running statistics are meaningless after a merge, because no subnet saw the activations of the full
network. They are re-estimated by forward passes over training batches before evaluation. A network whose batch norm
tracks no running statistics uses batch statistics here, so its accuracy depends on the batch size of the evaluation.

Where it sits: `ist/training/rounds.py` calls it after a round.
Not here: metrics (`metrics.py`), losses (`losses.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ist.data.batches import is_stream, length
from ist.data.loading.loader import LoaderSettings, read_batches
from ist.data.nested import call_model, mapped, moved, scores, tensors_in
from ist.errors import ConfigError, DataError, ISTError, LoopError, ModelError, error_with_line, first_line
from ist.evaluation.metrics import Metric
from ist.evaluation.step_function import StepFunction, step_loss
from ist.measurements import MEASUREMENTS
from ist.network.failures import loss_errors, loss_of, network_errors
from ist.network.lazy_tensor import LazyTensor, needs_values
from ist.network.modes import preserve_modes
from ist.rng import Indices, ItemDraws, Purpose, permutation

_CPU = torch.device("cpu")
_NO_LOADER = LoaderSettings()
_RECORDED = {"round", "metric", "lost"} | {m.name for m in MEASUREMENTS if m.source != "evaluation"}


@dataclass(frozen=True)
class Metrics:
    """The result of an evaluation.

    Attributes:
        loss: The mean loss over the samples; None if the user's own evaluation returns none.
        values: The values of the metric by name; empty without a metric.
    """

    loss: float | None
    values: Mapping[str, float]


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    loss: Callable[[Any, Any], Tensor],
    batch_size: int,
    device: torch.device,
    metric: Metric | None,
    seed: int = 0,
    loader: LoaderSettings = _NO_LOADER,
    step: StepFunction | None = None,
) -> Metrics:
    """Evaluate a network on a data set.

    Args:
        model: The full network, on `device`; it runs in evaluation mode, and its modes are restored.
        dataset: Pairs (input, target).
        loss: Mean loss of (outputs, targets).
        batch_size: The number of samples in a batch.
        device: The device of the network.
        metric: The metric to report beside the loss; None for none.
        seed: The seed of the run; it determines the random numbers that the data set draws, the same in every call.
        loader: How batches are read.
        step: Computes the loss of whole batches, instead of `loss`; the data set is then a `WholeBatches`.

    Raises:
        DataError: The metric counts none of the data set's targets, a sample cannot be read, or its loss fails.
        ConfigError: The metric fails, or needs targets that the data set does not have.
        ModelError: The network fails.
    """
    count, loss_sum, sums, counted = length(dataset), 0.0, torch.zeros((), dtype=torch.float64, device=device), 0
    samples = list(evaluation_batches(count, batch_size))
    batches = read_batches(dataset, samples, device, loader, ItemDraws(seed, Purpose.EVALUATION))
    with preserve_modes(model), _preserve_tensors(model), torch.no_grad(), closing(batches):
        model.eval()
        for batch, (inputs, targets) in zip(samples, batches, strict=True):

            def numbers(batch: Indices = batch) -> Indices:
                return batch

            if step is not None:
                loss_sum += float(step_loss(step, model, inputs, numbers).loss) * len(batch)
                if metric is None:
                    continue
                inputs, targets = _pair(inputs, metric)
            with network_errors(model):
                outputs = call_model(model, inputs)
            if step is None:
                with loss_errors(numbers):
                    loss_sum += float(loss_of(loss, outputs, targets, numbers)) * len(batch)
            if metric is not None:
                with loss_errors(numbers, metric.names[0]):
                    batch_sums, batch_count = metric.batch(scores(outputs), targets)
                sums, counted = sums + batch_sums, counted + batch_count
    if metric is not None and counted == 0:
        raise DataError(f"metric '{metric.names[0]}' counts none of the {count} samples: all targets are ignored ones")
    return Metrics(loss_sum / count, metric.values(sums, counted) if metric else {})


def read_batch(
    dataset: Dataset[Any], samples: Indices, device: torch.device, loader: LoaderSettings, draws: ItemDraws
) -> tuple[Any, Any]:
    """Return one batch (inputs, targets) of a data set; of a `WholeBatches`, the inputs are the whole batch.

    Args:
        dataset: The data set.
        samples: The samples of the batch.
        device: The device of the batch.
        loader: How batches are read.
        draws: The key of the random numbers that the data set draws.

    Raises:
        DataError: A sample cannot be read.
    """
    with closing(read_batches(dataset, [samples], device, loader, draws)) as batches:
        return next(batches)


def batch_loss(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss: Callable[[Any, Any], Tensor],
    samples: Indices,
    step: StepFunction | None = None,
) -> float:
    """Return the loss of a network in evaluation mode on a batch; its modes are restored.

    Args:
        model: The full network.
        inputs: The inputs, or the whole batch with `step`.
        targets: The targets.
        loss: Mean loss of (outputs, targets).
        samples: The samples of the batch, for messages.
        step: Computes the loss of whole batches, instead of `loss`.

    Raises:
        DataError: The loss fails.
        ModelError: The network fails.
    """

    def numbers() -> Indices:
        return samples

    with preserve_modes(model), _preserve_tensors(model), torch.no_grad():
        model.eval()
        if step is not None:
            return float(step_loss(step, model, inputs, numbers).loss)
        with network_errors(model):
            outputs = call_model(model, inputs)
        with loss_errors(numbers):
            return float(loss_of(loss, outputs, targets, numbers))


def evaluate_by(function: Callable[[nn.Module], Mapping[str, float] | float], model: nn.Module) -> Metrics:
    """Evaluate a network with a user's function, in evaluation mode and without gradients.

    Args:
        function: Returns numbers by name, or the loss alone.
        model: The full network; its modes are restored.

    Raises:
        LoopError: The function raises an exception, or does not return numbers, or a name is one of a round's record.
    """
    with preserve_modes(model), _preserve_tensors(model), torch.no_grad():
        model.eval()
        try:
            found = function(model)
            numbers = found if isinstance(found, Mapping) else {"loss": found}
            values = {str(name): float(value) for name, value in numbers.items()}
        except (ISTError, MemoryError):
            raise
        except Exception as error:  # user code may raise anything, and return anything
            raise LoopError(f"the function of run.evaluate: {error_with_line(error)}") from error
    loss = values.pop("loss", None)
    if taken := sorted(values.keys() & _RECORDED):
        raise LoopError(f"the function of run.evaluate returns '{taken[0]}', a number that IST measures: rename it")
    return Metrics(loss, values)


def _pair(batch: Any, metric: Metric) -> tuple[Any, Any]:
    """Return a whole batch as (inputs, targets).

    Raises:
        ConfigError: It is no pair.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise ConfigError(
        f"'evaluate.metric' is '{metric.names[0]}', which needs data of pairs (input, target), but with 'train.step' a "
        f"batch of the test data is a {type(batch).__name__}: set evaluate.metric to 'none'"
    )


def evaluation_batches(count: int, batch_size: int) -> Iterator[Indices]:
    """Yield the positions of `count` samples (int64) in batches of `batch_size`; the last batch may be smaller.

    A single last sample joins the batch before it: batch norm without running statistics cannot normalize one sample.
    """
    starts = list(range(0, count, batch_size))
    if batch_size > 1 and len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], count], strict=True):
        yield np.arange(start, stop, dtype=np.int64)


def reestimate_statistics(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], object] = call_model
) -> None:
    """Replace batch norm's running statistics by their mean over the given batches.

    Like `torch.optim.swa_utils.update_bn`, but with all other modules in evaluation mode, so that dropout is off as it
    is in evaluation.

    Args:
        model: The full network; its modes are restored. A norm in evaluation mode keeps its statistics, which then
            act like weights.
        batches: Training inputs, one batch each, on the network's device.
        forward: Runs the network on the inputs of a batch.
    """
    norms = batch_norms(model).values()
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with preserve_modes(model), _preserve_tensors(model), torch.no_grad():
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
            norm.train()
        try:
            for inputs in batches:
                with network_errors(model):
                    forward(model, inputs)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def batch_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Return, by path, the batch norms whose running statistics change in training."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats and module.training
    }


@contextmanager
def _preserve_tensors(model: nn.Module) -> Iterator[None]:
    """Put the original tensors back if a forward in the `with` block replaces parameters or buffers.

    The original tensors get the new values, so that other references to them still refer to the network's tensors.

    Raises:
        ModelError: A forward writes to a parameter that has no values in this process, or needs them in memory.
    """
    lazy = {name: parameter for name, parameter in model.named_parameters() if isinstance(parameter, LazyTensor)}
    parameters = [(p, p.data) for p in model.parameters() if not isinstance(p, LazyTensor)]
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (held, name, tensor)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    ]
    try:
        yield
    except Exception as error:
        if needs_values(error):
            raise ModelError(
                f"{first_line(error)}: 'pool.evaluation' is 'layers' (pool.store 'sharded'), so that the evaluated "
                "network has no values in this process: set it to 'whole'"
            ) from error
        raise
    finally:
        for held, name, tensor in places:
            new = held.get(name)
            if new is not None and new is not tensor and new.shape == tensor.shape:  # a cache may have grown
                tensor.data.copy_(new.detach())
                held[name] = tensor
        for parameter, data in parameters:
            if parameter.data_ptr() != data.data_ptr() and parameter.shape == data.shape:
                data.copy_(parameter.detach())
                parameter.data = data
        written = next((name for name, parameter in lazy.items() if parameter.kept_bytes), None)
        if written is not None:
            raise ModelError(
                f"the forward writes to the parameter '{written}', but no process holds it (pool.store 'sharded'): set "
                "pool.store to 'coordinator'"
            )


MOST_CACHED_BYTES = 64 * 2**20
"""The most memory that the inputs of a re-estimation may take between two evaluations."""


class InputCache:
    """Keeps the inputs of a re-estimation in memory, so that later evaluations do not read the samples again.

    Inputs are not kept if they need more than `MOST_CACHED_BYTES`, or are in memory anyway (a `TensorDataset`).
    """

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def inputs(
        self, dataset: Dataset[Any], batches: Sequence[Indices], seed: int = 0, loader: LoaderSettings = _NO_LOADER
    ) -> Iterator[Any]:
        """Yield the inputs of each batch, on the CPU; the arguments are the same in every call.

        Args:
            dataset: The training data.
            batches: The samples of each batch.
            seed: The seed of the run; it determines the random numbers that the data set draws.
            loader: How batches are read.
        """
        if len(self._kept) == len(batches):
            for inputs in self._kept:
                yield mapped(inputs, torch.clone)  # a network may change its inputs in place
            return
        kept: list[Any] | None = None if type(dataset) is TensorDataset else []
        kept_bytes = 0
        with closing(read_batches(dataset, batches, _CPU, loader, ItemDraws(seed, Purpose.STATISTICS))) as read:
            for inputs, _ in read:
                if kept is not None:
                    kept_bytes += sum(tensor.nbytes for tensor in tensors_in(inputs))
                    kept = [*kept, mapped(inputs, torch.clone)] if kept_bytes <= MOST_CACHED_BYTES else None
                yield inputs
        self._kept = kept or []


def statistics_batches(
    dataset: Dataset[Any],
    batch_size: int,
    num_batches: int,
    seed: int,
    device: torch.device,
    cache: InputCache | None = None,
    loader: LoaderSettings = _NO_LOADER,
) -> Iterable[Any]:
    """Yield the inputs of up to `num_batches` batches, drawn once for the run without replacement.

    Of a stream, these are the first items.

    Args:
        dataset: The training data.
        batch_size: The number of samples in a batch.
        num_batches: The largest number of batches.
        seed: The seed of the run.
        device: The device of the inputs.
        cache: Keeps small inputs between calls with the same arguments; None: samples are read in every call.
        loader: How batches are read.
    """
    if is_stream(dataset):
        order: Indices = np.arange(num_batches * batch_size)
    else:
        order = permutation(length(dataset), seed, Purpose.STATISTICS)
    # Only full batches: a smaller one would have the same weight in the mean.
    full = max(1, min(num_batches, len(order) // batch_size))
    batches = [order[number * batch_size : (number + 1) * batch_size] for number in range(full)]
    for inputs in (cache or InputCache()).inputs(dataset, batches, seed, loader):
        yield moved(inputs, device)
