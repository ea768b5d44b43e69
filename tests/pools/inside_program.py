"""Train workers of two ranks each; this file is the program of the ranks.

python -m tests.forked_ranks 4 tests/pools/inside_program.py OUT built_in|cuda|own_loop|resumed|left [ddp] [fsdp]

Not here: what is claimed of it (`tests/pools/test_inside.py`).
"""

import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import ist
from ist.data.batches import ShardedSampler
from ist.data.shards.unequal import OwnData
from ist.runs.execute import execute
from ist.runs.open import CoordinatorPart
from ist.storage.checkpoint import write_tensors
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.subnet.job import Job
from tests.conftest import data, job_for, naming
from tests.networks import seeded

RANKS = {"kind": "torchrun", "device": "cpu", "ranks_per_worker": 2}

SCENARIOS: dict[str, dict[str, Any]] = {
    "uneven parts, clipped": {
        "train__batch_size": 9, "train__accumulate": 2, "train__clip_grad_norm": 0.3,
        "train__optimizer": {"name": "AdamW", "args": {"lr": 0.02}},
    },
    "kept state, frozen, step": {
        "network": "frozen", "data__shard": "own", "train__step": "tests.pools.inside_program:with_right",
        "train__logged": ["right"], "recipe__stages": [{}, {"rounds": 2, "keep": 1}], "evaluate__metric": "none",
    },
    "error feedback, varying shares": {
        "exchange__down": "float16", "exchange__up": "float16", "exchange__values": "deltas",
        "exchange__error_feedback": True, "partition__strategy": "categorical",
    },
}  # fmt: skip
"""Without random numbers of the network: each rank of a worker draws its own."""


def with_right(network: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
    """The loss of a batch, and the fraction of right classes."""
    inputs, targets = batch
    scores = network(inputs)
    return nn.functional.cross_entropy(scores, targets), {"right": (scores.argmax(dim=1) == targets).double().mean()}


class Frozen(nn.Module):
    """A network with a frozen first layer, a buffer, and blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 12).requires_grad_(False), nn.Linear(12, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 12)) for _ in range(2))
        self.register_buffer("shift", torch.linspace(0, 1, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + self.shift
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 11), nn.ReLU(), nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 5))


def for_digits() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def samples(size: int = 100, seed: int = 0) -> TensorDataset:
    inputs, targets = data(size, seed=seed).tensors
    return TensorDataset(inputs.double(), targets)


def own_samples(worker: int) -> TensorDataset:
    """A worker's own data."""
    return samples(37 + 20 * worker, seed=worker)


def scenario(name: str, **changes: Any) -> tuple[Job, nn.Module]:
    """A run in float64, and its network."""
    settings = dict(SCENARIOS[name])
    model = seeded({"frozen": Frozen, "plain": plain}[settings.pop("network", "plain")]).double()
    own = OwnData(own_samples) if settings.get("data__shard") == "own" else None
    train = None if own else samples()
    made = job_for(model, train, samples(), own=own, **{"train__workers": 2, **settings, **changes})
    return replace(made, task=replace(made.task, build=lambda: model)), model


def run(name: str, out: Path, **pool: Any) -> None:
    """Run a scenario, and write the weights and the records."""
    part = execute(scenario(name, pool=pool)[0], progress=False)
    if isinstance(part, CoordinatorPart):
        write_tensors(out / f"{name}.safetensors", part.method.model.state_dict(), {})
        (out / f"{name}.json").write_text(json.dumps(part.recorder.history))


def rows(batch: np.ndarray[Any, Any], part: ist.Part) -> torch.Tensor:
    """The rows of this rank, of a batch of its worker."""
    return torch.from_numpy(np.array_split(batch, part.ranks)[part.rank])


def train(run: ist.Joined, leaves: bool = False) -> list[dict[str, Any]]:
    """A training loop as its user would write it, on the batches of the built-in loop; return the states it had."""
    sampler, (inputs, targets), states = ShardedSampler(100, run.num_workers, BATCH, SEED), samples().tensors, []
    shard = sampler.shard(run.worker)
    for part in run:
        states.append(run.state_dict())
        for step in part.steps:
            own = torch.from_numpy(shard)[rows(sampler.batch(run.worker, step), part)]
            if leaves and (part.round, part.worker, part.rank) == (1, 1, 1):
                raise KeyError("of the user's own")
            loss = nn.functional.cross_entropy(part.model(inputs[own]), targets[own])
            loss.backward()
            nn.utils.clip_grad_norm_(part.model.parameters(), 0.5)
            part.optimizer.step()
            part.optimizer.zero_grad()
            part.log(loss, len(own))
    return states


def joined(model: nn.Module, inside: str, **settings: Any) -> ist.Joined:
    pool = ist.Pool(ranks_per_worker=2, inside=inside)  # type: ignore[arg-type]
    example = samples().tensors[0][:2]
    return ist.join(model, example=example, rounds=4, **COMMON, pool=pool, **settings)  # type: ignore[arg-type]


SEED, BATCH = 5, 10  # equal parts: DDP averages ranks with equal weights
COMMON: dict[str, Any] = {
    "local_steps": 3, "seed": SEED, "progress": False,
    "optimizer": ist.Optimizer(name="AdamW", args={"lr": 0.02}),
    "recipe": ist.Recipe(stages=[ist.Stage(), ist.Stage(rounds=2, keep=1)]),
}  # fmt: skip


def own_loop(_: Path, rank: int) -> None:
    """The user's own loop, the built-in one, and a loop that continues from a state, train the same.

    With data of their own, the ranks of a worker must have the same.
    """
    pool = ist.Pool(ranks_per_worker=2)
    with pytest.raises(ist.DataError, match=naming("ranks of worker", "pool.ranks_per_worker")):
        ist.train(seeded(plain), data(seed=rank), shard="own", workers=2, rounds=1, pool=pool, progress=False)
    ist.train(seeded(plain), data(seed=rank // 2), shard="own", workers=2, rounds=1, pool=pool, progress=False)
    for inside in ("ddp", "fsdp"):
        built_in, own, again = (seeded(plain).double() for _ in range(3))
        ist.train(
            built_in, samples(), workers=2, rounds=4, batch_size=BATCH, clip_grad_norm=0.5, **COMMON,
            pool=ist.Pool(ranks_per_worker=2, inside=inside),  # type: ignore[arg-type]
        )  # fmt: skip
        run = joined(own, inside)
        assert (run.worker, run.num_workers, run.rank, run.ranks) == (rank // 2, 2, rank % 2, 2)
        states = train(run)
        with pytest.raises(ist.ConfigError, match=naming("rank 7 of 2", f"rank {rank % 2} of 2")):
            joined(again, inside, state={**states[3], "workers": [rank // 2, 2, 7, 2]})
        train(joined(again, inside, state=states[3]))
        if rank == 0:
            for name, expected in built_in.named_parameters():
                torch.testing.assert_close(own.get_parameter(name), expected, rtol=0, atol=1e-12)
                assert torch.equal(own.get_parameter(name), again.get_parameter(name)), name
            assert [record["samples"] for record in run.history] == [60, 120, 180, 240]


def resumed(out: Path, rank: int) -> None:
    """A run that stops between two rounds with the same neurons, and is resumed, ends with the same weights."""
    kept = {
        "train__optimizer": {"name": "AdamW", "args": {"lr": 0.02}}, "train__rounds": 4, "train__workers": 2,
        "recipe__stages": [{}, {"rounds": 3, "keep": 1}], "checkpoint": {"every": 1},
    }  # fmt: skip

    def run_to(folder: Path, inside: str, stop: int | None, resume: bool = False) -> dict[str, torch.Tensor]:
        model = seeded(plain).double()
        made = job_for(model, samples(), **kept, pool={**RANKS, "inside": inside})
        made = replace(made, task=replace(made.task, build=lambda: model))
        run = None
        if rank == 0:
            run = RunFolder(folder) if resume else create_run_folder(made.config, folder)
        stopping = [StopAfter(stop)] if stop is not None else []
        execute(made, run, resume, False, callbacks=stopping)
        return dict(model.state_dict())

    for inside in ("ddp", "fsdp"):
        whole, broken = out / f"{inside}-whole", out / f"{inside}-broken"
        expected = run_to(whole, inside, None)
        run_to(broken, inside, 2)
        if rank == 0:  # each rank has saved its own
            assert {path.name[:11] for path in broken.rglob("worker-*")} == {f"worker-000{rank}" for rank in range(4)}
            shutil.copytree(broken, torn := out / f"{inside}-torn")
            for path in torn.rglob("worker-0003*"):
                path.unlink()
        run_to(out / f"{inside}-torn", inside, None, resume=True)  # both ranks of worker 1 start with fresh state
        found = run_to(broken, inside, None, resume=True)
        if rank == 0:
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), inside
            assert (out / f"{inside}-torn" / "result.json").exists()


class StopAfter(ist.Callback):
    """Ends a run after some rounds."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def on_round(self, record: dict[str, Any]) -> ist.Stop | None:
        return ist.Stop("enough") if record["round"] + 1 == self.rounds else None


def left(out: Path, rank: int) -> None:
    """A rank that is not the first one of its worker leaves its loop."""
    try:
        train(joined(seeded(plain).double(), "ddp"), leaves=True)
    except (KeyError, RuntimeError, ist.PoolError) as error:  # in the user's own backward pass, PyTorch raises its own
        (out / f"left-{rank}").write_text(json.dumps([time.time(), str(error)]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, what, *insides = sys.argv[1:]
    if what not in ("built_in", "cuda"):
        {"own_loop": own_loop, "left": left, "resumed": resumed}[what](Path(folder), int(os.environ["RANK"]))
    for inside in insides:
        out = Path(folder) / inside
        out.mkdir(exist_ok=True)
        for name in SCENARIOS:
            run(name, out, **{**RANKS, "device": "cuda" if what == "cuda" else "cpu"}, inside=inside)
