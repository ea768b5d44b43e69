"""Runs of every method that IST is compared with; the program of a group of ranks.

python -m tests.forked_ranks 3 tests/baselines/program.py OUT [DEVICE]   (or torchrun, in its place)
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from ist.config.methods import METHODS
from ist.data.batches import fetch, take_shard
from ist.distributed.environment import is_rank_zero
from ist.errors import DataError, ModelError
from ist.loops.part import completed
from ist.rng import Purpose
from ist.rng import seeded as seeded_generators
from ist.runs.build import make_job, step_function
from ist.runs.execute import execute
from ist.runs.open import FollowerPart, open_run
from ist.storage.checkpoint import write_tensors
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.subnet.job import Job
from ist.training.rounds import run_rounds
from tests.conftest import data, small_config
from tests.networks import seeded

WORKERS = 3
DEVICE = sys.argv[2] if __name__ == "__main__" and len(sys.argv) > 2 else None
POOL = {"kind": "torchrun", "backend": "gloo", "device": DEVICE or "cpu"}
DROPOUT = 0.3 if DEVICE is None else 0.0
"""No dropout in comparisons between devices, because a GPU draws other random numbers."""

STOPPED_AFTER = 2
BASELINES = [name for name, spec in METHODS.items() if not spec.has_coordinator]

PLAIN: dict[str, Any] = {"train__optimizer": {"name": "SGD", "args": {"lr": 0.2}}}
ADAM: dict[str, Any] = {"train__optimizer": {"name": "AdamW", "args": {"lr": 0.01}}}
CLIPPED = 0.3
"""Shorter than most gradients of these runs."""

OUTER_MEAN: dict[str, Any] = {"baseline": {"outer": {"lr": 1.0, "momentum": 0.0}}}

RUNS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in BASELINES},
    "diloco": {"method": "diloco", **ADAM},
    "powersgd of rank 2": {"method": "powersgd", "baseline": {"powersgd_rank": 2, "powersgd_start": 5}},
    "ddp, plain SGD": {"method": "ddp", "train__local_steps": 1, **PLAIN},
    "local SGD of one step, plain SGD": {"method": "local_sgd", "train__local_steps": 1, **PLAIN},
    "local SGD, plain SGD": {"method": "local_sgd", **PLAIN},
    "diloco that takes the mean, plain SGD": {"method": "diloco", **OUTER_MEAN, **PLAIN},
    "diloco_int8 that takes the mean, plain SGD": {"method": "diloco_int8", **OUTER_MEAN, **PLAIN},
    **{
        f"{method}, clipped, accumulated": {"method": method, "train__clip_grad_norm": CLIPPED, "train__accumulate": 3}
        for method in ("ddp", "ddp_fp16", "powersgd", "local_sgd")
    },
    **{
        f"{method}, by a function": {
            "method": method,
            "train__optimizer": {
                "name": "tests.optimizers:like_the_class",
                "args": small_config().train.optimizer.model_dump(include={"name", "args"}),
            },
        }
        for method in ("ddp", "local_sgd")
    },
    "ddp, in bfloat16": {"method": "ddp", "train__autocast": "bfloat16"},
    "ddp, by a step function": {
        "method": "ddp", "train__step": "tests.steps:counting", "train__logged": ["samples", "right"], "train__accumulate": 3, "train__clip_grad_norm": CLIPPED,
    },
    "ddp, compiled": {"method": "ddp", "train__compile": "eager", "train__accumulate": 2},
    "ddp, in two parts": {"method": "ddp", "train__accumulate": 2},
    "ist that keeps": {
        "method": "ist", **ADAM, "train__optimizer_state": "kept",
        "exchange": {"up": "int8", "values": "deltas", "error_feedback": True},
        "recipe": {"stages": [{}, {"rounds": 3, "keep": 1}]},
    },
}  # fmt: skip
RESUMED = ("ddp", "powersgd", "local_sgd", "diloco", "diloco_int8", "ist that keeps")


def build() -> nn.Module:
    """A batch norm, a layer norm and dropout; two matrices that PowerSGD compresses, and one that is too small."""
    return seeded(
        lambda: nn.Sequential(
            # No bias where batch norm follows: its gradient is a rounding error, of which Adam makes whole steps.
            nn.Linear(12, 24, bias=False), nn.BatchNorm1d(24), nn.Tanh(), nn.Dropout(DROPOUT),
            nn.Linear(24, 20), nn.LayerNorm(20), nn.Tanh(), nn.Dropout(DROPOUT), nn.Linear(20, 5),
        )
    )  # fmt: skip


def build_plain() -> nn.Module:
    """A network without batch statistics and without random numbers."""
    return seeded(lambda: nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5)))


def build_tied() -> nn.Module:
    """Two layers with the same weights, and a frozen one."""
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 5)))
    model[2].weight = model[0].weight  # type: ignore[index]
    model[2].bias.requires_grad_(False)  # type: ignore[index]
    return model


OTHER_NETWORKS = {
    "ddp, no norm": build_plain,
    "ddp, tied weights": build_tied,
    "local_sgd, tied weights": build_tied,
    "diloco_int8, tied weights": build_tied,
}


def build_unused() -> nn.Module:
    """A layer that the network does not use."""
    model = build()
    model.register_parameter("spare", nn.Parameter(torch.zeros(3)))
    return model


class Mixed(nn.Module):
    """Parameters of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.last = nn.Linear(24, 5, dtype=torch.float64)

    def forward(self, inputs: Any) -> Any:
        return self.last(self.first(inputs).double())


def rank() -> int:
    return int(os.environ["RANK"])


REFUSED: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Any]]] = {
    "unused": ("ddp", build_unused, data),
    "mixed": ("powersgd", lambda: seeded(Mixed), data),
    "fewer samples": ("ist", build, lambda: data(100 - 20 * rank())),
    "other samples": ("ist", build, lambda: data(seed=rank())),
}


def refused(name: str) -> str:
    """The class and the message of the error with which a run ends before its first round."""
    method, make, load = REFUSED[name]
    config = small_config(train__workers=WORKERS, pool=POOL, method=method)
    try:
        run(make_job(config, make(), make, load(), None, nn.functional.cross_entropy), None, resume=False)
    except (ModelError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def job(name: str) -> Job:
    """The job of a run."""
    settings, make = RUNS.get(name, {"method": name.partition(",")[0]}), OTHER_NETWORKS.get(name, build)
    config = small_config(train__workers=WORKERS, pool=POOL, **settings)
    loss, step = nn.functional.cross_entropy, step_function(config.train.step)
    return make_job(config, make(), make, data(), data(40, seed=4), loss, step=step)


class PowerCutError(Exception):
    """Ends a run between two rounds."""


def run(made: Job, folder: RunFolder | None, resume: bool, stop: bool = False) -> Any:
    """Take part in a run, until its end or the power cut; return rank 0's part of it."""
    if not stop:
        return execute(made, folder, resume, progress=False)
    with open_run(made, folder, resume, progress=False) as part:
        if isinstance(part, FollowerPart):
            for round_number in range(STOPPED_AFTER + 1):
                completed(part.follower.train_round(round_number))
            return part
        note = part.recorder.round_done

        def cut(round_number: int, *rest: Any) -> None:
            if round_number == STOPPED_AFTER:
                raise PowerCutError
            note(round_number, *rest)

        part.recorder.round_done = cut  # type: ignore[method-assign]
        completed(run_rounds(part.job, part.method, part.recorder, part.first_round, part.device))
        return part


def plain_powersgd(made: Job) -> dict[str, Tensor]:
    """Train with PyTorch's own PowerSGD in a plain loop, in the current process group; return the parameters."""
    me, cpu = rank(), torch.device("cpu")
    shard = take_shard(made.task.train_data, made.schedule.sampler.shard(me))
    model = build()
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(PowerSGDState(None, 1, start_powerSGD_iter=2, random_seed=made.config.seed), powerSGD_hook)
    train = made.config.train
    optimizer = torch.optim.SGD(model.parameters(), **train.optimizer.args)
    for round_number in range(made.schedule.num_rounds):
        with seeded_generators(cpu, made.config.seed, Purpose.TRAINING, round_number, me):
            for step in made.schedule.steps(round_number):
                optimizer.zero_grad()
                batch = made.schedule.sampler.batch(me, step)
                for number, rows in enumerate(np.array_split(batch, train.accumulate), start=1):
                    inputs, targets = fetch(shard, rows, cpu)
                    with contextlib.nullcontext() if number == train.accumulate else ddp.no_sync():
                        loss = nn.functional.cross_entropy(ddp(inputs), targets)
                        (loss * len(rows) / len(batch)).backward()
                if train.clip_grad_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), train.clip_grad_norm)
                optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def main(out: Path) -> None:
    """Execute all runs, then some again with a power cut."""
    torch.set_num_threads(1)
    for name in [*RUNS, *OTHER_NETWORKS]:
        part = run(job(name), None, resume=False)
        if not isinstance(part, FollowerPart):
            write_tensors(out / f"{name}.safetensors", part.method.model.state_dict(), {})
            (out / f"{name}.json").write_text(json.dumps(part.recorder.history))
    for name in RESUMED:
        made = job(name)
        folder = create_run_folder(made.config, out / "runs" / name) if is_rank_zero() else None
        with contextlib.suppress(PowerCutError):
            run(made, folder, resume=False, stop=True)
        part = run(job(name), folder, resume=True)
        if not isinstance(part, FollowerPart):
            write_tensors(out / f"{name}, resumed.safetensors", part.method.model.state_dict(), {})
    if DEVICE is None:
        for name in ("powersgd", "powersgd, clipped, accumulated"):
            trained = plain_powersgd(job(name))
            if is_rank_zero():
                write_tensors(out / f"PyTorch's own {name}.safetensors", trained, {})
    (out / f"refused by rank {rank()}.json").write_text(json.dumps({name: refused(name) for name in REFUSED}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
