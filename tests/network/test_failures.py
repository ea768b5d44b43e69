"""Errors in a user's data, network or loss name the sample, the round, the worker and the module."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import ist
from ist.data.batched import BatchedDataset
from ist.data.batches import fetch
from ist.distributed import process_group as group
from ist.errors import ConfigError, DataError, ISTError, ModelError, PoolError, WorkerLostError
from ist.evaluation.evaluate import evaluate
from ist.runs.rehearsal import rehearse
from tests.conftest import data, job_for
from tests.networks import NETWORKS, seeded

CPU = torch.device("cpu")
BAD = 77


class Damaged(Dataset[Any]):
    """A data set with one bad sample."""

    def __init__(self, how: str, inner: TensorDataset | None = None) -> None:
        self.inner = inner or data()
        self.how = how

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.inner[index]
        if index == BAD:
            if self.how == "raises":
                raise KeyError("no such recording")
            if self.how == "shape":
                return inputs[:-1], target
            if self.how == "target":
                return inputs, torch.tensor(11)
        return inputs, target


def load(root: Path | None, damaged: str) -> tuple[Dataset[Any], Dataset[Any]]:  # noqa: ARG001
    """Return training and test data; one of them has a target that is not a class number."""
    train, test = data(), data(90, seed=4)
    return (Damaged("target", train), test) if damaged == "train" else (train, Damaged("target", test))


EXPECTED = {
    "raises": rf"\b{BAD} of Damaged.*KeyError: 'no such recording' \(test_failures.py, line \d+\)",
    "shape": rf"\b{BAD}\b.*RuntimeError: stack|RuntimeError: stack",
    "target": rf"loss.*\b{BAD}\b.*\b11\b.*0 to 4.*IndexError: Target 11",
}


def trained(dataset: Any, model: nn.Module | None = None, **options: Any) -> Any:
    return ist.train(
        model or seeded(NETWORKS["no batch norm"]), dataset, workers=2, epochs=1, local_steps=1, batch_size=8,
        progress=False, **options,
    )  # fmt: skip


def error_of(act: Any, kind: type[ISTError]) -> str:
    with pytest.raises(kind) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def round_and_worker_of_bad_sample(workers: int = 2) -> tuple[int, int]:
    sampler = job_for(
        seeded(NETWORKS["no batch norm"]), train__workers=workers, train__batch_size=8, seed=0
    ).schedule.sampler
    return next(
        (step, worker)
        for worker in range(workers)
        for step in range(sampler.steps_per_epoch)
        if BAD in sampler.shard(worker)[sampler.batch(worker, step)]
    )


@pytest.mark.parametrize("how", EXPECTED)
def test_a_late_bad_sample_is_named_with_its_round_and_worker(how: str) -> None:
    message = error_of(lambda: trained(Damaged(how)), DataError)

    round_number, worker = round_and_worker_of_bad_sample()
    assert round_number > 0
    assert message.startswith(f"round {round_number}, worker {worker}: ")
    assert re.search(EXPECTED[how], message)


def test_the_bad_target_of_a_tensor_data_set_is_named_by_its_number_in_the_full_data_set() -> None:
    inputs, targets = data().tensors
    targets[BAD] = -3

    message = error_of(lambda: trained(TensorDataset(inputs, targets)), DataError)

    assert re.search(rf"loss.*\b{BAD}\b.*-3.*0 to 4", message)


@pytest.mark.parametrize("how", EXPECTED)
def test_a_bad_test_sample_is_named(how: str) -> None:
    message = error_of(lambda: trained(data(), test_data=Damaged(how)), DataError)

    assert re.match(r"eval.*round 0: ", message)
    assert re.search(EXPECTED[how], message)


def test_two_items_of_different_shapes_are_both_named() -> None:
    with pytest.raises(DataError, match=rf"70, {BAD} of Damaged.*RuntimeError: stack expects"):
        fetch(Damaged("shape"), np.array([70, 71, BAD, 78]), CPU)


def test_items_that_are_not_pairs_are_refused() -> None:
    triples = TensorDataset(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4))

    with pytest.raises(DataError, match=r"TensorDataset .*3 .*\(inputs, targets\)"):
        fetch(triples, np.array([0, 1]), CPU)


class DamagedBatches(BatchedDataset):
    def __len__(self) -> int:
        return 100

    def batch(self, indices: Any) -> Any:  # noqa: ARG002
        raise OSError("disk gone")

    def part(self, indices: Any) -> BatchedDataset:  # noqa: ARG002
        return self


def test_the_error_of_a_batch_that_the_data_set_makes_names_its_samples() -> None:
    with pytest.raises(DataError, match=r"0, 1, 2, 3, 4, 5, 6, 7, \.\.\. \(9\) of DamagedBatches .* disk gone"):
        fetch(DamagedBatches(), np.arange(9), CPU)


class Fragile(nn.Module):
    """Returns its input; fails if that is large, in its forward or its backward pass."""

    def __init__(self, backward: bool) -> None:
        super().__init__()
        self.backward = backward

    def forward(self, inputs: Tensor) -> Tensor:
        if float(inputs.detach().abs().max() if not inputs.is_meta else 0) > 1000:
            if not self.backward:
                raise ArithmeticError("too large")
            inputs.register_hook(refuse)
        return inputs


def refuse(gradient: Tensor) -> Tensor:  # noqa: ARG001
    raise ArithmeticError("too large to go back")


@pytest.mark.parametrize("backward", [False, True])
def test_the_error_of_a_network_that_fails_late_names_round_worker_and_module(backward: bool) -> None:
    inputs, targets = data().tensors
    inputs[BAD] *= 1e6
    network = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), Fragile(backward), nn.Linear(16, 5))

    message = error_of(lambda: trained(TensorDataset(inputs, targets), network), ModelError)

    round_number, worker = round_and_worker_of_bad_sample()
    expected = "backward.*ArithmeticError: too large to go back" if backward else r"'2' \(Fragile\).*: too large"
    assert re.match(rf"round {round_number}, worker {worker}: .*{expected} \(test_failures\.py, line ", message)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_an_out_of_memory_error_passes_unchanged(error: Exception) -> None:
    class Full(Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Any:
            raise error

    with pytest.raises(type(error)):
        fetch(Full(), np.arange(2), CPU)


def without_statistics() -> nn.Module:
    return seeded(NETWORKS["the paper's"])


def test_a_single_last_test_sample_joins_the_batch_before() -> None:
    result = trained(data(), without_statistics(), test_data=data(33, seed=4), evaluate_options={"batch_size": 16})

    assert all(record["test_loss"] > 0 for record in result.history)


@pytest.mark.parametrize(
    ("make", "test", "size"),
    [
        (without_statistics, data(33, seed=4), 1),
        (without_statistics, data(1, seed=4), 16),
        (lambda: seeded(NETWORKS["one hidden layer"]), None, 1),
    ],
)
def test_evaluation_that_would_fail_after_the_first_round_is_refused_before_it(make: Any, test: Any, size: int) -> None:
    job = job_for(make(), None, test, evaluate__batch_size=size)

    found = error_of(lambda: rehearse(job), ModelError)

    assert f"evaluate.batch_size {size}" in found
    assert "Expected more than 1 value per channel" in found


def test_a_metric_that_fails_names_the_samples() -> None:
    model, test = seeded(NETWORKS["no batch norm"]), data(40, seed=4)
    job = job_for(model, test=test)
    floats = TensorDataset(test.tensors[0], test.tensors[1].float())

    with pytest.raises(ConfigError, match=r"'accuracy' of samples 0, 1, .*ValueError: .*evaluate\.metric.*'rmse'"):
        evaluate(model, floats, lambda outputs, _: functional.mse_loss(outputs, outputs), 16, CPU, job.task.metric)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[group.Membership]:
    """Three ranks that share a store."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(group.dist.distributed_c10d, "_get_default_store", lambda: store)
    return [group.Membership(rank, 3, CPU, "gloo") for rank in range(3)]


def failed(membership: group.Membership, error: Exception) -> str:
    """Return the message of a rank that fails with an error."""
    with pytest.raises(type(error)) as caught, group.failures_published(membership):
        raise error
    return str(caught.value)


def test_a_rank_that_lost_a_peer_repeats_the_error_that_the_peer_has_reported(ranks: list[group.Membership]) -> None:
    assert failed(ranks[0], PoolError("rank 0 lost rank 1")) == "rank 0 lost rank 1"
    assert failed(ranks[2], DataError("sample 77 is bad\nand more")) == "sample 77 is bad\nand more"
    assert failed(ranks[0], WorkerLostError("rank 0 lost rank 1")) == "rank 2 failed: DataError: sample 77 is bad"
    assert failed(ranks[1], ValueError("its own")) == "its own"


def test_an_error_that_a_rank_reported_in_an_earlier_run_is_forgotten(ranks: list[group.Membership]) -> None:
    failed(ranks[2], ValueError("\x1b[31mred\x07"))
    assert failed(ranks[0], PoolError("lost")) == "rank 2 failed: ValueError:  [31mred "

    with group.failures_published(ranks[2]):
        assert failed(ranks[0], PoolError("lost")) == "lost"


def test_reports_without_a_valid_signature_are_ignored(ranks: list[group.Membership]) -> None:
    failed(ranks[2], DataError("sample 77 is bad"))
    store: Any = group.dist.distributed_c10d._get_default_store()
    genuine = store.get("ist/cause//2").decode()

    store.set("ist/cause//1", "ValueError: all is lost")
    store.set("ist/cause//0", genuine)  # as another rank
    assert failed(ranks[0], PoolError("lost")) == "rank 2 failed: DataError: sample 77 is bad"

    store.set("ist/cause//2", genuine.replace("77", "78"))
    assert failed(ranks[0], PoolError("lost")) == "lost"


def test_a_lost_store_does_not_hide_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> Any:
        raise RuntimeError("Connection reset by peer")

    store = SimpleNamespace(set=gone, check=gone)
    monkeypatch.setattr(group.dist.distributed_c10d, "_get_default_store", lambda: store)

    assert failed(group.Membership(0, 2, CPU, "gloo"), DataError("bad")) == "bad"
    assert failed(group.Membership(0, 2, CPU, "gloo"), PoolError("lost")) == "lost"
