"""Reading batches in loader processes: the same bits, errors and randomness as without, and no process left behind."""

import copy
import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

import ist
from ist.data.batched import Collated
from ist.data.batches import ShardedSampler, fetch, take_shard
from ist.data.loading.loader import BatchReader, LoaderSettings, StepBatches
from ist.errors import ConfigError, DataError
from ist.rng import ItemDraws, Purpose
from ist.runs.build import build_job
from tests.augmented import Augmented
from tests.conftest import LONG_LIVED, assert_same, clone, data, generators_left_alone, naming, small_config
from tests.networks import NETWORKS, seeded

CPU = torch.device("cpu")
TWO = LoaderSettings(workers=2)
EARLIER: set[int] = set()


def all_children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "resource_tracker" not in " ".join(child.cmdline())]


@pytest.fixture(autouse=True)
def earlier_children() -> set[int]:
    """Processes that an earlier test of the same process has left on purpose, such as Ray's."""
    EARLIER.clear()
    EARLIER.update(child.pid for child in all_children())
    return EARLIER


def children() -> list[psutil.Process]:
    """Return the processes that the running test has started and not ended."""
    return [child for child in all_children() if child.pid not in EARLIER]


def trained(dataset: Any, **arguments: Any) -> dict[str, Tensor]:
    """Train a network on two workers for three rounds; return its values."""
    model = seeded(NETWORKS["two hidden layers, batch norm"])
    ist.train(model, dataset, **{"workers": 2, "rounds": 3, "local_steps": 3, "progress": False, **arguments})
    return clone(model.state_dict())


class Squares(Dataset[tuple[Tensor, int]]):
    """Sample `bad` cannot be read."""

    def __init__(self, bad: int = -1) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.bad:
            raise KeyError(f"row {index}")
        return torch.full((12,), float(index)), index % 5


READERS: list[BatchReader] = []


@pytest.fixture(autouse=True)
def readers_closed() -> Iterator[None]:
    """End the loader processes of a test that fails, before another fixture kills them."""
    yield
    while READERS:
        READERS.pop().close()


def reader(dataset: Dataset[Any], settings: LoaderSettings = TWO, parts: int = 1, steps: int = 12) -> BatchReader:
    sampler = ShardedSampler(40, 2, 5, 3)
    batches = StepBatches(take_shard(dataset, sampler.shard(1)), sampler, 1, parts)
    READERS.append(BatchReader(batches, steps * parts, settings, CPU))
    return READERS[-1]


def plain(number: int, parts: int = 1, dataset: Dataset[Any] | None = None) -> Any:
    return reader(dataset or Squares(), LoaderSettings(), parts).batch(number)


@pytest.mark.procs
def test_loader_processes_stay_for_the_whole_run_and_read_the_same_batches_in_any_order() -> None:
    batches, seen = reader(Squares()), set()

    for number in (0, 1, 2, 6, 7, 3, 4, 3, 11, 0):  # rounds may be abandoned, or repeated
        for found, expected in zip(batches.batch(number), plain(number), strict=True):
            assert torch.equal(found, expected)
        seen |= {child.pid for child in children()}

    assert len(seen) == 4  # the processes of batch 11, the last one, are gone
    batches.close()
    assert children() == []


@pytest.mark.procs
def test_micro_batches_are_read_one_by_one() -> None:
    batches = reader(Squares(), parts=2)

    found = [batches.batch(number)[1].tolist() for number in range(4)]

    assert found == [plain(number, 2)[1].tolist() for number in range(4)]
    whole = [plain(number)[1].tolist() for number in range(2)]
    assert [found[0] + found[1], found[2] + found[3]] == whole
    batches.close()


@pytest.mark.procs
@pytest.mark.parametrize("dataset", [data(), Augmented(data())], ids=["fixed", "augmented"])
def test_a_run_with_loader_processes_gives_the_same_bits(dataset: Any) -> None:
    expected = trained(dataset, test_data=dataset, accumulate=2)

    with generators_left_alone():
        found = trained(dataset, test_data=dataset, accumulate=2, loader=ist.Loader(workers=2, prefetch=1))

    assert_same(found, expected)
    assert children() == []


@pytest.mark.procs
def test_dropout_draws_the_same_numbers_with_loader_processes() -> None:
    networks = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 5))
    models = [seeded(lambda: copy.deepcopy(networks)) for _ in range(2)]

    for model, loader in zip(models, (None, {"workers": 1}), strict=True):
        ist.train(model, data(), workers=1, rounds=2, local_steps=3, progress=False, loader=loader)

    assert_same(clone(models[0].state_dict()), clone(models[1].state_dict()))


@pytest.mark.procs
def test_an_unreadable_sample_is_named_with_its_round_and_worker_and_no_process_is_left() -> None:
    messages = []
    for loader in ({"workers": 0}, {"workers": 2}):
        with pytest.raises(DataError, match=naming("round 0, worker 1", "sample 14 of Squares", "row 14")) as caught:
            trained(Squares(bad=14), loader=loader, batch_size=5)
        messages.append(str(caught.value))
        assert children() == []

    assert messages[0] == messages[1]


class Killed(Squares):
    """Reading ends the loader process, as the system does if memory is short."""

    def __init__(self) -> None:
        super().__init__()
        self.parent = os.getpid()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Slow(Squares):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(20)
        return super().__getitem__(index)


@pytest.mark.procs
@pytest.mark.parametrize(
    ("dataset", "settings", "named"),
    [
        (Killed(), LoaderSettings(workers=1), ["data.loader.workers 1", "DataLoader worker"]),
        pytest.param(
            Slow(),
            LoaderSettings(workers=1, timeout_s=0.2),
            ["data.loader.workers 1", "timed out after 0.2"],
            marks=pytest.mark.system,  # its process takes five seconds to end
        ),
    ],
)
def test_a_lost_loader_process_ends_the_run_with_one_line(
    dataset: Any, settings: LoaderSettings, named: list[str]
) -> None:
    batches = reader(dataset, settings)

    with pytest.raises(DataError, match=naming(*named)) as caught:
        batches.batch(0)

    assert "\n" not in str(caught.value)
    assert children() == []


def test_a_loader_process_that_cannot_get_the_data_is_reported() -> None:
    batches = reader(Collated(Squares(), lambda items: items), LoaderSettings(workers=1, start_method="spawn"))

    with pytest.warns(UserWarning, match="pickle"), pytest.raises(DataError, match=naming("data.loader.workers 1")):
        batches.batch(0)

    LONG_LIVED.extend(child for child in psutil.Process().children() if "resource_tracker" in " ".join(child.cmdline()))


# Randomness of items


class Drawing(Dataset[Any]):
    """Each item is a draw from each of the generators."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(torch.rand(())), random.random(), float(np.random.normal())]), index


class AllAtOnce(Drawing):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


def items(indices: list[int], epoch: int = 0, dataset: Dataset[Any] | None = None, seed: int = 3) -> list[list[float]]:
    draws = ItemDraws(seed, Purpose.TRAINING, epoch)
    found: list[list[float]] = fetch(dataset or Drawing(), np.array(indices), CPU, None, draws)[0].tolist()
    return found


def test_what_an_item_draws_depends_on_seed_epoch_and_sample_only() -> None:
    torch.manual_seed(1)
    with generators_left_alone():
        first, second = items([4, 9])
    torch.manual_seed(2)
    random.random()
    np.random.normal()

    assert items([30, 9, 4])[1:] == [second, first]  # other company, other place, other state of the process
    others = [second, items([4], epoch=1)[0], items([4], seed=4)[0]]
    assert all(first[generator] != other[generator] for other in others for generator in range(3))


def test_items_of_a_part_draw_as_those_of_the_whole_data_set() -> None:
    part = take_shard(Drawing(), np.array([4, 9]))
    draws = ItemDraws(3, Purpose.TRAINING)

    found = fetch(part, np.array([1, 0]), CPU, lambda: np.array([9, 4]), draws)[0].tolist()

    assert found == items([9, 4])


def test_a_data_set_that_reads_a_batch_at_once_draws_by_its_first_item() -> None:
    assert items([4, 9], dataset=AllAtOnce()) == items([4, 9], dataset=AllAtOnce())
    assert items([4, 9], dataset=AllAtOnce()) != items([9, 4], dataset=AllAtOnce())
    assert items([4], dataset=AllAtOnce()) == items([4])


def test_a_numpy_generator_of_another_kind_is_seeded_for_items_and_restored() -> None:
    before, state = np.random.mtrand.get_bit_generator(), np.random.get_state(legacy=False)
    own = np.random.PCG64(3)
    try:
        np.random.mtrand.set_bit_generator(own)
        expected = own.state
        found = items([4])
        assert own.state == expected
        assert np.random.mtrand.get_bit_generator() is own
    finally:
        np.random.mtrand.set_bit_generator(before)
        np.random.set_state(state)

    assert found == items([4])


@pytest.mark.procs
def test_each_epoch_augments_a_sample_differently_and_a_loader_process_as_the_worker_itself() -> None:
    batches = reader(Drawing())

    found = [batches.batch(number) for number in range(8)]  # two epochs of 20 samples in batches of 5

    by_sample = [
        {int(sample): draw.tolist() for draws, samples in epoch for draw, sample in zip(draws, samples, strict=True)}
        for epoch in (found[:4], found[4:])
    ]
    assert by_sample[0].keys() == by_sample[1].keys()
    assert all(by_sample[0][sample] != by_sample[1][sample] for sample in by_sample[0])
    for number in (1, 6):
        assert torch.equal(found[number][0], plain(number, dataset=Drawing())[0])
    batches.close()


# Collate functions and loaders of the user


class Sentences(Dataset[Any]):
    """Sequences of different lengths, which do not stack."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"values": torch.full((1 + index % 7,), float(index)), "label": index % 5}


def padded(rows: list[dict[str, Any]], width: int = 12) -> tuple[Tensor, Tensor]:
    values = pad_sequence([row["values"] for row in rows], batch_first=True)
    values = nn.functional.pad(values, (0, width - values.shape[1]))
    return values, torch.tensor([row["label"] for row in rows])


COLLATE = f"{__name__}:padded"


def sentences(root: Path | None) -> tuple[Dataset[Any], Dataset[Any]]:  # noqa: ARG001
    return Sentences(), Sentences()


class Stacked(Sentences):
    def __getitem__(self, index: int) -> Any:
        inputs, labels = padded([super().__getitem__(index)])
        return inputs[0], int(labels)


@pytest.mark.procs
def test_a_collate_function_serves_training_evaluation_and_the_example() -> None:
    evaluate = ist.Evaluate(batch_size=32)
    expected = trained(Stacked(), test_data=Stacked(), evaluate=evaluate)

    given = trained(Sentences(), test_data=Sentences(), collate_fn=padded, evaluate=evaluate)
    loader = partial(DataLoader, Sentences(), batch_size=32, collate_fn=padded)
    of_loader = trained(loader(shuffle=True, num_workers=1), test_data=loader())

    assert_same(given, expected)
    assert_same(of_loader, expected)


def test_a_configuration_names_a_collate_function() -> None:
    job = build_job(
        small_config(
            data={"name": f"{__name__}:sentences", "collate": COLLATE}, model__args={"widths": [12, 9, 5]},
            train__workers=2,
        )
    )  # fmt: skip

    assert job.task.example.shape == (2, 12)
    with pytest.raises(ConfigError, match=naming("data.collate", "tests.data.test_loader:paded")):
        build_job(small_config(data={"name": "digits", "collate": f"{__name__}:paded"}))


def test_samples_that_a_collate_function_refuses_are_named() -> None:
    def failing(rows: list[Any]) -> Any:
        raise ValueError(f"{len(rows)} rows")

    with pytest.raises(DataError, match=naming("samples 4, 9 of Sentences", "ValueError: 2 rows")):
        fetch(Collated(Sentences(), failing), np.array([4, 9]), CPU)


def test_a_sample_that_a_data_set_cannot_read_with_others_is_named() -> None:
    class Rows(Squares):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[index] for index in indices]

    with pytest.raises(DataError, match=naming("sample 7 of Rows", "row 7")):
        fetch(take_shard(Rows(bad=7), np.arange(20)), np.array([4, 7]), CPU)


@pytest.mark.procs
def test_of_a_loader_the_data_set_the_batch_size_and_the_processes_are_used() -> None:
    calls: list[int] = []
    dataset = Augmented(data())

    given = DataLoader(dataset, batch_size=16, shuffle=True, num_workers=1, worker_init_fn=calls.append, timeout=60)

    assert_same(trained(given), trained(dataset, batch_size=16))


def test_a_loader_in_order_is_shuffled_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=naming("shuffle=False", "shuffle=True")):
        found = trained(DataLoader(data(), batch_size=32))

    assert_same(found, trained(data()))


class OtherLoader(DataLoader[Any]):
    pass


def loaded(**arguments: Any) -> DataLoader[Any]:
    return DataLoader(data(), **{"batch_size": 16, **arguments})


@pytest.mark.parametrize(
    ("loader", "named"),
    [
        (loaded(sampler=WeightedRandomSampler([1.0] * 100, 100)), ["sampler=WeightedRandomSampler", "ist.join"]),
        (loaded(sampler=DistributedSampler(data(), 2, 0)), ["sampler=DistributedSampler", "shuffle=True"]),
        (loaded(sampler=RandomSampler(data(), replacement=True)), ["RandomSampler", "replacement", "ist.join"]),
        (loaded(batch_size=1, batch_sampler=[[0, 1], [2, 3]]), ["batch_sampler=list", "ist.join"]),
        (loaded(batch_size=None), ["batch_size=None", "ist.join"]),
        (loaded(drop_last=True), ["drop_last=True", "leave drop_last out"]),
        (loaded(shuffle=True, generator=torch.Generator()), ["generator", "'seed'"]),
        (loaded(num_workers=1, in_order=False), ["in_order=False"]),
        (OtherLoader(data()), ["test_loader.OtherLoader", "loader.dataset"]),
    ],
)
def test_what_a_run_cannot_honour_of_a_loader_is_refused_by_name(loader: DataLoader[Any], named: list[str]) -> None:
    with pytest.raises(DataError, match=naming("data is a DataLoader", *named)):
        trained(loader)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"batch_size": 32}, ["batch_size is 32", "batch_size=16"]),
        ({"loader": {"workers": 1}}, ["loader is given", "DataLoader"]),
        ({"test_data": loaded(), "evaluate": {"batch_size": 8}}, ["evaluate.batch_size is 8", "batch_size=16"]),
        ({"collate_fn": 3}, ["collate_fn is 3"]),
    ],
)
def test_a_loader_and_an_argument_that_contradict_each_other_are_refused(arguments: Any, named: list[str]) -> None:
    with pytest.raises(ConfigError, match=naming(*named)):
        trained(loaded(shuffle=True), **arguments)


def test_a_tensor_data_set_is_read_without_seeding_its_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ItemDraws, "seeds", None)  # would fail

    assert len(plain(0, dataset=TensorDataset(torch.zeros(40, 12), torch.zeros(40)))[0]) == 5
