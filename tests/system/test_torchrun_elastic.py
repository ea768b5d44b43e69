"""Ranks that die under torchrun, and nodes that leave: the run resumes from its last checkpoint."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ist.storage.checkpoint import read_tensors
from tests.conftest import ROOT, Run, assert_same, config_tree, free_port, wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config_tree(**{"pool": {"kind": "torchrun", "device": "cpu"}, **changes})))
    return path


@contextmanager
def torchrun(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """One torchrun agent in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as in launch/torchrun.sh
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            for member in family(process):
                member.kill()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [member for member in family(process)[1:] if "--auto-resume" in member.cmdline()]


def rounds(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def test_a_killed_rank_is_restarted_and_the_run_ends_in_the_same_weights(tmp_path: Path, ist_command: Run) -> None:
    path, folder = written(tmp_path, train__workers=2, train__rounds=120, checkpoint={"every": 5}), tmp_path / "run"
    arguments = ["-m", "ist", "train", path, "--run-dir", folder, "--auto-resume"]

    with torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "3", *arguments) as process:
        for after in (10, 60):
            wait_for(lambda after=after: len(rounds(folder)) > after, 90, f"round {after}")
            ranks(process)[after % 7 % 2].send_signal(signal.SIGKILL)
        said, _ = process.communicate(timeout=120)

    assert process.returncode == 0, said
    whole = ist_command("train", path, "--run-dir", tmp_path / "whole", "--pool", "inline")
    assert whole.returncode == 0, whole.stderr
    found, expected = (read_tensors(run / "model.safetensors")[0] for run in (folder, tmp_path / "whole"))
    assert_same(found, expected)
    assert [record["round"] for record in rounds(folder)] == list(range(120))


def test_a_run_goes_on_with_the_nodes_that_are_left_and_takes_in_those_that_come(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = written(tmp_path, train__workers={"min": 1, "max": 2}, train__rounds=100000, checkpoint={"every": 1})
    meeting = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "9", "--rdzv-backend", "c10d"]
    meeting += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "elastic", "--local-addr", "127.0.0.1"]
    meeting += ["--rdzv-conf", "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"]
    arguments = [
        *meeting,
        "--monitor-interval",
        "0.5",
        "-m",
        "ist",
        "train",
        path,
        "--run-dir",
        folder,
        "--auto-resume",
    ]

    def workers() -> int:
        found = rounds(folder)
        return found[-1]["workers"] if found else 0

    with torchrun(*arguments) as first:
        wait_for(lambda: workers() == 1, 60, "training on one node")
        with torchrun(*arguments) as second:
            wait_for(lambda: workers() == 2, 60, "training on two nodes")
            for member in family(second):
                member.kill()
        wait_for(lambda: workers() == 1, 90, "training on one node again")
        assert first.poll() is None

    numbers = [record["round"] for record in rounds(folder)]
    assert numbers == list(range(len(numbers)))
