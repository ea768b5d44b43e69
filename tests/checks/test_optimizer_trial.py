"""State that an optimizer class has in the object itself is lost with the object: a warning comes before a run."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ist.api import train
from ist.config.schema import Optimizer
from ist.errors import ConfigError
from ist.optimization.factory import optimizer_factory
from ist.optimization.optimizers import named_state, restore_named_state
from ist.runs.recorder import RunRecorder
from tests.conftest import assert_same, clone, data, naming
from tests.networks import NETWORKS, seeded
from tests.runs.test_resume import PowerCutError

THREE = {"optimizer": "tests.optimizers:Accumulating", "optimizer_args": {"lr": 0.1, "every": 3}}


def trained(model: nn.Module | None = None, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"workers": 2, "rounds": 2, "progress": False}
    return train(model or seeded(NETWORKS["no batch norm"]), data(), **{**settings, **options}).model


def test_gradients_that_are_unused_when_a_round_ends_are_warned_of() -> None:
    expected = naming("'calls'", "once in 3 steps", "train.local_steps (4) a multiple of 3")
    with pytest.warns(UserWarning, match=expected):
        trained(**THREE, local_steps=4)


def test_a_count_that_starts_again_is_warned_of_alone_if_nothing_else_is_lost() -> None:
    with pytest.warns(UserWarning, match=naming("'train.optimizer.name'", "attribute 'calls'")) as said:
        trained(**THREE, local_steps=6)

    assert "multiple" not in str(said[0].message)


def test_a_setting_of_a_parameter_group_that_a_step_changes_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=naming("OwnRate", "'lr' of parameter group 0")):
        trained(optimizer="tests.optimizers:OwnRate", optimizer_args={"lr": 0.1}, local_steps=3)


def test_an_optimizer_that_never_steps_within_a_round_is_refused() -> None:
    with pytest.raises(ConfigError, match=naming("'train.optimizer.name'", "2 local steps", "train.local_steps")):
        trained(**THREE, local_steps=2)


def test_state_outside_the_per_parameter_state_is_not_carried() -> None:
    with pytest.raises(ConfigError, match=naming("'carried'", "Accumulating", "'calls'", "'reset'")):
        trained(**THREE, local_steps=6, train_options={"optimizer_state": "carried"})


@pytest.mark.parametrize("name", ["Accumulating", "OwnRate"])
def test_one_worker_that_keeps_its_optimizer_continues_with_it_also_after_a_resume(tmp_path: Path, name: str) -> None:
    args = {"lr": 0.1, "every": 3} if name == "Accumulating" else {"lr": 0.1}
    options: dict[str, Any] = {
        "workers": 1, "local_steps": 4, "optimizer": f"tests.optimizers:{name}", "optimizer_args": args,
        "train_options": {"optimizer_state": "kept"}, "checkpoint_options": {"every": 1}, "run_dir": tmp_path / "run",
        "rounds": 4,
    }  # fmt: skip
    uninterrupted = trained(**{**options, "run_dir": None})
    save = RunRecorder.save

    def stop_after_two(self: Any, rounds_done: int, state: Any) -> None:
        save(self, rounds_done, state)
        if rounds_done == 2:
            raise PowerCutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunRecorder, "save", stop_after_two)
        with pytest.raises(PowerCutError):
            trained(**options)
    resumed = trained(**options, resume=True)

    assert_same(clone(resumed.state_dict()), clone(uninterrupted.state_dict()))


def test_state_of_a_kept_optimizer_that_cannot_be_saved_is_warned_of() -> None:
    options: dict[str, Any] = {
        "workers": 1, "local_steps": 4, "optimizer": "tests.optimizers:History", "optimizer_args": {"lr": 0.1},
        "train_options": {"optimizer_state": "kept"},
    }  # fmt: skip
    with pytest.warns(UserWarning, match=naming("attribute 'seen'", "not saved")):
        trained(**options, checkpoint_options={"every": 1})
    trained(**options, checkpoint_options={"every": 9})


def test_numbers_of_the_optimizer_and_of_its_groups_are_part_of_its_named_state() -> None:
    spec = Optimizer(name="tests.optimizers:Accumulating", args={"lr": 0.1, "every": 3})
    named = {"w": nn.Parameter(torch.zeros(3))}
    first, second = (optimizer_factory(spec)(named) for _ in range(2))
    first.calls, first.param_groups[0]["lr"] = 7, 0.25  # type: ignore[attr-defined]

    restore_named_state(second, named, named_state(first, named))

    assert second.calls == 7  # type: ignore[attr-defined]
    assert second.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad", "RMSprop", "NAdam", "Rprop", "Adafactor", "ASGD"])
def test_torchs_own_optimizers_have_no_other_state(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(optimizer=name, local_steps=2, optimizer_args={"lr": 1e-3}, rounds=1)
    optimizer = optimizer_factory(Optimizer(name=name, args={"lr": 1e-3}))({"w": nn.Parameter(torch.zeros(3))})
    assert not [key for key in named_state(optimizer, {}) if ":" in key]
