"""Identity 3: one worker is plain training, bit for bit, for every optimizer, schedule and `train.optimizer_state`."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from ist.api import train
from ist.errors import ConfigError, DataError
from ist.models.mlp import MLP
from ist.runs.execute import execute
from tests.conftest import assert_same, clone, data, job_for, naming, plain_loop
from tests.networks import NETWORKS, seeded

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "Adagrad": {"lr": 0.01, "initial_accumulator_value": 0.1},
    "Adadelta": {"lr": 0.5},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "Rprop": {"lr": 0.01},
}


def run(job: Any) -> None:
    execute(job, progress=False)


@pytest.mark.parametrize("state", ["carried", "kept"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_worker_whose_state_is_not_reset_is_plain_training_bit_for_bit(optimizer: str, state: str) -> None:
    ours, plain = (seeded(NETWORKS["two hidden layers, batch norm"]) for _ in range(2))
    args = OPTIMIZERS[optimizer]
    job = job_for(
        ours,
        train__workers=1,
        train__rounds=3,
        train__optimizer={"name": optimizer, "args": args},
        train__optimizer_state=state,
        train__running_statistics="carried",
        checkpoint__every=100,
    )

    run(job)
    plain_loop(plain, job, getattr(torch.optim, optimizer)(plain.parameters(), **args))

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))


@pytest.mark.parametrize("network", NETWORKS)
def test_one_worker_in_one_round_is_plain_training_on_every_network(network: str) -> None:
    ours, plain = (seeded(NETWORKS[network]) for _ in range(2))
    job = job_for(ours, train__workers=1, train__rounds=1, train__local_steps=9, train__running_statistics="carried")

    run(job)
    plain_loop(plain, job, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9))

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))


SCHEDULES: dict[str, tuple[dict[str, Any], Any]] = {
    "CosineAnnealingLR": ({"T_max": "total_steps"}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9)),
    "StepLR": ({"step_size": 4}, lambda o: torch.optim.lr_scheduler.StepLR(o, 4)),
    "OneCycleLR": (
        {"max_lr": 0.2, "total_steps": "total_steps"},
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=10),
    ),
    "LinearLR": ({}, lambda o: torch.optim.lr_scheduler.LinearLR(o)),
    "ExponentialLR": ({"gamma": 0.9}, lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_runs_over_the_whole_run_as_in_a_plain_loop(schedule: str) -> None:
    ours, plain = (seeded(NETWORKS["no batch norm"]) for _ in range(2))
    args, make = SCHEDULES[schedule]
    if schedule == "OneCycleLR":
        args = {**args, "total_steps": 10}  # the plain loop below steps it once more at the end
    job = job_for(
        ours,
        train__workers=1,
        train__rounds=3,
        train__optimizer_state="carried",
        train__schedule={"name": schedule, "args": args},
    )

    run(job)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    plain_loop(plain, job, optimizer, make(optimizer))

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))


def test_reset_state_differs_from_carried_state_after_the_first_round() -> None:
    finals = []
    for state in ("reset", "carried"):
        model = seeded(NETWORKS["no batch norm"])
        run(job_for(model, train__rounds=2, train__optimizer_state=state))
        finals.append(model.output.weight.detach())

    assert not torch.equal(finals[0], finals[1])


def test_without_test_data_the_network_still_gets_statistics_that_fit_it() -> None:
    model = seeded(lambda: MLP([12, 48, 48, 5]))
    train(model, data(2000), workers=2, local_steps=10, epochs=10, progress=False)
    inputs, targets = data(400, seed=5).tensors

    model.eval()
    accuracy = (model(inputs).argmax(dim=1) == targets).float().mean()

    assert accuracy > 0.75


@pytest.mark.system
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_regression_by_several_workers_has_the_right_scale(batch_norm: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 8, generator=generator)
    targets = (inputs[:, :1] * 2 + inputs[:, 1:2]).abs()
    model = seeded(lambda: MLP([8, 64, 64, 1], batch_norm=batch_norm))

    train(
        model, TensorDataset(inputs, targets), loss="mse_loss", workers=4, local_steps=20, rounds=40, progress=False,
        optimizer="Adam", optimizer_args={"lr": 3e-3},
    )  # fmt: skip

    model.eval()
    error = nn.functional.mse_loss(model(inputs), targets)
    assert error < 0.25 * targets.var()


@pytest.mark.parametrize("in_loader", [False, True])
def test_a_list_of_samples_is_a_data_set(in_loader: bool) -> None:
    of_tensors, of_samples = seeded(NETWORKS["no batch norm"]), seeded(NETWORKS["no batch norm"])
    samples: Any = [data()[row] for row in range(len(data()))]
    if in_loader:
        samples = DataLoader(samples, batch_size=32, shuffle=True)

    train(of_tensors, data(), workers=2, local_steps=3, rounds=2, progress=False)
    train(of_samples, samples, workers=2, local_steps=3, rounds=2, progress=False)

    assert_same(clone(of_tensors.state_dict()), clone(of_samples.state_dict()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((torch.zeros(4, 2), torch.zeros(4)), "data is a tuple.*TensorDataset"),
        ([torch.zeros(4, 2), torch.zeros(4)], "data is a list.*TensorDataset"),
        ([{"x": torch.zeros(2)}], "list.*dict.*pair"),
        (DataLoader(data(), drop_last=True), "data is a DataLoader with drop_last"),
        (TensorDataset(torch.zeros(4, 12)), "TensorDataset.*tuple.*pair"),
    ],
)
def test_data_other_than_a_data_set_of_pairs_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train(seeded(NETWORKS["no batch norm"]), wrong, workers=2, rounds=1)
    with pytest.raises(DataError, match=message.replace("data is", "test_data is")):
        train(seeded(NETWORKS["no batch norm"]), data(), test_data=wrong, workers=2, rounds=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"exchange": "int8"}, ["exchange is 'int8'", "ist.Exchange(...)", "mapping"]),
        ({"pool_options": ["cpu"]}, ["pool_options is ['cpu']", "mapping"]),
        ({"data_options": {"shufle": "global"}}, ["'data.shufle'", "'shuffle'"]),
        ({"optimizer": nn.Linear}, ["optimizer is the class Linear", "torch.optim"]),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])},
            ["optimizer is a SGD", "ist.Optimizer(name='SGD'", "lambda named: SGD(named.values(), ...)"],
        ),
        ({"schedule": nn.Linear}, ["schedule is the class Linear", "torch.optim.lr_scheduler", "ist.Schedule("]),
        (
            {"schedule": lr_scheduler.ConstantLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))},
            [
                "schedule is a ConstantLR",
                "ist.Schedule(name='ConstantLR'",
                "lambda optimizer: ConstantLR(optimizer, ...)",
            ],
        ),
        ({"loss": nn.CrossEntropyLoss}, ["loss is the class CrossEntropyLoss", "CrossEntropyLoss()"]),
    ],
)
def test_arguments_of_the_wrong_type_are_refused_by_name(wrong: Any, message: list[str]) -> None:
    with pytest.raises(ConfigError, match=naming(*message)):
        train(seeded(NETWORKS["no batch norm"]), data(), workers=2, rounds=1, **wrong)


def test_outputs_and_targets_of_shapes_that_torch_would_broadcast_are_refused() -> None:
    inputs = torch.randn(60, 12)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))

    with pytest.raises(ConfigError, match="Using a target size .* that is different to the input size"):
        train(model, TensorDataset(inputs, inputs[:, 0]), loss="mse_loss", workers=2, rounds=1)
    train(model, TensorDataset(inputs, inputs[:, :1]), loss="mse_loss", workers=2, rounds=1, progress=False)


def test_accuracy_of_targets_that_are_not_class_numbers_is_refused() -> None:
    inputs = torch.randn(60, 12)
    data, model = TensorDataset(inputs, inputs[:, :1]), nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1))

    with pytest.raises(
        ConfigError, match=naming("'accuracy'", "class numbers", "set evaluate.metric to 'rmse' or 'none'")
    ):
        train(
            model, data, loss="mse_loss", workers=2, rounds=1, test_data=data, evaluate_options={"metric": "accuracy"}
        )


def test_frozen_parameters_do_not_change_with_carried_state() -> None:
    model = seeded(NETWORKS["no batch norm"])
    model.linear_1.requires_grad_(requires_grad=False)
    before = clone(model.state_dict())

    run(job_for(model, train__optimizer_state="carried"))

    assert torch.equal(model.linear_1.weight, before["linear_1.weight"])
    assert not torch.equal(model.linear_2.weight, before["linear_2.weight"])


def test_training_does_not_change_the_callers_number_of_threads() -> None:
    torch.set_num_threads(2)

    train(seeded(NETWORKS["no batch norm"]), data(), workers=2, local_steps=1, rounds=1, progress=False)

    assert torch.get_num_threads() == 2


def test_the_python_api_trains_in_place_and_learns() -> None:
    model = seeded(lambda: MLP([12, 48, 48, 5]))
    before = clone(model.state_dict())

    result = train(model, data(2000), test_data=data(400, seed=5), workers=3, local_steps=10, epochs=10, progress=False)

    assert result.model is model
    assert result.is_coordinator
    assert not torch.equal(model.output.weight, before["output.weight"])
    assert result.history[-1]["accuracy"] > 0.75  # chance is about 0.2
    assert result.history[-1]["samples"] == 2000 * 10
