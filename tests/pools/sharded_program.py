"""Runs with a sharded store in a real process group, compared with runs whose coordinator holds the network.

python -m tests.forked_ranks 2 tests/pools/sharded_program.py FOLDER SCENARIO ...

Not here: what is claimed of it (`tests/pools/test_sharded.py`), the weights of all scenarios (`test_conformance.py`).
"""

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import ist
from tests.conftest import data, naming
from tests.own_loop_program import SETTINGS, Loader, joined, network, step_all, train

SHARDED = ist.Pool(kind="torchrun", store="sharded")


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(mine, other.get_parameter(name)) for name, mine in one.named_parameters())


def own_loop(_: Path, rank: int) -> None:
    """The user's own loop, with an evaluation, and ended early."""
    settings = SETTINGS["dropout, schedule, state"]
    networks = network("dropout"), network("dropout")
    for model, pool in zip(networks, ("auto", SHARDED), strict=True):
        run = joined(model, pool=pool, **settings)
        if rank == 0:
            run.evaluate(lambda whole: float(next(whole.parameters()).detach().sum()), every=1)
        loader = Loader(run.worker, run.num_workers)
        for part in run:
            step_all(part, loader)
            if part.round == 2:
                run.stop("enough")
        if rank == 0:
            assert run.stopped_early == "enough"
            assert [record["round"] for record in run.history] == [0, 1, 2]
            assert run.history[-1]["test_loss"] == float(next(model.parameters()).detach().sum())
    if rank == 0:
        assert same(*networks)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*(m.buffers() for m in networks), strict=True)), (
            "re-estimated statistics"
        )


def state_refused(_: Path, rank: int) -> None:  # noqa: ARG001
    """A state in the middle of the loop would hold the full network."""
    run = joined(network("plain"), pool=SHARDED)
    loader = Loader(run.worker, run.num_workers)
    for part in run:
        with pytest.raises(ist.ConfigError, match=naming("state_dict", "pool.store", "run_dir")):
            run.state_dict()
        step_all(part, loader)


def interrupted(folder: Path, rank: int) -> None:
    """Rank 1 leaves the loop; both resume from the last checkpoint."""
    run = joined(network("plain"), run_dir=folder / "run", pool=SHARDED)
    loader, started = Loader(run.worker, run.num_workers), time.monotonic()
    learns = pytest.raises(ist.PoolError, match=naming("worker 1 has left the loop")) if rank == 0 else nullcontext()
    with learns:
        for part in run:
            if part.round == 2 and rank == 1:
                break
            step_all(part, loader)
    assert time.monotonic() - started < 20


def resumed(folder: Path, rank: int) -> None:
    continued, uninterrupted = network("plain"), network("plain")
    run = joined(continued, run_dir=folder / "run", resume=True, pool=SHARDED)
    train(run, Loader(run.worker, run.num_workers))
    again = joined(uninterrupted)
    train(again, Loader(again.worker, again.num_workers))
    if rank == 0:
        assert same(continued, uninterrupted)
        assert [record["round"] for record in run.history] == [0, 1, 2, 3]


def broken(worker: int) -> Dataset[Any]:
    """The data of worker 1 make its loss infinite."""
    inputs, targets = data(seed=worker).tensors
    return TensorDataset(inputs * (1e38 if worker else 1), targets)


def rejected(_: Path, rank: int) -> None:
    """The result of worker 1 is invalid: its neurons keep their values, in all shards."""
    networks, histories = (network("plain"), network("plain")), []
    for model, store in zip(networks, ("coordinator", "sharded"), strict=True):
        pool = ist.Pool(kind="torchrun", store=store, min_returned=1)
        result = ist.train(model, broken, shard="own", workers=2, rounds=3, local_steps=2, pool=pool, progress=False)
        histories.append([(record["loss"], record["lost"]) for record in result.history] if rank == 0 else [])
    if rank == 0:
        assert same(*networks)
        losses = [[loss for loss, _ in history] for history in histories]
        assert losses[0] == losses[1]
        for history in histories:
            assert all(lost[0]["worker"] == 1 and lost[0]["kind"] == "rejected" for _, lost in history)


def diverged(_: Path, rank: int) -> None:  # noqa: ARG001
    """All ranks end with one error."""
    with pytest.raises(ist.DivergedError, match=naming("worker 1", "round 0")):
        ist.train(
            network("plain"), broken, shard="own", workers=2, rounds=3, local_steps=2, pool=SHARDED, progress=False
        )


class Raising(ist.Callback):
    def on_round(self, record: Any) -> None:
        raise ValueError(f"in round {record['round']}")


def goes_on(folder: Path, rank: int) -> None:
    """Rank 0 fails, and its program goes on: the others must not wait for it."""
    kind, named = (ist.PoolError, ["rank 0 failed", "in round 0"]) if rank else (ist.CallbackError, ["in round 0"])
    with pytest.raises(kind, match=naming(*named)):
        ist.train(network("plain"), data(), workers=2, rounds=3, pool=SHARDED, progress=False, callbacks=[Raising()])
    (folder / f"learnt-{rank}").touch()
    deadline = time.monotonic() + 20
    while rank == 0 and not (folder / "learnt-1").exists():
        assert time.monotonic() < deadline, "rank 1 has not learnt that rank 0 has failed"
        time.sleep(0.02)


class Renormed(torch.nn.Module):
    """An embedding that normalizes its weights in place, also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.hidden, self.last = (
            torch.nn.Embedding(3, 12, max_norm=0.5), torch.nn.Linear(12, 8), torch.nn.Linear(8, 5),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.hidden(x + self.rows(torch.zeros(len(x), dtype=torch.int64))).relu())


def refused(_: Path, rank: int) -> None:
    """What an evaluation cannot do with a network that no process holds is refused by name."""
    for evaluation in ("layers", "whole"):
        pool = ist.Pool(kind="torchrun", store="sharded", evaluation=evaluation)
        kind, named = (ist.ISTError, ["rows.weight"]) if rank else (ist.ModelError, ["'rows.weight'", "pool.store"])
        with pytest.raises(kind, match=naming(*named)):
            ist.train(Renormed(), data(), test_data=data(), workers=2, rounds=1, pool=pool, progress=False)
    run = joined(network("plain"), pool=SHARDED)
    if rank == 0:
        run.evaluate(lambda whole: float(next(whole.parameters()).data_ptr()), every=1)
    loader = Loader(run.worker, run.num_workers)
    kind, named = (ist.PoolError, []) if rank else (ist.ModelError, ["pool.evaluation", "'whole'"])
    with pytest.raises(kind, match=naming(*named)):
        train(run, loader)


SCENARIOS = {
    found.__name__: found
    for found in (own_loop, state_refused, interrupted, resumed, rejected, diverged, goes_on, refused)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        SCENARIOS[name](Path(sys.argv[1]), int(os.environ["RANK"]))
