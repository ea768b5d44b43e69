"""The theory's experiments on the paper's own data set, in less than a minute."""

import time
from pathlib import Path

import pytest

from ist.theory import EXPERIMENTS
from tests.conftest import ROOT, Run

DATA = ROOT / ".data" / "crime"

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not DATA.is_dir(), reason="Communities and Crime is not there: make .data/crime"),
]


def test_all_quick_experiments_take_less_than_a_minute(tmp_path: Path, ist_command: Run) -> None:
    started = time.perf_counter()
    done = ist_command("theory", "--quick", "--data", DATA, "--out", tmp_path, timeout=110)
    elapsed = time.perf_counter() - started

    assert done.returncode == 0, done.stderr
    assert {path.stem for path in tmp_path.glob("*.csv")} == set(EXPERIMENTS)
    assert {path.stem for path in tmp_path.glob("*.png")} == set(EXPERIMENTS)
    assert elapsed < 90  # 60 on two cores that do nothing else


def test_the_whole_file_is_read() -> None:
    from ist.data.crime import read_crime

    inputs, targets = read_crime(DATA)

    assert inputs.shape == (1993, 99)
    assert float(targets.mean()) == pytest.approx(0.238, abs=5e-4)
    assert float(targets.var(unbiased=False)) == pytest.approx(0.0543, abs=5e-5)
