"""Reports are self-contained files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ist.errors import RunFolderError
from ist.report.names import run_names
from ist.report.page import find_runs, write_report
from ist.report.table import table_rows
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.storage.run_folder import RunFolder, create_run_folder
from tests.conftest import naming, small_config


def finished(path: Path, **changes: Any) -> RunFolder:
    folder = create_run_folder(small_config(**changes), path)
    execute(build_job(folder.load_config()), folder, progress=False)
    return folder


def test_a_page_contains_table_curves_and_configurations_and_needs_no_network(tmp_path: Path) -> None:
    runs = [finished(tmp_path / "runs" / str(seed), seed=seed) for seed in (1, 2)]

    text = write_report(find_runs([tmp_path / "runs"]), tmp_path / "report.html").read_text()

    assert text.count("<svg") == 5
    assert "ist (seed 1)" in text
    assert "local_steps: 3" in text
    assert f"{runs[0].result()['accuracy']:.2%}" in text
    outside = [
        url for url in re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", text) if not url.startswith("#")
    ]
    assert outside == []
    assert "<script" not in text


def test_names_from_a_configuration_cannot_inject_markup(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", model__args={"widths": [64, 24, 20, 10], "activation": "relu"})
    config = run.config_path.read_text()
    run.config_path.write_text(config.replace("activation: relu", "activation: <b>relu</b>"))

    text = write_report([run], tmp_path / "report.html").read_text()

    assert "<b>relu" not in text
    assert "&lt;b&gt;relu" in text


def test_an_unfinished_run_is_refused_with_the_command_to_resume_it(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")

    with pytest.raises(RunFolderError, match=naming(f"{folder.path}: ", f"ist train --resume {folder.path}")):
        write_report([folder], tmp_path / "report.html")


def test_a_page_says_which_run_a_callback_has_ended(tmp_path: Path) -> None:
    whole, ended = (finished(tmp_path / name, label=name) for name in ("whole", "ended"))
    (ended.path / "result.json").write_text(json.dumps(ended.result() | {"stopped_early": "no <better> loss"}))

    text = write_report([whole, ended], tmp_path / "report.html").read_text()

    assert text.count("stopped early") == 1
    assert "ended: stopped early after 4 rounds: no &lt;better&gt; loss" in text


def test_a_page_says_how_often_workers_were_left_out_and_what_evaluation_fetched_if_any(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    before = write_report([run], tmp_path / "report.html").read_text()
    assert "left out" not in before
    assert "pool.evaluation" not in before.partition("<details")[0]
    more = {"faults": {"lost": 0, "late": 3, "rejected": 1}, "evaluate_bytes": 4_200_000}
    (run.path / "result.json").write_text(json.dumps(run.result() | more))

    text = write_report([run], tmp_path / "report.html").read_text()

    assert "3 late, 1 rejected" in text
    assert re.search(naming("4.2 MB", "pool.evaluation"), text)


def named(path: Path, **changes: Any) -> RunFolder:
    """The folder of a finished run, without training."""
    folder = create_run_folder(small_config(**changes), path)
    label = changes.get("label") or changes.get("method", "ist")
    numbers = {"workers": 4, "rounds": 4, "loss": 0.5, "sent_bytes": 10, "train_s": 1.0, "memory_bytes": 10}
    result = {"name": "small", "method": "ist", "label": label, "seed": changes.get("seed", 3), **numbers}
    (path / "result.json").write_text(json.dumps(result))
    return folder


def with_rate(rate: float, momentum: float = 0.9) -> dict[str, Any]:
    return {"train__optimizer": {"name": "SGD", "args": {"lr": rate, "momentum": momentum}}}


def test_names_of_runs_in_a_sweep_show_the_keys_that_differ(tmp_path: Path) -> None:
    def names(*changes: dict[str, Any]) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return run_names([named(folder / f"run-{number}", **change) for number, change in enumerate(changes)])

    assert names({}) == ["ist"]
    assert names(with_rate(0.1), with_rate(0.2)) == ["ist (lr 0.1)", "ist (lr 0.2)"]
    assert names({"seed": 1}, {"seed": 2}, {"label": "mine"}) == ["ist (seed 1)", "ist (seed 2)", "mine"]
    assert names({"seed": 1, **with_rate(0.1)}, {"seed": 2, **with_rate(0.1, 0.0)}) == [
        "ist (seed 1, momentum 0.9)", "ist (seed 2, momentum 0.0)",
    ]  # fmt: skip
    assert names({"recipe": {"outer": {"lr": 0.5}}}, {"recipe": {"outer": {"lr": 0.7}}, **with_rate(0.2)}) == [
        "ist (train.optimizer.args.lr 0.1, recipe.outer.lr 0.5)", "ist (train.optimizer.args.lr 0.2, recipe.outer.lr 0.7)",
    ]  # fmt: skip
    assert names({"exchange": {"up": "int8"}}, {}) == ["ist (up int8)", "ist (up exact)"]
    assert names({}, {}) == ["ist: run-0", "ist: run-1"]
    assert names({}, {}, {"seed": 4}) == ["ist: run-0", "ist: run-1", "ist (seed 4)"]
    assert names(*({"model__args": {"widths": [64, *[8] * deep, 10]}} for deep in (9, 10))) == [
        "ist: run-0",
        "ist: run-1",
    ]


def test_names_of_runs_in_folders_of_the_same_name_show_their_paths(tmp_path: Path) -> None:
    runs = [named(tmp_path / name / "run") for name in "ab"]

    assert run_names(runs) == [f"ist: {tmp_path}/a/run", f"ist: {tmp_path}/b/run"]


def test_the_ratio_says_how_many_times_fewer_bytes_a_run_sends() -> None:
    base = {"seed": 0, "accuracy": 0.9, "test_loss": 0.1, "train_s": 2.0, "virtual_s": 1.5, "memory_bytes": 2_000_000}
    ours = {**base, "method": "ist", "sent_bytes": 1000, "held_fraction": 0.251}

    rows = table_rows([ours, {**base, "method": "ddp", "sent_bytes": 60_000}])

    assert rows[0] == ("ist", "90.00%", "1.0 kB", "60x fewer", "2.0", "1.5", "2.0 MB", "25%")
    assert rows[1][3] == "1x"
    assert rows[1][-1] == "not counted"
