"""Parameters with sparse gradients, complex ones, and arguments that are functions: they work, or are refused by
name."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ist.api import train
from ist.config.base import plain, run_fingerprint
from ist.config.load import dump_config, load_config
from ist.errors import ConfigError
from ist.subnet.job import assignments
from ist.tensors import is_finite
from ist.transport.endpoints import message_layouts
from tests.conftest import assert_same, clone, data, job_for, plain_loop, small_config
from tests.networks import NETWORKS, seeded
from tests.training.test_one_worker import run


class Bags(nn.Module):
    """A network with only embeddings, whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = (nn.EmbeddingBag(30, 5, mode="sum", sparse=True) for _ in range(2))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.hidden(numbers) + self.last(numbers)  # type: ignore[no-any-return]


class SparseFirst(nn.Module):
    """An embedding with sparse gradients before a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8, sparse=True)
        self.layers = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.layers(self.embedding(numbers).flatten(1))  # type: ignore[no-any-return]


class Complex(nn.Module):
    """A hidden layer of real units, and complex weights behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(12, 16), nn.Linear(6, 5)
        self.waves = nn.Parameter(torch.randn(16, 6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.last((torch.relu(self.hidden(x)).to(torch.complex64) @ self.waves).abs())  # type: ignore[no-any-return]


def numbers() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randint(30, (100, 4), generator=generator), torch.randint(5, (100,), generator=generator)
    )


CASES = [
    (Bags, numbers, "SparseAdam", {"lr": 0.01}, "kept"),
    (SparseFirst, numbers, "SGD", {"lr": 0.1}, "reset"),
    (SparseFirst, numbers, "Adagrad", {"lr": 0.1}, "carried"),
    (Complex, data, "Adam", {"lr": 0.01}, "carried"),
    (Complex, data, "SGD", {"lr": 0.01, "momentum": 0.9}, "kept"),
]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(("build", "dataset", "optimizer", "args", "state"), CASES)
def test_one_worker_trains_sparse_and_complex_parameters_as_a_plain_loop_does(
    build: Any, dataset: Any, optimizer: str, args: dict[str, Any], state: str
) -> None:
    ours, by_hand = (seeded(build) for _ in range(2))
    job = job_for(
        ours,
        dataset(),
        train__workers=1,
        train__rounds=3,
        train__optimizer={"name": optimizer, "args": args},
        train__optimizer_state=state,
    )
    made = getattr(torch.optim, optimizer)(by_hand.parameters(), **args)

    run(job)
    plain_loop(by_hand, job, made)

    assert_same(clone(ours.state_dict()), clone(by_hand.state_dict()))


def test_complex_weights_are_cut_and_merged() -> None:
    model = seeded(Complex)
    job = job_for(model, train__workers=4, exchange={"down": "int8", "up": "int8", "values": "deltas"})
    before = clone(model.state_dict())

    run(job)

    assert message_layouts(job.split, job.config.exchange, assignments(job).cuts(0)[0]).plain.specs["waves"].shape == (
        4,
        2,
    )
    moved = (model.waves != before["waves"]).float().mean()
    assert moved > 0.5  # weights of hidden units that are off for all samples do not move


def test_momentum_of_sparse_gradients_is_carried() -> None:
    model = seeded(SparseFirst)
    run(job_for(model, numbers(), train__optimizer_state="carried"))  # SGD with momentum


def test_optimizer_state_of_sparse_adam_that_cannot_be_carried_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'carried'.*SparseAdam.*'step'.*'reset'"):
        train(
            Bags(), numbers(), workers=1, rounds=1, optimizer="SparseAdam", train_options={"optimizer_state": "carried"}
        )
    with pytest.raises(ConfigError, match="SparseAdam.*dense gradients"):
        train(seeded(NETWORKS["no batch norm"]), data(), workers=1, rounds=1, optimizer="SparseAdam")


def test_non_finite_complex_numbers_are_detected() -> None:
    assert is_finite([torch.tensor([1 + 2j])])
    assert not is_finite([torch.tensor([complex(1, math.nan)])])


def falling(step: int) -> float:
    return 0.9**step


class Callable:
    def __call__(self, step: int) -> float:
        return 0.9**step


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (falling, f"{__name__}:falling"),
        (lambda step: 0.9**step, f"{__name__}:<lambda>"),
        (Callable(), f"{__name__}:Callable"),
        (Callable, f"{__name__}:Callable"),
        (torch.float16, "torch:dtype"),
        ((0.9, 0.99), [0.9, 0.99]),
        (np.float64(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (functools.partial(falling, 3), {"partial": f"{__name__}:falling", "args": [3], "keywords": {}}),
    ],
)
def test_an_argument_is_written_in_a_form_that_yaml_can_represent(value: Any, expected: Any) -> None:
    assert plain(value) == expected


def test_a_schedule_of_functions_is_written_into_the_run_folder_and_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "workers": 2, "local_steps": 2, "schedule": "LambdaLR", "schedule_args": {"lr_lambda": falling},
        "run_dir": tmp_path / "run", "progress": False,
    }  # fmt: skip

    result = train(seeded(NETWORKS["no batch norm"]), data(), rounds=3, **options)
    again = train(seeded(NETWORKS["no batch norm"]), data(), rounds=3, resume=True, **options)

    assert load_config(tmp_path / "run/config.yaml").train.schedule.args == {"lr_lambda": f"{__name__}:falling"}  # type: ignore[union-attr]
    assert_same(clone(result.model.state_dict()), clone(again.model.state_dict()))


def test_configurations_with_the_same_function_at_different_addresses_are_equal() -> None:
    def config() -> Any:
        return small_config(train__schedule={"name": "LambdaLR", "args": {"lr_lambda": lambda step: 0.9**step}})

    assert run_fingerprint(config()) == run_fingerprint(config())
    assert dump_config(config()) == dump_config(config())
