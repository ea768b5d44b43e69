"""The error for a non-finite value names its cause: data, a parameter before training, or divergence."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ist.api import train
from ist.errors import DataError, DivergedError, ModelError
from tests.conftest import data, naming
from tests.networks import NETWORKS, seeded

OPTIONS: dict[str, Any] = {"workers": 2, "local_steps": 3, "rounds": 2, "progress": False}


def with_value(sample: int, value: float) -> TensorDataset:
    inputs, targets = data(100).tensors
    inputs[sample, 2] = value
    return TensorDataset(inputs, targets)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_with_non_finite_values_are_named(value: float) -> None:
    for sample in (33, 66, 99):  # some are in the first batch, others are not
        with pytest.raises((DataError, DivergedError), match=naming("training data", f"holds {value} in its inputs")):
            train(seeded(NETWORKS["no batch norm"]), with_value(sample, value), **OPTIONS | {"rounds": 9})


def test_a_first_sample_with_nan_is_named() -> None:
    with pytest.raises(DataError, match=naming("first samples of the training data", "nan")):
        train(seeded(NETWORKS["no batch norm"]), with_value(0, math.nan), **OPTIONS)


def test_targets_with_non_finite_values_are_named() -> None:
    inputs, targets = torch.randn(100, 12), torch.randn(100, 5)
    targets[:] = math.nan

    with pytest.raises(DataError, match=naming("nan in its targets")):
        train(seeded(NETWORKS["no batch norm"]), TensorDataset(inputs, targets), loss="mse_loss", **OPTIONS)


def test_divergence_with_finite_data_is_reported_as_divergence() -> None:
    with pytest.raises(DivergedError, match=naming("diverged", "learning rate")):
        train(
            seeded(NETWORKS["no batch norm"]), TensorDataset(torch.randn(100, 12), torch.randn(100, 5)),
            loss="mse_loss", optimizer_args={"lr": 1e20}, **OPTIONS,
        )  # fmt: skip


def test_a_trained_parameter_with_non_finite_values_is_named_before_the_run() -> None:
    model = seeded(NETWORKS["no batch norm"])
    model.register_parameter("idle", nn.Parameter(torch.full((3,), math.nan)))

    with pytest.raises(ModelError, match=naming("'idle' holds nan", "requires_grad_(False)")):
        train(model, data(), **OPTIONS)
    model.idle.requires_grad_(requires_grad=False)
    train(model, data(), **OPTIONS)


class Masked(nn.Module):
    """A hidden layer before a mask of infinities, which is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(12, 16), nn.Linear(16, 5)
        self.register_buffer("mask", torch.full((5, 5), -math.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.last(torch.relu(self.hidden(x)))
        mixing = (torch.zeros(5, 5) + self.mask).softmax(dim=1)
        return scores @ mixing  # type: ignore[no-any-return]


def test_a_mask_with_infinities_may_be_a_buffer_unless_it_is_rounded() -> None:
    for state in ("kept", "reset"):
        train(Masked(), data(), train_options={"optimizer_state": state}, **OPTIONS)

    with pytest.raises(ModelError, match=naming("buffer 'mask' holds inf", "exchange", "persistent=False")):
        train(Masked(), data(), exchange={"down": "int8", "up": "int8"}, **OPTIONS)
