"""A worker rank never holds the full network, from its first import to its end."""

import json
from pathlib import Path

import pytest
import yaml

from ist.runs.build import build_job
from ist.tensors import named_tensors
from tests.conftest import config_tree, run_torchrun, small_config
from tests.initialization.built import NOTED, Noted

MODEL = {"name": "tests.initialization.built:Noted", "args": {"widths": [64, 24, 20, 10]}}


def test_a_job_is_built_without_the_full_network() -> None:
    NOTED.clear()

    job = build_job(small_config(model=MODEL))

    assert set(NOTED) == {0}
    job.task.build()
    assert NOTED[-1] > 0  # the test can see a network that is built


@pytest.mark.system
def test_a_worker_rank_needs_less_memory_than_the_full_network(tmp_path: Path) -> None:
    """The operating system's peak since the process started, less that of a process that has imported the libraries."""
    widths = [64, 7000, 7000, 10]
    full_bytes = sum(tensor.nbytes for tensor in named_tensors(Noted(widths)).values())
    tree = config_tree(
        model={**MODEL, "args": {"widths": widths}}, train__rounds=2, train__local_steps=1, evaluate={"every": 2},
        pool={"kind": "torchrun", "device": "cpu"},
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))

    program = ["-m", "tests.initialization.peaks", str(tmp_path), "train", str(tmp_path / "run.yaml")]
    run_torchrun([*program, "--run-dir", str(tmp_path / "run")], 4, 200)

    peaks = {rank: json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)}
    for rank in (1, 2, 3):
        libraries, peak = peaks[rank]
        # Its share is 1/16 of the network: values, gradient, momentum and two messages are 5/16.
        assert peak - libraries < 0.6 * full_bytes, (rank, peaks, full_bytes)
    assert peaks[0][1] - peaks[0][0] > full_bytes  # the coordinator holds it, so the test can see it
