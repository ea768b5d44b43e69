"""The task of a run: which network is trained, on which data, by which loss, and how it is measured.

Where it sits: `ist/runs/build.py` makes it once in each process, of a configuration or of a user's own objects; workers
take data and loss from it, the evaluation data and metric.
Not here: how the network is split (`ist/subnet/split_model.py`), which samples a step uses
(`ist/optimization/schedule.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from ist.data.content import NOTHING, Content, content
from ist.evaluation.metrics import Metric
from ist.network.copies import copied

LossFunction = Callable[[Any, Any], Tensor]
"""Mean loss of (outputs, targets)."""


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and how it is measured; the same in every process.

    Attributes:
        build: Makes the full network with its initial weights, in the modes in which it is trained.
        train_data: A map-style data set of pairs (input, target).
        test_data: The same for evaluation; None: the network is not evaluated.
        loss: Mean loss of (outputs, targets).
        metric: What is reported beside the loss, if anything.
        example: Inputs of a batch of two, or of as many as a training step has where two are too few.
        seed: Of the run.
    """

    build: Callable[[], nn.Module]
    train_data: Dataset[Any]
    test_data: Dataset[Any] | None
    loss: LossFunction
    metric: Metric | None
    example: Any
    seed: int

    def build_copy(self) -> nn.Module:
        """Return a full network with its initial weights, on the CPU, that shares nothing with any other."""
        return copied(self.build()).cpu()

    @cached_property
    def contents(self) -> tuple[Content, Content]:
        """What a few items of the training data hold, and of the test data."""
        test = NOTHING if self.test_data is None else content(self.test_data, self.seed)
        return content(self.train_data, self.seed), test

    def for_workers(self) -> "Task":
        """Return what a worker needs: neither the initial weights nor the test data."""
        return replace(self, build=_no_build, test_data=None)


def _no_build() -> nn.Module:
    raise AssertionError("a worker asked for initial weights, which it does not have")
