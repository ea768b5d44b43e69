"""Examples for the comparison of submodel and full network: non-finite values, and more than two samples."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ist.checks.verify import verify_cuts
from ist.errors import ModelError
from ist.runs.build import make_job
from tests.conftest import small_config
from tests.networks import seeded
from tests.neurons.networks import rand
from tests.neurons.test_neurons import job_of


class Causal(nn.Module):
    """Attention whose mask is a parameter."""

    def __init__(self, masked: float) -> None:
        super().__init__()
        self.query, self.value, self.feed, self.out = (nn.Linear(*s) for s in ((12, 12), (12, 9), (9, 8), (8, 5)))
        self.mask = nn.Parameter(torch.full((6, 6), masked).triu(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        # The sum of two least numbers of float32 is minus infinity in float32, and finite in float64.
        scores = self.query(x) @ x.transpose(1, 2) + self.mask + self.mask
        return self.out(self.feed(scores.softmax(-1) @ self.value(x)).relu())


@pytest.mark.parametrize("masked", [float("-inf"), torch.finfo(torch.float32).min])
def test_a_mask_in_the_parameters_may_be_minus_infinity_or_the_least_number(masked: float) -> None:
    job = job_of(seeded(lambda: Causal(masked)), rand(2, 6, 12))

    verify_cuts(job)
    assert [group.size for group in job.split.groups] == [9, 8]


class Single(nn.Module):
    """Computes no finite value in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.first(x).tanh())
        return y if x.dtype == torch.float32 else y * float("nan")


def test_a_network_without_finite_values_in_float64_is_compared_in_float32() -> None:
    verify_cuts(job_of(seeded(Single), rand(4, 12)))


class Closed(nn.Module):
    """One of its classes cannot be chosen."""

    def __init__(self, closed: float, everywhere: bool = False) -> None:
        super().__init__()
        self.first, self.out, self.closed, self.everywhere = nn.Linear(12, 8), nn.Linear(8, 5), closed, everywhere

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.first(x).tanh())
        return y.masked_fill(torch.arange(5) >= (0 if self.everywhere else 4), self.closed)


@pytest.mark.parametrize("closed", [float("-inf"), float("nan")])
def test_outputs_that_are_not_finite_in_both_networks_agree(closed: float) -> None:
    verify_cuts(job_of(seeded(lambda: Closed(closed)), rand(4, 12)))


def test_a_network_that_computes_no_finite_output_is_refused() -> None:
    job = job_of(seeded(lambda: Closed(float("nan"), everywhere=True)), rand(4, 12))

    with pytest.raises(ModelError, match=r"output 0\b.*finite"):
        verify_cuts(job)


def test_a_value_that_is_finite_in_only_one_network_is_a_difference() -> None:
    from ist.checks.compared import distance

    nothing, infinite = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")])

    assert distance(nothing, nothing) == distance(infinite, infinite) == 0
    assert not distance(nothing, torch.ones(2)) <= 1e9
    assert not distance(infinite, torch.ones(2)) <= 1e9
    assert not distance(infinite, -infinite) <= 1e9


class Ghost(nn.Module):
    """Ghost batch norm: normalizes each eight samples separately."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in x.chunk(len(x) // 8)])


def test_a_network_that_needs_more_than_two_samples_gets_a_training_batch() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 9), Ghost(9), nn.ReLU(), nn.Linear(9, 5)))
    data = TensorDataset(rand(64, 12), torch.zeros(64, dtype=torch.int64))

    job = make_job(small_config(train__batch_size=16), model, lambda: model, data, None, F.cross_entropy)

    verify_cuts(job)
    assert [group.size for group in job.split.groups] == [9]
    assert len(job.task.example) == 16
    with pytest.raises(ModelError, match="chunks"):
        make_job(small_config(train__batch_size=4), model, lambda: model, data, None, F.cross_entropy)
