"""One optimizer step with all its features: that of a plain PyTorch loop, bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ist.api import train
from ist.errors import ConfigError
from ist.loops.local_loop import TaskLoop
from ist.loops.part import LocalSteps, completed
from ist.runs.execute import execute
from ist.subnet.job import Job, slot_of
from tests.conftest import assert_same, clone, data, job_for, naming, small_config
from tests.networks import NETWORKS, seeded

FEATURES: dict[str, dict[str, Any]] = {
    "clipped": {"clip_grad_norm": 0.3},
    "in three parts, of which one is shorter": {"accumulate": 3},
    "in four parts, clipped": {"accumulate": 4, "clip_grad_norm": 0.5},
    "in bfloat16, in two parts, clipped": {"autocast": "bfloat16", "accumulate": 2, "clip_grad_norm": 0.5},
}


def plain_loop(model: nn.Module, job: Job, scaler: torch.amp.GradScaler | None = None, **features: Any) -> None:
    """What anybody would write; only which samples a step uses comes from the job."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    inputs, targets = job.task.train_data.tensors  # type: ignore[attr-defined]
    shard = torch.from_numpy(job.schedule.sampler.shard(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for step in range(job.schedule.total_steps):
        optimizer.zero_grad()
        batch = job.schedule.sampler.batch(0, step)
        parts = np.array_split(batch, features.get("accumulate", 1))
        for part in parts:
            rows = shard[torch.from_numpy(part)]
            with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in features):
                loss = nn.functional.cross_entropy(model(inputs[rows]), targets[rows])
            scaler.scale(loss / (len(batch) / len(part))).backward()  # type: ignore[no-untyped-call]
        if "clip_grad_norm" in features:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), features["clip_grad_norm"])
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("name", FEATURES)
def test_one_worker_makes_the_steps_of_a_plain_loop_bit_for_bit(name: str) -> None:
    ours, plain, without = (seeded(NETWORKS["two hidden layers, batch norm"]) for _ in range(3))
    settings = {"train__workers": 1, "train__optimizer_state": "carried", "train__running_statistics": "carried"}
    job = job_for(ours, **settings, **{f"train__{key}": value for key, value in FEATURES[name].items()})

    execute(job, progress=False)
    plain_loop(plain, job, **FEATURES[name])
    plain_loop(without, job)

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))
    assert not torch.equal(ours.output.weight, without.output.weight)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_scaled_gradients_make_the_steps_of_a_plain_loop_bit_for_bit(max_norm: float | None) -> None:
    """The scaler of float16, which needs a GPU, is put in place by hand; such large inputs overflow in some steps."""

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=3e38, growth_interval=5)

    ours, plain = (seeded(NETWORKS["no batch norm"]) for _ in range(2))
    features = {} if max_norm is None else {"clip_grad_norm": max_norm}
    inputs, targets = data().tensors
    large = TensorDataset(20 * inputs, targets)
    job = job_for(
        ours,
        large,
        train__workers=1,
        train__rounds=1,
        train__local_steps=6,
        **{f"train__{k}": v for k, v in features.items()},
    )
    named = dict(ours.named_parameters())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    slot, cpu = slot_of(job, 0), torch.device("cpu")
    loop = TaskLoop(job, slot, cpu)
    loop.step._scaler = scaler()
    part = completed(LocalSteps(job.schedule, 0, slot, cpu, loop).of_round(0, ours, named, optimizer))
    plain_loop(plain, job, scaler(), **features)

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))
    assert part.steps_made == job.config.train.local_steps
    assert loop.step._scaler.get_scale() < 3e38
    assert not torch.equal(ours.output.weight, seeded(NETWORKS["no batch norm"]).output.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool__device": "cpu"}, ["'train.autocast'", "'pool.device' is 'cpu'", "'bfloat16'"]),
        ({"pool": {"kind": "ray"}}, ["'train.autocast'", "'pool.ray.num_gpus' is 0", "'bfloat16'"]),
        ({"pool__device": "auto", "train__optimizer_state": "carried"}, ["'autocast'", "'carried'", "'reset'"]),
    ],
)
def test_float16_where_it_cannot_work_is_refused(changes: dict[str, Any], message: list[str]) -> None:
    with pytest.raises(ConfigError, match=naming(*message)):
        small_config(train__autocast="float16", **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_float16_on_a_machine_without_a_gpu_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=naming("'train.autocast' is 'float16'", "GPU", "'bfloat16'")):
        train(seeded(NETWORKS["no batch norm"]), data(), workers=2, rounds=1, autocast="float16")


def test_the_loss_of_a_step_in_parts_is_the_mean_over_its_samples() -> None:
    losses = []
    for parts in (1, 3):
        model = seeded(NETWORKS["no batch norm"])
        part = execute(job_for(model, train__workers=1, train__accumulate=parts), progress=False)
        losses.append([record["loss"] for record in part.recorder.history])  # type: ignore[union-attr]

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # sums in another order


def test_more_parts_than_a_step_has_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match=naming("'train.accumulate' is 9", "'train.batch_size' is 8", "at most 6")):
        train(seeded(NETWORKS["no batch norm"]), data(50), workers=2, batch_size=8, rounds=1, accumulate=9)


@pytest.mark.parametrize("value", [0, -1.0, float("inf")])
def test_a_norm_that_no_gradient_can_have_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=naming("'train.clip_grad_norm'", str(value))):
        train(seeded(NETWORKS["no batch norm"]), data(), workers=2, rounds=1, clip_grad_norm=value)
