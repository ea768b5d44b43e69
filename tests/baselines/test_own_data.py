"""The baselines on data of the ranks' own: as plain loops in which each rank reads its own batches."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ist.storage.checkpoint import read_tensors
from tests.conftest import clone, run_forked_ranks
from tests.networks import NETWORKS, seeded
from tests.pools.scenario import WORKERS, job, own_data


def batches(step: int) -> list[tuple[Tensor, Tensor]]:
    """The batch of every rank."""
    sampler = job("own data")[0].schedule.sampler
    rows = [torch.from_numpy(sampler.batch(worker, step)) for worker in range(WORKERS)]
    return [own_data(worker)[rows[worker]] for worker in range(WORKERS)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def data_parallel(rounds: int, local_steps: int) -> dict[str, Tensor]:
    model = seeded(NETWORKS["no batch norm"])
    optimizer = optimizer_of(model)
    for step in range(rounds * local_steps):
        optimizer.zero_grad()
        for inputs, targets in batches(step):
            (nn.functional.cross_entropy(model(inputs), targets) / WORKERS).backward()
        optimizer.step()
    return clone(model.state_dict())


def local_sgd(rounds: int, local_steps: int) -> dict[str, Tensor]:
    models = [seeded(NETWORKS["no batch norm"]) for _ in range(WORKERS)]
    optimizers = [optimizer_of(model) for model in models]
    for round_number in range(rounds):
        for step in range(round_number * local_steps, (round_number + 1) * local_steps):
            for model, optimizer, (inputs, targets) in zip(models, optimizers, batches(step), strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
        states = [copy.deepcopy(model.state_dict()) for model in models]
        mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
        for model in models:
            model.load_state_dict(mean)
    return clone(models[0].state_dict())


@pytest.mark.system
def test_ranks_of_a_baseline_read_their_own_data(tmp_path: Path) -> None:
    run_forked_ranks((WORKERS, "tests/baselines/own_data.py", tmp_path, "ddp", "local_sgd"))

    config = job("own data")[0].config.train
    assert config.rounds is not None
    for method, oracle in (("ddp", data_parallel), ("local_sgd", local_sgd)):
        found, _ = read_tensors(tmp_path / f"{method}.safetensors")
        expected = oracle(config.rounds, config.local_steps)
        # Means over three ranks are summed in another order: a few roundings of numbers near 0.1 in each step.
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
