"""`ist.split`: it returns the split that training uses, and prints the output of `ist inspect`."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ist
from ist.errors import ConfigError, DataError, ModelError
from ist.runs.split import split_of
from tests.conftest import data, job_for

EXAMPLE = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5)
    )


def test_every_neuron_has_one_owner_and_modules_hold_the_values_of_their_neurons() -> None:
    model = network()
    split = ist.split(model, EXAMPLE, workers=4, rounds=3, seed=5)

    for round_number in range(3):
        held = [split.neurons(worker, round_number) for worker in range(4)]
        for group in split.groups:
            owned = np.concatenate([neurons[group.name] for neurons in held])
            assert sorted(owned) == list(range(group.neurons))
        module: Any = split.module(2, round_number)
        first, second = held[2]["0"], held[2]["3"]
        assert torch.equal(module[3].weight, model[3].weight[second][:, first])
        assert torch.equal(module[1].running_var, model[1].running_var[first])
        assert module(EXAMPLE).shape == (2, 5)

    assert [group.neurons_per_worker for group in split.groups] == [(6, 6, 6, 6), (5, 5, 5, 5)]
    assert not torch.equal(split.module(2, 0)[0].weight, split.module(2, 1)[0].weight)  # type: ignore[index]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"exchange": ist.Exchange(up="int4", values="deltas"), "partition": ist.Partition(strategy="rolling", keep=0.5)},
        {"optimizer": "Adam", "optimizer_state": "carried"},
        {"recipe": ist.Recipe(stages=[ist.Stage(), ist.Stage(rounds=1, keep=1)])},
        {"pool": ist.Pool(coordinator="dedicated")},
    ],
)  # fmt: skip
def test_bytes_and_neurons_are_those_of_training(settings: dict[str, Any]) -> None:
    common = {"workers": 2, "local_steps": 2, "rounds": 3, "seed": 4, **settings}

    split = ist.split(network(), EXAMPLE, **common)
    result = ist.train(network(), data(), batch_size=8, progress=False, **common)

    assert result.history[-1]["sent_bytes"] == split.inspection.bytes_of_run
    grown = result.history[1]["sent_bytes"] - result.history[0]["sent_bytes"]
    assert grown == split.bytes_per_round.ist
    assert [share.sent_bytes for share in split.shares][1:] == result.history[1]["bytes_to_worker"][1:]


def test_a_configuration_and_python_give_the_same_split() -> None:
    job = job_for(network(), train__rounds=3)
    of_job = split_of(job)

    split = ist.split(
        network(), EXAMPLE, workers=4, local_steps=3, rounds=3, seed=3, optimizer=job.config.train.optimizer
    )

    lacking = {"model": "mlp", "steps_per_epoch": job.schedule.sampler.steps_per_epoch}
    assert {**split.as_dict(), **lacking} == of_job.as_dict()
    shown, tables = str(split), str(of_job).partition("Neuron groups")[2]
    assert shown.startswith("Sequential: 965 parameters")
    assert shown.partition("Neuron groups")[2] == tables != ""
    assert "\x1b" not in str(split)


def test_a_split_does_not_change_the_network_or_the_generators() -> None:
    model = network()
    model[1].eval()
    compiled = torch.compile(model, backend="eager")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()

    with pytest.warns(UserWarning, match="compile"):
        split = ist.split(compiled, EXAMPLE, workers=2)  # type: ignore[arg-type]
    module: Any = split.module(0)

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [m.training for m in (model, model[0], model[1])] == [True, True, False]
    with torch.no_grad():
        model[0].weight.zero_()
    assert module[0].weight.abs().sum() > 0, "a copy"
    assert split.module(0)[0].weight.abs().sum() == 0, "the values as they are now"  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"workers": 30}, ModelError, "'0' has 24 neurons.*30 workers"),
        ({"partition": ist.Exchange()}, ConfigError, r"^partition is .*ist\.Partition"),
        ({"partition": {"keep": 2.0}}, ConfigError, "^ist.split: 'partition.keep' is 2.0"),
        ({"example": [1, 2]}, DataError, "example is a list without a tensor"),
        ({"example": torch.ones(2, 7)}, ModelError, "7"),
        ({"batch_size": 3}, TypeError, r"split\(\) got an unexpected keyword argument 'batch_size'"),
        ({"pool_options": {}}, TypeError, "'pool_options'"),
    ],
)
def test_invalid_arguments_and_networks_that_cannot_be_split_are_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        ist.split(network(), **{"example": EXAMPLE, "workers": 2, **arguments})


def test_a_worker_or_round_that_does_not_exist_is_refused() -> None:
    split = ist.split(network(), EXAMPLE, workers=2, rounds=3)

    for arguments, named in (((2,), "worker is 2.*0 to 1"), ((-1,), "worker is -1"), ((0, 3), "round_number is 3.*2")):
        with pytest.raises(ConfigError, match=named):
            split.module(*arguments)
