"""Parameter groups that a configuration describes: as in a plain loop, in every worker, and refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import ist
from ist.errors import ConfigError
from ist.runs.recorder import RunRecorder
from tests import optimizers
from tests.conftest import assert_same, clone, data, job_for, naming, plain_loop
from tests.networks import NETWORKS, seeded
from tests.runs.test_resume import PowerCutError
from tests.training.test_one_worker import run

NO_DECAY = {"match": ["*.bias", "*norm*"], "args": {"weight_decay": 0.0}}
OUTPUT = {"match": ["output.*"], "args": {"lr": 0.03}}
ADAMW = {"name": "AdamW", "args": {"lr": 0.01, "weight_decay": 0.5}, "groups": [NO_DECAY, OUTPUT]}


def network() -> nn.Module:
    return seeded(NETWORKS["two hidden layers, batch norm"])


def by_hand(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `ADAMW`, as anybody would write it."""
    named = dict(model.named_parameters())
    no_decay = [p for name, p in named.items() if name.endswith(".bias") or "norm" in name]
    return torch.optim.AdamW(
        [
            {"params": no_decay, "weight_decay": 0.0},
            {"params": [named["output.weight"]], "lr": 0.03},
            {"params": [p for name, p in named.items() if "norm" not in name and name.endswith(".weight")][:-1]},
        ],
        lr=0.01,
        weight_decay=0.5,
    )


@pytest.mark.parametrize("state", ["carried", "kept"])
@pytest.mark.parametrize("is_scheduled", [True, False])
def test_one_worker_with_groups_is_a_plain_loop_with_them(is_scheduled: bool, state: str) -> None:
    ours, plain = network(), network()
    rates = {"max_lr": [0.02, 0.03, 0.04], "total_steps": 10}
    job = job_for(
        ours,
        train__workers=1,
        train__rounds=3,
        train__optimizer=ADAMW,
        train__optimizer_state=state,
        train__running_statistics="carried",
        train__schedule={"name": "OneCycleLR", "args": rates} if is_scheduled else None,
    )

    run(job)
    optimizer = by_hand(plain)
    plain_loop(plain, job, optimizer, lr_scheduler.OneCycleLR(optimizer, **rates) if is_scheduled else None)

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))


def train(**options: Any) -> nn.Module:
    settings: dict[str, Any] = {"workers": 2, "rounds": 2, "local_steps": 2, "progress": False}
    return ist.train(network(), data(), **{**settings, **options}).model


def test_groups_are_the_same_as_objects_and_as_mappings() -> None:
    groups = [ist.ParameterGroup(**NO_DECAY), ist.ParameterGroup(**OUTPUT)]
    objects = ist.Optimizer(name="AdamW", args={"lr": 0.01, "weight_decay": 0.5}, groups=groups)

    assert_same(clone(train(optimizer=objects).state_dict()), clone(train(optimizer=ADAMW).state_dict()))


@pytest.mark.parametrize("state", ["carried", "kept", "reset"])
def test_settings_of_a_group_hold_in_every_worker(state: str) -> None:
    fixed = {"name": "SGD", "args": {"lr": 0.1}, "groups": [{"max_dims": 1, "args": {"lr": 0.0}}]}
    start = dict(network().named_parameters())

    trained = train(optimizer=fixed, optimizer_state=state, schedule={"name": "LinearLR"}, workers=3)

    for name, parameter in trained.named_parameters():
        assert torch.equal(parameter, start[name]) == (parameter.ndim == 1), name


def test_a_stages_scale_reaches_every_configured_group() -> None:
    job = job_for(network(), train__rounds=2, train__optimizer=ADAMW, recipe__stages=[{"rounds": 1, "lr_scale": 2}, {}])

    rates = [tuple(group["lr"] for group in step) for step in job.schedule.settings]

    assert rates == [(0.02, 0.06, 0.02)] * 3 + [(0.01, 0.03, 0.01)] * 3


def test_groups_of_a_class_are_split_further() -> None:
    model = network()
    spec = {
        "name": "tests.optimizers:GroupedSGD",
        "args": {"lr": 0.05},
        "groups": [{**OUTPUT, "args": {"momentum": 0.5}}],
    }
    job = job_for(model, train__optimizer=spec)

    made = job.task.make_optimizer(dict(model.named_parameters()))

    expected = [(1, 0.02, 0.5), (6, 0.02, 0.0), (1, 0.05, 0.5), (2, 0.05, 0.0)]
    assert [(len(group["params"]), group["lr"], group["momentum"]) for group in made.param_groups] == expected


def test_a_resumed_run_with_groups_is_the_same_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "workers": 1, "rounds": 4, "optimizer": ADAMW, "checkpoint": {"every": 1},
        "schedule": {"name": "StepLR", "args": {"step_size": 3}},
    }  # fmt: skip
    uninterrupted = train(**options)
    save = RunRecorder.save

    def stop_after_two(self: Any, rounds_done: int, state: Any) -> None:
        save(self, rounds_done, state)
        if rounds_done == 2:
            raise PowerCutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunRecorder, "save", stop_after_two)
        with pytest.raises(PowerCutError):
            train(**options, run_dir=tmp_path / "run")
    resumed = train(**options, run_dir=tmp_path / "run", resume=True)

    assert_same(clone(resumed.state_dict()), clone(uninterrupted.state_dict()))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"match": ["*.bais"], "args": {}}], ["groups.0.match'", "'*.bais'", "matches no trained", ".bias'"]),
        ([{"match": ["output.weight"], "max_dims": 1, "args": {}}], ["groups.0.max_dims'", "output.weight", "more dims"]),
        ([{"match": ["*"], "args": {}}, OUTPUT], ["groups.1'", "output.weight", "in group 0", "first"]),
        ([{"max_dims": 1, "args": {"weigth_decay": 0}}], ["groups.0.args'", "'weigth_decay'", "did you mean 'weight_decay'"]),
        ([{"max_dims": 1, "args": {"params": []}}], ["groups.0.args'", "'params'", "weight_decay"]),
        ([NO_DECAY, {**OUTPUT, "args": {"lr": -1.0}}], ["groups.1.args'", "-1.0"]),
        ([{"args": {"lr": 1.0}}], ["groups.0'", "'match'", "'max_dims'"]),
        ([{"match": ["*.bias"]}], ["groups.0.args'", "required"]),
    ],
)  # fmt: skip
def test_a_wrong_group_is_refused_by_name(groups: list[Any], message: list[str]) -> None:
    for name in ("AdamW", "tests.optimizers:no_decay_on_biases"):
        if "-1.0" in message and ":" in name:
            continue  # only a class's own constructor knows which values it allows
        with pytest.raises(ConfigError, match=naming(*message)) as raised:
            train(optimizer={"name": name, "groups": groups})
        assert "\n" not in str(raised.value)


def test_groups_by_name_are_possible_where_a_function_makes_the_optimizer() -> None:
    model = network()
    spec = {"name": "tests.optimizers:no_decay_on_biases", "groups": [OUTPUT]}
    named = dict(model.named_parameters())
    job = job_for(model, train__optimizer=spec)

    made = job.task.make_optimizer(named)

    rates = {
        name: group["lr"]
        for group in made.param_groups
        for name in named
        if any(p is named[name] for p in group["params"])
    }
    assert {name for name, rate in rates.items() if rate == 0.03} == {"output.weight", "output.bias"}
    assert len(made.param_groups) == len(optimizers.no_decay_on_biases(named).param_groups) + 1
