"""Callbacks receive what happens in a run, and may end it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import ist
from ist.cli.main import app
from ist.config.schema import Config
from ist.distributed.environment import is_rank_zero
from ist.errors import CallbackError, ConfigError, DivergedError
from ist.monitoring.display import Display
from ist.monitoring.observers import check_callbacks, make_callbacks, round_ended, run_start, started
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.runs.open import CoordinatorPart
from ist.storage.checkpoint import read_tensors
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.training.rounds import evaluate_full_network
from tests.conftest import a_record, assert_same, data, job_for, naming, run_forked_ranks, small_config
from tests.networks import NETWORKS, seeded

WHOLE = {"recipe": {"stages": [{"keep": 1}]}, "checkpoint": {"every": 1}}
"""Every worker trains the full network, so that it keeps its optimizer's momentum from round to round."""


class Log(ist.Callback):
    """Notes every call, and ends the run after a round."""

    def __init__(self, ends_after: int | None = None) -> None:
        self.ends_after = ends_after
        self.calls: list[tuple[str, Any]] = []

    def on_start(self, run: ist.RunStart) -> None:
        self.run = run
        self.calls.append(("start", run.first_round))

    def on_round(self, record: Any) -> ist.Stop | None:
        self.calls.append(("round", record["round"]))
        return ist.Stop("enough") if record["round"] == self.ends_after else None

    def on_evaluate(self, record: Any) -> None:
        self.last = record
        self.calls.append(("evaluate", record["round"]))

    def on_checkpoint(self, rounds_done: int) -> None:
        self.calls.append(("checkpoint", rounds_done))

    def on_end(self, result: Any) -> None:
        self.result = result
        self.calls.append(("end", result["rounds"]))

    def close(self) -> None:
        self.calls.append(("close", None))


def run(config: Config, path: Path, *callbacks: ist.Callback, resume: bool = False) -> CoordinatorPart:
    folder = RunFolder(path) if resume else create_run_folder(config, path)
    part = execute(build_job(config), folder, resume, progress=False, callbacks=callbacks)
    assert isinstance(part, CoordinatorPart)
    return part


# What callbacks receive


def test_a_callback_receives_every_event_in_order(tmp_path: Path) -> None:
    log = Log()

    part = run(small_config(evaluate={"every": 3}), tmp_path / "run", log)

    assert log.calls == [
        ("start", 0), ("round", 0), ("round", 1), ("checkpoint", 2), ("round", 2), ("evaluate", 2), ("round", 3),
        ("evaluate", 3), ("checkpoint", 4), ("end", 4), ("close", None),
    ]  # fmt: skip
    assert log.result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert log.run.run_dir == tmp_path / "run"
    assert (log.run.name, log.run.num_rounds, log.run.config["train"]["local_steps"]) == ("run", 4, 3)
    parameters = sum(parameter.numel() for parameter in part.method.model.parameters())
    assert log.run.parameters == log.run.trained_parameters == parameters
    assert set(log.last) >= set(log.run.numbers)


def test_a_run_without_a_folder_has_an_end_too() -> None:
    log = Log()

    result = ist.train(
        torch.nn.Linear(12, 5), data(), workers=1, rounds=2, local_steps=1, progress=False, callbacks=[log]
    )

    assert log.calls == [("start", 0), ("round", 0), ("round", 1), ("end", 2), ("close", None)]
    assert "test_loss" not in log.run.numbers
    assert result.stopped_early is None
    assert "stopped_early" not in log.result


def test_a_callback_cannot_change_the_records() -> None:
    class Vandal(ist.Callback):
        def on_round(self, record: Any) -> None:
            record["bytes_to_worker"].clear()
            record["loss"] = "nothing"

    log = Log()
    settings: dict[str, Any] = {"workers": 1, "rounds": 1, "progress": False}
    result = ist.train(torch.nn.Linear(12, 5), data(), callbacks=[Vandal(), log], **settings)

    assert result.history[0]["loss"] > 0
    assert result.history[0]["bytes_to_worker"] == [0]


def test_passwords_of_the_configuration_are_not_passed_on() -> None:
    config = small_config(
        checkpoint={"storage": "s3://me:secret@host/x"},
        watch={"callbacks": [{"name": "mlflow", "args": {"tracking_uri": "https://me:secret@host"}}]},
    )

    start = run_start(config, job_for(seeded(NETWORKS["no batch norm"])), None, 0)

    assert "secret" not in str(start.config)
    assert start.config["checkpoint"]["storage"] == "s3://***@host/x"


# Ending a run


def test_a_run_that_a_callback_ends_is_evaluated_and_saved_and_finished(tmp_path: Path) -> None:
    log = Log(ends_after=1)
    config = small_config(train__rounds=9, evaluate={"every": 9}, checkpoint={"every": 9})

    part = run(config, tmp_path / "run", log)

    assert log.calls == [
        ("start", 0), ("round", 0), ("round", 1), ("evaluate", 1), ("checkpoint", 2), ("end", 2), ("close", None),
    ]  # fmt: skip
    result = RunFolder(tmp_path / "run").result()
    metrics = evaluate_full_network(part.job, part.method.model, part.device)
    assert (result["stopped_early"], result["rounds"]) == ("enough", 2)
    assert (result["test_loss"], result["accuracy"]) == (metrics.loss, metrics.values["accuracy"])
    assert_same(read_tensors(tmp_path / "run" / "model.safetensors")[0], part.method.model.state_dict())
    assert RunFolder(tmp_path / "run").finished_records() == part.recorder.history


def test_a_request_to_end_after_the_last_round_changes_nothing(tmp_path: Path) -> None:
    run(small_config(), tmp_path / "run", Log(ends_after=3))

    assert "stopped_early" not in RunFolder(tmp_path / "run").result()


def test_a_run_that_was_ended_and_is_resumed_is_the_same_run(tmp_path: Path) -> None:
    config = small_config(**WHOLE)
    run(config, tmp_path / "whole")
    run(config, tmp_path / "ended", Log(ends_after=1))

    run(config, tmp_path / "ended", resume=True)

    weights = [read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("whole", "ended")]
    assert_same(*weights)
    folder = RunFolder(tmp_path / "ended")
    assert not folder.stopped_early()
    assert [record["round"] for record in folder.records()] == [0, 1, 2, 3]


def test_a_resumed_run_says_that_workers_had_not_saved_their_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(**WHOLE | {"checkpoint": {"every": 3}})
    run(config, tmp_path / "run", Log(ends_after=1))

    run(config, tmp_path / "run", resume=True)

    assert naming_in(caplog.text, "worker 0", "no saved state", "round 3")


def naming_in(text: str, *parts: str) -> bool:
    return all(part in text for part in parts)


@pytest.mark.system
def test_every_rank_ends_when_a_callback_does_and_other_runs_send_nothing_more(tmp_path: Path) -> None:
    run_forked_ranks((2, __file__, tmp_path))

    ended, ddp, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ist", "ddp", "whole"))
    assert len(ended) == len(ddp) == 2
    assert len(whole) == 4
    assert [record["sent_bytes"] for record in ended] == [record["sent_bytes"] for record in whole[:2]]
    assert [record["loss"] for record in ended] == [record["loss"] for record in whole[:2]]


def as_a_rank(out: Path) -> None:
    """Run three times as a rank: two runs that a callback ends, and one to its last round."""
    torch.set_num_threads(1)
    pool = {"kind": "torchrun", "device": "cpu"}
    for name, method, callbacks in (("ist", "ist", [Log(1)]), ("ddp", "ddp", [Log(1)]), ("whole", "ist", [])):
        given = callbacks if is_rank_zero() else []
        part = execute(
            build_job(small_config(train__workers=2, pool=pool, method=method)), progress=False, callbacks=given
        )
        if isinstance(part, CoordinatorPart):
            (out / f"{name}.json").write_text(json.dumps(part.recorder.history))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_address")
def test_a_callback_ends_a_run_on_ray(tmp_path: Path) -> None:
    run(small_config(pool={"kind": "ray"}, train__rounds=9), tmp_path / "run", Log(ends_after=1))

    result = RunFolder(tmp_path / "run").result()
    assert (result["stopped_early"], result["rounds"]) == ("enough", 2)


def test_the_command_line_says_why_a_run_ended_and_resumes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_callbacks.py").write_text(
        "import ist\n"
        "class Once(ist.Callback):\n"
        "    def __init__(self, after): self.after = after\n"
        "    def on_start(self, run): self.first = run.first_round\n"
        "    def on_round(self, record):\n"
        "        return ist.Stop('seen enough') if record['round'] == self.first + self.after else None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = small_config(train__rounds=5, watch={"callbacks": [{"name": "my_callbacks:Once", "args": {"after": 1}}]})
    (tmp_path / "mine.yaml").write_text(json.dumps(config.model_dump()))
    path = tmp_path / "run"

    app(["train", str(tmp_path / "mine.yaml"), "--run-dir", str(path)], standalone_mode=False)
    first = capsys.readouterr().out
    app(["train", "--resume", str(path)], standalone_mode=False)
    second = capsys.readouterr().out
    app(["train", "--resume", str(path)], standalone_mode=False)
    third = capsys.readouterr().out

    assert naming_in(first, "ist: stopped early", "2 rounds", "seen enough")
    assert naming_in(second, "stopped early", "4 rounds", "seen enough")
    assert "stopped early" not in third
    assert RunFolder(path).result()["rounds"] == 5


# Errors


class Broken(ist.Callback):
    def __init__(self, event: str) -> None:
        setattr(self, event, self.fail)

    def fail(self, *_: Any) -> None:
        raise KeyError("no such thing")


@pytest.mark.parametrize("event", ["on_start", "on_round", "on_evaluate", "on_checkpoint", "on_end", "close"])
def test_an_error_in_a_callback_names_it_and_closes_the_others(event: str, tmp_path: Path) -> None:
    log = Log()

    with pytest.raises(
        CallbackError, match=naming("callback Broken", event, "KeyError", "no such thing", "test_callbacks.py, line ")
    ):
        run(small_config(), tmp_path / "run", log, Broken(event))

    assert log.calls[-1] == ("close", None)


def test_the_error_of_a_run_is_not_hidden_by_one_of_close(caplog: pytest.LogCaptureFixture) -> None:
    diverging = ist.Optimizer(name="SGD", args={"lr": 1e30})
    ones = TensorDataset(torch.ones(8, 2), torch.ones(8, 1))

    with pytest.raises(DivergedError):
        ist.train(
            torch.nn.Linear(2, 1), ones, loss="mse_loss", workers=1, rounds=2, optimizer=diverging, progress=False,
            callbacks=[Broken("close")],
        )  # fmt: skip

    assert naming_in(caplog.text, "callback Broken", "close", "KeyError")


def test_an_answer_that_is_not_a_stop_is_refused() -> None:
    class Eager(ist.Callback):
        def on_round(self, record: Any) -> Any:
            return record["round"] == 3

    with pytest.raises(CallbackError, match=naming("callback Eager", "on_round", "True", "ist.Stop(", "None")):
        round_ended([Eager()], a_record(3))


class WithTypo(ist.Callback):
    def on_rounds(self, record: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("callback", "parts"),
    [
        (print, ("callbacks[0]", "print", "ist.Callback")),
        (Log, ("callbacks[0]", "the class Log", "an object")),
        ("wandb", ("callbacks[0]", "'wandb'", "ist.Callback")),
        (WithTypo(), ("callback WithTypo", "'on_rounds'", "did you mean 'on_round'?")),
    ],
)
def test_what_is_not_a_callback_is_refused_before_anything_starts(callback: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=naming(*parts)):
        ist.train(torch.nn.Linear(12, 5), data(), workers=1, rounds=1, callbacks=[callback])
    with pytest.raises(ConfigError, match=naming("callbacks is <", "a list")):
        ist.train(torch.nn.Linear(12, 5), data(), workers=1, rounds=1, callbacks=Log())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("wandbb", ("watch.callbacks.0.name", "'wandbb'", "did you mean 'wandb'?")),
        ("builtins:dict", ("watch.callbacks.0.name", "'builtins:dict'", "{}", "ist.Callback")),
        ("tests.monitoring.test_callbacks:WithTypo", ("callback WithTypo", "'on_rounds'", "'on_round'")),
        ({"name": "early_stopping", "args": {"patients": 2}}, ("watch.callbacks.0.args", "patients", "patience")),
        ({"name": "early_stopping", "args": {"patience": 0}}, ("EarlyStopping", "patience is 0", "above 0")),
        ({"name": "early_stopping", "args": {"mode": "least"}}, ("EarlyStopping", "'least'", "'min' or 'max'")),
        ({"name": "profiler", "args": {"rounds": []}}, ("Profiler", "rounds is []")),
    ],
)
def test_a_configured_callback_is_checked_before_anything_starts(given: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=naming(*parts)):
        check_callbacks(small_config(watch={"callbacks": [given]}))


def test_callbacks_in_a_configuration_are_a_list_of_names_or_mappings() -> None:
    with pytest.raises(ConfigError, match=naming("watch.callbacks", "'wandb'", "list")):
        small_config(watch={"callbacks": "wandb"})
    with pytest.raises(ConfigError, match=naming("ist.Watch", "callbacks.0", "keys among name, args")):
        ist.Watch(callbacks=[Log()])


def test_built_in_callbacks_come_first_and_the_display_last() -> None:
    config = small_config(watch={"tensorboard": True, "metrics_port": 0, "callbacks": ["early_stopping"]})

    made = make_callbacks(config, [Log()])

    assert [type(callback).__name__ for callback in made] == [
        "TensorBoard", "Prometheus", "Log", "EarlyStopping", "Display",
    ]  # fmt: skip


# Progress


def test_tqdm_shows_progress_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    start = run_start(small_config(), job_for(seeded(NETWORKS["no batch norm"])), None, 0)

    with started([display := Display("tqdm")], start):
        display.on_round(a_record(0, lost=[{"worker": 1, "kind": "late", "reason": "missed 5 s"}]))
        display.on_round(a_record(1))

    shown = capsys.readouterr().err
    assert naming_in(shown, "ist:  50%", "2/4", "loss 0.5000", "accuracy 87.50%", "worker 1", "missed 5 s")


def test_a_notebook_gets_a_bar_of_tqdm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ist.monitoring.display.PlainConsole.is_jupyter", True, raising=False)
    monkeypatch.setattr("ist.monitoring.display.PlainConsole.__init__", lambda *_, **__: None)
    start = run_start(small_config(), job_for(seeded(NETWORKS["no batch norm"])), None, 0)

    with started([display := Display(True)], start):
        display.on_round(a_record(0))

    assert naming_in(capsys.readouterr().err, "1/4", "loss 0.5000", "round/s")


def test_another_kind_of_progress_is_refused() -> None:
    with pytest.raises(ConfigError, match=naming("progress is 'bar'", "'tqdm'")):
        ist.train(torch.nn.Linear(12, 5), data(), workers=1, rounds=1, progress="bar")  # type: ignore[arg-type]


if __name__ == "__main__":
    as_a_rank(Path(sys.argv[1]))
