"""A network's modules train in the modes that the user gave them, and have these modes afterwards."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ist
from ist.errors import ISTError, ModelError
from ist.evaluation.evaluate import evaluate, reestimate_statistics
from ist.network.modes import enter_training_modes, modes_of, preserve_modes, set_modes
from ist.subnet.job import assignments
from tests.conftest import data, job_for
from tests.networks import seeded

CPU = torch.device("cpu")


class Adapter(nn.Linear):
    """Does more in `train` than set the mode, as an adapter that merges its weights for evaluation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.is_merged = False

    def train(self, mode: bool = True) -> "Adapter":
        self.is_merged = not mode
        return super().train(mode)


def network() -> nn.Module:
    """A network with a frozen batch norm, one that trains, a dropout that is off, and one that is on."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.9), nn.Linear(8, 6), nn.BatchNorm1d(6),
            nn.Dropout(0.5), Adapter(6, 5),
        )
    )  # fmt: skip
    model[1].running_mean.fill_(0.3)
    model[1].eval().requires_grad_(False)
    model[3].eval()
    return model


MODES = [True, True, False, True, False, True, True, True, True]


def train(model: nn.Module, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"workers": 2, "local_steps": 3, "rounds": 2, "batch_size": 10, "progress": False}
    return ist.train(model, data(60), **settings | options).model


def test_a_frozen_batch_norm_keeps_its_statistics_and_all_modules_their_modes() -> None:
    model = network()

    trained = train(model, test_data=data(20, seed=1))

    assert (trained[1].running_mean == 0.3).all()
    assert (trained[1].running_var == 1).all()
    assert (trained[5].running_mean != 0).all()  # re-estimated
    assert list(modes_of(model).values()) == MODES
    assert not trained[7].is_merged


def test_submodels_and_full_networks_train_in_the_modes_of_the_user() -> None:
    model = network()
    job = job_for(model, train__workers=2)

    submodel = job.split.module(assignments(job).of(0)[0], CPU)

    assert list(modes_of(submodel).values()) == MODES
    assert list(modes_of(job.task.build_copy()).values()) == MODES


def test_modes_are_restored_after_an_error() -> None:
    model = network()
    before = modes_of(model)

    with pytest.raises(ISTError):
        train(model, loss="mse_loss")

    assert modes_of(model) == before


def test_evaluation_runs_in_evaluation_mode_and_restores_every_mode() -> None:
    model, seen = network(), []
    model[6].register_forward_hook(lambda module, *_: seen.append(module.training))

    evaluate(model, data(20), nn.functional.cross_entropy, 10, CPU, None)
    reestimate_statistics(model, [data(20).tensors[0]])

    assert seen == [False, False, False]
    assert list(modes_of(model).values()) == MODES


def test_evaluation_that_fails_restores_every_mode_and_momentum() -> None:
    model = network()

    with pytest.raises(ModelError, match="mat1 and mat2"):
        reestimate_statistics(model, [torch.zeros(4, 99)])
    with pytest.raises(ModelError, match="mat1 and mat2"):
        evaluate(model, data(20, features=99), nn.functional.cross_entropy, 10, CPU, None)

    assert list(modes_of(model).values()) == MODES
    assert model[5].momentum == 0.1


def test_a_network_in_evaluation_mode_trains_in_it_with_a_warning() -> None:
    model = network().eval()
    model[5].running_mean.fill_(0.2)

    with pytest.warns(UserWarning, match="network .*evaluation mode"):
        train(model)

    assert not any(modes_of(model).values())
    assert (model[5].running_mean == 0.2).all()


class FreezesNorm(nn.Sequential):
    """Puts its first norm into evaluation mode in `train`, which has not been called yet."""

    def train(self, mode: bool = True) -> "FreezesNorm":
        super().train(mode)
        self[1].eval()
        return self


def test_modules_that_a_networks_own_train_freezes_are_frozen_and_modes_can_be_restored() -> None:
    model = FreezesNorm(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    model[2].eval()

    assert list(enter_training_modes(model).values()) == [True, True, False, False, True]

    set_modes(model, dict.fromkeys(modes_of(model), True))
    assert all(modes_of(model).values())


def test_modes_are_restored_by_the_modules_own_train() -> None:
    model = network()

    with preserve_modes(model):
        model.eval()
        assert model[7].is_merged

    assert not model[7].is_merged
    assert list(modes_of(model).values()) == MODES


def test_a_network_with_a_frozen_part_trains_as_in_a_plain_loop() -> None:
    model, mine = network(), network()
    for module in (model, mine):
        module[6].p = 0.0

    train(model, workers=1, local_steps=2, rounds=1, batch_size=60, optimizer_args={"lr": 0.1})
    optimizer = torch.optim.SGD([p for p in mine.parameters() if p.requires_grad], lr=0.1)
    inputs, targets = data(60).tensors
    for _ in range(2):
        optimizer.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(mine(inputs), targets)
        loss.backward()
        optimizer.step()

    for (name, found), expected in zip(model.named_parameters(), mine.parameters(), strict=True):
        # 1e-5: the batch is in another order, and so are the sums over it.
        assert torch.allclose(found, expected, atol=1e-5), name
