"""Shards of unequal length: splits by classes, and the steps of workers with different numbers of samples."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

import ist
from ist.data.batched import Collated, WholeBatches
from ist.data.shards.dirichlet import class_numbers, dirichlet_split
from ist.data.shards.unequal import SkewedSampler
from ist.errors import ConfigError, DataError
from ist.loops.local_loop import TaskLoop
from ist.plan.predict import Planner
from ist.runs.split import split_of
from ist.subnet.job import slot_of
from tests.conftest import data, job_for, naming, small_config
from tests.networks import NETWORKS, seeded

LABELS = torch.arange(1000) % 4


def counts(parts: Any, labels: torch.Tensor = LABELS) -> list[list[int]]:
    return [torch.bincount(labels[torch.from_numpy(part)], minlength=4).tolist() for part in parts]


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("workers", [1, 3, 40])
def test_every_sample_belongs_to_one_worker_and_every_worker_has_one(alpha: float, workers: int) -> None:
    parts = dirichlet_split(LABELS, workers, alpha, seed=3)

    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    assert min(map(len, parts)) >= 1
    assert all(np.array_equal(part, np.sort(part)) for part in parts)


def test_a_large_concentration_gives_nearly_equal_mixes_and_a_small_one_gives_a_class_to_few_workers() -> None:
    even = counts(dirichlet_split(LABELS, 5, 1e6))
    skewed = counts(dirichlet_split(LABELS, 5, 0.01))

    # Fractions have a standard deviation of sqrt(0.2 * 0.8 / (5 * 10^6 + 1)), which is 0.05 of 250 samples.
    assert all(abs(number - 50) <= 1 for worker in even for number in worker)
    assert all(max(of_class) >= 0.9 * 250 for of_class in zip(*skewed, strict=True))


def test_the_fractions_of_a_class_have_the_variance_of_a_dirichlet_distribution() -> None:
    labels = torch.arange(400).repeat_interleave(100)  # 400 classes of 100 samples: 400 draws
    for alpha in (0.3, 2.0):
        parts = dirichlet_split(labels, 5, alpha)
        fractions = np.stack([np.bincount(labels[part], minlength=400) for part in parts]) / 100

        # 400 draws of 5 fractions: a relative error of about 5%; rounding to 1/100 adds less than 1%.
        assert float(fractions.var(axis=1).mean()) == pytest.approx(0.2 * 0.8 / (5 * alpha + 1), rel=0.15)


def test_the_split_depends_on_the_seed_only_and_is_the_same_for_every_version_of_numpy() -> None:
    parts = dirichlet_split(LABELS, 3, 0.3, seed=7)

    assert counts(parts) == counts(dirichlet_split(LABELS.tolist(), 3, 0.3, seed=7))
    assert counts(parts) != counts(dirichlet_split(LABELS, 3, 0.3, seed=8))
    assert counts(parts) == [[152, 0, 188, 27], [87, 226, 15, 35], [11, 24, 47, 188]]


class Items(Dataset[Any]):
    """Pairs of an input and a given target."""

    def __init__(self, targets: Any) -> None:
        self.given = targets

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(2), self.given[index]


class WithTargets(Items):
    """Items that are expensive, but whose targets are at hand."""

    def __init__(self, targets: Any) -> None:
        super().__init__(targets)
        self.targets = targets

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("an item was read")


class Columns:
    """A data set as of Hugging Face: no PyTorch class, and columns by name."""

    column_names = ["text", "label"]  # noqa: RUF012

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, key: Any) -> Any:
        assert key == "label"
        return self.numbers


class Mappings(Items):
    """Items that are mappings."""

    def __getitem__(self, index: int) -> Any:
        return {"inputs": torch.zeros(2), "labels": self.given[index]}


def test_class_numbers_come_from_any_data_set_with_class_numbers_as_targets() -> None:
    numbers = [2, 0, 1, 1]
    tensors = TensorDataset(torch.zeros(4, 2), torch.tensor(numbers))

    for labels in (
        numbers, np.array(numbers), torch.tensor(numbers), tensors, Items(numbers), Items(torch.tensor(numbers)),
        Columns(numbers), Mappings(torch.tensor(numbers)), WholeBatches(Mappings(numbers)),
        Collated(tensors, default_collate), WithTargets(numbers), Subset(WithTargets([9, *numbers]), [1, 2, 3, 4]),
    ):  # fmt: skip
        assert class_numbers(labels).tolist() == numbers


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (TensorDataset(torch.zeros(4, 2), torch.zeros(4)), ["TensorDataset", "float32", "class number"]),
        (TensorDataset(torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.long)), ["(4, 3)", "class number"]),
        ([0, -1, 2, 3], ["negative", "class number"]),
        (Items([0, 1, 0.5, 2]), ["sample 2", "float", "class number"]),
        ([0, 1], ["2 samples", "3 workers"]),
    ],
)
def test_what_cannot_be_split_by_classes_is_refused(labels: Any, named: list[str]) -> None:
    with pytest.raises(DataError, match=naming(*named)):
        dirichlet_split(labels, 3, 0.3)


@pytest.mark.parametrize(("workers", "alpha"), [(0, 0.3), (3, 0.0), (3, float("nan"))])
def test_a_split_needs_workers_and_a_positive_concentration(workers: int, alpha: float) -> None:
    with pytest.raises(DataError, match=naming("alpha", "num_workers", "positive")):
        dirichlet_split(LABELS, workers, alpha)


def test_each_worker_goes_through_its_own_epochs_in_batches_of_nearly_equal_size() -> None:
    sampler = SkewedSampler(LABELS.numpy(), 0.3, 4, 16, seed=3)

    for worker in range(4):
        samples = len(sampler.shard(worker))
        steps = -(-samples // 16)
        epochs = [[sampler.batch(worker, epoch * steps + step) for step in range(steps)] for epoch in range(2)]
        for batches in epochs:
            sizes = {len(batch) for batch in batches}
            assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(samples))
            assert max(sizes) <= 16
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) >= sampler.smallest_batch
        assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))
        assert [sampler.epoch(worker, step) for step in (0, steps - 1, steps, 2 * steps)] == [0, 0, 1, 2]


def test_a_worker_of_a_skewed_run_trains_on_its_own_samples_only() -> None:
    job = job_for(seeded(NETWORKS["no batch norm"]), data(), data__skew={"alpha": 0.3})
    parts = dirichlet_split(data(), 4, 0.3, seed=3)

    for worker, part in enumerate(parts):
        loop = TaskLoop(job, slot_of(job, worker), torch.device("cpu"))
        assert torch.equal(loop.shard.tensors[0], data().tensors[0][torch.from_numpy(part)])
    assert len({len(part) for part in parts}) > 1
    shown = split_of(job)
    assert [sum(of_worker) for of_worker in shown.inspection.samples_by_class or ()] == [len(part) for part in parts]
    assert "Samples of each class" in str(shown)


def test_a_skewed_run_counts_its_passes_over_all_samples() -> None:
    result = ist.train(
        seeded(NETWORKS["no batch norm"]), data(), workers=4, rounds=2, local_steps=5, batch_size=4, progress=False,
        skew=ist.Skew(alpha=0.3), seed=3,
    )  # fmt: skip
    sampler = SkewedSampler(class_numbers(data()), 0.3, 4, 4, 3)
    samples = sum(len(sampler.batch(worker, step)) for worker in range(4) for step in range(10))

    assert result.history[-1]["epoch"] == samples / 100


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train__rounds": None, "train__epochs": 3}, ["train.epochs", "data.skew", "train.rounds"]),
        ({"data__shuffle": "global"}, ["data.shuffle", "global", "data.skew", "local"]),
        ({"data__skew": {"alpha": 0}}, ["data.skew.alpha", "0"]),
    ],
)
def test_what_skewed_shards_exclude_is_refused(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError, match=naming(*named)):
        small_config(**{"data__skew": {"alpha": 0.3}, **changes})


def test_skewed_shards_are_not_planned() -> None:
    with pytest.raises(ConfigError, match=naming("data.skew", "ist plan", "data.skew=null")):
        Planner(small_config(data__skew={"alpha": 0.3}), ["ist"])


def test_targets_that_are_no_class_numbers_are_refused_before_a_run() -> None:
    regression = TensorDataset(torch.randn(20, 12), torch.randn(20, 5))

    with pytest.raises(DataError, match=naming("data.skew", "class number")):
        ist.train(nn.Linear(12, 5), regression, workers=2, rounds=1, loss="mse_loss", skew={"alpha": 1.0})
