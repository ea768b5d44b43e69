"""Runs by every method that IST is compared with; the program of torchrun's processes.

torchrun --nproc-per-node N tests/baselines/program.py OUT [DEVICE]
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ist.distributed.environment import is_rank_zero
from ist.errors import ModelError
from ist.runs.build import make_job
from ist.runs.open import Following, open_run
from ist.storage.checkpoint import write_tensors
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.subnet.job import Job
from ist.training.rounds import follow_rounds, run_rounds
from tests.conftest import data, small_config
from tests.networks import seeded

WORKERS = 3
POOL = {
    "kind": "torchrun", "backend": "gloo",
    "device": sys.argv[2] if __name__ == "__main__" and len(sys.argv) > 2 else "cpu",
}  # fmt: skip
STOPPED_AFTER = 2

PLAIN = {"optimizer": {"name": "SGD", "args": {"lr": 0.2}}}
ADAM = {"optimizer": {"name": "AdamW", "args": {"lr": 0.01}}}

RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"method": "ddp"},
    "ddp_fp16": {"method": "ddp_fp16"},
    "ddp_bf16": {"method": "ddp_bf16"},
    "powersgd": {"method": "powersgd"},
    "powersgd of rank 2": {"method": "powersgd", "baseline": {"powersgd_rank": 2, "powersgd_start": 5}},
    "local_sgd": {"method": "local_sgd"},
    "diloco": {"method": "diloco", **{f"train__{key}": value for key, value in ADAM.items()}},
    "diloco_int8": {"method": "diloco_int8"},
    "ddp, plain SGD": {"method": "ddp", "train__local_steps": 1, **{f"train__{k}": v for k, v in PLAIN.items()}},
    "local SGD of one step, plain SGD": {
        "method": "local_sgd", "train__local_steps": 1, **{f"train__{key}": value for key, value in PLAIN.items()},
    },
    "local SGD, plain SGD": {"method": "local_sgd", **{f"train__{key}": value for key, value in PLAIN.items()}},
    "diloco that takes the mean, plain SGD": {
        "method": "diloco", "baseline": {"outer_lr": 1.0, "outer_momentum": 0.0},
        **{f"train__{key}": value for key, value in PLAIN.items()},
    },
    "diloco_int8 that takes the mean, plain SGD": {
        "method": "diloco_int8", "baseline": {"outer_lr": 1.0, "outer_momentum": 0.0},
        **{f"train__{key}": value for key, value in PLAIN.items()},
    },
    "ist that keeps": {
        "method": "ist", **{f"train__{key}": value for key, value in ADAM.items()}, "train__optimizer_state": "kept",
        "exchange": {"up": "int8", "values": "deltas", "error_feedback": True},
        "recipe": {"stages": [{}, {"rounds": 3, "keep": 1}]},
    },
}  # fmt: skip
TIED = ("ddp", "local_sgd", "diloco_int8")
NORMED = ("ddp", "local_sgd", "diloco_int8")
RESUMED = (
    "ddp",
    "ddp, norm and dropout",
    "local_sgd, norm and dropout",
    "powersgd",
    "local_sgd",
    "diloco",
    "diloco_int8",
    "ist that keeps",
)


def build() -> nn.Module:
    """Two layers that PowerSGD compresses, and one that is too small."""
    return seeded(lambda: nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5)))


def build_normed() -> nn.Module:
    """A batch norm, a layer norm and dropout."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 20), nn.LayerNorm(20),
            nn.ReLU(), nn.Dropout(0.2), nn.Linear(20, 5),
        )
    )  # fmt: skip


def build_tied() -> nn.Module:
    """Two layers with the same weights, and a frozen one."""
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 5)))
    model[2].weight = model[0].weight  # type: ignore[index]
    model[2].bias.requires_grad_(False)  # type: ignore[index]
    return model


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


REFUSED = {"unused": ("ddp", build_unused), "mixed": ("powersgd", lambda: seeded(Mixed))}


def refused(name: str) -> str:
    """What a run is refused with."""
    method, make = REFUSED[name]
    config = small_config(train__workers=WORKERS, pool=POOL, method=method)
    try:
        run(make_job(config, make(), make, data(), None, nn.functional.cross_entropy), None, resume=False)
    except ModelError as error:
        return str(error)
    return "nothing"


def job(name: str) -> Job:
    """The job of a run."""
    settings, make = RUNS.get(name), build
    if settings is None:
        method, _, kind = name.partition(", ")
        settings, make = {"method": method}, {"tied weights": build_tied, "norm and dropout": build_normed}[kind]
    config = small_config(train__workers=WORKERS, pool=POOL, **settings)
    return make_job(config, make(), make, data(), data(40, seed=4), nn.functional.cross_entropy)


class PowerCutError(Exception):
    """Ends a run in its midst."""


def run(made: Job, folder: RunFolder | None, resume: bool, stop: bool = False) -> Any:
    """Take part in a run, to its end or to the power cut; return rank 0's part of it."""
    with open_run(made, folder, resume, progress=False) as part:
        if isinstance(part, Following):
            if stop:
                for round_number in range(STOPPED_AFTER + 1):
                    part.follower.train_round(round_number)
            else:
                follow_rounds(part.job, part.follower, part.first_round)
            return part
        if stop:
            note = part.recorder.round_done

            def cut(round_number: int, *rest: Any) -> None:
                if round_number == STOPPED_AFTER:
                    raise PowerCutError
                note(round_number, *rest)

            part.recorder.round_done = cut  # type: ignore[method-assign]
        run_rounds(part.job, part.method, part.recorder, part.first_round, part.device)
        return part


def main(out: Path) -> None:
    """Make all runs, then some again, with a power cut."""
    torch.set_num_threads(1)
    others = [f"{method}, tied weights" for method in TIED] + [f"{method}, norm and dropout" for method in NORMED]
    for name in [*RUNS, *others]:
        part = run(job(name), None, resume=False)
        if not isinstance(part, Following):
            write_tensors(out / f"{name}.safetensors", part.method.model.state_dict(), {})
            (out / f"{name}.json").write_text(json.dumps(part.recorder.history))
    for name in RESUMED:
        made = job(name)
        folder = create_run_folder(made.config, out / "runs" / name) if is_rank_zero() else None
        with contextlib.suppress(PowerCutError):
            run(made, folder, resume=False, stop=True)
        part = run(job(name), folder, resume=True)
        if not isinstance(part, Following):
            write_tensors(out / f"{name}, resumed.safetensors", part.method.model.state_dict(), {})
    (out / f"refused by rank {os.environ['RANK']}.json").write_text(
        json.dumps({name: refused(name) for name in REFUSED})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
