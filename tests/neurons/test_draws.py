"""Networks with random draws in their forward: submodel and full network draw the same values in a comparison."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ist.checks.verify import verify_cuts
from ist.errors import ModelError
from ist.neurons.tracing.shared_draws import Draws, fixed_draws, with_same_draws
from tests.networks import seeded
from tests.neurons.networks import rand
from tests.neurons.test_neurons import job_of

D = torch.distributions


class Hidden(nn.Module):
    """Applies a random function to each of its hidden layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(6, 5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.second(self.function(self.first(x)).tanh())))


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda h: h * torch.rand(h.shape, dtype=h.dtype),
    "randn of one dim": lambda h: h + torch.randn(h.shape[1], dtype=h.dtype),
    "rand of a column": lambda h: h * torch.rand(h.shape[0], 1),
    "rand_like and a comparison": lambda h: h * (torch.rand_like(h) < 0.5),
    "randn_like": lambda h: h + torch.randn_like(h),
    "randint": lambda h: h * torch.randint(1, 4, h.shape),
    "normal of a size": lambda h: h + torch.normal(0.0, 1.0, h.shape, dtype=h.dtype),
    "normal of tensors": lambda h: h + torch.normal(h.detach(), h.detach().exp()),
    "normal_": lambda h: h + torch.empty_like(h).normal_(),
    "uniform_": lambda h: h + h.new_empty(h.shape).uniform_(-1, 1),
    "exponential_": lambda h: h + torch.empty_like(h).exponential_(2.0),
    "cauchy_": lambda h: h + torch.empty_like(h).cauchy_(),
    "log_normal_": lambda h: h + torch.empty_like(h).log_normal_(),
    "geometric_": lambda h: h + torch.empty_like(h).geometric_(0.3),
    "random_": lambda h: h + torch.empty_like(h).random_(0, 3),
    "bernoulli": lambda h: h * torch.bernoulli(h.sigmoid()),
    "bernoulli_": lambda h: h * torch.empty_like(h).bernoulli_(0.5),
    "poisson": lambda h: h + torch.poisson(h.exp()),
    "rrelu": lambda h: F.rrelu(h, 0.1, 0.9, training=True),
    "gamma": lambda h: D.Gamma(h.exp(), 1.0, validate_args=False).rsample(),
    "binomial": lambda h: h * D.Binomial(5, logits=h, validate_args=False).sample(),
}  # fmt: skip


@pytest.mark.parametrize("function", ELEMENTWISE.values(), ids=ELEMENTWISE.keys())
def test_hidden_units_that_are_combined_with_random_numbers_are_split(function: Callable[[Tensor], Tensor]) -> None:
    job = job_of(seeded(lambda: Hidden(function)), rand(4, 12))

    verify_cuts(job)
    assert [group.size for group in job.split.groups] == [8, 6]


class Sampled(nn.Module):
    """Its middle layer computes the parameters of a distribution, whose samples cannot be split."""

    def __init__(self, sample: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(*s) for s in ((12, 8), (8, 6), (6, 7), (7, 5)))
        self.sample = sample

    def forward(self, x: Tensor) -> Tensor:
        parameters = self.second(self.first(x).tanh())
        drawn = self.sample(parameters - parameters.mean(1, keepdim=True))
        return self.last(self.third(drawn).tanh())


SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda p: D.Normal(p, p.exp()).rsample(),
    "categorical": lambda p: F.one_hot(D.Categorical(logits=p).sample(), 6) * p,
    "multinomial": lambda p: p + torch.multinomial(p.softmax(1), 3)[:, :1],
    "dirichlet": lambda p: D.Dirichlet(p.exp()).rsample(),
    "beta": lambda p: D.Beta(p.exp(), p.exp() + 1).rsample(),
    "gumbel softmax": lambda p: F.gumbel_softmax(p, hard=True),
    "permutation of samples": lambda p: p[torch.randperm(len(p))],
    "permutation of units": lambda p: p[:, torch.randperm(p.shape[1])],
    "sorted noise": lambda p: p.gather(1, torch.rand(p.shape).argsort(1)),
    "student": lambda p: D.StudentT(3.0, p).rsample(),
    "uniform": lambda p: D.Uniform(p, p + 1).rsample(),
    "python": lambda p: p * random.random(),
    "numpy": lambda p: p * float(np.random.rand()),
    "python's branch": lambda p: p if random.random() < 0.5 else p.exp(),
    "torch's branch": lambda p: p if torch.rand(()) < 0.5 else p.exp(),
}  # fmt: skip


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
def test_layers_before_and_after_a_sampled_distribution_are_split(sample: Callable[[Tensor], Tensor]) -> None:
    job = job_of(seeded(lambda: Sampled(sample)), rand(4, 12))

    verify_cuts(job)
    assert [group.size for group in job.split.groups] == [8, 7]


class Counting(nn.Module):
    """Makes one draw per hidden unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h) * sum(torch.rand(()) for _ in range(h.shape[1]))


def test_a_network_whose_draws_depend_on_its_width_is_refused_with_the_operator_and_the_line() -> None:
    job = job_of(seeded(Counting), rand(4, 12))

    with pytest.raises(ModelError, match=r"4 random draws .* 8: .* rand at .*test_draws\.py:\d+"):
        verify_cuts(job)


def test_draws_of_different_operators_are_refused() -> None:
    with pytest.raises(ModelError, match=r"\brand\b.*\(2,\).*\brandn\b.*\(2,\)"):
        with_same_draws(0, [lambda: torch.rand(2), lambda: torch.randn(2)])


def test_draws_vary_along_dims_of_one_size_and_are_equal_along_others() -> None:
    (wide, narrow), is_random = with_same_draws(0, [lambda: torch.rand(3, 8), lambda: torch.rand(3, 2)])

    assert is_random
    assert torch.equal(wide[:, :2], narrow)
    assert (wide == wide[:, :1]).all()
    assert len(wide[:, 0].unique()) == 3


@pytest.mark.parametrize(
    ("draw", "low", "high"),
    [
        (lambda: torch.rand(400, dtype=torch.float64), 0.5, 1 / 12),
        (lambda: torch.randn(400, dtype=torch.float64), 0, 1),
        (lambda: torch.empty(400).exponential_(2), 0.5, 0.25),
        (lambda: torch.bernoulli(torch.full((400,), 0.3)), 0.3, 0.21),
        (lambda: torch.randint(0, 3, (400,)).double(), 1, 2 / 3),
        (lambda: torch.multinomial(torch.tensor([0.2, 0.8]), 400, replacement=True).double(), 0.8, 0.16),
        (lambda: torch.empty(400).log_normal_(0, 0.1), 1.005, 0.0102),
    ],
)
def test_values_have_the_mean_and_the_variance_of_their_distribution(
    draw: Callable[[], Tensor], low: float, high: float
) -> None:
    with fixed_draws(Draws(0)):
        values = draw()

    # Of 400 samples: four standard errors.
    assert abs(float(values.mean()) - low) < 4 * (high / 400) ** 0.5
    assert float(values.var()) == pytest.approx(high, rel=0.35)


def test_a_comparison_restores_the_state_of_all_generators() -> None:
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected: Any = random.random(), np.random.rand(), torch.rand(())
    random.seed(5), np.random.seed(5), torch.manual_seed(5)

    with fixed_draws(Draws(3)):
        random.random(), np.random.rand(), torch.rand(2)

    assert (random.random(), np.random.rand(), torch.rand(())) == expected
