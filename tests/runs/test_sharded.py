"""A run whose network is stored in shards is saved by all ranks, and resumed by any number of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ist.storage.backend import LocalStorage
from ist.storage.checkpoint import load_checkpoint, read_tensors
from tests.conftest import assert_same, run_forked_ranks
from tests.runs.sharded import ROUNDS, network, run

PROGRAM = "tests/runs/sharded.py"
INLINE = {"kind": "inline"}


def newest(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a run's last checkpoint: of the network, the optimizers and the average."""
    storage = LocalStorage(folder / "checkpoints")
    tensors, progress = load_checkpoint(storage, storage.names()[-1])
    assert progress.rounds_done == ROUNDS
    return dict(tensors)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evaluations(folder: Path) -> list[tuple[float, ...]]:
    return [(record["loss"], record["test_loss"], record["accuracy"]) for record in records(folder)]


@pytest.mark.system
def test_runs_that_are_interrupted_and_resumed_end_as_one_coordinator_does(tmp_path: Path) -> None:
    """In shards as with one coordinator, from checkpoints of either kind, and by other numbers of ranks."""
    torch.set_num_threads(1)
    star, changed = tmp_path / "star", tmp_path / "changed"
    trained = run(star, 3, ROUNDS, INLINE)
    for workers, last in ((4, 1), (2, 3), (3, ROUNDS)):
        run(changed, workers, last, INLINE)
    from_star = tmp_path / "from star"
    run(from_star, 3, 2, INLINE)

    run_forked_ranks(
        (3, PROGRAM, tmp_path / "whole", 3, ROUNDS),
        (3, PROGRAM, tmp_path / "resumed", 3, 2),
        (3, PROGRAM, tmp_path / "resumed", 3, ROUNDS, "whole"),
        (3, PROGRAM, from_star, 3, ROUNDS),
        (4, PROGRAM, tmp_path / "4-2-3", 4, 1),
        (2, PROGRAM, tmp_path / "4-2-3", 2, 3),
        (3, PROGRAM, tmp_path / "4-2-3", 3, ROUNDS),
        (3, PROGRAM, tmp_path / "to star", 3, 2),
        (3, PROGRAM, tmp_path / "again", 3, ROUNDS),
        (3, PROGRAM, tmp_path / "again", 3, ROUNDS),  # a finished run has nothing to do
        (2, PROGRAM, tmp_path / "refused", 2, ROUNDS, "refused"),
        (3, PROGRAM, tmp_path / "full disk", 3, ROUNDS, "full disk"),
        (3, PROGRAM, tmp_path / "full disk", 3, ROUNDS),
    )
    run(tmp_path / "to star", 3, ROUNDS, INLINE)

    assert sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()) == [
        "round-00000004", "round-00000005",
    ]  # fmt: skip
    for folder, like in (
        ("whole", star), ("resumed", star), ("from star", star), ("to star", star), ("again", star), ("full disk", star),
        ("4-2-3", changed),
    ):  # fmt: skip
        found = tmp_path / folder
        assert_same(newest(found), newest(like))
        assert_same(read_tensors(found / "model.safetensors")[0], read_tensors(like / "model.safetensors")[0])
        assert evaluations(found) == evaluations(like), folder
    assert_same(read_tensors(star / "model.safetensors")[0], trained.state_dict())
    assert set(newest(star)) > set(network().state_dict())
    parameters = network().named_parameters()
    elsewhere = sum(tensor[-(-len(tensor) // 3) :].nbytes for _, tensor in parameters)  # rows of other ranks
    assert records(star)[-1]["evaluate_bytes"] == 0
    batches = 2  # one of the test data, and one from which batch norm's statistics are estimated
    assert [record["evaluate_bytes"] for record in records(tmp_path / "whole")] == [
        batches * elsewhere * (done + 1) for done in range(ROUNDS)
    ]
    gathered = [record["evaluate_bytes"] for record in records(tmp_path / "resumed")]
    assert gathered[-1] - gathered[1] == elsewhere * (ROUNDS - 2)  # once for each evaluation
