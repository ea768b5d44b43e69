"""The scale of a round's update that the coordinator chooses itself: `recipe.merge_scale: auto`.

Of several factors it takes the one with which the full network has the lowest loss on a batch of training data. To try
a factor, it merges the results of the round with it, as it would with a number in the configuration; so the choice of a
factor and that factor as a number give the same weights, bit for bit.
Cost of a round: for each factor a merge and a forward pass over `evaluate.batch_size` samples, on the coordinator, and
memory for a copy of what is merged.
Where it sits: `coordinator.py` asks it for the merge of a round.
Not here: the merge (`ist/subnet/cut.py`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ist.data.batches import length
from ist.data.nested import mapped
from ist.evaluation.evaluate import batch_loss, read_batch, reestimate_statistics
from ist.network.failures import located
from ist.rng import Indices, ItemDraws, Purpose, seeded, uniform
from ist.subnet.job import Job, assignments
from ist.subnet.residual_blocks import scaled_blocks
from ist.subnet.stores.parameter_store import RoundMerge

STEP = math.sqrt(2)
"""The ratio of two factors that are tried."""


def tried_factors(num_workers: int) -> list[float]:
    """Return the factors that are tried, from 1 down to 1 / workers, with which the sum of all updates is their mean.

    >>> [round(factor, 3) for factor in tried_factors(4)]
    [1.0, 0.707, 0.5, 0.354, 0.25]
    >>> [round(factor, 3) for factor in tried_factors(3)]
    [1.0, 0.707, 0.5, 0.354, 0.333]
    """
    between = range(math.ceil(math.log(num_workers, STEP) - 1e-9))
    return [*(STEP**-exponent for exponent in between), 1 / num_workers]


class ScaleSearch:
    """Chooses the scale of each round's update.

    Args:
        job: The run; this process can read its training data.
        model: The full network.
        tensors: What a merge changes, by name.
        device: The device of the network.

    Attributes:
        chosen: The factor of the last round.
    """

    def __init__(self, job: Job, model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._job = job
        self._model = model
        self._tensors = tensors
        self._device = device
        self._before = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        self.chosen = 1.0

    def merge(self, round_number: int, num_workers: int, started: Callable[[float], RoundMerge]) -> "SearchedMerge":
        """Start the merge of a round.

        Args:
            round_number: The round, from 0.
            num_workers: The workers of the round.
            started: Starts the merge with a factor.
        """
        return SearchedMerge(self, round_number, tried_factors(num_workers), started)

    def choose(self, round_number: int, factors: Sequence[float], merged: Callable[[float], None]) -> None:
        """Merge with the best of the factors; of two with equal losses, the first is the better one.

        Args:
            round_number: The round.
            factors: The factors, in descending order.
            merged: Merges with a factor.
        """
        self.chosen = factors[-1]  # if no loss is finite, the shortest step is the safest
        if len(factors) > 1:
            losses = self._losses(round_number, factors, merged)
            if math.isfinite(best := min(losses)):
                self.chosen = factors[losses.index(best)]
        merged(self.chosen)

    def _losses(self, round_number: int, factors: Sequence[float], merged: Callable[[float], None]) -> list[float]:
        """Return the loss with each factor, infinite if it is not finite; the tensors are as before afterwards."""
        for name, tensor in self._tensors.items():
            self._before[name].copy_(tensor)
        found = []
        with located(f"choosing the scale of round {round_number} (recipe.merge_scale)"):
            samples = self._samples(round_number)
            batch = read_batch(self._job.task.train_data, samples, self._device, self._job.task.loader, self._draws)
            for factor in factors:
                merged(factor)
                loss = self._loss(round_number, batch, samples)
                found.append(loss if math.isfinite(loss) else math.inf)
                for name, tensor in self._tensors.items():
                    tensor.copy_(self._before[name])
        return found

    @property
    def _draws(self) -> ItemDraws:
        return ItemDraws(self._job.config.seed, Purpose.MERGE_SCALE)

    def _samples(self, round_number: int) -> Indices:
        """Return the numbers of the samples on which a round's factors are compared; they may repeat."""
        size, available = self._job.config.evaluate.batch_size, length(self._job.task.train_data)
        if available <= size:
            return np.arange(available)
        drawn = uniform(size, self._job.config.seed, Purpose.MERGE_SCALE, round_number)
        return np.floor(drawn * available).astype(np.int64)

    def _loss(self, round_number: int, batch: tuple[Any, Any], samples: Indices) -> float:
        """Return the loss of the full network on a batch, whose statistics batch norm uses."""
        job, task, inputs = self._job, self._job.task, batch[0]
        random = seeded(self._device, job.config.seed, Purpose.MERGE_SCALE, round_number)
        with scaled_blocks(self._model, assignments(job).block_scales()), random:
            if job.config.train.running_statistics == "reestimate":
                reestimate_statistics(self._model, [mapped(inputs, torch.clone)], task.forward)
            return batch_loss(self._model, mapped(inputs, torch.clone), batch[1], task.loss, samples, task.step)


class SearchedMerge:
    """The merge of a round with a factor that is chosen when all results are there; a `RoundMerge`.

    Args:
        search: Chooses the factor.
        round_number: The round.
        factors: The factors that are tried.
        started: Starts the merge with a factor.
    """

    def __init__(
        self, search: ScaleSearch, round_number: int, factors: Sequence[float], started: Callable[[float], RoundMerge]
    ) -> None:
        self._search = search
        self._round = round_number
        self._factors = factors
        self._started = started
        self._results: dict[int, Mapping[str, Tensor]] = {}

    def add(self, worker: int, tensors: Mapping[str, Tensor], are_lasting: bool = True) -> None:
        """Note a worker's trained tensors; unless they are lasting, they are copied."""
        self._results[worker] = tensors if are_lasting else {name: tensor.clone() for name, tensor in tensors.items()}

    def finish(self) -> None:
        """Choose the factor, and merge with it."""
        self._search.choose(self._round, self._factors, self._merged)

    def _merged(self, factor: float) -> None:
        merge = self._started(factor)
        for worker, tensors in self._results.items():
            merge.add(worker, tensors)
        merge.finish()
