"""The part of a run that a process needs: a worker does not hold the samples of others."""

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from ist.checks.finite_values import find_non_finite_sample
from ist.data.shards.unequal import OwnData
from ist.loops.local_loop import TaskLoop
from ist.runs.build import build_job
from ist.runs.rehearsal import rehearse
from ist.subnet.job import for_one_worker, slot_of
from tests.conftest import data, job_for, small_config
from tests.networks import NETWORKS, seeded

CPU = torch.device("cpu")


@pytest.mark.parametrize("changes", [{}, {"data__skew": {"alpha": 0.3}}])
def test_the_part_for_one_worker_has_its_samples_only_and_the_same_batches(changes: dict[str, Any]) -> None:
    job = job_for(seeded(NETWORKS["no batch norm"]), data(103), test=data(10), **changes)

    part = for_one_worker(job, 2)

    whole, alone = (TaskLoop(of, slot_of(job, 2), CPU) for of in (job, part))
    assert isinstance(part.task.train_data, TensorDataset)
    assert len(part.task.train_data) == len(job.schedule.sampler.shard(2)) < 103
    assert part.task.train_data.tensors[0].untyped_storage().nbytes() == len(part.task.train_data) * 12 * 4
    assert part.task.test_data is None
    for step in range(12):
        batch = whole.sampler.batch(2, step)
        assert (whole.numbers(batch) == alone.numbers(alone.sampler.batch(2, step))).all()
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(whole.read(batch), alone.read(batch), strict=True))
    assert part.task.contents == job.task.contents
    rehearse(part)


def test_a_non_finite_sample_has_its_number_in_the_full_data_set() -> None:
    inputs, targets = data(103).tensors
    job = job_for(seeded(NETWORKS["no batch norm"]), TensorDataset(inputs, targets), train__local_steps=10)
    bad = int(job.schedule.sampler.shard(2)[7])
    inputs[bad, 3] = float("nan")
    part = for_one_worker(job, 2)
    expected = f"sample {bad} of the training data holds nan in its inputs"

    assert find_non_finite_sample(job, 4, 2, 0) == find_non_finite_sample(part, 4, 2, 0) == expected
    elsewhere = for_one_worker(job_for(seeded(NETWORKS["no batch norm"]), pool__kind="torchrun"), 2)
    assert find_non_finite_sample(elsewhere, 4, 1, 0) is None


def test_all_samples_stay_if_workers_may_need_others_later() -> None:
    model = seeded(NETWORKS["no batch norm"])
    own = OwnData(lambda _: data())
    for job in (
        job_for(model, data__shuffle="global"),
        job_for(model, train__min_workers=2),
        job_for(model, own=own, data__shard="own"),
    ):
        assert for_one_worker(job, 1) is job


@pytest.mark.parametrize(
    ("rank", "coordinator", "worker"), [("2", "trains", 2), ("2", "dedicated", 1), ("0", "trains", None)]
)
def test_a_rank_that_follows_keeps_its_own_samples_only(
    monkeypatch: pytest.MonkeyPatch, rank: str, coordinator: str, worker: int | None
) -> None:
    size = "4" if coordinator == "trains" else "5"
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    job = build_job(small_config(pool={"kind": "torchrun", "coordinator": coordinator}))

    samples = len(job.task.train_data)  # type: ignore[arg-type]
    assert samples == (job.schedule.sampler.num_samples if worker is None else len(job.schedule.sampler.shard(worker)))
    assert job.task.worker == (worker or 0)
