"""Fingerprints of data sets: whether two processes have loaded the same data."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, default_collate

from ist.data.batched import Collated
from ist.data.batches import as_numbered
from ist.data.fingerprint import ALL, NO_DATA, DataFingerprint, data_fingerprint
from ist.distributed import process_group as group
from ist.errors import DataError
from ist.runs.rehearsal import rehearse
from tests.augmented import Augmented
from tests.conftest import data, generators_left_alone, job_for, naming
from tests.networks import NETWORKS, seeded


class Items(Dataset[Any]):
    """Given items."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def alike(one: Dataset[Any], other: Dataset[Any]) -> bool:
    return data_fingerprint(one, 3).first_different_item(data_fingerprint(other, 3)) is None


@pytest.mark.parametrize("make", [data, lambda seed: Augmented(data(seed=seed))], ids=["stored", "augmented"])
def test_the_same_data_are_alike_and_others_are_not(make: Any) -> None:
    assert alike(make(seed=1), make(seed=1))
    assert not alike(make(seed=1), make(seed=2))


def test_data_that_differ_in_their_last_digits_are_alike() -> None:
    inputs, targets = data().tensors

    assert alike(TensorDataset(inputs, targets), TensorDataset(inputs * (1 + 1e-5), targets))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((torch.ones(3), 1), (torch.ones(3), 2)),
        ((torch.ones(3), 1), (torch.ones(3), torch.tensor(1))),
        ((torch.ones(3), 1), (torch.ones(4), 1)),
        ((torch.ones(3), 1), (torch.ones(3).double(), 1)),
        ((torch.ones(3), 1.5), (torch.ones(3), 1.7)),
        ((torch.tensor(2.0), "a"), (torch.tensor(2.0), "b")),
        (({"a": torch.ones(2)}, 0), ({"b": torch.ones(2)}, 0)),
        (((torch.ones(2), torch.zeros(2)), 0), ((torch.zeros(2), torch.ones(2)), 0)),
        ((torch.arange(40), 0), (torch.arange(40).flip(0), 0)),
        ((300 + torch.arange(9.0), 0), (300 + torch.arange(9.0).flip(0), 0)),
        ((np.arange(3), 0), (np.arange(3)[::-1].copy(), 0)),
        ((np.arange(3, dtype=">f4"), 0), (np.arange(3, dtype=">i4"), 0)),
        ((np.uint64(2**63), 0), (np.uint64(2**63 + 1), 0)),
        ((torch.full((3,), 1j), 0), (torch.full((3,), -1j), 0)),
        ((torch.ones(3, dtype=torch.bfloat16), 0), (torch.zeros(3, dtype=torch.bfloat16), 0)),
        ((torch.tensor([torch.nan, 1.0]), 0), (torch.tensor([0.0, 1.0]), 0)),
        ((torch.tensor([True] * 20), 0), (torch.tensor([False] * 20), 0)),
    ],
)
def test_all_parts_of_an_item_are_compared(one: Any, other: Any) -> None:
    assert alike(Items(one), Items(one))
    assert not alike(Items(one), Items(other))


def test_an_item_that_cannot_be_read_is_named() -> None:
    class Missing(Items):
        def __getitem__(self, index: int) -> Any:
            raise FileNotFoundError(f"{index}.wav")

    with pytest.raises(DataError, match=r"\b0 of Missing.*FileNotFoundError: 0\.wav \(test_fingerprint\.py, line"):
        data_fingerprint(Missing(1, 2), 3)


def test_a_fingerprint_can_be_sent_as_numbers() -> None:
    made = data_fingerprint(Augmented(data()), 3)

    assert DataFingerprint.from_numbers(torch.tensor(made.to_numbers(), dtype=torch.float64).tolist()) == made


def test_a_fingerprint_does_not_change_the_state_of_generators() -> None:
    with generators_left_alone():
        data_fingerprint(Augmented(data()), 3)


class OwnGenerator(Dataset[tuple[Tensor, Tensor]]):
    """A data set that draws from its own generator, which the run cannot seed."""

    def __init__(self, inner: TensorDataset) -> None:
        self.inner = inner
        self.generator = np.random.default_rng(5)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        item, target = self.inner[index]
        return item + self.generator.random(), target


def test_items_that_differ_between_two_reads_are_not_compared() -> None:
    made = data_fingerprint(OwnGenerator(data(seed=1)), 3)

    assert made.unrepeatable == 0
    assert alike(OwnGenerator(data(seed=1)), OwnGenerator(data(seed=2)))
    assert data_fingerprint(Augmented(data()), 3).unrepeatable is None


@pytest.mark.parametrize(("train", "test"), [(OwnGenerator, Augmented), (Augmented, OwnGenerator)])
def test_data_that_differ_between_two_reads_are_named_in_a_warning(train: Any, test: Any) -> None:
    job = job_for(seeded(NETWORKS["no batch norm"]), train(data()), test(data(40, seed=4)))
    which = "training" if train is OwnGenerator else "test"

    with pytest.warns(UserWarning, match=rf"{which} data .*OwnGenerator.*\b0\b.*numpy\.random"):
        rehearse(job)


def test_there_is_no_warning_for_seeded_data() -> None:
    rehearse(job_for(seeded(NETWORKS["no batch norm"]), Augmented(data()), Augmented(data(40, seed=4))))
    rehearse(job_for(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))))


def agreed(
    monkeypatch: pytest.MonkeyPatch, contents: list[tuple[DataFingerprint, DataFingerprint]], rank: int = 0
) -> int:
    """Return the first round on which a rank agrees if the ranks have these training and test data."""

    def gather(said: list[Tensor], own: Tensor) -> None:
        for slot, (train, test) in zip(said, contents, strict=True):
            slot.copy_(torch.tensor([*own[:2].tolist(), *train.to_numbers(), *test.to_numbers()], dtype=own.dtype))

    monkeypatch.setattr(group.dist, "all_gather", gather)
    membership = group.Membership(rank, len(contents), torch.device("cpu"), "gloo")
    return group.agree_on_start(membership, 7, 2**32 - 1, contents[rank])


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_rank_refuses_to_start_with_different_training_data(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    ours, theirs, fewer = (data_fingerprint(data(size, seed=seed), 3) for size, seed in ((100, 1), (100, 2), (90, 1)))

    assert agreed(monkeypatch, [(ours, NO_DATA)] * 3, rank) == 7
    with pytest.raises(DataError, match=r"training data .*rank 2 .*rank 0.*sample 0\b"):
        agreed(monkeypatch, [(ours, NO_DATA), (ours, NO_DATA), (theirs, NO_DATA)], rank)
    with pytest.raises(DataError, match=r"rank 1 .*\b90\b.*training.*rank 0 .*\b100\b"):
        agreed(monkeypatch, [(ours, NO_DATA), (fewer, NO_DATA), (theirs, NO_DATA)], rank)


def test_rank_0_warns_of_different_test_data(monkeypatch: pytest.MonkeyPatch) -> None:
    train, ours, theirs = (data_fingerprint(data(seed=seed), 3) for seed in (1, 2, 3))

    with pytest.warns(UserWarning, match=r"test data .*rank 2 .*rank 0.*evaluates"):
        agreed(monkeypatch, [(train, ours), (train, NO_DATA), (train, theirs)])
    agreed(monkeypatch, [(train, ours), (train, NO_DATA), (train, theirs)], rank=2)
    agreed(monkeypatch, [(train, ours), (train, NO_DATA), (train, ours)])


class WithTargets(Items):
    """Items whose targets are at hand, as in torchvision."""

    def __init__(self, targets: Any) -> None:
        super().__init__(*((torch.zeros(3), int(target)) for target in targets))
        self.targets = targets


def test_samples_in_memory_that_are_not_among_the_compared_items_are_compared_as_well() -> None:
    inputs, targets = data(1000).tensors
    compared = set(data_fingerprint(TensorDataset(inputs, targets), 3).indices)
    other = next(index for index in range(1000) if index not in compared)
    relabelled = targets.clone()
    relabelled[other] = (relabelled[other] + 1) % 5
    changed = inputs.clone()
    hidden = [index for index in range(0, 1000, 50) if index not in compared]
    changed[hidden] = changed[hidden] + 3
    swapped = torch.arange(1000)
    swapped[[other, other + 1]] = swapped[[other + 1, other]]
    whole = TensorDataset(inputs, targets)

    for one, two in (
        (whole, TensorDataset(inputs, relabelled)),
        (whole, TensorDataset(changed, targets)),
        (WithTargets(targets), WithTargets(relabelled)),
        (WithTargets(targets.tolist()), WithTargets(relabelled.tolist())),
        (Subset(whole, list(range(1000))), Subset(whole, swapped.tolist())),
        (Collated(whole, default_collate), Collated(TensorDataset(inputs, relabelled), default_collate)),
    ):
        assert not alike(one, two)
        assert alike(one, one)
        assert data_fingerprint(one, 3).first_different_item(data_fingerprint(two, 3)) == ALL
    assert alike(whole, TensorDataset(inputs * (1 + 1e-5), targets))
    assert alike(TensorDataset(inputs[:, :0], targets), TensorDataset(inputs[:, :0], targets))


def test_ranks_whose_samples_in_memory_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets = data(1000).tensors
    relabelled = targets.roll(1)
    ours = data_fingerprint(TensorDataset(inputs, targets), 3)
    theirs = data_fingerprint(TensorDataset(inputs, relabelled), 3)
    items = (*ours.items[:-1], theirs.items[-1])

    with pytest.raises(DataError, match=naming("training data", "rank 1", "rank 0", "in memory", "data.shard", "own")):
        agreed(monkeypatch, [(ours, NO_DATA), (replace(ours, items=items), NO_DATA)], 0)


class Stream(IterableDataset[Any]):
    """Items that come one after the other; with noise from a generator of its own, other ones in each pass."""

    def __init__(self, first: float, noise: bool = False) -> None:
        self.first, self.draws = first, np.random.default_rng(1) if noise else None

    def __iter__(self) -> Any:
        for number in range(20):
            shift = self.draws.normal() if self.draws is not None else 0.0
            yield torch.arange(4.0) * (self.first + number) + shift, number


def test_streams_are_compared_by_their_first_items() -> None:
    ours, theirs = (data_fingerprint(as_numbered(Stream(first), 3), 3) for first in (1.0, 2.0))

    assert DataFingerprint.from_numbers(ours.to_numbers()) == ours
    assert len(ours.to_numbers()) == len(NO_DATA.to_numbers())
    assert ours.first_different_item(data_fingerprint(as_numbered(Stream(1.0), 3), 3)) is None
    assert ours.first_different_item(theirs) == 0
    assert ours.unrepeatable is None
    assert data_fingerprint(as_numbered(Stream(1.0, noise=True), 3), 3).unrepeatable == 0
