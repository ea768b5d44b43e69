"""How much of the network a worker holds, as a run records it."""

from typing import Any

import pytest
import torch

from ist.baselines.ranks import RankRound, summarise
from ist.monitoring.meter import MemoryGauge, Meter
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.runs.open import CoordinatorPart
from ist.runs.recorder import RunRecorder
from ist.storage.checkpoint import Progress
from ist.subnet.assignments import Team
from ist.subnet.job import assignments
from ist.training.rounds import RoundReport, Seconds
from tests.conftest import round_numbers, small_config, worker_numbers

TWO_STAGES = {"recipe": {"stages": [{}, {"rounds": 2, "keep": 1}]}}


def recorded(**changes: Any) -> RunRecorder:
    part = execute(build_job(small_config(**changes)), progress=False)
    assert isinstance(part, CoordinatorPart)
    return part.recorder


def test_a_run_records_the_largest_part_of_the_network_that_a_worker_held() -> None:
    # 64-24-20-10 with batch norm among 4 workers: each holds 6 and 5 neurons, with three vectors for each of them.
    quarter = (64 * 6 + 3 * 6 + 6 * 5 + 3 * 5 + 5 * 10 + 10) / (64 * 24 + 3 * 24 + 24 * 20 + 3 * 20 + 20 * 10 + 10)

    two_stages, narrow = recorded(**TWO_STAGES), recorded(train__rounds=1)

    assert [record["held_fraction"] for record in two_stages.history] == [quarter, quarter, 1.0, 1.0]
    assert two_stages.result()["held_fraction"] == 1.0
    assert narrow.result()["held_fraction"] == quarter


def test_methods_in_which_every_rank_has_the_network_hold_all_of_it() -> None:
    rank = RankRound(worker_numbers(samples=16), finite=True, sent_bytes=0.0, transfers_s=())

    assert summarise([rank, rank]).held_fraction == 1.0


@pytest.mark.parametrize(
    "partition",
    [{}, {"keep": 0.5}, {"strategy": "categorical"}, {"strategy": "bernoulli", "keep": 0.6}, {"coverage": "balanced"}],
    ids=str,
)
def test_the_fraction_is_that_of_the_module_of_the_largest_share(partition: dict[str, Any]) -> None:
    job = build_job(small_config(partition=partition))
    held, whole = assignments(job), sum(parameter.numel() for parameter in job.split.template.parameters())

    for number, workers in ((0, 4), (1, 2), (2, 3)):
        team = Team(workers)
        modules = [job.split.module(neurons, torch.device("meta")) for neurons in held.of(number, team)]
        largest = max(sum(parameter.numel() for parameter in module.parameters()) for module in modules)
        assert held.held_fraction(number, team) == largest / whole


@pytest.mark.parametrize(("known", "expected"), [({}, None), ({"held_fraction": 0.75}, 0.75)], ids=["old", "new"])
def test_the_most_of_a_run_is_unknown_if_an_older_version_made_its_first_rounds(
    known: dict[str, float], expected: float | None
) -> None:
    job, gauge = build_job(small_config()), MemoryGauge(torch.device("cpu"))
    before = Progress(rounds_done=2, numbers={"loss": 0.5, "memory_bytes": 1, **known})
    recorder = RunRecorder(job, None, (), before, Meter(), gauge)
    numbers = round_numbers([worker_numbers(samples=16)])

    recorder.round_done(2, RoundReport(numbers, [], held_fraction=0.25), None, Seconds(1.0, 0.0), 0)

    assert recorder.result().get("held_fraction") == expected
    assert ("held_fraction" in recorder.history[-1]) == bool(known)
