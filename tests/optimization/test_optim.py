"""Optimizers and schedules by name, and the optimizer state that can be carried."""

from typing import Any

import pytest
import torch
from torch import nn

from ist.config.schema import Optimizer, Schedule
from ist.errors import ConfigError
from ist.loops.part import completed
from ist.monitoring.meter import Meter
from ist.optimization import optimizers as optim
from ist.optimization.factory import optimizer_factory
from ist.optimization.step_settings import schedule_settings
from ist.pools.inline import InlinePool
from ist.training.coordinator import Coordinator
from tests.conftest import job_for
from tests.networks import NETWORKS, seeded


def slots_of(spec: Optimizer) -> optim.StateSlots:
    return optim.state_slots(spec, optimizer_factory(spec), {"w": 2})


def made(spec: Optimizer, named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return optimizer_factory(spec)(named)


REFUSED = {"Adafactor": "row_var", "ASGD": "ax"}


def test_every_optimizer_of_torch_is_carried_or_refused_by_name() -> None:
    carried, refused = set(), set()
    for name, cls in vars(torch.optim).items():
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            continue
        if name in ("Optimizer", "LBFGS", "SparseAdam"):
            continue
        spec = Optimizer(name=name, args={"lr": 0.1} if name == "SGD" else {})
        if name in REFUSED:
            with pytest.raises(ConfigError, match=f"'{REFUSED[name]}'.*'reset'"):
                slots_of(spec)
            refused.add(name)
        else:
            slots_of(spec)
            carried.add(name)

    assert refused == REFUSED.keys() & vars(torch.optim).keys()
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad"} <= carried


def test_lbfgs_is_refused_because_it_needs_a_closure() -> None:
    with pytest.raises(ConfigError, match=r"'train\.optimizer\.name'.*'LBFGS'"):
        made(Optimizer(name="LBFGS"), {"w": nn.Parameter(torch.zeros(1))})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Optimizer(name="SDG"), r"'train\.optimizer\.name'.*'SDG'.*'SGD'"),
        (Optimizer(name="SGD", args={"lr": -1.0}), r"'train\.optimizer\.args'.*Invalid learning rate: -1\.0"),
        (Optimizer(name="SGD", args={"lrr": 1.0}), r"'train\.optimizer\.args'.*SGD.*'lrr'"),
        (Optimizer(name="collections:OrderedDict"), r"'collections:OrderedDict'.*torch\.optim\.Optimizer"),
    ],
)
def test_a_wrong_optimizer_is_refused_with_its_key(spec: Optimizer, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(spec, {"w": nn.Parameter(torch.zeros(1))})


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule(name="ReduceLROnPlateau"), r"'train\.schedule\.name'.*'ReduceLROnPlateau'.*metric"),
        (Schedule(name="StepLR"), r"'train\.schedule\.args'.*StepLR.*step_size"),
        (Schedule(name="CosineLR"), r"'train\.schedule\.name'.*'CosineLR'.*'\w*Cosine\w*LR'|'Cosine"),
    ],
)
def test_a_wrong_schedule_is_refused_with_its_key(schedule: Schedule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule_settings(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), schedule, 10)


def test_loading_stored_state_gives_the_same_optimizer_state() -> None:
    spec = Optimizer(name="Adam")
    slots = slots_of(spec)
    named = {"w": nn.Parameter(torch.randn(3, 2))}
    from ist.tensors import TensorSpec

    specs = optim.carried_specs(slots, {"w": TensorSpec((3, 2), torch.float32)})
    first = made(spec, named)
    named["w"].grad = torch.randn(3, 2)
    first.step()
    state = optim.initial_state(slots, specs, torch.device("cpu"))

    optim.store_state(first, named, slots, state)
    second = made(spec, named)
    optim.load_state(second, named, slots, state)

    expected: Any = first.state[named["w"]]
    for key, value in second.state[named["w"]].items():
        assert torch.equal(value, expected[key]), key


def test_plain_numbers_in_optimizer_state_stay_plain_numbers() -> None:
    named = {"w": nn.Parameter(torch.zeros(3, 2))}
    first, second = (made(Optimizer(name="SGD", args={"lr": 0.1}), named) for _ in range(2))
    state = {"step": 7, "rate": 0.5, "warm": True, "moment": torch.ones(3, 2)}  # SparseAdam's step is a plain number
    first.state[named["w"]].update(state)

    optim.restore_named_state(second, named, optim.named_state(first, named))

    found = second.state[named["w"]]
    assert {key: found[key] for key in ("step", "rate", "warm")} == {"step": 7, "rate": 0.5, "warm": True}
    assert type(found["step"]) is int
    assert torch.equal(found["moment"], state["moment"])


def test_state_of_a_parameter_without_gradients_is_carried_too() -> None:
    model = seeded(NETWORKS["no batch norm"])
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    job, meter = (
        job_for(model, train__optimizer={"name": "Adam", "args": {}}, train__optimizer_state="carried"),
        Meter(),
    )
    made = Coordinator(job, InlinePool(job, torch.device("cpu"), meter), model, meter)

    for round_number in range(3):
        completed(made.train_round(round_number))

    state = made.checkpoint_state()
    assert torch.equal(state["idle"], torch.ones(3))
    assert not state["exp_avg@idle"].any()
    assert bool(state["exp_avg@linear_1.weight"].any())
