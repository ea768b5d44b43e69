"""Side effects of users' networks: frozen norms, changing buffers, unusual parameters; and clear errors."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import ist
from ist.errors import DataError, ISTError, ModelError
from ist.subnet.job import assignments
from tests.conftest import data
from tests.networks import Router, seeded
from tests.neurons.networks import Recurrent, rand
from tests.neurons.test_neurons import job_of


def train(model: nn.Module, dataset: Any = None, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"workers": 2, "local_steps": 3, "rounds": 2, "batch_size": 10, "progress": False}
    return ist.train(model, dataset or data(60), **settings | options).model


class FrozenNorm(nn.Module):
    """Puts its batch norm into evaluation mode in `train`, as in fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)
        self.norm.running_mean.fill_(3.0)
        self.norm.running_var.fill_(4.0)

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


def test_a_norm_that_its_network_puts_into_evaluation_mode_does_not_change_its_statistics() -> None:
    model = FrozenNorm()
    job = job_of(model, rand(2, 12))
    submodel = job.split.module(assignments(job).of(0)[0], torch.device("cpu"))

    trained = train(model, test_data=data(20, seed=1))

    assert "norm.running_mean" in job.split.specs
    assert not submodel.norm.training
    assert (trained.norm.running_mean == 3).all()
    assert (trained.norm.running_var == 4).all()


class Counting(nn.Module):
    """Replaces a buffer in its forward, instead of writing to it."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 5)
        self.register_buffer("count", torch.zeros(1), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count = self.count + 1
        return self.last(self.first(x).relu())


def test_a_buffer_that_is_replaced_in_the_forward_is_merged() -> None:
    assert train(Counting()).count == 6


class Replacing(nn.Module):
    """Replaces the memory of a parameter and of a buffer in every forward, in training and in evaluation mode."""

    def __init__(self, change: Any = lambda tensor: tensor.clone()) -> None:
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(12, 8), nn.Linear(8, 5), nn.Parameter(torch.ones(5))
        self.register_buffer("count", torch.zeros(1))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data = self.change(self.scale.data)
        self.count = self.count + 1
        return self.last(self.first(x).relu()) * self.scale


KEPT = {"optimizer_state": "kept"}
CARRIED = {"optimizer_state": "carried"}


@pytest.mark.parametrize("options", [{"workers": 1, "train_options": KEPT}, {"train_options": CARRIED}, {}])
def test_a_parameter_whose_data_is_replaced_in_the_forward_trains_as_one_that_is_not(options: Any) -> None:
    options = {"test_data": data(20), "rounds": 3, "optimizer_args": {"lr": 0.1, "momentum": 0.9}} | options

    found = train(seeded(Replacing), **options).state_dict()
    expected = train(seeded(lambda: Replacing(lambda tensor: tensor)), **options).state_dict()

    assert not torch.equal(expected["scale"], seeded(Replacing).state_dict()["scale"])
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert found["count"] == 9 + 3  # nine steps, and an evaluation after every three steps


def test_a_parameter_that_the_forward_casts_to_float32_is_trained_and_keeps_its_dtype() -> None:
    model = seeded(Router)
    before = model.router.weight.detach().clone()

    trained = train(model, test_data=data(20), workers=1)

    assert trained.router.weight.dtype == torch.bfloat16
    assert (trained.router.weight - before).abs().max() > 1e-3
    with pytest.raises(ModelError, match=r"'router\.weight'.*torch\.bfloat16.*torch\.float32.*'train"):
        train(seeded(Router), workers=1, train_options=CARRIED, optimizer_args={"lr": 0.1, "momentum": 0.9})


class Growing(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.count = torch.cat([self.count, self.count])
        return self.last(self.first(x).relu())


def test_a_buffer_that_the_forward_makes_longer_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'count'.*\(1,\).*\(2,\)"):
        train(Growing())


def test_a_non_persistent_buffer_that_changes_is_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match="'count'.*persistent"):
        train(Counting(persistent=False))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.filterwarnings("ignore:RNN module weights")  # cuDNN gathers them at every call: they lie in the message
def test_a_projected_lstm_is_trained() -> None:
    class Projected(Recurrent):
        def __init__(self) -> None:
            super().__init__(nn.LSTM, proj_size=4)
            self.out = nn.Linear(4, 5)

    sequences = TensorDataset(torch.randn(40, 4, 6), torch.randint(5, (40,)))
    model = seeded(Projected)
    before = model.out.weight.detach().clone()

    assert not torch.equal(train(model, sequences, workers=1).out.weight, before)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Flatten(), nn.Linear(6 * 3, 8), nn.Linear(8, 5)),
        lambda: nn.Sequential(nn.Embedding(9, 6, padding_idx=0), nn.Flatten(), nn.Linear(6 * 3, 8), nn.Linear(8, 5)),
    ],
    ids=["sparse", "padding"],
)
def test_embeddings_of_every_kind_are_trained(build: Any) -> None:
    tokens = TensorDataset(torch.randint(1, 9, (40, 3)), torch.randint(5, (40,)))
    model = seeded(build)
    before = model[0].weight.detach().clone()

    assert not torch.equal(train(model, tokens, optimizer_args={"lr": 0.1}).get_parameter("0.weight"), before)


def test_parameters_without_gradients_do_not_change() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()

    assert torch.equal(train(model)[0].weight, before)


def test_two_parameters_in_the_same_memory_are_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    model[2].weight.data = model[0].weight.data

    with pytest.raises(ModelError, match=r"'0\.weight' and '2\.weight'.*decoder\.weight = encoder\.weight"):
        train(model)


Pair = namedtuple("Pair", ["x", "y"])


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Any:
        return Pair(torch.ones(12) * index / 30, torch.zeros(12)), index % 5


def test_inputs_may_be_named_tuples() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.net(x + y)

    train(Model(), Pairs())


class Failing(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 99, "expected 99 features"
        return super().forward(x)


def ragged() -> Dataset[Any]:
    class Ragged(Dataset[Any]):
        def __len__(self) -> int:
            return 30

        def __getitem__(self, index: int) -> Any:
            return torch.zeros(index + 1), 0

    return Ragged()


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 5))


PLAIN = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))


@pytest.mark.parametrize(
    ("model", "options", "kind", "message"),
    [
        (lambda: Failing(nn.Linear(12, 8), nn.Linear(8, 5)), {}, ModelError, "AssertionError: expected 99 features"),
        (lazy, {}, ModelError, r"'0\.weight'.*lazy"),
        (lambda: PLAIN, {"dataset": ragged()}, DataError, "of Ragged .*RuntimeError: stack"),
        (lambda: PLAIN, {"test_data": data(0)}, DataError, "test.*empty"),
    ],
    ids=["assertion", "lazy", "ragged", "empty test data"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_an_impossible_network_or_data_set_is_one_clear_error(
    model: Any, options: Any, kind: type[ISTError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        train(model(), **options)


def test_an_index_out_of_range_is_one_clear_error() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, 5))
    tokens = TensorDataset(torch.full((30, 3), 50), torch.zeros(30, dtype=torch.int64))

    with pytest.raises(ModelError, match="index out of range"):
        train(model, tokens)
