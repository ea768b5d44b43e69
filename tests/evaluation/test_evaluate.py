"""Evaluation and batch norm statistics of the full network: exact means over the data, without side effects."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from ist.data.batched import IGNORED
from ist.errors import DataError
from ist.evaluation.evaluate import (
    InputCache,
    evaluate,
    evaluation_batches,
    reestimate_statistics,
    statistics_batches,
)
from ist.evaluation.metrics import ACCURACY, RMSE
from ist.network.modes import modes_of
from ist.training.rounds import evaluate_full_network, refresh_statistics
from tests.conftest import clone, data, generators_left_alone, job_for

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9, momentum=0.3), nn.Dropout(0.5), nn.ReLU(), nn.Linear(9, 5))


@pytest.mark.parametrize("size", [16, 7, 40, 100])
def test_loss_and_metric_are_means_over_samples_for_any_batch_size(size: int) -> None:
    model, test = network(), data(40, seed=4)
    inputs, targets = test.tensors

    found = evaluate(model, test, functional.cross_entropy, size, CPU, ACCURACY)

    with torch.no_grad():
        outputs = model.eval()(inputs)
    # float32 means of 40 losses near 1.6, summed in another order
    assert found.loss == pytest.approx(float(functional.cross_entropy(outputs, targets)), rel=1e-5)
    assert found.values == {"accuracy": int((outputs.argmax(1) == targets).sum()) / 40}


def test_a_smaller_last_batch_has_a_smaller_weight() -> None:
    losses = torch.tensor([1.0, 1.0, 1.0, 1.0, 10.0, 10.0])
    test = TensorDataset(losses, losses)

    found = evaluate(nn.Identity(), test, lambda outputs, _: outputs.mean(), 4, CPU, None)

    assert found.loss == 4.0  # with equal weights for both batches it would be 5.5


def test_a_metric_sums_over_batches_and_skips_ignored_targets() -> None:
    scores = torch.eye(3)[[0, 1, 2, 0, 1, 2, 0]]
    targets = torch.tensor([0, 1, 0, IGNORED, IGNORED, 2, IGNORED])

    found = evaluate(nn.Identity(), TensorDataset(scores, targets), functional.cross_entropy, 3, CPU, ACCURACY)

    assert found.values == {"accuracy": 3 / 4}


def test_the_finish_of_a_metric_is_applied_to_the_mean_over_all_batches() -> None:
    outputs = torch.tensor([[0.0], [0.0], [0.0]])
    targets = torch.tensor([[3.0], [4.0], [0.0]])

    found = evaluate(nn.Identity(), TensorDataset(outputs, targets), functional.mse_loss, 2, CPU, RMSE)

    assert found.values == {"rmse": pytest.approx((25 / 3) ** 0.5)}


def test_a_metric_that_counts_no_sample_is_an_error_with_its_name() -> None:
    test = TensorDataset(torch.zeros(6, 3), torch.full((6,), IGNORED))

    with pytest.raises(DataError, match=r"'accuracy' .*\b6 samples"):
        evaluate(nn.Identity(), test, lambda outputs, _: outputs.sum(), 4, CPU, ACCURACY)


def test_evaluation_does_not_change_modes_weights_statistics_and_gradients() -> None:
    model = network()
    model[2].eval()
    modes, before = modes_of(model), clone(model.state_dict())
    seen: list[bool] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.requires_grad or model.training)
        return functional.cross_entropy(outputs, targets)

    evaluate(model, data(40, seed=4), loss, 16, CPU, ACCURACY)

    assert modes_of(model) == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert seen == [False] * 3
    assert all(parameter.grad is None for parameter in model.parameters())


def test_statistics_are_the_plain_mean_of_the_statistics_of_the_batches() -> None:
    model = network()
    model[1].running_mean.fill_(9)
    batches = [data(size, seed=size).tensors[0] for size in (20, 20, 30)]
    with torch.no_grad():
        hidden = [model[0](batch) for batch in batches]

    reestimate_statistics(model, batches)

    for name, of_batch in (("running_mean", lambda h: h.mean(0)), ("running_var", lambda h: h.var(0))):
        expected = torch.stack([of_batch(h) for h in hidden]).mean(0)
        # torch updates the mean batch by batch: a few roundings of numbers near 1
        torch.testing.assert_close(model[1].get_buffer(name), expected, rtol=1e-5, atol=1e-6)
    assert int(model[1].num_batches_tracked) == 3
    assert model[1].momentum == 0.3
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(modes_of(model).values())


def test_statistics_are_taken_without_dropout() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(12))
    inputs = data(60).tensors[0]

    reestimate_statistics(model, [inputs])

    torch.testing.assert_close(model[1].running_mean, inputs.mean(0))


class Counted(Dataset[Any]):
    """A data set that counts how often its items are read; with noise, they draw random numbers."""

    def __init__(self, inner: TensorDataset, noise: bool = False) -> None:
        self.inner, self.noise, self.reads = inner, noise, 0

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        item, target = self.inner[index]
        return item + float(np.random.normal()) if self.noise else item, target


@pytest.mark.parametrize(
    ("norm", "noise", "limit", "evaluations", "reads"),
    [
        (True, False, 64 * 2**20, 2, 3 * 10),  # the second evaluation reads nothing
        (True, False, 64 * 2**20, 0, 3 * 10),  # nobody evaluates: once, for the saved network
        (True, False, 3 * 10 * 12 * 4 - 1, 2, 2 * 3 * 10),  # a byte more than may be kept
        (True, True, 64 * 2**20, 2, 3 * 10),  # each evaluation draws the same numbers
        (False, False, 64 * 2**20, 2, 0),
    ],
)
def test_re_estimation_reads_its_budget_once_and_nothing_without_running_statistics(
    norm: bool, noise: bool, limit: int, evaluations: int, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ist.evaluation.evaluate.MOST_CACHED_BYTES", limit)
    train = Counted(data(100), noise)
    model = network() if norm else nn.Sequential(nn.Linear(12, 9), nn.ReLU(inplace=True), nn.Linear(9, 5))
    job = job_for(model, train, test=data(8), evaluate__batch_size=10, evaluate__statistics_batches=3)
    train.reads, found = 0, []

    if evaluations:
        with generators_left_alone():
            found = [evaluate_full_network(job, model, CPU).loss for _ in range(evaluations)]
    else:
        refresh_statistics(job, model, CPU)

    assert train.reads == reads
    assert len(set(found)) <= 1


def test_inputs_that_are_kept_do_not_change_when_the_network_changes_its_inputs() -> None:
    cache, train = InputCache(), Counted(data(100))
    rows = [np.arange(10), np.arange(10, 20)]

    for _ in range(2):
        for inputs in cache.inputs(train, rows):
            inputs.zero_()
    found = list(cache.inputs(train, rows))

    assert train.reads == 20
    assert torch.equal(torch.cat(found), train.inner.tensors[0][:20])


def test_batches_for_statistics_are_full_and_drawn_once_for_the_run_without_replacement() -> None:
    numbers = TensorDataset(torch.arange(50.0), torch.zeros(50))

    def drawn(size: int, batches: int, seed: int = 3) -> list[list[float]]:
        return [batch.tolist() for batch in statistics_batches(numbers, size, batches, seed, CPU)]

    found = drawn(8, 5)
    assert [len(batch) for batch in found] == [8] * 5
    assert len({number for batch in found for number in batch}) == 40
    assert drawn(8, 5) == found
    assert drawn(8, 5, seed=4) != found
    assert [len(batch) for batch in drawn(16, 10)] == [16, 16, 16]  # a smaller one would have the same weight
    assert [len(batch) for batch in drawn(64, 10)] == [50]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 64))
def test_every_sample_is_evaluated_once_and_no_avoidable_batch_has_one_sample(count: int, size: int) -> None:
    batches = list(evaluation_batches(count, size))

    assert np.array_equal(np.concatenate(batches), np.arange(count))
    assert all(len(batch) == size for batch in batches[:-2])
    assert len(batches[-1]) <= size + 1
    assert size == 1 or count == 1 or min(map(len, batches)) > 1
