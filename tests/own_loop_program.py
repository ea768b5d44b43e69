"""Train with `ist.join` in a real process group, and write what every rank has seen.

    RANK=... torchrun-like variables; own_loop_program.py FOLDER SCENARIO

Not here: what is claimed of it (`tests/test_own_loop.py`).
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ist
from ist.data.batches import ShardedSampler
from tests.conftest import data, naming
from tests.networks import NETWORKS, seeded

ROUNDS, STEPS, BATCH, SEED = 4, 3, 8, 5

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout, schedule, state": {
        "optimizer": ist.Optimizer(name="SGD", args={"lr": 0.1, "momentum": 0.9}),
        "schedule": ist.Schedule(name="LinearLR", args={"total_iters": 6}),
        "optimizer_state": "carried",
    },
    "Muon, groups, schedule by a function": {
        "optimizer": ist.Optimizer(
            name="MuonWithAdamW",
            groups=[ist.ParameterGroup(max_dims=1, args={"weight_decay": 0.0})],
        ),
        "schedule": ist.Schedule(factor=lambda step: 0.9**step),
        "optimizer_state": "carried",
    },
    "int8 and stages": {
        "optimizer": ist.Optimizer(name="AdamW", args={"lr": 0.01}),
        "exchange": ist.Exchange(up="int8", down="int8", values="deltas", error_feedback=True),
        "recipe": ist.Recipe(stages=[ist.Stage(), ist.Stage(rounds=1, keep=1, local_steps=2)]),
    },
}  # fmt: skip


class Dropped(nn.Module):
    """A network that draws random numbers, with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.dropout(self.norm(self.first(x)).relu(), 0.3, self.training))


def network(setting: str) -> nn.Module:
    return seeded(Dropped) if setting.startswith("dropout") else seeded(NETWORKS["no batch norm"])


class Loader:
    """The batches of the built-in loop for a worker, endlessly; its position can be saved."""

    def __init__(self, worker: int, num_workers: int) -> None:
        self.sampler = ShardedSampler(100, num_workers, BATCH, SEED)
        self.worker, self.position = worker, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = data().tensors
        while True:
            rows = torch.from_numpy(self.sampler.shard(self.worker)[self.sampler.batch(self.worker, self.position)])
            self.position += 1
            yield inputs[rows], targets[rows]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "unused": [torch.tensor([1, 2]), (b"bytes", None, 0.5)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert torch.equal(state["unused"][0], torch.tensor([1, 2]))
        assert state["unused"][1] == (b"bytes", None, 0.5)
        self.position = state["position"]


def joined(model: nn.Module, **settings: Any) -> ist.Joined:
    return ist.join(
        model,
        **{
            "example": data().tensors[0][:2], "local_steps": STEPS, "rounds": ROUNDS, "seed": SEED, "progress": False,
            "statistics": [data().tensors[0]], **settings,
        },
    )  # fmt: skip


def train(run: ist.Joined, loader: Any, accumulate: int = 1) -> None:
    """A training loop as its user would write it."""
    for part in run:
        step_all(part, loader, accumulate)


def step_all(part: ist.Part, loader: Any, accumulate: int = 1) -> None:
    """The body of such a loop."""
    for number, (inputs, targets) in enumerate(part.take(loader)):
        loss = nn.functional.cross_entropy(part.model(inputs), targets)
        (loss / accumulate).backward()
        if (number + 1) % accumulate == 0:
            part.optimizer.step()
            part.optimizer.zero_grad()
        part.log(loss, len(inputs))


def same_as_built_in(_: Path, rank: int) -> None:
    """Each setting by the built-in loop, and by the user's own."""
    for setting, settings in SETTINGS.items():
        built_in, own = network(setting), network(setting)
        result = ist.train(
            built_in, data(), workers=2, local_steps=STEPS, rounds=ROUNDS, batch_size=BATCH, seed=SEED, progress=False,
            **settings,
        )  # fmt: skip
        run = joined(own, **settings)
        train(run, Loader(run.worker, run.num_workers))
        if rank == 0:
            weights = {name for name, _ in own.named_parameters()}
            assert all(torch.equal(built_in.get_parameter(name), own.get_parameter(name)) for name in weights), setting
            keys = ("round", "steps", "samples", "loss", "sent_bytes")
            records = [
                [{key: record[key] for key in keys} for record in found] for found in (result.history, run.history)
            ]
            assert records[0] == records[1], setting
        else:
            assert not run.is_coordinator
            assert run.history == []


def interrupted(folder: Path, rank: int) -> None:
    """Leave the loop in the middle of the third round."""
    run = joined(network("plain"), run_dir=folder / "run")
    loader = Loader(run.worker, run.num_workers)
    try:
        for part in run:
            for number, (inputs, targets) in enumerate(part.take(loader)):
                if part.round == 2 and number == 1 and rank == 1:
                    raise KeyError("of the user's own")
                loss = nn.functional.cross_entropy(part.model(inputs), targets)
                loss.backward()
                part.optimizer.step()
                part.optimizer.zero_grad()
                part.log(loss, len(inputs))
    except KeyError:
        (folder / "left").write_text(str(time.time()))
    except ist.PoolError as error:
        (folder / "learnt").write_text(json.dumps([time.time(), str(error)]))


def resumed(folder: Path, rank: int) -> None:
    """Resume the interrupted run, and train another one without an interruption."""
    continued, whole = network("plain"), network("plain")
    run = joined(continued, run_dir=folder / "run", resume=True)
    train(run, Loader(run.worker, run.num_workers))
    again = joined(whole)
    train(again, Loader(again.worker, again.num_workers))
    if rank == 0:
        assert all(torch.equal(mine, whole.get_parameter(name)) for name, mine in continued.named_parameters())
        assert [record["round"] for record in run.history] == list(range(ROUNDS))


def state_saved(folder: Path, rank: int) -> None:
    """Continue from a state that the user saved, in the middle of an uninterrupted run."""
    settings = SETTINGS["int8 and stages"]
    whole, continued = network("plain"), network("plain")
    run = joined(whole, **settings)
    loader, path = Loader(run.worker, run.num_workers), folder / f"state-{rank}.pt"
    for part in run:
        if part.round == 2:
            torch.save(run.state_dict(), path)
        step_all(part, loader)
    again = joined(continued, state=torch.load(path, weights_only=True), **settings)
    loader = Loader(again.worker, again.num_workers)
    for part in again:
        step_all(part, loader)
    if rank == 0:
        assert all(torch.equal(mine, whole.get_parameter(name)) for name, mine in continued.named_parameters())
        assert [record["samples"] for record in again.history] == [record["samples"] for record in run.history[2:]]


def stopped(_: Path, rank: int) -> None:
    """Every rank asks for the end; the coordinator's wish counts."""
    run = joined(network("plain"))
    if run.is_coordinator:
        run.evaluate(lambda _: 0.5, every=2)
    loader, seen = Loader(run.worker, run.num_workers), 0
    for part in run:
        for inputs, targets in part.take(loader):
            nn.functional.cross_entropy(part.model(inputs), targets).backward()
            part.optimizer.step()
            part.log(1.0, len(inputs))
        seen += 1
        if part.round == 1:
            run.stop("enough")
    assert seen == 2
    assert [record.get("test_loss") for record in run.history] == ([None, 0.5] if rank == 0 else [])
    assert run.stopped_early == ("enough" if rank == 0 else None)


def no_step(folder: Path, rank: int) -> None:
    """Rank 1 forgets to make a step."""
    try:
        for part in joined(network("plain")):
            for inputs, targets in part.take(Loader(part.worker, part.num_workers)):
                loss = nn.functional.cross_entropy(part.model(inputs), targets)
                loss.backward()
                part.log(loss, len(inputs))
                if rank == 1:
                    break
                part.optimizer.step()
    except ist.ISTError as error:
        (folder / f"time-{rank}").write_text(str(time.time()))
        (folder / f"failed-{rank}").write_text(f"{type(error).__name__}: {error}")
        deadline = time.monotonic() + 30
        while rank == 1 and not (folder / "failed-0").exists():  # it lives on: the other must not wait for its end
            assert time.monotonic() < deadline, "rank 0 has not learnt that rank 1 has failed"
            time.sleep(0.02)


def dedicated(_: Path, rank: int) -> None:
    """Rank 0 only coordinates, so one of two processes is a worker; other numbers of workers are refused."""
    pool = ist.Pool(coordinator="dedicated")
    for workers, kind in ((2, pool), (3, "torchrun")):
        with pytest.raises(ist.ConfigError, match=naming("2 processes", f"train.workers is {workers}")):
            joined(network("plain"), workers=workers, pool=kind)
    run = joined(network("plain"), pool=pool)
    assert (run.worker, run.num_workers, run.is_coordinator) == (rank - 1, 1, rank == 0)
    train(run, Loader(max(run.worker, 0), run.num_workers))
    assert [record["steps"] for record in run.history] == ([STEPS] * ROUNDS if rank == 0 else [])


def users_group(folder: Path, rank: int) -> None:
    """The user's program forms the group itself, without the variables of a launcher."""
    import os

    store = dist.FileStore(str(folder / "store"), 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = network("plain")
    run = joined(model, workers=2)
    loader = Loader(run.worker, run.num_workers)
    train(run, loader, accumulate=2)
    assert loader.position == ROUNDS * STEPS * 2  # two batches make a step
    built_in = ist.train(
        network("plain"), lambda worker: data(seed=worker), shard="own", workers=2, rounds=1, progress=False
    )
    assert built_in.is_coordinator == (rank == 0)
    assert dist.is_initialized()
    if rank == 0:
        assert [record["steps"] for record in run.history] == [STEPS] * ROUNDS
    (folder / f"rank-{rank}").write_text(f"{run.worker} of {run.num_workers}")


SCENARIOS = {
    found.__name__: found
    for found in (same_as_built_in, interrupted, resumed, state_saved, stopped, no_step, dedicated, users_group)
}

if __name__ == "__main__":
    import os

    torch.set_num_threads(1)
    SCENARIOS[sys.argv[2]](Path(sys.argv[1]), int(os.environ["RANK"]))
