"""Runs with the same results on every pool; this file is also the program of the torchrun pool's ranks.

python -m tests.forked_ranks N tests/pools/scenario.py OUT COORDINATOR|sharded [DEVICE [SCENARIO ...]]   (or under torchrun)
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ist.data.shards.unequal import OwnData
from ist.runs.execute import execute
from ist.runs.open import CoordinatorPart
from ist.storage.checkpoint import write_tensors
from ist.subnet.assignments import Team, WorkerSlot
from ist.subnet.job import Job, assignments
from ist.subnet.stores.parameter_store import LocalStore
from ist.transport.endpoints import SubnetWriter
from ist.transport.interfaces import Subnet, WorkerPool
from ist.transport.message import Header
from tests.augmented import Augmented, Stream
from tests.conftest import data, job_for, returned, whole_state
from tests.networks import NETWORKS, frozen_first, seeded
from tests.neurons.networks import stack
from tests.steps import Named

WORKERS = 3

SCENARIOS: dict[str, dict[str, Any]] = {
    "batch norm, reset": {"network": "two hidden layers, batch norm", "train__activation_scale": "none"},
    "carried Adam, uneven": {
        "network": "uneven widths",
        "train__optimizer": {"name": "Adam", "args": {"lr": 0.01}},
        "train__optimizer_state": "carried",
    },
    "scaled, scheduled, last round short": {
        "network": "no batch norm",
        "train__activation_scale": "width",
        "train__optimizer_state": "carried",
        "train__rounds": None,
        "train__epochs": 2,
        "train__local_steps": 2,
        "train__schedule": {"name": "CosineAnnealingLR", "args": {"T_max": "total_steps"}},
    },
    "scheduled by a function": {
        "network": "no batch norm", "train__schedule": {"name": "LambdaLR", "args": {"lr_lambda": lambda step: 0.8**step}},
    },
    "an optimizer by a function, carried": {
        "network": "uneven widths", "train__optimizer": {"name": "tests.optimizers:no_decay_on_biases", "args": {}},
        "train__optimizer_state": "carried",
    },
    "Muon and AdamW, carried": {
        "network": "uneven widths", "train__optimizer": {"name": "MuonWithAdamW", "args": {"lr": 0.02}},
        "train__optimizer_state": "carried",
    },
    "dropout": {"network": "dropout"},
    "random items": {"network": "two hidden layers, batch norm", "items": Augmented},
    "random items, loader": {
        "network": "two hidden layers, batch norm", "items": Augmented, "data__loader": {"workers": 1},
    },
    "random stream, loader": {"network": "no batch norm", "stream": Stream, "data__loader": {"workers": 1}},
    "attention, carried": {"network": "attention", "train__optimizer_state": "carried"},
    "varying shares": {"network": "uneven widths", "partition__strategy": "categorical"},
    "overlapping shares": {
        "network": "no batch norm", "partition__strategy": "bernoulli", "partition__keep": 0.6,
        "train__optimizer_state": "carried",
    },
    "quantized, error feedback": {
        "network": "uneven widths", "exchange__down": "int8", "exchange__up": "int3", "exchange__values": "deltas",
        "exchange__error_feedback": True, "checkpoint__every": 2, "train__optimizer_state": "carried",
    },
    "half precision, varying shares": {
        "network": "attention", "partition__strategy": "categorical", "exchange__down": "float16",
        "exchange__up": "bfloat16",
    },
    "by a step function, in parts, clipped": {
        "network": "one hidden layer", "items": Named, "train__step": "tests.steps:with_numbers", "train__accumulate": 3,
        "train__logged": ["right", "weight"],
        "train__clip_grad_norm": 0.4, "train__autocast": "bfloat16", "evaluate__metric": "none",
    },
    "whole blocks": {
        "network": "blocks", "partition__strategy": "blocks", "partition__blocks": ["1.*"], "partition__min_depth": 2,
    },
    "kept state, full width, global shuffle": {
        "network": "uneven widths", "train__optimizer_state": "kept", "checkpoint__every": 100,
        "recipe__stages": [{}, {"rounds": 2, "keep": 1}], "data__shuffle": "global",
    },
    "stages, outer momentum, averaged": {
        "network": "uneven widths", "train__optimizer_state": "carried",
        "recipe__stages": [{"rounds": 1, "keep": 1, "lr_scale": 0.5}, {}, {"rounds": 1, "keep": 0.6, "local_steps": 2}],
        "recipe__outer": {"lr": 0.9, "momentum": 0.5}, "recipe__average": {"kind": "ema", "decay": 0.6},
    },
    "scaled updates": {
        "network": "no batch norm", "partition__strategy": "bernoulli", "partition__keep": 0.6,
        "train__optimizer_state": "carried", "exchange__up": "int8", "exchange__values": "deltas",
        "recipe": {
            "merge_scale": {"own": 0.5, "shared": 0.75}, "outer": {"momentum": 0.5},
            "stages": [{}, {"rounds": 1, "keep": 1, "merge_scale": 0.7}],
        },
    },
    "chosen scale": {
        "network": "two hidden layers, batch norm", "items": Augmented, "recipe__merge_scale": "auto",
        "exchange__up": "int8", "exchange__values": "deltas",
    },
    "balanced, filled up, folded": {
        "network": "no batch norm", "partition__coverage": "balanced", "partition__keep": 0.5,
        "train__activation_scale": "folded", "recipe__stages": [{}, {"rounds": 1, "keep": 1}],
    },
    "frozen, some of it shared": {"network": "frozen", "partition__exclude": ["0"], "train__activation_scale": "folded"},
    "frozen, quantized": {
        "network": "frozen", "exchange__down": "int8", "exchange__up": "int8", "exchange__values": "deltas",
        "partition__strategy": "categorical",
    },
    "blocks, full width at the end": {
        "network": "blocks", "partition__strategy": "blocks", "partition__blocks": ["1.*"],
        "recipe__stages": [{}, {"rounds": 2, "keep": 1}],
    },
    "frozen rest, first absent": {
        "network": "two hidden layers, batch norm", "recipe__stages": [{"rounds": 1}, {"rest": "frozen"}],
        "exchange__up": "int8", "exchange__values": "deltas", "train__optimizer_state": "carried",
    },
    "frozen rest, frozen parameters": {"network": "frozen", "partition__rest": "frozen", "exchange__rest": "int8"},
    "skewed shards": {"network": "no batch norm", "data__skew": {"alpha": 0.3}},
    "own data": {"network": "no batch norm", "data__shard": "own"},
}  # fmt: skip


FEW_BUFFERS = (
    "carried Adam, uneven", "overlapping shares", "quantized, error feedback", "stages, outer momentum, averaged",
    "frozen, quantized", "chosen scale",
)  # fmt: skip
"""Scenarios in which a dedicated coordinator has two message buffers for three workers."""


class FailsElsewhere(nn.Module):
    """A network that fails in every process but the one that created it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = seeded(NETWORKS["no batch norm"])
        self.home = os.getpid()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.home:
            raise RuntimeError("only here")
        return self.layers(inputs)


EXTRA = {
    "fails elsewhere": FailsElsewhere,
    "dropout": lambda: nn.Sequential(nn.Linear(12, 18), nn.ReLU(), nn.Dropout(0.5), nn.Linear(18, 5)),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 4)), nn.Linear(4, 12), nn.TransformerEncoderLayer(12, 3, 20, batch_first=True),
        nn.Flatten(), nn.Linear(36, 5),
    ),
    "blocks": stack,
    "frozen": frozen_first,
}  # fmt: skip


def own_data(worker: int) -> Dataset[Any]:
    """Return a worker's own data; no other rank asks for them."""
    if "RANK" in os.environ:
        assert worker == int(os.environ["RANK"]) - int(os.environ["WORLD_SIZE"]) + WORKERS
    return data(17 + 20 * worker, seed=10 + worker)


def job(name: str, **changes: Any) -> tuple[Job, nn.Module]:
    settings = {**SCENARIOS[name], **changes}
    build = {**NETWORKS, **EXTRA}[settings.pop("network")]
    items = settings.pop("items", lambda dataset: dataset)
    train_items = settings.pop("stream", items)
    model = seeded(build)
    own = OwnData(own_data) if settings.get("data__shard") == "own" else None
    train = None if own else train_items(data())
    made = job_for(model, train, items(data(40, seed=4)), own=own, **{"train__workers": WORKERS, **settings})
    return replace(made, task=replace(made.task, build=lambda: model)), model


def run(name: str, out: Path, **changes: Any) -> None:
    made, _ = job(name, **changes)
    part = execute(made, progress=False)
    if isinstance(part, CoordinatorPart):
        slug = name.replace(" ", "-").replace(",", "")
        write_tensors(out / f"{slug}.safetensors", part.method.model.state_dict(), {})
        (out / f"{slug}.json").write_text(json.dumps(part.recorder.history))


def rounds_without_waiting(pool: WorkerPool, made: Job, model: nn.Module, rounds: int) -> list[tuple[int, int]]:
    """Submit a worker's next subnet as soon as its last one is returned; return (worker, round) of each result."""
    names = pool.gather(0)
    held, store = assignments(made), LocalStore(whole_state(made, model))
    writer, team, came = SubnetWriter(made.split, made.config.exchange), Team(len(names)), []

    def submit(round_number: int, worker: int) -> None:
        cut = held.cuts(round_number)[worker]
        buffers = pool.buffers(worker, writer.layouts(cut))
        sent = writer.write(store, cut, round_number, buffers)
        buffers.down.write_header(Header(round_number, worker))
        pool.submit(round_number, Subnet(WorkerSlot(worker, team), buffers, sent))

    next_round = dict.fromkeys(range(len(names)), 1)
    for worker in next_round:
        submit(0, worker)
    for result in returned(pool.results()):
        assert isinstance(result, Subnet), result
        round_number = next_round[result.worker] - 1
        result.buffers.up.read_header(round_number, result.worker)
        came.append((result.worker, round_number))
        if next_round[result.worker] < rounds:
            next_round[result.worker] += 1
            submit(round_number + 1, result.worker)
    return came


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, coordinator, device, *chosen = [*sys.argv[1:], "cpu"] if len(sys.argv) < 4 else sys.argv[1:]
    for scenario in chosen or SCENARIOS:
        kind: dict[str, Any] = {"store": "sharded"} if coordinator == "sharded" else {"coordinator": coordinator}
        if coordinator == "dedicated" and scenario in FEW_BUFFERS:
            kind["message_buffers"] = 2
        run(scenario, Path(out), pool={"kind": "torchrun", "device": device, **kind})
