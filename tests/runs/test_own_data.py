"""Workers with data of their own (`data.shard: own`): which process loads what, and what is refused."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

import ist
from ist.data.fingerprint import NO_DATA, data_fingerprint
from ist.data.shards.dirichlet import dirichlet_split
from ist.data.shards.unequal import OwnData
from ist.distributed import process_group as group
from ist.errors import ConfigError, DataError, ModelError
from ist.plan.predict import Planner
from ist.runs.build import build_job
from ist.runs.rehearsal import rehearse
from ist.subnet.job import for_workers
from tests.conftest import assert_same, clone, data, job_for, naming, small_config
from tests.networks import NETWORKS, seeded

PLAIN = "no batch norm"
OWN: dict[str, Any] = {"data__shard": "own"}


def trained(**arguments: Any) -> dict[str, Tensor]:
    model = seeded(NETWORKS[PLAIN])
    given = {"workers": 3, "rounds": 3, "local_steps": 4, "batch_size": 8, "progress": False, **arguments}
    given["optimizer"] = {"name": "SGD", "args": {"lr": 0.1, "momentum": 0.9}}
    ist.train(model, **given)
    return clone(model.state_dict())


def test_one_worker_with_data_of_its_own_trains_as_with_assigned_data() -> None:
    assert_same(trained(data=lambda _: data(), shard="own", workers=1), trained(data=data(), workers=1))
    assert_same(trained(data=data(), shard="own", workers=1), trained(data=data(), workers=1))


def test_workers_with_the_parts_of_a_split_train_as_with_skewed_shards() -> None:
    tensors = data().tensors
    parts = [
        TensorDataset(*(tensor[torch.from_numpy(part)] for tensor in tensors))
        for part in dirichlet_split(data(), 3, 0.3, seed=5)
    ]

    own = trained(data=parts.__getitem__, shard="own", seed=5)

    assert_same(own, trained(data=data(), skew=ist.Skew(alpha=0.3), seed=5))
    assert len({len(part) for part in parts}) == 3


def test_each_data_set_is_loaded_once_and_does_not_travel_with_the_run() -> None:
    asked: list[int] = []

    def load(worker: int) -> Dataset[Any]:
        asked.append(worker)
        return data(20 + worker, seed=worker)

    job = job_for(seeded(NETWORKS[PLAIN]), own=OwnData(load), train__workers=3, **OWN)
    rehearse(job)
    ist.train(seeded(NETWORKS[PLAIN]), load, shard="own", workers=3, rounds=2, local_steps=2, progress=False)

    assert asked == [0, 0, 1, 2]
    large = job_for(seeded(NETWORKS[PLAIN]), own=OwnData(_large), train__workers=3, **OWN)
    assert len(_large(0).tensors[0].untyped_storage()) > 4_000_000
    assert len(pickle.dumps(for_workers(large).task.own_data)) < 1000
    assert for_workers(large).task.train_data is not large.task.train_data


def _large(worker: int) -> TensorDataset:
    return data(100_000, seed=worker)


@pytest.mark.procs
def test_own_data_are_read_by_loader_processes_and_collated() -> None:
    def collate(items: list[Any]) -> Any:
        return torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])

    plain = trained(data=own, shard="own")

    assert_same(trained(data=own, shard="own", collate_fn=collate, loader=ist.Loader(workers=1)), plain)


def own(worker: int) -> TensorDataset:
    return data(20 + worker, seed=worker)


def test_a_loader_process_knows_how_many_samples_its_worker_has() -> None:
    asked: list[int] = []
    job = job_for(seeded(NETWORKS[PLAIN]), own=OwnData(own), train__workers=3, **OWN)
    sampler = job.schedule.sampler

    copy = pickle.loads(pickle.dumps(sampler))

    copy.data._load = asked.append
    assert copy.batch(0, 3).tolist() == sampler.batch(0, 3).tolist()
    assert asked == []


def test_records_of_own_data_have_no_epoch() -> None:
    result = ist.train(
        seeded(NETWORKS[PLAIN]), lambda worker: data(20 + worker), shard="own", workers=2, rounds=1, local_steps=2,
        progress=False,
    )  # fmt: skip

    assert "epoch" not in result.history[0]


LOADED: list[tuple[int | None, int]] = []


def load(root: Path | None, worker: int | None, num_workers: int) -> tuple[Dataset[Any] | None, Dataset[Any]]:  # noqa: ARG001
    """A loader of own data; a coordinator that does not train has none."""
    LOADED.append((worker, num_workers))
    inputs, targets = data(40 + 5 * (worker or 0), features=64, classes=10, seed=worker or 0).tensors
    return None if worker is None else TensorDataset(inputs, targets), data(20, 64, 10, seed=9)


def load_rank(root: Path | None) -> tuple[Dataset[Any], Dataset[Any]]:  # noqa: ARG001
    """A loader that reads the files of its machine."""
    return data(40, 64, 10), data(20, 64, 10)


LOADER = "tests.runs.test_own_data:load"
LAUNCHED = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_a_loader_receives_the_number_of_the_worker_whose_data_to_load() -> None:
    LOADED.clear()
    job = build_job(small_config(**OWN, data__name=LOADER))

    assert LOADED == [(0, 4)]
    assert job.task.own_data is not None
    assert [len(job.task.own_data(worker)) for worker in range(4)] == [40, 45, 50, 55]  # type: ignore[arg-type]
    assert LOADED == [(0, 4), (1, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize(
    ("rank", "world_size", "coordinator", "worker"),
    [("1", "4", "trains", 1), ("1", "5", "dedicated", 0), ("0", "5", "dedicated", None)],
)
def test_a_rank_loads_the_data_of_its_own_worker_only(
    monkeypatch: pytest.MonkeyPatch, rank: str, world_size: str, coordinator: str, worker: int | None
) -> None:
    for name, value in {**LAUNCHED, "RANK": rank, "WORLD_SIZE": world_size}.items():
        monkeypatch.setenv(name, value)
    LOADED.clear()

    pool = {"kind": "torchrun", "coordinator": coordinator}
    job = build_job(small_config(**OWN, data__name=LOADER, pool=pool, train__running_statistics="carried"))
    rehearse(job)

    assert [(worker, 4)] == LOADED
    assert job.task.worker == worker
    # A loader without the argument reads the files of its machine.
    other = small_config(**OWN, data__name="tests.runs.test_own_data:load_rank", pool__kind="torchrun")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert build_job(other).task.worker == int(rank)


def test_a_number_of_ranks_that_does_not_match_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    config = small_config(**OWN, data__name=LOADER, pool__kind="torchrun", train__workers=3)

    with pytest.raises(ConfigError, match=naming("4 processes", "train.workers", "3")):
        build_job(config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train__rounds": None, "train__epochs": 3}, ["train.epochs", "data.shard", "train.rounds"]),
        ({"data__shuffle": "global"}, ["data.shuffle", "global", "data.shard", "local"]),
        ({"data__skew": {"alpha": 1.0}}, ["data.skew", "data.shard", "own"]),
        ({"train__min_workers": 2}, ["train.min_workers", "data.shard", "fixed number"]),
    ],
)
def test_what_own_data_exclude_is_refused(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError, match=naming(*named)):
        small_config(**OWN, **changes)


def test_loaders_that_cannot_tell_workers_apart_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=naming("data.shard", "inline", "tests.runs.test_own_data:load_rank", "worker")
    ):
        build_job(small_config(**OWN, data__name="tests.runs.test_own_data:load_rank"))
    with pytest.raises(ConfigError, match=naming("data.args.worker", "data.shard", "remove")):
        build_job(small_config(**OWN, data__name=LOADER, data__args={"worker": 3}))
    with pytest.raises(ConfigError, match=naming("data.shard", "ist plan", "data.shard=assigned")):
        Planner(small_config(**OWN, data__name=LOADER), ["ist"])


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"data": data(), "shard": "own"}, ConfigError, ["shard", "TensorDataset", "inline", "data=lambda worker"]),
        ({"data": lambda _: data()}, ConfigError, ["data is a function", "shard='own'"]),
        ({"data": lambda _: TensorDataset(torch.empty(0)), "shard": "own"}, DataError, ["worker 0", "empty"]),
        ({"data": lambda _: 5, "shard": "own"}, DataError, ["worker 0", "int", "data set"]),
        ({"data": [data()].__getitem__, "shard": "own"}, DataError, ["worker 1", "IndexError"]),
    ],
)
def test_data_that_are_no_worker_s_own_are_refused(arguments: Any, error: type[Exception], named: list[str]) -> None:
    with pytest.raises(error, match=naming(*named)):
        trained(**arguments)


def test_a_coordinator_without_data_needs_an_example_and_no_batch_norm() -> None:
    pool = {"kind": "ray"}
    own = OwnData(lambda worker: data(20 + worker))
    with pytest.raises(DataError, match=naming("data.shard", "coordinator", "test data", "worker None")):
        job_for(seeded(NETWORKS[PLAIN]), own=own, pool=pool, **OWN)
    norm = seeded(NETWORKS["two hidden layers, batch norm"])
    with pytest.raises(ModelError, match=naming("data.shard", "running_statistics", "carried", "worker None")):
        job_for(norm, test=data(), own=own, pool=pool, **OWN)

    dedicated = {"kind": "torchrun", "coordinator": "dedicated"}
    with pytest.raises(ModelError, match=naming("data.shard", "running_statistics", "carried", "worker None")):
        build_job(small_config(**OWN, data__name=LOADER, pool=dedicated))  # before its process starts

    carried = job_for(norm, test=data(), own=own, pool=pool, **OWN, train__running_statistics="carried")
    some = job_for(norm, data(30), own=own, pool=pool, **OWN)

    assert carried.task.worker is some.task.worker is None
    assert len(some.task.train_data) == 30  # type: ignore[arg-type]
    rehearse(carried)


def test_rank_0_warns_of_ranks_with_the_same_data(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (data_fingerprint(data(seed=seed), 3) for seed in (1, 2))

    def start(rank: int, *contents: Any) -> int:
        def gather(said: list[Tensor], own: Tensor) -> None:
            for slot, train in zip(said, contents, strict=True):
                slot.copy_(torch.tensor([*own[:2].tolist(), *train.to_numbers(), *NO_DATA.to_numbers()]))

        monkeypatch.setattr(group.dist, "all_gather", gather)
        membership = group.Membership(rank, len(contents), torch.device("cpu"), "gloo")
        return group.agree_on_start(membership, 7, 5, (contents[rank], NO_DATA), own_data=True)

    with pytest.warns(UserWarning, match=naming("ranks 1 and 2", "100", "data.shard", "worker")):
        start(0, ours, theirs, theirs)
    assert start(1, ours, theirs, theirs) == start(0, NO_DATA, ours, theirs) == 7


def test_the_sample_that_made_a_loss_invalid_is_named_from_the_worker_s_own_data() -> None:
    def load(worker: int) -> TensorDataset:
        inputs, targets = data(16, seed=worker).tensors
        inputs[5 if worker == 1 else 0, 0] = float("nan") if worker == 1 else 0.0
        return TensorDataset(inputs, targets)

    with pytest.raises(ist.DivergedError, match=naming("worker 1", "sample 5", "nan")):
        trained(data=load, shard="own", workers=2)
