"""Scale factors folded into the weights of a subnet while it is trained (train.activation_scale: folded)."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from ist.data.batches import fetch, take_shard
from ist.loops.part import completed
from ist.models.mlp import MLP
from ist.monitoring.meter import Meter
from ist.pools.inline import InlinePool
from ist.subnet.job import Job, assignments
from ist.training.coordinator import Coordinator
from tests.conftest import assert_same, clone, job_for
from tests.networks import NETWORKS, seeded

CPU = torch.device("cpu")


def coordinator(job: Job, model: nn.Module) -> Coordinator:
    meter = Meter()
    return Coordinator(job, InlinePool(job, CPU, meter), model, meter)


@pytest.mark.parametrize("network", ["no batch norm", "uneven widths"])
def test_one_worker_trains_the_full_network_bit_for_bit(network: str) -> None:
    results = []
    for scale in ("none", "folded"):
        model = seeded(NETWORKS[network])
        made = coordinator(job_for(model, train__workers=1, train__activation_scale=scale), model)
        for round_number in range(2):
            completed(made.train_round(round_number))
        results.append(clone(model.state_dict()))

    assert_same(*results)


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_workers_step_is_a_plain_step_of_the_submodel_with_multiplied_weights(overlapping: bool) -> None:
    model = seeded(NETWORKS["no batch norm"])
    job = job_for(
        model, train__workers=3, train__local_steps=2, train__activation_scale="folded",
        partition={"keep": 0.75} if overlapping else {},
    )  # fmt: skip
    before, cuts = copy.deepcopy(model), assignments(job).cuts(0)
    total = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    count = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    for worker, (first, second) in enumerate(assignments(job).of(0)):
        factors = {"linear_2.weight": 16 / len(first), "output.weight": 8 / len(second)}
        indices = {
            name: torch.meshgrid(
                *[
                    torch.arange(size) if own is None else torch.from_numpy(own)
                    for size, own in zip(tensor.shape, cuts[worker][name], strict=True)
                ],
                indexing="ij",
            )
            for name, tensor in before.state_dict().items()
        }
        submodel = MLP([12, len(first), len(second), 5], batch_norm=False)
        submodel.load_state_dict(
            {name: factors.get(name, 1) * tensor[indices[name]] for name, tensor in before.state_dict().items()}
        )
        optimizer = torch.optim.SGD(submodel.parameters(), lr=0.1, momentum=0.9)
        shard = take_shard(job.task.train_data, job.schedule.sampler.shard(worker))
        for step in range(2):
            inputs, targets = fetch(shard, job.schedule.sampler.batch(worker, step), CPU)
            optimizer.zero_grad()
            functional.cross_entropy(submodel(inputs), targets).backward()
            optimizer.step()
        for name, tensor in submodel.state_dict().items():
            total[name][indices[name]] += tensor / factors.get(name, 1)
            count[name][indices[name]] += 1

    completed(coordinator(job, model).train_round(0))

    for name, tensor in model.state_dict().items():
        expected = torch.where(count[name] > 0, total[name] / count[name].clamp(min=1), before.state_dict()[name])
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("workers", "is_exact"), [(4, True), (3, False)])
@pytest.mark.parametrize("exchange", ["weights", "deltas"])
def test_a_round_with_learning_rate_zero_changes_values_by_rounding_only(
    workers: int, is_exact: bool, exchange: str
) -> None:
    model = seeded(NETWORKS["no batch norm"])
    before = clone(model.state_dict())
    optimizer = {"name": "SGD", "args": {"lr": 0.0}}
    job = job_for(
        model, train__workers=workers, train__activation_scale="folded", train__optimizer=optimizer,
        exchange__values=exchange,
    )  # fmt: skip
    made = coordinator(job, model)

    for round_number in range(3):
        completed(made.train_round(round_number))

    if is_exact:  # quarters of 16 and 8: the factor is a power of two
        assert_same(clone(model.state_dict()), before)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=0)
