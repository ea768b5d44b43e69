"""Reports: one file that refers to nothing outside itself."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ist.build import build_job
from ist.errors import RunFolderError
from ist.report.page import find_runs, write_report
from ist.report.table import table_rows
from ist.rounds import run_rounds
from ist.run import Leading, open_run
from ist.run_folder import RunFolder, create_run_folder
from tests.conftest import small_config


def finished(path: Path, **changes: Any) -> RunFolder:
    folder = create_run_folder(small_config(**changes), path)
    with open_run(build_job(folder.load_config()), folder, resume=False, progress=False) as part:
        assert isinstance(part, Leading)
        run_rounds(part.job, part.method, part.recorder, part.first_round, part.device)
        part.recorder.finish(part.method.model)
    return folder


def test_a_page_holds_table_curves_and_configurations_and_needs_no_network(tmp_path: Path) -> None:
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


def test_an_unfinished_run_is_refused_with_the_way_on(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")

    with pytest.raises(RunFolderError, match="has not finished. Go on with: ist train --resume"):
        write_report([folder], tmp_path / "report.html")


def test_a_page_says_how_often_workers_were_left_out_if_any_were(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert "left out" not in write_report([run], tmp_path / "report.html").read_text()
    (run.path / "result.json").write_text(json.dumps(run.result() | {"faults": {"lost": 0, "late": 3, "rejected": 1}}))

    text = write_report([run], tmp_path / "report.html").read_text()

    assert "ist: workers were left out of a round: 3 late, 1 rejected." in text


def test_the_ratio_says_how_many_times_fewer_bytes_a_run_sends() -> None:
    base = {"seed": 0, "accuracy": 0.9, "test_loss": 0.1, "train_s": 2.0, "virtual_s": 1.5, "memory_bytes": 2_000_000}

    rows = table_rows([{**base, "method": "ist", "sent_bytes": 1000}, {**base, "method": "ddp", "sent_bytes": 60_000}])

    assert rows[0] == ("ist", "90.00%", "1.0 kB", "60x fewer", "2.0", "1.5", "2.0 MB")
    assert rows[1][3] == "1x"
