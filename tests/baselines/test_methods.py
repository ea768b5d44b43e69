"""The methods that IST is compared with: each is what it says, sends what its formula says, and can be resumed."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ist.data.batches import fetch, take_shard
from ist.evaluation.evaluate import reestimate_statistics, statistics_batches
from ist.rng import Purpose, seeded
from ist.storage.checkpoint import read_tensors
from ist.subnet.job import Job
from tests.baselines.program import NORMED, RESUMED, RUNS, WORKERS, build, build_normed, job
from tests.conftest import ROOT, assert_same, clone, run_torchrun

pytestmark = [pytest.mark.system, pytest.mark.procs, pytest.mark.timeout(200)]

RING = 2 * (WORKERS - 1)  # sends of all ranks together, for one byte to average
NUMBERS = sum(parameter.numel() for parameter in build().parameters())
STEPS, ROUNDS = 3, 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    run_torchrun([str(ROOT / "tests/baselines/program.py"), str(folder)], WORKERS, timeout=180)
    return folder


def weights(runs: Path, name: str) -> dict[str, Tensor]:
    return read_tensors(runs / f"{name}.safetensors")[0]


def records(runs: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((runs / f"{name}.json").read_text())
    return found


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=0, atol=tolerance), name


def large_batch_training(made: Job) -> dict[str, Tensor]:
    """One process, whose batch is all ranks' together, each rank's mean weighing the same."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), **made.config.train.optimizer.args)
    shards = [take_shard(made.train_data, made.dealing.shard(rank)) for rank in range(WORKERS)]
    for step in range(made.total_steps):
        optimizer.zero_grad()
        for rank, shard in enumerate(shards):
            inputs, targets = fetch(shard, made.dealing.batch(rank, step), torch.device("cpu"))
            loss = nn.functional.cross_entropy(model(inputs), targets) / WORKERS
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.state_dict()


def test_ddp_is_training_with_a_large_batch(runs: Path) -> None:
    # 1e-5: twelve steps of sums in another order
    assert_close(weights(runs, "ddp"), large_batch_training(job("ddp")), 1e-5)


def ranks_with_norm_and_dropout(made: Job, averaged_every_step: bool) -> dict[str, Tensor]:
    """The trained numbers of all ranks in one process: gradients averaged each step, or numbers each round."""
    models = [build_normed().train() for _ in range(WORKERS)]
    optimizers = [torch.optim.SGD(model.parameters(), **made.config.train.optimizer.args) for model in models]
    shards = [take_shard(made.train_data, made.dealing.shard(rank)) for rank in range(WORKERS)]
    cpu = torch.device("cpu")
    for round_number in range(made.num_rounds):
        # Each rank draws its dropout from a generator of its own, which goes on over the steps of a round.
        states = []
        for rank in range(WORKERS):
            with seeded(cpu, made.config.seed, Purpose.TRAINING, round_number, rank):
                states.append(torch.get_rng_state())
        for step in made.steps(round_number):
            for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                optimizer.zero_grad()
                inputs, targets = fetch(shards[rank], made.dealing.batch(rank, step), cpu)
                torch.set_rng_state(states[rank])
                nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
                states[rank] = torch.get_rng_state()
            if averaged_every_step:
                for same in zip(*(model.parameters() for model in models), strict=True):
                    mean = torch.stack([parameter.grad for parameter in same]).mean(dim=0)
                    for parameter in same:
                        parameter.grad = mean.clone()
            for optimizer in optimizers:
                optimizer.step()
        if not averaged_every_step:
            for same in zip(*(model.parameters() for model in models), strict=True):
                mean = torch.stack([parameter.data for parameter in same]).mean(dim=0)
                for parameter in same:
                    parameter.data = mean.clone()
    return {name: parameter.data for name, parameter in models[0].named_parameters()}


@pytest.mark.parametrize("method", ["ddp", "local_sgd"])
def test_norms_and_dropout_are_those_of_ranks_with_batches_and_draws_of_their_own(runs: Path, method: str) -> None:
    name = f"{method}, norm and dropout"
    found, expected = weights(runs, name), ranks_with_norm_and_dropout(job(name), method == "ddp")

    # 1e-4: twelve steps of sums in another order, and norms divide by small numbers
    assert_close({key: found[key] for key in expected}, expected, 1e-4)


@pytest.mark.parametrize("method", NORMED)
def test_statistics_of_norms_are_taken_from_the_network_that_is_evaluated(runs: Path, method: str) -> None:
    name = f"{method}, norm and dropout"
    made, state = job(name), weights(runs, name)
    model = build_normed()
    model.load_state_dict(state)
    batches = statistics_batches(
        made.train_data, made.config.evaluate.batch_size, made.config.evaluate.statistics_batches, made.config.seed,
        torch.device("cpu"),
    )  # fmt: skip
    reestimate_statistics(model, batches)

    assert_close(clone(model.state_dict()), state, 1e-5)  # sums in another order
    assert records(runs, name)[-1]["loss"] < records(runs, name)[0]["loss"]


@pytest.mark.parametrize(("name", "tolerance"), [("ddp_fp16", 2e-3), ("ddp_bf16", 2e-2)])
def test_half_as_many_bytes_give_nearly_the_same_network(runs: Path, name: str, tolerance: float) -> None:
    whole, half = weights(runs, "ddp"), weights(runs, name)

    assert_close(half, whole, tolerance)
    assert any(not torch.equal(half[key], whole[key]) for key in whole)
    assert records(runs, name)[-1]["sent_bytes"] * 2 == records(runs, "ddp")[-1]["sent_bytes"]


def test_local_sgd_of_one_step_is_ddp(runs: Path) -> None:
    assert_close(weights(runs, "local SGD of one step, plain SGD"), weights(runs, "ddp, plain SGD"), 1e-5)
    assert records(runs, "local_sgd")[-1]["loss"] != records(runs, "ddp")[-1]["loss"]


def test_diloco_with_a_plain_outer_step_is_local_sgd(runs: Path) -> None:
    mean = weights(runs, "local SGD, plain SGD")

    assert_close(weights(runs, "diloco that takes the mean, plain SGD"), mean, 1e-5)
    # Each round is off by at most a level of 1 / 127 of the largest change, twice.
    assert_close(weights(runs, "diloco_int8 that takes the mean, plain SGD"), mean, 2e-2)


def test_diloco_is_not_local_sgd(runs: Path) -> None:
    plain, nesterov = weights(runs, "local_sgd"), weights(runs, "diloco_int8")

    assert any((plain[name] - nesterov[name]).abs().max() > 1e-2 for name in plain)


def powersgd_numbers(rank: int) -> int:
    """Numbers of a compressed step: rank x (rows + columns) of a matrix where that halves it at least."""
    total = 0
    for parameter in build().parameters():
        rows, columns = parameter.shape[0], parameter[0].numel()
        low = min(rank, rows, columns)
        total += (rows + columns) * low if (rows + columns) * low * 2 < rows * columns else rows * columns
    return total


@pytest.mark.parametrize(("name", "rank", "start"), [("powersgd", 1, 2), ("powersgd of rank 2", 2, 5)])
def test_powersgd_sends_the_bytes_of_its_formula(runs: Path, name: str, rank: int, start: int) -> None:
    compressed = powersgd_numbers(rank)

    assert compressed < NUMBERS / 2
    expected = 4 * RING * (start * NUMBERS + (STEPS * ROUNDS - start) * compressed)
    assert records(runs, name)[-1]["sent_bytes"] == pytest.approx(expected, abs=WORKERS)  # each rank rounds its own


def test_powersgd_begins_as_ddp_and_goes_on_otherwise(runs: Path) -> None:
    losses = {name: [r["loss"] for r in records(runs, name)] for name in ("ddp", "powersgd", "powersgd of rank 2")}

    assert losses["powersgd of rank 2"][0] == losses["ddp"][0]
    assert losses["powersgd of rank 2"][-1] != losses["ddp"][-1] != losses["powersgd"][-1]
    assert losses["powersgd"][-1] < losses["powersgd"][0]


@pytest.mark.parametrize("name", ["local_sgd", "diloco", "diloco_int8"])
def test_local_methods_send_the_network_once_a_round(runs: Path, name: str) -> None:
    history = records(runs, name)
    per_number = 4.0
    if name == "diloco_int8":  # blocks of 1024 with a scale of four bytes, as many for each rank
        blocks = -(-NUMBERS // (1024 * WORKERS)) * WORKERS
        per_number = blocks * 1028 / NUMBERS

    for before, after in pairwise(history):
        sent = after["sent_bytes"] - before["sent_bytes"]
        assert sent == pytest.approx(RING * NUMBERS * per_number, abs=2 * WORKERS)  # each rank rounds its own


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_was_stopped_and_resumed_is_the_same_run(runs: Path, name: str) -> None:
    assert_same(weights(runs, f"{name}, resumed"), weights(runs, name))


@pytest.mark.parametrize("name", RUNS)
def test_compute_normalised_seconds_are_counted(runs: Path, name: str) -> None:
    history = records(runs, name)

    assert history[0]["virtual_s"] > 0
    assert all(after["virtual_s"] > before["virtual_s"] for before, after in pairwise(history))


@pytest.mark.parametrize("name", ["local_sgd, tied weights", "ddp, tied weights", "diloco_int8, tied weights"])
def test_tied_weights_stay_tied(runs: Path, name: str) -> None:
    state = weights(runs, name)

    assert torch.equal(state["0.weight"], state["2.weight"])
    assert records(runs, name)[-1]["loss"] < records(runs, name)[0]["loss"]


def test_networks_that_a_method_cannot_train_are_refused_by_every_rank(runs: Path) -> None:
    for rank in range(WORKERS):
        told = json.loads((runs / f"refused by rank {rank}.json").read_text())

        assert "'spare' gets no gradient" in told["unused"]
        assert "needs parameters of one dtype, but the network has torch.float32 and torch.float64" in told["mixed"]
