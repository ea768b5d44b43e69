"""An optimizer class with several parameter groups follows its schedule as in a plain loop, in every worker."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from ist.errors import ModelError
from ist.optimization.step_settings import apply_settings, matching_groups
from ist.runs.rehearsal import rehearse
from tests import optimizers
from tests.conftest import assert_same, clone, job_for, plain_loop
from tests.networks import NETWORKS, seeded
from tests.training.test_one_worker import run

GROUPED = [("GroupedSGD", {"lr": 0.05, "momentum": 0.9}), ("GroupedAdamW", {"lr": 0.01})]

Make = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
SCHEDULES: dict[str, tuple[dict[str, Any], Make]] = {
    "LinearLR": ({"total_iters": 7}, lambda o: lr_scheduler.LinearLR(o, total_iters=7)),
    "OneCycleLR": (
        {"max_lr": [0.1, 0.2], "total_steps": 10},
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=10),
    ),
    "CyclicLR": (
        {"base_lr": [0.01, 0.02], "max_lr": 0.1, "step_size_up": 3},
        lambda o: lr_scheduler.CyclicLR(o, base_lr=[0.01, 0.02], max_lr=0.1, step_size_up=3),
    ),
    "LambdaLR": (
        {"lr_lambda": [lambda step: 0.9**step, lambda step: 1 / (1 + step)]},
        lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]),
    ),
}


@pytest.mark.parametrize("state", ["carried", "kept"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "args"), GROUPED, ids=["SGD", "AdamW"])
def test_every_group_follows_the_schedule_as_in_a_plain_loop(
    name: str, args: dict[str, Any], schedule: str, state: str
) -> None:
    ours, plain = (seeded(NETWORKS["no batch norm"]) for _ in range(2))
    schedule_args, make = SCHEDULES[schedule]
    job = job_for(
        ours,
        train__workers=1,
        train__rounds=3,
        train__optimizer={"name": f"tests.optimizers:{name}", "args": args},
        train__optimizer_state=state,
        train__schedule={"name": schedule, "args": schedule_args},
    )

    run(job)
    optimizer = getattr(optimizers, name)(plain.parameters(), **args)
    plain_loop(plain, job, optimizer, make(optimizer))

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))


def test_a_learning_rate_that_is_a_tensor_follows_the_schedule_and_the_users_tensor_does_not_change() -> None:
    ours, plain = (seeded(NETWORKS["no batch norm"]) for _ in range(2))
    rate = torch.tensor(0.1)
    job = job_for(
        ours,
        train__workers=1,
        train__rounds=2,
        train__optimizer={"name": "SGD", "args": {"lr": rate}},
        train__schedule={"name": "ExponentialLR", "args": {"gamma": 0.5}},
    )

    run(job)
    optimizer = torch.optim.SGD(plain.parameters(), lr=torch.tensor(0.1))
    plain_loop(plain, job, optimizer, lr_scheduler.ExponentialLR(optimizer, gamma=0.5))

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))
    assert rate == 0.1


def test_a_stages_learning_rate_scale_reaches_every_group() -> None:
    job = job_for(
        seeded(NETWORKS["no batch norm"]),
        train__rounds=2,
        train__optimizer={"name": "tests.optimizers:GroupedSGD", "args": {"lr": 0.05}},
        recipe__stages=[{"rounds": 1, "lr_scale": 2}, {}],
    )

    rates = [tuple(group["lr"] for group in step) for step in job.schedule.settings]

    assert rates == [(0.04, 0.1)] * 3 + [(0.02, 0.05)] * 3


def test_groups_are_matched_by_their_parameters_if_a_worker_lacks_some() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    args = {"lr": 0.1}
    job = job_for(
        model,
        train__optimizer={"name": "tests.optimizers:GroupForEach", "args": args},
        train__schedule={"name": "ConstantLR", "args": {"factor": 0.5, "total_iters": 100}},
    )
    named = dict(list(model.named_parameters())[2:])
    optimizer = optimizers.GroupForEach(named.values(), **args)

    apply_settings(optimizer, matching_groups(optimizer, named, job.schedule.group_of), job.schedule.settings[0])

    # The third and the fourth parameter of the network, at half their learning rates.
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05 * 0.9**2, 0.05 * 0.9**3], rel=1e-12)


def test_groups_that_depend_on_sizes_are_refused_with_a_schedule() -> None:
    job = job_for(
        nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)),
        train__optimizer={"name": "tests.optimizers:GroupBySize", "args": {"lr": 0.1}},
        train__schedule={"name": "LinearLR"},
    )

    with pytest.raises(ModelError, match=r"'train\.optimizer\.name'.*GroupBySize.*'0\.weight' and '0\.bias'"):
        rehearse(job)


def test_state_that_differs_between_matrices_and_vectors_is_carried() -> None:
    ours, plain = (seeded(NETWORKS["no batch norm"]) for _ in range(2))
    job = job_for(
        ours,
        train__workers=1,
        train__rounds=3,
        train__optimizer={"name": "tests.optimizers:MomentumForMatrices", "args": {"lr": 0.1}},
        train__optimizer_state="carried",
    )

    run(job)
    plain_loop(plain, job, optimizers.MomentumForMatrices(plain.parameters(), lr=0.1))

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))
    assert {name.split("@")[1] for name in job.split.state_specs} == {
        name for name, parameter in plain.named_parameters() if parameter.ndim == 2
    }
