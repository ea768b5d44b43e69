"""Metrics of the whole network.

Batch norm's running statistics are meaningless after a merge: no subnet ever saw the activations of
the whole network. They are re-estimated by a forward pass over training batches before evaluation.
A network whose batch norm keeps no running statistics uses batch statistics here, and its accuracy then
depends on the batch size of the evaluation.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ist.data.batches import fetch, length
from ist.data.nested import call_model, scores
from ist.errors import DataError
from ist.metrics import Metric
from ist.modes import kept_modes
from ist.rng import Purpose, permutation


@dataclass(frozen=True)
class Metrics:
    """Mean loss over `samples` samples, and the values of a metric, by name, where one was asked for."""

    loss: float
    values: Mapping[str, float]
    samples: int


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    loss: Callable[[Any, Any], Tensor],
    batch_size: int,
    device: torch.device,
    metric: Metric | None,
) -> Metrics:
    """Evaluate a network on a data set.

    Args:
        model: The whole network, on `device`; evaluated in evaluation mode, and left in the modes that it had.
        dataset: Pairs (input, target).
        loss: Mean loss of (outputs, targets).
        batch_size: Samples of a batch.
        device: Where the network is.
        metric: What to report beside the loss.

    Raises:
        DataError: The metric counts none of the data set's targets.
    """
    count, loss_sum, sums, counted = length(dataset), 0.0, torch.zeros((), dtype=torch.float64, device=device), 0
    with kept_modes(model), torch.no_grad():
        model.eval()
        for start in range(0, count, batch_size):
            batch = np.arange(start, min(start + batch_size, count), dtype=np.int64)
            inputs, targets = fetch(dataset, batch, device)
            outputs = call_model(model, inputs)
            loss_sum += float(loss(outputs, targets)) * len(batch)
            if metric is not None:
                batch_sums, batch_count = metric.batch(scores(outputs), targets)
                sums, counted = sums + batch_sums, counted + batch_count
    if metric is not None and counted == 0:
        raise DataError(f"metric '{metric.names[0]}' has nothing to count: no target of the {count} samples is one")
    return Metrics(loss_sum / count, metric.values(sums, counted) if metric else {}, count)


def reestimate_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace batch norm's running statistics by their mean over the given batches.

    Like `torch.optim.swa_utils.update_bn`, but with everything else in evaluation mode: dropout must be
    off while the statistics of the network as evaluated are taken.

    Args:
        model: The whole network; left in the modes that it had. A norm in evaluation mode keeps its statistics, which
            are like weights.
        batches: Training inputs, one batch each, on the network's device.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats and module.training
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with kept_modes(model), torch.no_grad():
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
            norm.train()
        try:
            for inputs in batches:
                call_model(model, inputs)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def statistics_batches(
    dataset: Dataset[Any], batch_size: int, num_batches: int, seed: int, device: torch.device
) -> Iterable[Any]:
    """Yield the inputs of up to `num_batches` batches, drawn once for the run without replacement."""
    order = permutation(length(dataset), seed, Purpose.STATISTICS)
    # At most as many batches as are full: a runt batch would weigh as much as a full one.
    full = max(1, min(num_batches, len(order) // batch_size))
    for number in range(full):
        yield fetch(dataset, order[number * batch_size : (number + 1) * batch_size], device)[0]
