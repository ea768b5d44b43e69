"""Several runs in one process, one after the other: nothing of one is left when the next begins."""

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import nn

import ist
from ist.config.load import validate
from ist.launch.start import launch
from ist.storage.run_folder import create_run_folder
from tests.conftest import config_tree, data
from tests.networks import NETWORKS, seeded

pytestmark = pytest.mark.timeout(300)

RUNS = 6


def held() -> dict[str, Any]:
    """What a process, and what it has started, hold of the system."""
    gc.collect()
    me = psutil.Process()
    return {
        "descriptors": me.num_fds(),
        "threads": me.num_threads(),
        "children": {child.pid for child in me.children()},
        "shared memory": set(Path("/dev/shm").iterdir()),
        "temporary files": set(Path(tempfile.gettempdir()).iterdir()),
    }


def assert_nothing_is_left(run: Callable[[int], object]) -> None:
    """The first run may leave what a library makes once."""
    run(0)
    before, memory = held(), psutil.Process().memory_info().rss

    for number in range(1, RUNS):
        run(number)

    after = held()
    assert after["descriptors"] <= before["descriptors"] + 1  # a connection to Ray's cluster may come and go
    assert after["threads"] <= before["threads"] + 2  # so may a thread of its
    for what in ("children", "shared memory", "temporary files"):
        assert after[what] <= before[what], what
    assert psutil.Process().memory_info().rss - memory < 20 << 20


@pytest.mark.system
def test_runs_in_processes_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    config = validate(config_tree(train__workers=2, pool={"kind": "torchrun", "device": "cpu"}), "test")

    def run(number: int) -> None:
        folder = create_run_folder(config, tmp_path / f"run-{number}")
        launch(config, folder.path, resume=False)
        assert folder.is_finished()

    assert_nothing_is_left(run)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_address")
def test_runs_on_ray_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    settings: dict[str, Any] = {"workers": 2, "local_steps": 2, "rounds": 2, "pool": "ray", "progress": False}

    def run(_: int) -> None:
        ist.train(seeded(NETWORKS["no batch norm"]), data(), loss=nn.CrossEntropyLoss(), **settings)

    assert_nothing_is_left(run)
