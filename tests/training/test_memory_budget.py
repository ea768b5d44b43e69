"""The predicted memory of a worker and of the coordinator, by part."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ist.loops.step_memory import UncountedError, step_memory
from ist.report.table import memory_table
from ist.training.memory_budget import MemoryBudget, count_step, memory_budgets
from tests.conftest import job_for
from tests.networks import seeded

CPU = torch.device("cpu")
WIDE = 64 * 12 + 64 + 5 * 64 + 5
SHARE = 16 * 12 + 16 + 5 * 16 + 5
"""Numbers in the network below, and in a quarter of it: its last bias is in every share."""


def two_layers() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 5)))


def budgets(with_activations: bool = False, **changes: Any) -> dict[str, MemoryBudget]:
    job = job_for(two_layers(), train__workers=4, train__batch_size=8, **changes)
    return memory_budgets(job, count_step(job, CPU, with_activations))


def adam(**args: Any) -> dict[str, Any]:
    return {"train__optimizer": {"name": "Adam", "args": {"lr": 0.01, **args}}}


def test_a_worker_holds_its_share_its_gradient_and_the_state_of_the_optimizer() -> None:
    plain, amsgrad = budgets(**adam()), budgets(**adam(amsgrad=True))

    assert plain["worker"].parts == {
        "weights": 4 * SHARE, "gradients": 4 * SHARE,
        "optimizer state": 2 * 4 * SHARE + 4 * 4,  # and a count of steps for each of four parameters
        "work space": 4 * 16 * 12,  # the largest tensor
    }  # fmt: skip
    assert amsgrad["worker"].parts["optimizer state"] == 3 * 4 * SHARE + 4 * 4
    assert plain["worker"].nbytes == sum(plain["worker"].parts.values())
    assert plain["coordinator"].parts["full network"] == 4 * WIDE
    messages = plain["coordinator"].parts["messages"]
    assert 4 * 4 * SHARE <= messages <= 4 * (4 * SHARE + 128 + 4 * 64)  # headers and padding


def test_rounded_messages_need_a_decoded_copy_and_residuals_in_full_shape() -> None:
    exchange = {"up": "int8", "down": "int8", "values": "deltas"}
    rounded = budgets(exchange=exchange)["worker"]
    feedback = budgets(exchange={**exchange, "error_feedback": True}, checkpoint={"every": 100})["worker"]

    assert rounded.parts["weights"] == 4 * SHARE
    assert 16 * 12 + 5 * 16 <= rounded.parts["messages"] < 4 * SHARE
    assert feedback.parts["feedback residuals"] == 4 * (64 * 12 + 5 * 64)
    assert any("full network" in note for note in feedback.notes)


def test_the_coordinator_holds_the_outer_optimizer_the_average_and_carried_state() -> None:
    recipe = {"outer": {"lr": 0.7, "momentum": 0.9}, "average": {"kind": "ema"}}
    found = budgets(recipe=recipe, train__optimizer_state="carried", **adam())

    whole = found["coordinator"].parts
    assert whole["outer optimizer"] == 2 * 4 * WIDE
    assert whole["average"] == 4 * WIDE
    assert whole["carried state"] == 2 * 4 * WIDE + 4 * 4
    assert found["worker"].parts["optimizer state"] == 2 * 4 * SHARE + 4 * 4  # it is in the message


def test_scaling_an_update_needs_a_workers_largest_part_three_times() -> None:
    plain, scaled, full_width = (
        budgets(recipe=recipe)["coordinator"].parts["work space"]
        for recipe in ({}, {"merge_scale": 0.5}, {"merge_scale": 0.5, "stages": [{"keep": 1}]})
    )

    assert scaled - plain == 3 * 4 * 64 // 4 * 12  # a quarter of the hidden neurons
    assert full_width == budgets(recipe={"stages": [{"keep": 1}]})["coordinator"].parts["work space"]
    assert budgets(recipe={"merge_scale": "auto"})["coordinator"].parts["scale search"] == 4 * WIDE


@pytest.mark.parametrize(("coordinator", "own"), [("trains", 1), ("dedicated", 0)])
def test_a_coordinator_with_few_message_buffers_holds_as_many_messages_and_what_it_averages(
    coordinator: str, own: int
) -> None:
    pool = {"kind": "torchrun", "coordinator": coordinator}
    every = budgets(pool=pool)["coordinator"].parts
    few = budgets(pool={**pool, "message_buffers": 1})["coordinator"].parts

    assert few["messages"] == (1 + own) * every["messages"] // 4
    assert few["results to average"] == (4 - own) * 4 * 5  # the last bias is in every share
    assert "results to average" not in every
    assert budgets(pool={**pool, "message_buffers": 4})["coordinator"].parts == every


def test_a_rank_of_a_baseline_holds_the_full_network_and_the_buffers_of_the_method() -> None:
    found = {
        method: budgets(method=method, pool={"kind": "torchrun"}, **adam()) for method in ("ddp", "local_sgd", "diloco")
    }

    assert list(found["ddp"]) == ["worker"]
    assert found["ddp"]["worker"].parts["weights"] == 4 * WIDE
    assert "method buffers" not in found["ddp"]["worker"].parts
    assert found["local_sgd"]["worker"].parts["method buffers"] == 4 * WIDE
    assert found["diloco"]["worker"].parts["method buffers"] == 3 * 4 * WIDE


def test_a_worker_of_a_sharded_store_also_holds_its_shard() -> None:
    star = budgets(**adam(), pool={"kind": "torchrun"})["worker"]
    found = budgets(**adam(), pool={"kind": "torchrun", "store": "sharded"})

    assert list(found) == ["worker"]
    parts = found["worker"].parts
    # A quarter of the rows of each tensor: 16 of 64 hidden neurons, 2 of 5 outputs.
    assert parts["shard of the network"] == 4 * (16 * 12 + 16 + 2 * 64 + 2)
    assert {name: parts[name] for name in ("weights", "gradients")} == {"weights": 4 * SHARE, "gradients": 4 * SHARE}
    assert 2 * 4 * SHARE < parts["pieces of messages"] < 2 * 4 * SHARE + 2 * 4 * (128 + 4 * 64)
    assert found["worker"].nbytes > star.nbytes


def test_a_full_width_phase_is_the_largest_round_of_a_worker() -> None:
    stages = [{}, {"rounds": 1, "keep": 1}]

    worker = budgets(recipe={"stages": stages}, **adam())["worker"]

    assert worker.parts["weights"] == worker.parts["gradients"] == 4 * WIDE
    assert worker.parts["messages"] > 4 * WIDE  # the buffers of the first stage and of the second


def test_a_step_is_counted_without_values_as_its_tensors_live() -> None:
    job = job_for(two_layers(), train__workers=4, train__batch_size=8)
    inputs, targets = torch.empty(8, 12, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")

    found = step_memory(job, job.split.template, (inputs, targets), CPU)

    assert found.gradient == 4 * WIDE
    # At the start of the backward pass the activations live, and no gradient. At its end it is the reverse.
    forward = 4 * 8 * (64 + 5)
    assert 0 < found.activations < 4 * forward
    wide = job_for(two_layers(), train__workers=4, train__batch_size=8, train__clip_grad_norm=1.0)
    many = torch.empty(8000, 12, device="meta"), torch.empty(8000, dtype=torch.int64, device="meta")
    large = step_memory(wide, wide.split.template, many, CPU)
    hidden = 4 * 8000 * 64
    assert hidden + 4 * 8000 * 5 < large.activations + large.gradient + large.optimizer < 4 * hidden


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.linear(inputs)
        return found[found[:, 0] > 0].sum(0, keepdim=True).expand(len(inputs), 5)


def test_a_step_that_needs_values_is_named_as_not_counted() -> None:
    job = job_for(two_layers(), train__workers=4, train__batch_size=8)

    with pytest.raises(UncountedError, match="data-dependent|data dependent|nonzero"):
        step_memory(job, Masked(), (torch.zeros(8, 12), torch.zeros(8, dtype=torch.int64)), CPU)


def test_what_is_not_counted_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncounted(*_: Any) -> Any:
        raise UncountedError("aten.nonzero.default")

    monkeypatch.setattr("ist.training.memory_budget.step_memory", uncounted)
    worker = budgets(with_activations=True, **adam(), data__loader={"workers": 2})["worker"]

    assert any("activations" in note and "aten.nonzero.default" in note for note in worker.notes)
    assert any("2 loader processes" in note for note in worker.notes)
    assert worker.parts["optimizer state"] == 2 * 4 * SHARE + 4 * 4


def test_a_report_shows_the_prediction_beside_both_measured_peaks() -> None:
    older = {"memory_bytes": 5_000_000}
    newer = {
        **older, "process_memory_bytes": 300_000_000, "coordinator_memory_bytes": 7_000_000,
        "memory_budget": {"worker": {"weights": 3_000_000, "gradients": 1_000_000}},
    }  # fmt: skip

    assert memory_table([older, newer], ["older", "newer"]) == [
        ("older", "worker", "not predicted", "5.0 MB", "not measured"),
        ("newer", "worker", "4.0 MB", "5.0 MB", "300.0 MB"),
        ("newer", "coordinator", "not predicted", "7.0 MB", "not measured"),
    ]
