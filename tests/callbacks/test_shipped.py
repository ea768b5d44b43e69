"""The callbacks that come with the package, with the real packages, which reach no network."""

import contextlib
import doctest
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ist
import ist.callbacks
from ist.callbacks import EarlyStopping, MLflow, Profiler, RayTune, WandB
from ist.errors import ConfigError
from ist.monitoring.exporters import scalars
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.storage.run_folder import RunFolder, create_run_folder
from tests.conftest import a_record, data, naming, small_config


class PowerCut(ist.Callback):
    """Ends a run by an error."""

    def __init__(self, in_round: int) -> None:
        self.in_round = in_round

    def on_round(self, record: Any) -> None:
        if record["round"] == self.in_round:
            raise ist.PoolError("power cut")


def train(path: Path, *callbacks: ist.Callback, resume: bool = False, **changes: Any) -> list[dict[str, Any]]:
    """Run, up to its end or a power cut; return the records."""
    config = small_config(**{"checkpoint": {"every": 1}} | changes)
    folder = RunFolder(path) if resume else create_run_folder(config, path)
    with contextlib.suppress(ist.PoolError):
        execute(build_job(config), folder, resume, progress=False, callbacks=callbacks)
    return folder.records()


def start(**changes: Any) -> ist.RunStart:
    given = {
        "name": "run", "config": {}, "run_dir": None, "num_rounds": 9, "first_round": 0, "parameters": 10,
        "trained_parameters": 10, "numbers": ("loss", "test_loss", "accuracy"), "history": (),
    }  # fmt: skip
    return ist.RunStart(**given | changes)


def test_the_examples_of_the_shipped_callbacks_run() -> None:
    said: list[str] = []
    tests = [
        test
        for name in ist.callbacks.__all__
        for test in doctest.DocTestFinder(recurse=False).find(
            getattr(ist.callbacks, name), name, globs={"ist": ist, **vars(ist.callbacks)}
        )
    ]

    for test in tests:
        doctest.DocTestRunner(verbose=False).run(test, out=said.append)

    assert sum(len(test.examples) for test in tests) > 0
    assert said == []


# Early stopping


@pytest.mark.parametrize(
    ("arguments", "values", "ends_after"),
    [
        ({"patience": 2}, [5, 4, 4, 3, 3, 3, 1], 5),
        ({"patience": 1}, [5, 4, 3, 2, 1], None),
        ({"patience": 2, "min_delta": 1}, [5, 4.5, 4, 3.9, 1], 2),
        ({"patience": 2, "mode": "max"}, [1, 2, 2, 1.9, 9], 3),
        ({"patience": 2}, [5, None, 6, None, 4, 5, None, 5], 7),
        ({"patience": 2}, [math.nan, 5, math.nan, math.inf, 1], 3),
    ],
)
def test_early_stopping_counts_observations_without_improvement(
    arguments: dict[str, Any], values: list[Any], ends_after: int | None
) -> None:
    stopping = EarlyStopping(**arguments)
    stopping.on_start(start())

    ended = [bool(stopping.on_round(a_record(number, test_loss=value))) for number, value in enumerate(values)]

    assert (ended.index(True) if True in ended else None) == ends_after


def test_a_killed_and_resumed_run_stops_early_in_the_same_round(tmp_path: Path) -> None:
    worsens: dict[str, Any] = {"train__rounds": 9, "train__optimizer": {"name": "SGD", "args": {"lr": 0.0}}}

    whole = train(tmp_path / "whole", EarlyStopping(patience=4), **worsens)
    train(tmp_path / "killed", EarlyStopping(patience=4), PowerCut(3), **worsens)
    killed = train(tmp_path / "killed", EarlyStopping(patience=4), resume=True, **worsens)

    assert len(whole) == len(killed) == 5
    reason = RunFolder(tmp_path / "killed").result()["stopped_early"]
    assert "test_loss" in reason
    assert "round 0" in reason


def test_early_stopping_needs_a_number_that_the_run_has() -> None:
    stopping = EarlyStopping("acuracy")
    with pytest.raises(ConfigError, match=naming("'acuracy'", "did you mean 'accuracy'?", "test_loss")):
        stopping.on_start(start())

    with pytest.raises(ConfigError, match=naming("'test_loss'", "loss", "test data")):
        ist.train(torch.nn.Linear(12, 5), data(), workers=1, rounds=1, progress=False, callbacks=[EarlyStopping()])


def joined(*callbacks: ist.Callback) -> Any:
    """A run with a loop and an evaluation of one's own."""
    rows = data()
    loader = [rows[:16]]
    run = ist.join(
        torch.nn.Linear(12, 5), example=rows[:2][0], workers=1, rounds=5, local_steps=1, progress=False, callbacks=callbacks,
    )  # fmt: skip
    perplexities = iter([9.0, 8.0, 8.0, 7.0, 6.0])
    run.evaluate(lambda _: {"perplexity": next(perplexities)})
    for part in run:
        for inputs, targets in part.take(loader):
            loss = torch.nn.functional.cross_entropy(part.model(inputs), targets)
            loss.backward()
            part.optimizer.step()
            part.log(loss, len(inputs))
    return run


def test_early_stopping_reads_the_numbers_of_an_own_evaluation() -> None:
    assert "perplexity" in joined(EarlyStopping("perplexity", patience=1)).stopped_early
    with pytest.raises(ConfigError, match=naming("'perplexities'", "did you mean 'perplexity'?")):
        joined(EarlyStopping("perplexities"))
    with pytest.raises(ConfigError, match=naming("'test_loss'", "perplexity")):
        joined(EarlyStopping())


# W&B


def logged_by_wandb(folder: Path) -> list[dict[str, Any]]:
    """Return the steps in the file of an offline run."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    store, steps = DataStore(), []
    store.open_for_scan(str(file))
    while (raw := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            steps.append({(item.key or item.nested_key[0]): json.loads(item.value_json) for item in items})
    store.close()
    return steps


@pytest.fixture
def wandb_service(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B's own process, which otherwise lives until this one ends."""
    import wandb

    for hook in ("exit", "excepthook"):  # W&B replaces them; they are restored after the test
        monkeypatch.setattr(sys, hook, getattr(sys, hook))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


@pytest.mark.procs
@pytest.mark.usefixtures("wandb_service")
@pytest.mark.filterwarnings("default")  # W&B's own
def test_wandb_receives_every_round_offline(tmp_path: Path) -> None:
    records = train(tmp_path / "run", WandB(mode="offline"))

    steps = logged_by_wandb(tmp_path / "run")
    assert len(steps) == len(records) == 4
    for step, record in zip(steps, records, strict=True):
        assert step["_step"] == record["round"]
        assert {key: value for key, value in step.items() if not key.startswith("_")} == scalars(record)
    kept = (tmp_path / "run" / "wandb-run-id").read_text().strip()
    assert next((tmp_path / "run" / "wandb").glob("offline-run-*")).name.endswith(kept)


# MLflow


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs packages of the full mlflow
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return (tmp_path / "mlruns").as_uri()


@pytest.mark.filterwarnings("default")  # MLflow's own
def test_mlflow_receives_every_round_and_a_resumed_run_continues(tmp_path: Path, mlflow_store: str) -> None:
    from mlflow import MlflowClient

    train(tmp_path / "run", MLflow(mlflow_store), PowerCut(2))
    client = MlflowClient(mlflow_store)
    experiment = client.get_experiment_by_name("ist")
    assert experiment
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FAILED"
    assert found.data.params["train.local_steps"] == "3"
    assert found.data.params["method"] == "ist"

    records = train(tmp_path / "run", MLflow(mlflow_store), resume=True)

    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    steps = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, "loss/train")}
    assert steps == {record["round"]: record["loss"] for record in records}
    result = RunFolder(tmp_path / "run").result()
    assert found.data.metrics["result/accuracy"] == result["accuracy"]


# Profiler


def test_the_profiler_writes_a_trace_of_each_chosen_round(tmp_path: Path) -> None:
    train(tmp_path / "run", Profiler(rounds=[1, 3]))

    traces = sorted((tmp_path / "run" / "profile").iterdir())
    assert [trace.name for trace in traces] == ["round-1.pt.trace.json", "round-3.pt.trace.json"]
    for trace in traces:
        names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
        assert {"aten::linear", "aten::addmm"} <= names
        assert any("Optimizer.step" in str(name) for name in names)


def test_a_profile_that_is_cut_off_leaves_no_trace_and_no_profiler(tmp_path: Path) -> None:
    train(tmp_path / "run", PowerCut(1), Profiler(rounds=[1]))

    assert not (tmp_path / "run" / "profile").exists()
    train(tmp_path / "other", Profiler(rounds=[0]))  # a profiler that still runs would refuse this
    assert (tmp_path / "other" / "profile" / "round-0.pt.trace.json").exists()


def test_the_profiler_needs_a_round_and_a_folder() -> None:
    with pytest.raises(ConfigError, match=naming("rounds has 9", "last round is 8")):
        Profiler([9]).on_start(start())
    with pytest.raises(ConfigError, match=naming("no folder", "run_dir")):
        Profiler([1]).on_start(start())


# Ray Tune


def test_a_run_outside_of_a_trial_is_refused() -> None:
    with pytest.raises(ConfigError, match=naming("'ray_tune'", "trial", "ray.tune.Tuner")):
        RayTune().on_start(start())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_address")
@pytest.mark.filterwarnings("default")  # Ray's own
def test_ray_tune_receives_every_round(tmp_path: Path) -> None:
    from ray import tune

    def trial(settings: dict[str, Any]) -> None:
        sgd = ist.Optimizer(name="SGD", args={"lr": settings["lr"]})
        ist.train(
            torch.nn.Linear(12, 5), data(), test_data=data(), workers=1, rounds=3, local_steps=2, optimizer=sgd,
            pool="inline", progress=False, callbacks=[RayTune()],
        )  # fmt: skip

    tuner = tune.Tuner(
        trial,
        param_space={"lr": tune.grid_search([0.1, 0.0])},
        tune_config=tune.TuneConfig(metric="test_loss", mode="min"),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    )
    results = tuner.fit()

    assert not results.errors
    assert results.get_best_result().config == {"lr": 0.1}
    assert list(results[0].metrics_dataframe["round"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("package", "make", "remedy"),
    [
        ("wandb", WandB, "pip install 'ist[wandb]'"),
        ("mlflow", MLflow, "pip install 'ist[mlflow]'"),
        ("pandas", RayTune, "pip install 'ray[tune]'"),
    ],
)
def test_a_missing_package_is_named_when_the_callback_is_created(
    package: str, make: Any, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{make.__module__}.find_spec", lambda name: None if name == package else object())

    with pytest.raises(ConfigError, match=naming(remedy)):
        make()
