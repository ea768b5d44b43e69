"""A run whose checkpoints the tests interrupt and resume: in one process, or as the program of ranks.

python -m tests.forked_ranks N tests/runs/sharded.py FOLDER N LAST [layers|whole|refused|full disk]   (or under torchrun)
"""

import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ist
from ist.storage.backend import LocalStorage
from tests.conftest import data, naming

ROUNDS = 5


class StopsAfter(ist.Callback):
    """Ends the run after a number of rounds, as an interruption that leaves a checkpoint."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def on_round(self, record: Any) -> ist.Stop | None:
        return ist.Stop("interrupted") if record["round"] + 1 == self.rounds else None


def no_space(self: LocalStorage, name: str) -> AbstractContextManager[Any]:
    raise ist.RunFolderError(f"{self.folder / name}: cannot be written: No space left on device")


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(12, 22), nn.BatchNorm1d(22), nn.ReLU(), nn.Linear(22, 17), nn.Tanh(), nn.Linear(17, 5)
    )


def run(folder: Path, workers: int, last: int, pool: dict[str, Any], storage: str | None = None) -> nn.Module:
    """Run or resume the run of a folder, up to a number of rounds; return the user's network after it."""
    model = network()
    ist.train(
        model, data(), test_data=data(40, seed=4), workers=workers, local_steps=2, batch_size=8, rounds=ROUNDS, seed=3,
        optimizer={"name": "Adam", "args": {"lr": 0.01}}, optimizer_state="carried", progress=False, run_dir=folder,
        resume=folder.exists() and (folder / "config.yaml").exists(), pool=pool, checkpoint={"every": 1, "storage": storage},
        exchange={"down": "int8", "up": "int4", "values": "deltas", "error_feedback": True},
        recipe={"outer": {"lr": 0.9, "momentum": 0.5}, "average": {"kind": "ema", "decay": 0.6}},
        callbacks=[StopsAfter(last)] if last < ROUNDS else [],
    )  # fmt: skip
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, workers, last, evaluation = [*sys.argv[1:], "layers"][:4]
    pool: dict[str, Any] = {"kind": "torchrun", "device": "cpu", "store": "sharded"}
    if evaluation == "full disk":
        if os.environ["RANK"] == "1":
            LocalStorage.create = no_space  # type: ignore[assignment, method-assign]
        knows_the_cause = os.environ["RANK"] in "01"  # a rank that asks rank 0 for it may find it gone
        cause = naming("round-00000001", "No space left on device") if knows_the_cause else None
        with pytest.raises(ist.ISTError, match=cause):
            run(Path(folder), int(workers), int(last), pool)
    elif evaluation == "refused":
        with pytest.raises(ist.ConfigError, match=naming("rank 1", "memory://", "checkpoint.storage")):
            run(Path(folder), int(workers), int(last), pool, "memory://of-each-process")
    else:
        run(Path(folder), int(workers), int(last), {**pool, "evaluation": evaluation})
