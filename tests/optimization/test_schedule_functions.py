"""Schedules that are functions: a factor by step, or a scheduler made of an optimizer; as in a plain loop."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import ist
from ist.errors import ConfigError
from ist.runs.recorder import RunRecorder
from tests.conftest import assert_same, clone, data, job_for, naming, plain_loop
from tests.networks import NETWORKS, seeded
from tests.runs.test_resume import PowerCutError
from tests.training.test_one_worker import run

GROUPED = {
    "name": "SGD",
    "args": {"lr": 0.1, "momentum": 0.9},
    "groups": [{"max_dims": 1, "args": {"lr": 0.05}}],
}


def warmup(step: int, steps: int = 4) -> float:
    return min(1.0, (step + 1) / steps)


def falling(step: int, steps: int) -> Any:
    return np.float32(1 - step / steps)


def warmup_then_cosine(optimizer: torch.optim.Optimizer, steps: int = 9) -> lr_scheduler.LRScheduler:
    first = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [first, lr_scheduler.CosineAnnealingLR(optimizer, steps - 3)], [3])


def chained(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.StepLR(optimizer, 4)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


def network() -> nn.Module:
    return seeded(NETWORKS["no batch norm"])


def by_hand(model: nn.Module) -> torch.optim.Optimizer:
    vectors, matrices = ([p for p in model.parameters() if (p.ndim == 1) == wanted] for wanted in (True, False))
    return torch.optim.SGD([{"params": vectors, "lr": 0.05}, {"params": matrices}], lr=0.1, momentum=0.9)


def lambda_lr(function: Callable[[int], float]) -> Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]:
    return lambda optimizer: lr_scheduler.LambdaLR(optimizer, function)


HERE = __name__
SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]]] = {
    "factor": ({"factor": f"{HERE}:warmup"}, lambda_lr(warmup)),
    "factor of Python": ({"factor": lambda step: 0.8**step}, lambda_lr(lambda step: 0.8**step)),
    "factor with arguments": (
        {"factor": f"{HERE}:falling", "args": {"steps": "total_steps"}}, lambda_lr(functools.partial(falling, steps=9))
    ),
    "scheduler": ({"name": f"{HERE}:warmup_then_cosine", "args": {"steps": "total_steps"}}, warmup_then_cosine),
    "chained": ({"name": f"{HERE}:chained"}, chained),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # torch's SequentialLR itself passes it
@pytest.mark.parametrize("state", ["carried", "kept"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_worker_follows_a_function_as_a_plain_loop_does(schedule: str, state: str) -> None:
    ours, plain = network(), network()
    section, make = SCHEDULES[schedule]
    job = job_for(
        ours,
        train__workers=1,
        train__rounds=3,
        train__optimizer=GROUPED,
        train__optimizer_state=state,
        train__schedule=section,
    )

    run(job)
    optimizer = by_hand(plain)
    plain_loop(plain, job, optimizer, make(optimizer))

    assert job.schedule.total_steps == 9
    assert len({tuple(group["lr"] for group in step) for step in job.schedule.settings}) > 3
    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))


def train(**options: Any) -> nn.Module:
    settings: dict[str, Any] = {"workers": 2, "rounds": 3, "local_steps": 3, "progress": False}
    return ist.train(network(), data(), **{**settings, **options}).model


@pytest.mark.filterwarnings("ignore:The epoch parameter in")
def test_python_and_configuration_name_the_same_schedule() -> None:
    same: list[list[Any]] = [
        [ist.Schedule(factor=warmup), {"factor": f"{HERE}:warmup"}, lambda o: lr_scheduler.LambdaLR(o, warmup)],
        [warmup_then_cosine, {"name": f"{HERE}:warmup_then_cosine", "args": {"steps": 9}}],
        [lr_scheduler.ConstantLR, "ConstantLR", ist.Schedule(name="ConstantLR")],
    ]

    for first, *others in same:
        expected = clone(train(schedule=first).state_dict())
        for other in others:
            assert_same(clone(train(schedule=other).state_dict()), expected)


def test_a_class_that_no_import_path_reaches_is_a_schedule() -> None:
    class Halved(lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float | torch.Tensor]:
            return [rate / 2 for rate in self.base_lrs]

    half = train(optimizer=ist.Optimizer(name="SGD", args={"lr": 0.05}))

    assert_same(clone(train(schedule=Halved).state_dict()), clone(half.state_dict()))


def test_a_factor_changes_once_a_round_where_that_is_asked_for() -> None:
    job = job_for(
        network(), train__rounds=2, train__schedule={"factor": f"{HERE}:warmup"}, train__schedule_unit="round"
    )

    assert [step[0]["lr"] for step in job.schedule.settings] == [0.1 / 4] * 3 + [0.1] * 3


def test_a_resumed_run_with_functions_is_the_same_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "workers": 1, "rounds": 4, "checkpoint": {"every": 1}, "schedule": ist.Schedule(factor=lambda step: 0.8**step),
        "optimizer": ist.Optimizer(**GROUPED),
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


def factor_of_nothing(step: int) -> Any:
    return None if step == 2 else 1.0


def not_a_number(step: int) -> float:
    return float("nan") if step else 1.0


def failing(step: int) -> float:
    return 1 / (2 - step)


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer)


def of_another_optimizer(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.ConstantLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=optimizer.defaults["lr"]))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda step: 0.9**step, ["schedule is ", "<lambda>", "TypeError", "ist.Schedule(factor=...)"]),
        (lambda optimizer: len(optimizer.param_groups), ["returns a int", "LRScheduler", "ist.Schedule(factor=...)"]),
        (plateau, ["schedule is ", "plateau", "metric"]),
        (of_another_optimizer, ["of_another_optimizer", "another optimizer"]),
        ({"name": f"{HERE}:plateau"}, ["'train.schedule.name'", "plateau", "metric"]),
        ({"name": f"{HERE}:warmup_then_cosine", "args": {"stps": 3}}, ["'train.schedule.name'", "TypeError", "'stps'"]),
        ({"factor": factor_of_nothing}, ["'train.schedule.factor'", "factor_of_nothing", "None", "step 2", "number"]),
        ({"factor": f"{HERE}:not_a_number"}, [f"'{HERE}:not_a_number'", "nan", "step 1", "finite number"]),
        ({"factor": failing}, ["failing", "ZeroDivisionError", "test_schedule_functions.py", "step 2"]),
        ({"factor": f"{HERE}:wramup"}, ["'train.schedule.factor'", "'wramup'"]),
        ({"factor": warmup, "args": {"stps": 3}}, ["warmup", "'train.schedule.args'", "'stps'"]),
        ({"factor": warmup, "name": "ConstantLR"}, ["train.schedule", "'name'", "'factor'", "one of"]),
        ({"args": {"gamma": 0.9}}, ["train.schedule", "'name'", "'factor'", "one of"]),
    ],
)
def test_a_wrong_schedule_is_refused_by_name(schedule: Any, message: list[str]) -> None:
    with pytest.raises(ConfigError, match=naming(*message)) as raised:
        train(schedule=schedule)
    assert "\n" not in str(raised.value)
