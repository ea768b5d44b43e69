"""Stages of a run: their rounds, and the changes that each makes."""

import copy
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from ist.config.recipe import Stage
from ist.data.batches import fetch, take_shard
from ist.errors import ConfigError
from ist.loops.part import completed
from ist.monitoring.meter import Meter
from ist.optimization.stages import spans
from ist.pools.inline import InlinePool
from ist.runs.split import print_inspection, split_of
from ist.subnet.job import Job, assignments
from ist.subnet.residual_blocks import scaled_blocks
from ist.training.coordinator import Coordinator
from tests.conftest import clone, data, job_for, small_config
from tests.networks import NETWORKS, seeded
from tests.neurons.networks import stack

CPU = torch.device("cpu")
WARM_UP, MAIN, FINISH = Stage(rounds=2, local_steps=3), Stage(keep=0.5), Stage(rounds=1, local_steps=4, keep=1)
ALL = [WARM_UP, MAIN, FINISH]


def coordinator(job: Job, model: nn.Module) -> Coordinator:
    meter = Meter()
    return Coordinator(job, InlinePool(job, CPU, meter), model, meter)


def table(stages: list[Stage], **length: Any) -> list[tuple[int, int, Stage]]:
    return [(span.steps.start, span.steps.stop, span.stage) for span in spans(stages, 5, **length)]


# Spans


def test_without_stages_rounds_are_equal_and_the_last_takes_the_rest_of_the_epochs() -> None:
    assert table([], rounds=3) == [(0, 5, Stage()), (5, 10, Stage()), (10, 15, Stage())]
    assert table([], total_steps=12) == [(0, 5, Stage()), (5, 10, Stage()), (10, 12, Stage())]


def test_stages_take_their_rounds_and_the_open_one_the_rest() -> None:
    fixed, finish = [(0, 3, WARM_UP), (3, 6, WARM_UP)], [(16, 20, FINISH)]

    assert table(ALL, rounds=5) == [*fixed, (6, 11, MAIN), (11, 16, MAIN), *finish]
    assert table(ALL, total_steps=20) == table(ALL, rounds=5)
    assert table(ALL, total_steps=18) == [*fixed, (6, 11, MAIN), (11, 14, MAIN), (14, 18, FINISH)]


def test_a_share_is_a_fraction_of_the_rounds_or_of_the_steps_rounded_to_rounds() -> None:
    main, finish = Stage(), Stage(share=0.4, local_steps=4, keep=1)
    last = [(10, 14, finish), (14, 18, finish)]

    assert table([main, finish], rounds=4) == [(0, 5, main), (5, 10, main), *last]
    assert table([main, finish], total_steps=18) == [(0, 5, main), (5, 10, main), *last]
    assert table([main, finish], total_steps=22) == [
        (0, 5, main),
        (5, 10, main),
        (10, 14, main),
        *((begin, begin + 4, finish) for begin in (14, 18)),
    ]
    assert table([main, Stage(share=0.01)], rounds=2)[1][2].share == 0.01, "at least one round"


def test_every_step_belongs_to_one_round() -> None:
    for total in range(11, 40):
        steps = [step for span in spans(ALL, 5, total_steps=total) for step in span.steps]
        assert steps == list(range(total))


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"rounds": 3}, r"'recipe\.stages'.*\b3 rounds.*\b3\b"),
        ({"total_steps": 10}, r"'recipe\.stages'.*\b10 local steps.*\b10\b"),
    ],
)
def test_stages_that_leave_nothing_for_the_open_one_are_refused(length: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spans(ALL, 5, **length)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe__stages": [{}, {}]}, r"'recipe'.*'stages'.*\b2\b.*\b2\b.*'rounds'.*'share'"),
        ({"recipe__stages": [{}, {"rounds": 1, "share": 0.5}]}, r"'recipe\.stages\.1'.*'rounds'.*'share'"),
        ({"recipe__stages": [{}, {"share": 1}]}, r"'recipe\.stages\.1\.share'.*\b1\b"),
        ({"recipe__stages": [{"rounds": 2}]}, r"'stages'.*\b1\b.*\b0\b.*'rounds'"),
        ({"recipe__stages": [{"kep": 1}]}, r"'recipe\.stages\.0\.kep'.*'keep'"),
        ({"recipe__stages": [{}, {"rounds": 1, "keep": 0.2}]}, r"'recipe\.stages\.1\.keep'.*0\.2.*'disjoint'"),
        (
            {"partition__strategy": "categorical", "recipe__stages": [{"keep": 0.5}]},
            r"'recipe\.stages\.0\.keep'.*0\.5.*'categorical'",
        ),
    ],
)
def test_a_wrong_stage_is_named_by_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(**changes)


# The full network on every worker


def trained_by_hand(job: Job, model: nn.Module, worker: int, round_number: int) -> nn.Module:
    """Train a worker's local SGD on the full network with plain torch, on the samples that ist assigns to it."""
    mine = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9)
    shard = take_shard(job.task.train_data, job.schedule.sampler.shard(worker))
    for step in job.schedule.steps(round_number):
        inputs, targets = fetch(shard, job.schedule.sampler.batch(worker, step), CPU)
        optimizer.zero_grad()
        functional.cross_entropy(mine(inputs), targets).backward()
        optimizer.step()
    return mine


@pytest.mark.parametrize("scale", ["none", "width", "folded"])
@pytest.mark.parametrize("partition", [{}, {"strategy": "categorical", "capacities": [1, 2, 5]}])
def test_a_full_width_phase_is_local_sgd(scale: str, partition: dict[str, Any]) -> None:
    model = seeded(NETWORKS["no batch norm"])
    stages = [{}, {"rounds": 1, "keep": 1, "local_steps": 4}]
    job = job_for(
        model, train__workers=3, train__rounds=2, train__activation_scale=scale, partition=partition,
        recipe__stages=stages,
    )  # fmt: skip
    made = coordinator(job, model)
    completed(made.train_round(0))
    whole = [dict(trained_by_hand(job, model, worker, 1).named_parameters()) for worker in range(3)]

    report = completed(made.train_round(1))

    assert report.numbers["steps"] == 4
    assert not assignments(job).exclusive(1)
    for name, found in model.named_parameters():
        mean = torch.stack([parameters[name].detach() for parameters in whole]).mean(dim=0)
        torch.testing.assert_close(found.detach(), mean, rtol=0, atol=1e-6)  # float32's rounding of a mean


def test_blocks_have_the_same_scale_in_a_full_width_phase_as_in_evaluation() -> None:
    model = seeded(stack)
    job = job_for(
        model, train__workers=3, train__rounds=2, train__local_steps=1, recipe__stages=[{"rounds": 1, "keep": 1}, {}],
        partition={"strategy": "blocks", "blocks": ["1.*"], "min_depth": 3},
    )  # fmt: skip
    batches = [
        fetch(
            take_shard(job.task.train_data, job.schedule.sampler.shard(worker)),
            job.schedule.sampler.batch(worker, 0),
            CPU,
        )
        for worker in range(3)
    ]
    with scaled_blocks(model, {f"1.{block}": 3 / 5 for block in range(5)}), torch.no_grad():
        total = sum(float(functional.cross_entropy(model(x), y, reduction="sum")) for x, y in batches)
    made = coordinator(job, model)

    report = completed(made.train_round(0))

    assert report.numbers["loss"] == pytest.approx(total / report.numbers["samples"], rel=1e-5)
    assert set(assignments(job).training_block_scales(0).values()) == {3 / 5}
    assert assignments(job).training_block_scales(1) == {}
    assert not any(module._forward_hooks for module in model.modules())
    before = clone(model.state_dict())
    completed(made.train_round(1))
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_inspect_shows_stages_with_their_fraction_of_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    stages = [{"local_steps": 4}, {"share": 0.5, "keep": 1, "local_steps": 2}]
    length = {"train__rounds": None, "train__epochs": 8}  # of two steps: 100 samples, four workers, batches of 16
    job = job_for(seeded(NETWORKS["no batch norm"]), recipe__stages=stages, **length)

    found = split_of(job).inspection
    print_inspection(found, Console(width=120))

    assert job.schedule.total_steps == 16
    assert found.local_steps == 4
    assert [(s.rounds, s.local_steps, s.steps) for s in found.stages] == [(2, 4, 8), (4, 2, 8)]
    assert "Stage 2: 4 rounds of 2 steps, 50%" in capsys.readouterr().out
    one = split_of(job_for(seeded(NETWORKS["no batch norm"]), train__local_steps=1)).inspection
    assert found.bytes_per_round.ddp == 4 * one.bytes_per_round.ddp


def test_inspect_shows_the_shares_of_the_open_stage() -> None:
    job = job_for(seeded(NETWORKS["no batch norm"]), recipe__stages=[{"rounds": 2, "keep": 1}, {}], train__rounds=6)

    found = split_of(job).inspection

    assert job.schedule.main_round == 2
    narrow = job_for(seeded(NETWORKS["no batch norm"]))
    assert [share.parameters for share in found.shares] == [
        share.parameters for share in split_of(narrow).inspection.shares
    ]
    assert [len(held) for held in assignments(job).of(0)[0]] == [16, 8]
    assert [len(held) for held in assignments(job).of(2)[0]] == [4, 2]


# Settings of the steps

COSINE = {"name": "CosineAnnealingLR", "args": {"T_max": "total_steps"}}


def settings_of(**changes: Any) -> list[float]:
    return [step[0]["lr"] for step in job_for(seeded(NETWORKS["no batch norm"]), **changes).schedule.settings]


def test_a_stage_multiplies_the_learning_rate() -> None:
    stages = [{}, {"rounds": 2, "lr_scale": 0.25}]

    assert settings_of(recipe__stages=stages) == [0.1] * 6 + [0.025] * 6
    plain = settings_of(train__schedule=COSINE)
    scheduled = settings_of(train__schedule=COSINE, recipe__stages=stages)
    assert scheduled == [*plain[:6], *[0.25 * rate for rate in plain[6:]]]
    assert settings_of() == settings_of(recipe__stages=[{}, {"rounds": 2, "keep": 1}]) == []


def test_a_schedule_by_rounds_is_constant_within_a_round() -> None:
    by_step = settings_of(train__schedule=COSINE)

    by_round = settings_of(train__schedule=COSINE, train__schedule_unit="round")

    assert by_round == [by_step[3 * (step // 3)] for step in range(12)]
    assert len(set(by_step)) == 12


def test_training_uses_the_scaled_learning_rate() -> None:
    moved = []
    for scale in (1.0, 0.5):
        model = seeded(NETWORKS["no batch norm"])
        before = clone(model.state_dict())
        job = job_for(
            model, data(), train__local_steps=1, train__optimizer={"name": "SGD", "args": {"lr": 0.1}},
            recipe__stages=[{"lr_scale": scale}],
        )  # fmt: skip
        completed(coordinator(job, model).train_round(0))
        moved.append({name: tensor - before[name] for name, tensor in model.state_dict().items()})

    for name, change in moved[0].items():
        torch.testing.assert_close(moved[1][name], change / 2, rtol=0, atol=1e-6)
    assert float(moved[0]["output.weight"].abs().max()) > 1e-3


def test_a_run_with_stages_sends_the_bytes_that_inspect_predicts() -> None:
    job = job_for(
        stack(), train__workers=3, train__rounds=6, recipe__stages=[stage.model_dump() for stage in ALL],
        exchange={"down": "int8", "up": "int8", "values": "deltas"},
    )  # fmt: skip
    made = coordinator(job, job.task.build())

    for number in range(job.schedule.num_rounds):
        completed(made.train_round(number))

    assert made.bytes_sent() == split_of(job).inspection.bytes_of_run


# Optimizer state that a worker stores


def trained(state: str, stages: list[dict[str, Any]], **changes: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Return the final weights of a run with two workers, and the bytes sent."""
    model = seeded(NETWORKS["no batch norm"]).double()
    samples, targets = data().tensors
    job = job_for(
        model, TensorDataset(samples.double(), targets), train__workers=2, train__optimizer_state=state,
        train__optimizer={"name": "Adam", "args": {"lr": 0.01}}, train__rounds=5, recipe__stages=stages,
        **changes,
    )  # fmt: skip
    method = coordinator(job, model)
    for round_number in range(job.schedule.num_rounds):
        completed(method.train_round(round_number))
    return clone(model.state_dict()), method.bytes_sent()


def test_kept_state_with_full_networks_is_local_training_with_persistent_optimizers() -> None:
    found, _ = trained("kept", [{"keep": 1}])

    common = seeded(NETWORKS["no batch norm"]).double()
    workers = [copy.deepcopy(common) for _ in range(2)]
    optimizers = [torch.optim.Adam(worker.parameters(), lr=0.01) for worker in workers]
    samples, targets = data().tensors
    sampler = job_for(common, train__workers=2).schedule.sampler
    for round_number in range(5):
        for number, (worker, optimizer) in enumerate(zip(workers, optimizers, strict=True)):
            worker.load_state_dict(common.state_dict())
            shard = torch.from_numpy(sampler.shard(number))
            for step in range(3 * round_number, 3 * round_number + 3):
                rows = shard[torch.from_numpy(sampler.batch(number, step))]
                optimizer.zero_grad()
                functional.cross_entropy(worker(samples[rows].double()), targets[rows]).backward()
                optimizer.step()
        for name, value in common.state_dict().items():
            value.copy_(torch.stack([worker.state_dict()[name] for worker in workers]).mean(dim=0))
    for name, value in common.state_dict().items():
        torch.testing.assert_close(found[name], value)


def test_state_is_kept_only_for_the_same_neurons_and_sends_no_bytes() -> None:
    fresh, fresh_bytes = trained("reset", [])
    drawn, drawn_bytes = trained("kept", [])
    assert fresh_bytes == drawn_bytes
    assert all(torch.equal(fresh[name], drawn[name]) for name in fresh)  # a new assignment every round

    finish = [{}, {"rounds": 3, "keep": 1}]
    reset, reset_bytes = trained("reset", finish)
    kept, kept_bytes = trained("kept", finish)
    assert reset_bytes == kept_bytes
    assert any((kept[name] - reset[name]).abs().max() > 1e-4 for name in kept)
