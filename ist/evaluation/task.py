"""The task of a run: the network, its data, its loss, its optimizer and its metric.

Where it sits: `ist/runs/build.py` builds it once in each process, from a configuration or from the user's own objects.
Workers use its training data, loss and optimizer, evaluation uses its test data and metric.
Not here: the split of the network (`ist/subnet/split_model.py`), the samples of each step
(`ist/optimization/schedule.py`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ist.data.batched import WholeBatches
from ist.data.batches import is_empty
from ist.data.fingerprint import NO_DATA, DataFingerprint, data_fingerprint
from ist.data.loading.loader import LoaderSettings
from ist.data.nested import call_model
from ist.data.shards.unequal import OwnData
from ist.evaluation.evaluate import InputCache
from ist.evaluation.metrics import Metric
from ist.evaluation.step_function import StepFunction
from ist.network.copies import copied
from ist.optimization.factory import MakeOptimizer

NO_SAMPLES = TensorDataset(torch.empty(0), torch.empty(0))
"""The training data of a process that has none."""

LossFunction = Callable[[Any, Any], Tensor]
"""Computes the mean loss of (outputs, targets)."""

GivenWeights = Callable[[], Mapping[str, Tensor]]
"""Opens the given weights of a network: tensors by the names of its `state_dict`, each read when it is asked for."""


@dataclass(frozen=True)
class OwnEvaluation:
    """The user's own evaluation of the full network.

    Attributes:
        function: Receives the network; returns numbers by name, or the loss alone.
        every: The number of rounds between evaluations.
    """

    function: Callable[[nn.Module], Mapping[str, float] | float]
    every: int


@dataclass(frozen=True)
class Task:
    """The network, its data, its loss, its optimizer and its metric; the same in every process.

    Attributes:
        build: Builds the full network with its initial weights, in the modes in which it trains.
        train_data: A map-style data set of pairs (input, target), or `WholeBatches` with `step`: the common one, or the
            one of this process's worker; empty if the user's own loop reads the data.
        test_data: A map-style data set for evaluation; None: the network is not evaluated.
        loss: Mean loss of (outputs, targets); not used if there is a step function.
        metric: The metric to report beside the loss; None for none.
        example: The inputs of a batch of two samples, or of a training batch if the network needs more.
        seed: The seed of the run.
        make_optimizer: Makes an optimizer of the network's or of a subnet's parameters, given by their names in the
            network; see `ist/optimization/factory.py`.
        loader: How batches of the training data are read.
        test_loader: How batches of the test data are read.
        loop: The user's own loop, which makes the local steps of an `ist.Part`; None: the built-in loop makes them, on
            `train_data`.
        evaluation: The user's own evaluation of the full network, instead of `test_data`; None for none.
        statistics: Inputs of batches from which batch norm's running statistics are re-estimated, instead of
            `train_data`; None for none.
        own_data: The data sets that workers have of their own; None: all workers read `train_data`.
        worker: The worker of this process, or the first one, whose own data set `train_data` is; None: this process
            only coordinates, and `train_data` may be empty.
        step: The user's step function, which computes the loss of a whole batch; None: `loss` does.
        compared: The fingerprints of the training data and of the test data, if `train_data` has become the shard of
            `worker` only; None: `train_data` has all samples that this process can read.
        weights: Opens the weights that the network starts with, if they are in files; None: `build` makes them.
    """

    build: Callable[[], nn.Module]
    train_data: Dataset[Any]
    test_data: Dataset[Any] | None
    loss: LossFunction
    metric: Metric | None
    example: Any
    seed: int
    make_optimizer: MakeOptimizer
    loader: LoaderSettings
    test_loader: LoaderSettings
    loop: Callable[[Any], object] | None = None
    evaluation: OwnEvaluation | None = None
    statistics: Iterable[Any] | None = None
    own_data: OwnData | None = None
    worker: int | None = 0
    step: StepFunction | None = None
    compared: tuple[DataFingerprint, DataFingerprint] | None = None
    weights: GivenWeights | None = None

    @property
    def is_evaluated(self) -> bool:
        """Whether the full network is evaluated."""
        return self.test_data is not None or self.evaluation is not None

    @property
    def forward(self) -> Callable[[nn.Module, Any], object]:
        """Runs a network on the inputs of a batch of `train_data`, as its training does."""
        return call_model if self.step is None else self.step

    def data_of(self, worker: int) -> Dataset[Any]:
        """Return the data set from which a worker of this process reads its samples.

        Raises:
            DataError: The worker's own data set cannot be loaded.
        """
        if self.own_data is None:
            return self.train_data
        return self.own_data(worker) if self.step is None else WholeBatches(self.own_data(worker))

    def build_copy(self) -> nn.Module:
        """Return a new full network with its initial weights, on the CPU."""
        return copied(self.build()).cpu()

    @cached_property
    def contents(self) -> tuple[DataFingerprint, DataFingerprint]:
        """The fingerprints of the training data and of the test data."""
        if self.compared is not None:
            return self.compared
        train, test = (
            NO_DATA if data is None or is_empty(data) else data_fingerprint(data, self.seed)
            for data in (self.train_data, self.test_data)
        )
        return NO_DATA if self.loop is not None else train, test

    @cached_property
    def statistics_inputs(self) -> InputCache:
        """The inputs from which batch norm's running statistics are re-estimated, once they are read."""
        return InputCache()

    def holds_data_of(self, worker: int) -> bool:
        """Return whether this process can read a worker's samples without loading further data."""
        return worker == self.worker or (self.own_data is None and self.compared is None)

    def for_workers(self) -> "Task":
        """Return the task for a worker, which needs neither the initial weights nor the test data.

        A worker loads its own data itself, if it has such.
        """
        train_data = self.train_data if self.own_data is None else NO_SAMPLES
        return replace(
            self, build=_no_build, train_data=train_data, test_data=None, evaluation=None, statistics=None, weights=None
        )


def _no_build() -> nn.Module:
    raise AssertionError("a worker asked for initial weights, which it does not have")
