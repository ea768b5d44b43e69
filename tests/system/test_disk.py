"""A disk that really fills up."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import Run, config_tree

pytestmark = [pytest.mark.system, pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "ist-test", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_by_file_name_and_keeps_the_last_checkpoint(
    small_disk: Path, tmp_path: Path, ist_command: Run
) -> None:
    config = tmp_path / "job.yaml"
    tree = config_tree(model__args={"widths": [64, 200, 200, 10]}, checkpoint={"every": 1, "keep": 100})
    config.write_text(yaml.safe_dump(tree))  # a checkpoint has 0.2 MB
    run = small_disk / "run"

    done = ist_command("train", config, "--run-dir", run, "--set", "train.rounds=10")

    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in error
    assert str(run) in error
    assert list((run / "checkpoints").glob(".*")) == []
    kept = len(list((run / "checkpoints").iterdir()))
    assert kept >= 2

    (run / "checkpoints" / "round-00000001.safetensors").unlink()  # the user makes room
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    resumed = ist_command("train", "--resume", run)
    assert resumed.returncode == 0, resumed.stderr
