"""Metrics: each against a plain computation, and the names by which a configuration refers to them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ist.errors import ConfigError, DataError
from ist.evaluation.evaluate import evaluate
from ist.evaluation.metrics import ACCURACY, BITS_PER_BYTE, PRECISION, RMSE, Metric
from ist.runs.build import build_job, metric_named
from ist.runs.execute import execute
from ist.runs.rehearsal import rehearse
from ist.storage.run_folder import create_run_folder
from tests.conftest import data, job_for, small_config
from tests.networks import NETWORKS, seeded

CPU = torch.device("cpu")


def _largest(scores: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return torch.stack([scores.max(dim=1).values.sum(), scores.min(dim=1).values.sum()]), len(targets)


EXTREMES = Metric(("largest", "smallest"), _largest, higher_is_better=False)
NO_METRIC = "a text"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values(metric: Metric, outputs: Tensor, targets: Tensor, batch_size: int = 3) -> dict[str, float]:
    """Evaluate given outputs, in batches of which the last is smaller."""
    dataset = TensorDataset(outputs, targets)
    return dict(evaluate(nn.Identity(), dataset, lambda *_: torch.zeros(()), batch_size, CPU, metric).values)


def test_accuracy_is_the_fraction_of_counted_targets_with_the_best_score() -> None:
    scores, targets = randn(10, 4), torch.tensor([0, 1, 2, 3, -100, 1, 2, -100, 0, 3])
    rows = [(row, int(target)) for row, target in zip(scores.tolist(), targets, strict=True) if target != -100]

    right = [row.index(max(row)) == target for row, target in rows]

    assert values(ACCURACY, scores, targets) == {"accuracy": pytest.approx(sum(right) / 8)}


def test_accuracy_of_ignored_targets_only_is_an_error() -> None:
    with pytest.raises(DataError, match=r"'accuracy' .*\b4 samples"):
        values(ACCURACY, randn(4, 3), torch.full((4,), -100))


def test_bits_per_byte_are_the_bits_of_each_byte_given_the_bytes_before_it() -> None:
    scores, tokens = randn(5, 7, 256), torch.randint(256, (5, 7), generator=torch.Generator().manual_seed(1))
    bits = [
        -math.log2(math.exp(scores[i, t, tokens[i, t + 1]]) / sum(math.exp(s) for s in scores[i, t].tolist()))
        for i in range(5)
        for t in range(6)
    ]

    assert values(BITS_PER_BYTE, scores, tokens) == {"bits_per_byte": pytest.approx(sum(bits) / 30, rel=1e-5)}


def test_precision_is_the_fraction_of_the_best_labels_that_an_item_has() -> None:
    scores = randn(7, 9)
    labels = torch.tensor([[0, 1, 2], [3, -1, -1], [4, 8, -1], [5, 6, 7], [2, -1, -1], [-1, -1, -1], [1, 0, -1]])
    expected = {}
    for top in (1, 3, 5):
        parts = []
        for row, mine in zip(scores.tolist(), labels.tolist(), strict=True):
            best = sorted(range(9), key=lambda label: -row[label])[:top]
            parts.append(len(set(best) & set(mine)) / top)
        expected[f"precision_at_{top}"] = pytest.approx(sum(parts) / 7)

    assert values(PRECISION, scores, labels) == expected


def test_rmse_is_the_root_of_the_mean_square_over_all_batches() -> None:
    outputs, targets = randn(8, 2), randn(8, 2, seed=1)
    squares = [(a - b) ** 2 for a, b in zip(outputs.flatten().tolist(), targets.flatten().tolist(), strict=True)]

    assert values(RMSE, outputs, targets) == {"rmse": pytest.approx(math.sqrt(sum(squares) / 16))}


def test_rmse_does_not_broadcast_outputs_to_targets_of_another_shape() -> None:
    with pytest.raises(ConfigError, match=r"samples 0, 1, 2 .*ValueError: .*\(3, 1\).*\(3,\)"):
        values(RMSE, randn(8, 1), randn(8))
    network = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))
    inputs = data().tensors[0]
    test = TensorDataset(inputs[:4], inputs[:4, :1])
    job = job_for(seeded(lambda: network), TensorDataset(inputs, inputs[:, 0]), test, evaluate__metric="rmse")
    object.__setattr__(job.task, "loss", lambda outputs, targets: (outputs - targets.flatten()).square().mean())
    with pytest.raises(ConfigError, match=r"'rmse' of samples 0, 1 .*ValueError: .*\(2,\).*\(2, 1\)"):
        rehearse(job)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "'accuracy'"),
        ("my_metrics.recall", "'my_metrics:recall'"),
        ("loss_of_hair", "accuracy, bits_per_byte, precision, rmse"),
        ("tests.evaluation.test_metrics:NO_METRIC", "ist.Metric"),
        ("tests.evaluation.test_metrics:MISSING", "'MISSING'"),
    ],
)
def test_a_wrong_metric_is_refused_by_its_key(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_job(small_config(evaluate__metric=name))

    assert "'evaluate.metric'" in str(caught.value)
    assert message in str(caught.value)


def test_each_short_name_refers_to_its_metric() -> None:
    names = ("accuracy", "bits_per_byte", "precision", "rmse")
    assert [metric_named(name) for name in names] == [ACCURACY, BITS_PER_BYTE, PRECISION, RMSE]
    assert metric_named("none") is None


def run(tmp_path: Path, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    folder = create_run_folder(small_config(**changes), tmp_path / "run")
    execute(build_job(folder.load_config()), folder, progress=False)
    return folder.records(), folder.result()


def test_a_users_metric_is_recorded_by_its_names_and_its_best_value_is_the_least(tmp_path: Path) -> None:
    records, result = run(tmp_path, evaluate__metric="tests.evaluation.test_metrics:EXTREMES")

    shown = [record["largest"] for record in records]
    assert all(record["metric"] == "largest" for record in records)
    assert all(record["smallest"] < record["largest"] for record in records)
    assert all(record["accuracy"] is None for record in records)
    assert result["metric"] == "largest"
    assert result["metrics"] == {
        "largest": shown[-1], "best_largest": min(shown), "smallest": records[-1]["smallest"],
    }  # fmt: skip
    assert result["accuracy"] is None


def test_without_a_metric_only_the_loss_is_reported(tmp_path: Path) -> None:
    records, result = run(tmp_path, evaluate__metric="none")

    assert all(record["metric"] is None and record["test_loss"] > 0 for record in records)
    assert (result["metric"], result["metrics"]) == (None, {})


def test_a_network_is_evaluated_by_the_metric_of_its_job() -> None:
    model, test = seeded(NETWORKS["no batch norm"]), data(40, seed=4)
    job = job_for(model, test=test)

    found = evaluate(model, test, job.task.loss, 16, CPU, job.task.metric)

    inputs, targets = test.tensors
    assert found.values["accuracy"] == pytest.approx(float((model(inputs).argmax(1) == targets).float().mean()))
    assert evaluate(model, test, job.task.loss, 16, CPU, None).values == {}
