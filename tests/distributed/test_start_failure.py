"""A mistake that rank 0 finds before the run reaches the other ranks at once, and they check nothing themselves."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from torch import nn
from torch.distributed import HashStore

from ist.distributed import start_failure
from ist.errors import ConfigError, ModelError, StartFailedError
from ist.runs.rehearsal import rehearse
from tests.conftest import ROOT, config_tree, job_for, naming


@pytest.fixture(autouse=True)
def first_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_failure, "_starts", [])


def test_a_rank_that_waits_hears_the_error_of_rank_zero_and_not_that_of_an_earlier_start() -> None:
    store = HashStore()
    start_failure.begin_start()
    start_failure.raise_if_failed(store, 1)

    start_failure.publish(store, ModelError("the cut\nis wrong"), world_size=2, is_host=False)

    with pytest.raises(StartFailedError, match=naming("rank 0", "ModelError: the cut")):
        start_failure.raise_if_failed(store, 1)
    start_failure.begin_start()
    start_failure.raise_if_failed(store, 1)


def test_an_error_that_a_stranger_publishes_is_ignored() -> None:
    store = HashStore()
    start_failure.begin_start()
    store.set("ist/failed/1/0", "0" * 64 + "ModelError: made up")

    start_failure.raise_if_failed(store, 1)


def test_only_rank_zero_builds_the_network_to_check_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> NoReturn:
        raise ConfigError("it was built")

    job = job_for(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)), pool={"kind": "torchrun"})
    job = replace(job, task=replace(job.task, build=build))
    environment = {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="it was built"):
        rehearse(job)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    rehearse(job)


@pytest.mark.system
def test_ranks_without_a_common_launcher_end_within_seconds_of_rank_zero(tmp_path: Path) -> None:
    tree: Any = config_tree(train__workers=2, train__loss="binary_cross_entropy", pool__kind="torchrun")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(tree))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}

    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "ist", "train", "wrong.yaml"],
            cwd=tmp_path, env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    first, errors_of_first = ranks[0], ranks[0].communicate(timeout=100)[1]
    ended = time.monotonic()
    errors = ranks[1].communicate(timeout=100)[1]

    assert time.monotonic() - ended < 20
    assert first.returncode != 0
    assert ranks[1].returncode != 0
    assert "do not work together" in errors_of_first
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "rank 0 failed before the run started" in lines[0]
    assert "do not work together" in lines[0]
    assert not (tmp_path / "runs").exists()
