"""The command line in this process: output, error messages and exit codes."""

import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from ist.cli import main as cli
from tests.conftest import ROOT, Run, config_tree, naming


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def ist(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["ist", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capfd.readouterr())

    return run


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config_tree(output=str(tmp_path / "runs"), **changes)))
    return path


def test_train_writes_a_run_folder_and_separates_progress_from_results(ist_command: Run, tmp_path: Path) -> None:
    # In its own process: this one may hold so much memory from earlier tests that a run needs no more.
    outcome = ist_command("train", written(tmp_path), "--run-dir", tmp_path / "run")

    assert outcome.returncode == 0
    assert "round 4/4" in outcome.stderr
    assert "accuracy" in outcome.stdout
    assert "round 4/4" not in outcome.stdout
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "checkpoints", "model.safetensors", "result.json"}
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    record, result = records[-1], json.loads((tmp_path / "run" / "result.json").read_text())
    for peak in ("memory_bytes", "coordinator_memory_bytes"):
        assert result[peak] == max(one[peak] for one in records) > 0
    # The start of the process counts too: the interpreter and torch alone take more than 100 MB.
    for process, above in (
        ("process_memory_bytes", "memory_bytes"),
        ("coordinator_process_memory_bytes", "memory_bytes"),
    ):
        assert result[process] >= max(one[process] for one in records) > result[above] + 100 * 10**6
    assert {"round", "loss", "accuracy", "sent_bytes", "compute_s", "exchange_s", "idle_s", "memory_bytes"} <= set(
        record
    )


def test_options_and_overrides_end_up_in_the_resolved_configuration(ist: Any, tmp_path: Path) -> None:
    ist("train", written(tmp_path), "--run-dir", tmp_path / "run", "--workers", "2", "--set", "train.rounds=1")

    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (resolved["train"]["workers"], resolved["train"]["rounds"]) == (2, 1)
    assert resolved["evaluate"]["batch_size"] == 1024


def test_a_finished_run_is_not_run_again(ist: Any, tmp_path: Path) -> None:
    ist("train", written(tmp_path), "--run-dir", tmp_path / "run")

    outcome = ist("train", "--resume", tmp_path / "run")

    assert outcome.code == 0
    assert re.search(naming(str(tmp_path / "run"), "finished"), outcome.err)
    assert "round 1/" not in outcome.err


def test_a_restarted_command_resumes_its_own_run_and_no_other(ist: Any, tmp_path: Path) -> None:
    config, again = written(tmp_path), ("--run-dir", tmp_path / "run", "--auto-resume")
    assert ist("train", config, *again).code == 0

    same, other = ist("train", config, *again), ist("train", config, *again, "--set", "seed=77")

    assert (same.code, other.code) == (0, 1)
    assert re.search(naming(str(tmp_path / "run"), "finished"), same.err)
    assert re.search(naming(str(tmp_path / "run"), "'seed' is 3", "77"), other.err)


def test_a_finished_run_is_extended_with_other_workers_from_the_command_line(ist: Any, tmp_path: Path) -> None:
    ist("train", written(tmp_path, train__rounds=2), "--run-dir", tmp_path / "run")

    outcome = ist("train", "--resume", tmp_path / "run", "--set", "train.rounds=3", "--workers", "2")

    assert outcome.code == 0
    assert "round 3/3" in outcome.err
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]
    assert (resolved["rounds"], resolved["workers"]) == (3, 2)
    for shown in (outcome.out, ist("report", tmp_path / "run").out):
        assert re.search(naming("from round 3 on", "train.rounds is 3, before 2", "train.workers is 2"), shown)
    refused = ist("train", "--resume", tmp_path / "run", "--set", "train.rounds=4", "--method", "ddp")
    assert refused.code == 1
    assert re.search(naming(str(tmp_path / "run"), "'method' is 'ist'", "'ddp'"), refused.err)


BAD: dict[str, tuple[Any, ...]] = {
    "a restart without a folder": ({}, ["--auto-resume"], 2, "--auto-resume", "--run-dir"),
    "an address without Ray": ({}, ["--address", "auto"], 2, "'pool.ray'", "'pool.kind' ray", "inline"),
    "more workers than neurons": ({"train__workers": 21}, [], 2, "'linear_2'", "20", "21", "train.workers"),
    "a model path that cannot be imported": (
        {"model__name": "no_such_package:Net"}, [], 2,
        "'model.name' is 'no_such_package:Net'", "No module named 'no_such_package'",
    ),
    "a model that does not exist": ({"model__name": "torch.nn:Lineal"}, [], 2, "'torch.nn'", "'Lineal'"),
    "a misspelt model": ({"model__name": "mpl"}, [], 2, "'model.name' is 'mpl'", "'mlp'"),
    "wrong arguments of a model": ({"model__args": {"width": [64, 10]}}, [], 2, "'model.args'", "MLP(", "'widths'"),
    "a refused argument of a model": ({"model__args": {"widths": [64, 10]}}, [], 2, "'model.args'", "widths [64, 10]"),
    "a model that cannot be split": (
        {"model__name": "torch.nn:Linear", "model__args": {"in_features": 64, "out_features": 10}}, [], 2, "hidden neurons",
    ),
    "a data set that is not there": (
        {"data": {"name": "fashion_mnist", "root": "/nonexistent"}}, [], 2,
        "/nonexistent", "apt-get install dataset-fashion-mnist",
    ),
    "an unknown loss": ({"train__loss": "cross_entrpy"}, [], 2, "'train.loss' is 'cross_entrpy'", "'cross_entropy'"),
    "an unknown optimizer": (
        {"train__optimizer": {"name": "SDG", "args": {"lr": 0.1}}}, [], 2, "'train.optimizer.name' is 'SDG'", "'SGD'",
    ),
    "an unknown method": ({"method": "dpd"}, [], 2, "'method' is 'dpd'", "'ddp'"),
    "data-parallel without processes": ({"method": "ddp"}, [], 2, "'ddp'", "'torchrun'", "'inline'"),
    "a GPU that is not there": ({"pool": {"kind": "inline", "device": "cuda"}}, [], 2, "pool.device", "CUDA"),
    "a loss that becomes NaN": ({"train__optimizer": {"name": "SGD", "args": {"lr": 1e30}}}, [], 1, "worker", "round"),
    "widths that do not match the data": (
        {"model__args": {"widths": [63, 24, 20, 10]}}, [], 2, "example", "RuntimeError", "64", "63",
    ),
    "too few outputs": ({"model__args": {"widths": [64, 24, 20, 4]}}, [], 2, "Target", "0 to 3"),
    "batch norm on batches of one": ({"train__batch_size": 1}, [], 2, "batch of 1"),
    "a schedule that ends early": (
        {"train__schedule": {"name": "OneCycleLR", "args": {"max_lr": 0.1, "total_steps": 3}}}, [], 2,
        "'train.schedule.args'",
    ),
    "an optimizer for sparse gradients": (
        {"train__optimizer": {"name": "SparseAdam"}}, [], 2, "SparseAdam", "dense gradients",
    ),
    "contradictory arguments of an optimizer": (
        {"train__optimizer": {"name": "Adam", "args": {"fused": True, "foreach": True}}}, [], 2, "'train.optimizer.args'",
    ),
    "nccl without a GPU": ({"pool": {"kind": "inline", "device": "cpu", "backend": "nccl"}}, [], 2, "nccl", "GPU"),
    "an output that is a file": ({}, ["--set", "output=/dev/null"], 1, "/dev/null", "Not a directory"),
    "an unknown key on the command line": ({}, ["--set", "train.lr=1"], 2, "'train.lr'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(ist: Any, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, arguments, code, *parts = BAD[case]
    if "GPU" in case:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    outcome = ist("train", written(tmp_path, **changes), *arguments)

    assert outcome.code == code, outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    assert re.search(naming(*parts), errors[0])
    assert "Traceback" not in outcome.err
    if code == 2:
        assert not (tmp_path / "runs").exists()


def test_divergence_names_the_worker_and_keeps_the_last_good_checkpoint(ist: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    schedule = {"name": "StepLR", "args": {"step_size": 6, "gamma": 1e30}}  # diverges after two rounds

    outcome = ist("train", written(tmp_path, train__schedule=schedule), "--run-dir", run)

    assert outcome.code == 1
    assert re.search(naming("error: ", "worker 0", "round 2"), outcome.err)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["round-00000002.safetensors"]
    assert not (run / "result.json").exists()


def test_an_unwritable_run_folder_ends_before_training(ist: Any, tmp_path: Path) -> None:
    occupied = tmp_path / "run"
    occupied.mkdir()
    (occupied / "thesis.tex").touch()

    outcome = ist("train", written(tmp_path), "--run-dir", occupied)

    assert outcome.code == 1
    assert re.search(naming(str(occupied), "empty"), outcome.err)
    assert "round" not in outcome.out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train"], ["CONFIG", "--resume RUN"]),
        (["train", "--resume", "nowhere"], ["error: nowhere: ", "run folder"]),
        (["train", "--resume", "nowhere", "--workers", "2"], ["error: nowhere: ", "run folder"]),
        (["train", "--resume", "nowhere", "--auto-resume"], ["--resume nowhere", "leave", "--auto-resume"]),
        (["report", "nowhere"], ["error: nowhere: ", "run folder"]),
        (["inspect", "nothing.yaml"], ["error: nothing.yaml: "]),
    ],
)
def test_wrong_command_lines_are_explained(ist: Any, arguments: list[str], parts: list[str]) -> None:
    outcome = ist(*arguments)

    assert outcome.code in (1, 2)
    assert re.search(naming(*parts), outcome.err)


def test_resuming_without_a_checkpoint_starts_from_the_first_round_and_says_so(ist: Any, tmp_path: Path) -> None:
    import shutil

    ist("train", written(tmp_path), "--run-dir", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "result.json").unlink()

    outcome = ist("train", "--resume", tmp_path / "run")

    assert outcome.code == 0
    assert re.search(naming(f"{tmp_path / 'run'}: ", "checkpoint", "round 1/4"), outcome.err)


def test_a_report_about_a_folder_of_runs_skips_unfinished_ones(ist: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        ist("train", written(tmp_path), "--run-dir", tmp_path / "runs" / name)
    (tmp_path / "runs" / "two" / "result.json").unlink()

    outcome = ist("report", tmp_path / "runs")

    assert outcome.code == 0
    assert f"{tmp_path / 'runs' / 'two'}: " in outcome.err
    assert f"{tmp_path / 'runs' / 'one'}: " not in outcome.err
    assert (tmp_path / "runs" / "report.html").exists()


def test_an_unknown_option_is_a_usage_error(ist: Any) -> None:
    outcome = ist("train", "--wrokers", "3")

    assert outcome.code == 2
    assert "wrokers" in outcome.err
    assert "Traceback" not in outcome.err


def test_help_and_keys_explain_themselves(ist: Any) -> None:
    assert "--auto-resume" in ist("train", "--help").out
    keys = ist("keys").out

    assert "train.local_steps" in keys
    assert "(tau)" in keys
    assert "FieldInfo" not in keys
    assert "train.optimizer_state  (kept or reset or carried; default kept)" in keys
    assert ist("--version").out.strip() == "0.1.0"


def test_inspect_prints_tables_and_json(ist: Any, tmp_path: Path) -> None:
    text = ist("inspect", written(tmp_path)).out
    found = json.loads(ist("inspect", written(tmp_path), "--json").out)

    assert "Neuron groups" in text
    assert "Memory of a process" in text
    worker, coordinator = found["memory"]["worker"]["parts"], found["memory"]["coordinator"]["parts"]
    assert worker["gradients"] == 4 * found["shares"][0]["parameters"]
    assert coordinator["full network"] > 4 * found["parameters"]
    assert found["held_bytes"] > 100 * 10**6  # torch alone
    assert [group["neurons"] for group in found["groups"]] == [24, 20]
    assert [share["parameters"] for share in found["shares"]] == [6 * 64 + 6 * 3 + 5 * 6 + 5 * 3 + 10 * 5 + 10] * 4
    assert found["bytes_per_round"]["ddp"] == 2 * 3 * 4 * found["parameters"] * 3


def test_five_calls_lead_from_the_command_to_the_local_step(
    ist: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ist as package_of_ist
    from ist.loops.local_loop import TaskLoop

    package = f"{Path(package_of_ist.__file__).parent}{os.sep}"  # a clone's folder may be called ist too
    ways: list[list[str]] = []
    real = TaskLoop.run

    def spy(*arguments: Any) -> Any:
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(package)]
        ways.append([f"{Path(frame.filename).name}:{frame.name}" for frame in frames])
        return real(*arguments)

    monkeypatch.setattr(TaskLoop, "run", spy)
    ist("train", written(tmp_path), "--run-dir", tmp_path / "run")

    after_the_command_line = [frame for frame in ways[0] if not frame.startswith("main.py")]
    assert after_the_command_line == ["execute.py:execute", "part.py:completed", "part.py:run"]
    assert ROOT.exists()


def test_the_command_line_refuses_to_resume_a_run_started_from_python(ist: Any, tmp_path: Path) -> None:
    from ist.api import train
    from tests.conftest import data
    from tests.networks import NETWORKS, seeded

    network = seeded(NETWORKS["no batch norm"])
    train(network, data(), workers=2, local_steps=1, rounds=1, run_dir=tmp_path / "run", progress=False)

    outcome = ist("train", "--resume", tmp_path / "run")

    assert outcome.code == 2
    assert re.search(naming(str(tmp_path / "run"), "Python", "ist.train(", "resume=True"), outcome.err)
