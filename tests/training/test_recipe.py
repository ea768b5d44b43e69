"""The average over rounds and the outer optimizer."""

import copy
import math
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ist
from ist.config.recipe import Average, Outer
from ist.loops.part import Part, completed
from ist.monitoring.meter import Meter
from ist.pools.inline import InlinePool
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.runs.open import CoordinatorPart
from ist.storage.checkpoint import read_tensors
from ist.storage.run_folder import create_run_folder
from ist.subnet.cut import Cut
from ist.subnet.job import Job, assignments
from ist.training.average import Averaged
from ist.training.coordinator import Coordinator
from ist.training.outer_optimizer import OuterOptimizer
from ist.training.rounds import RoundReport
from tests.conftest import assert_same, clone, data, job_for, plain_loop, round_numbers, small_config, worker_numbers
from tests.networks import NETWORKS, seeded

REPORT = RoundReport(
    round_numbers([worker_numbers(samples=1, steps=3)], loss=0.5), [worker_numbers(samples=1, steps=3)]
)
AVERAGES = {
    "exponential": {"kind": "ema", "decay": 0.6},
    "exponential, by steps": {"kind": "ema", "decay": 0.9, "decay_unit": "step"},
    "from the middle": {"kind": "ema", "decay": 0.6, "start": 0.5},
    "of all rounds": {"kind": "swa"},
    "of the last rounds": {"kind": "swa", "start": 0.5},
}


class Trajectory:
    """A method whose network has given values after each round."""

    def __init__(self, values: list[Tensor]) -> None:
        self.model = nn.BatchNorm1d(3)
        self._values = values

    def train_round(self, round_number: int) -> Generator[Part, None, RoundReport]:
        yield from ()
        with torch.no_grad():
            self.model.weight.copy_(self._values[round_number])
            assert self.model.running_mean is not None
            self.model.running_mean.fill_(round_number)
        return REPORT

    def checkpoint_state(self) -> Mapping[str, Tensor]:
        return self.model.state_dict()

    def bytes_sent(self) -> int:
        return 7

    def close(self) -> None:
        pass


def by_hand(settings: Average, values: list[Tensor], num_rounds: int) -> Tensor:
    """The average after the rounds in `values`."""
    averaged = values[min(math.floor(settings.start * num_rounds), len(values) - 1) :]
    if settings.kind == "swa":
        return torch.stack(averaged).double().mean(dim=0)
    average = averaged[0].double()
    steps = REPORT.numbers["steps"] if settings.decay_unit == "step" else 1
    for value in averaged[1:]:
        for _ in range(int(steps)):
            average = settings.decay * average + (1 - settings.decay) * value
    return average


def test_the_average_by_steps_is_that_of_a_plain_loop_if_every_round_is_a_step() -> None:
    ours, plain = (seeded(NETWORKS["no batch norm"]) for _ in range(2))
    job = job_for(
        ours, train__workers=1, train__local_steps=1, train__rounds=6, train__optimizer_state="carried",
        recipe__average={"kind": "ema", "decay": 0.9, "decay_unit": "step"},
    )  # fmt: skip
    part = execute(job, progress=False)

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    average = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    plain_loop(plain, job, optimizer, Stepped(lambda: average.update_parameters(plain)))

    found = dict(part.method.model.named_parameters())  # type: ignore[union-attr]
    assert_same(found, dict(average.module.named_parameters()))


class Stepped:
    """A scheduler that calls a function after each step."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.step = call


@pytest.mark.parametrize("settings", AVERAGES.values(), ids=AVERAGES.keys())
def test_the_average_matches_its_formula_after_every_round(settings: dict[str, Any]) -> None:
    average = Average(**settings)
    values = [torch.randn(3, generator=torch.Generator().manual_seed(number)) for number in range(6)]
    method = Trajectory(values)
    averaged = Averaged(method, average, 6)

    for number in range(6):
        completed(averaged.train_round(number))

        expected = by_hand(average, values[: number + 1], 6).float()
        torch.testing.assert_close(averaged.model.get_parameter("weight").detach(), expected, rtol=0, atol=1e-6)
        assert torch.equal(method.model.weight, values[number])  # training continues from the network itself
        assert torch.equal(averaged.model.get_buffer("running_mean"), torch.full((3,), float(number)))
    assert averaged.bytes_sent() == 7


@pytest.mark.parametrize("settings", AVERAGES.values(), ids=AVERAGES.keys())
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_average_continues_exactly(settings: dict[str, Any], stop: int) -> None:
    values = [torch.randn(3, generator=torch.Generator().manual_seed(number)) for number in range(6)]
    whole = Averaged(Trajectory(values), Average(**settings), 6)
    for number in range(6):
        completed(whole.train_round(number))
    first = Averaged(Trajectory(values), Average(**settings), 6)
    for number in range(stop):
        completed(first.train_round(number))
    saved = {name: tensor.clone() for name, tensor in first.checkpoint_state().items() if name.startswith("average/")}

    second = Averaged(Trajectory(values), Average(**settings), 6, saved)
    for number in range(stop, 6):
        completed(second.train_round(number))

    assert_same(second.checkpoint_state(), whole.checkpoint_state())


def run(folder: Path, **changes: Any) -> tuple[list[dict[str, Tensor]], CoordinatorPart]:
    """Run, and return the trained network's tensors after each round."""
    seen: list[dict[str, Tensor]] = []
    made = create_run_folder(small_config(**changes), folder)

    def opened(part: CoordinatorPart) -> None:
        note = part.recorder.round_done

        def spy(*arguments: Any) -> None:
            seen.append(clone(part.method.model.state_dict()))
            note(*arguments)

        part.recorder.round_done = spy  # type: ignore[method-assign]

    return seen, execute(build_job(made.load_config()), made, progress=False, opened=opened)


@pytest.mark.parametrize("settings", AVERAGES.values(), ids=AVERAGES.keys())
def test_the_average_is_evaluated_and_saved(tmp_path: Path, settings: dict[str, Any]) -> None:
    network = {"model__args": {"widths": [64, 24, 20, 10], "batch_norm": False}}
    plain, _ = run(tmp_path / "plain", **network)

    _, part = run(tmp_path / "averaged", **network, recipe__average=settings)

    kept = read_tensors(tmp_path / "averaged" / "model.safetensors")[0]
    for name, tensor in kept.items():
        expected = by_hand(Average(**settings), [state[name] for state in plain], 4)
        torch.testing.assert_close(tensor.double(), expected.double(), rtol=0, atol=1e-6)
        assert not torch.equal(tensor, plain[-1][name])
    model = part.job.task.build()
    model.load_state_dict(kept)
    inputs, targets = part.job.task.test_data.tensors  # type: ignore[union-attr]
    with torch.no_grad():
        loss = float(functional.cross_entropy(model.eval()(inputs), targets))
    assert part.recorder.history[-1]["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_training_from_python_leaves_the_average_in_the_users_network() -> None:
    # Batch norm: its statistics must be the average's too.
    network, test = seeded(NETWORKS["two hidden layers, batch norm"]), data(50, seed=4)
    other = copy.deepcopy(network)
    settings: dict[str, Any] = {
        "workers": 2, "local_steps": 3, "rounds": 4, "batch_size": 20, "test_data": test, "progress": False,
    }  # fmt: skip

    averaged = ist.train(network, data(), recipe={"average": {"kind": "swa"}}, **settings)
    ist.train(other, data(), **settings)

    assert averaged.model is network
    inputs, targets = test.tensors
    with torch.no_grad():
        loss = float(functional.cross_entropy(network.eval()(inputs), targets))
    assert averaged.history[-1]["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert not torch.equal(network.state_dict()["output.weight"], other.state_dict()["output.weight"])


# The outer optimizer

SETTINGS = Outer(lr=0.7, momentum=0.6)


def entry_by_entry(
    settings: Outer, before: Tensor, merged: Tensor, momentum: Tensor, trained: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weights and the momentum after the step, computed in a loop over single numbers."""
    moved, updated = merged.clone(), momentum.clone()
    for place in np.ndindex(*before.shape):
        if trained[place]:
            change = merged[place] - before[place]
            updated[place] = settings.momentum * momentum[place] + change
            moved[place] = before[place] + settings.lr * (change + settings.momentum * updated[place])
    return moved, updated


def held(parameters: Mapping[str, Tensor], cuts: list[Cut], workers: list[int]) -> dict[str, Tensor]:
    """Return masks of the entries that at least one of the workers holds."""
    masks = {name: np.zeros(tuple(tensor.shape), bool) for name, tensor in parameters.items()}
    for name, mask in masks.items():
        for worker in workers:
            places = [np.arange(n) if c is None else c for n, c in zip(mask.shape, cuts[worker][name], strict=True)]
            mask[np.ix_(*places)] = True
    return {name: torch.from_numpy(mask) for name, mask in masks.items()}


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("returned", [[0, 1, 2], [2, 0]])
def test_the_outer_optimizer_matches_a_loop_over_entries_and_skips_untrained_ones(returned: list[int]) -> None:
    model = seeded(NETWORKS["no batch norm"])
    job, parameters = job_for(model, train__workers=3), trained_parameters(model)
    step = OuterOptimizer(parameters, {})
    momentum = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    generator = torch.Generator().manual_seed(0)

    for round_number in range(3):
        cuts = assignments(job).cuts(round_number)
        masks = held(parameters, cuts, returned)
        before = clone(parameters)
        step.begin()
        for name, tensor in parameters.items():
            tensor.add_(masks[name] * torch.randn(tensor.shape, generator=generator))
        merged, momentum_before = clone(parameters), clone(momentum)
        step.step(SETTINGS, cuts, returned)

        for name, tensor in parameters.items():
            moved, momentum[name] = entry_by_entry(SETTINGS, before[name], merged[name], momentum[name], masks[name])
            torch.testing.assert_close(tensor, moved, rtol=0, atol=1e-5)
            found = step.checkpoint_state()[f"outer/{name}"]
            torch.testing.assert_close(found, momentum[name], rtol=0, atol=1e-5)
            assert torch.equal(tensor[~masks[name]], before[name][~masks[name]])
            assert torch.equal(momentum[name][~masks[name]], momentum_before[name][~masks[name]])
        assert not masks["linear_2.weight"].all()  # between hidden layers, some entries belong to no worker


def test_if_all_weights_are_trained_the_outer_optimizer_is_that_of_diloco() -> None:
    """Nesterov momentum as in PyTorch's SGD, which rounds once where this rounds twice: a tolerance of two ulp of 1."""
    model = seeded(NETWORKS["no batch norm"])
    job, parameters = job_for(model, train__workers=1), trained_parameters(model)
    theirs = {name: nn.Parameter(tensor.clone()) for name, tensor in parameters.items()}
    sgd = torch.optim.SGD(theirs.values(), lr=SETTINGS.lr, momentum=SETTINGS.momentum, nesterov=True)
    step = OuterOptimizer(parameters, {})
    generator = torch.Generator().manual_seed(0)

    for round_number in range(3):
        for name, tensor in parameters.items():  # both begin the round with the same weights
            theirs[name].data.copy_(tensor)
        step.begin()
        for name, tensor in parameters.items():
            merged = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            theirs[name].grad = tensor - merged
            tensor.copy_(merged)
        step.step(SETTINGS, assignments(job).cuts(round_number), [0])
        sgd.step()

        for name, tensor in parameters.items():
            torch.testing.assert_close(tensor, theirs[name].data, rtol=0, atol=2 * torch.finfo().eps)
            assert torch.equal(step.checkpoint_state()[f"outer/{name}"], -sgd.state[theirs[name]]["momentum_buffer"])


def coordinator(job: Job, model: nn.Module, carried: Mapping[str, Tensor] | None = None) -> Coordinator:
    meter = Meter()
    return Coordinator(job, InlinePool(job, torch.device("cpu"), meter), model, meter, carried)


def test_the_coordinator_applies_the_outer_optimizer_to_the_merged_network() -> None:
    model, reference = seeded(NETWORKS["no batch norm"]), seeded(NETWORKS["no batch norm"])
    shares = {"strategy": "bernoulli", "keep": 0.4}
    made = coordinator(job_for(model, partition=shares, recipe__outer=SETTINGS.model_dump()), model)
    plain = coordinator(job_for(reference, partition=shares), reference)
    momentum = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}

    for round_number in range(3):
        reference.load_state_dict(model.state_dict())
        before, cuts = clone(model.state_dict()), assignments(plain.job).cuts(round_number)
        completed(plain.train_round(round_number))
        completed(made.train_round(round_number))

        masks = held(trained_parameters(model), cuts, [0, 1, 2, 3])
        for name, merged in reference.state_dict().items():
            moved, momentum[name] = entry_by_entry(SETTINGS, before[name], merged, momentum[name], masks[name])
            torch.testing.assert_close(model.state_dict()[name], moved, rtol=0, atol=1e-5)


def test_a_stage_can_set_its_own_outer_optimizer() -> None:
    model, reference = seeded(NETWORKS["no batch norm"]), seeded(NETWORKS["no batch norm"])
    full_width = {"rounds": 2, "keep": 1}
    made = coordinator(job_for(model, recipe__stages=[{}, {**full_width, "outer": SETTINGS.model_dump()}]), model)
    plain = coordinator(job_for(reference, recipe__stages=[{}, full_width]), reference)
    momentum = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}

    for round_number in range(made.job.schedule.num_rounds):
        reference.load_state_dict(model.state_dict())
        before = clone(model.state_dict())
        completed(plain.train_round(round_number))
        completed(made.train_round(round_number))

        if round_number < made.job.schedule.num_rounds - 2:
            assert_same(clone(model.state_dict()), clone(reference.state_dict()))
            continue
        for name, merged in reference.state_dict().items():
            everything = torch.ones(merged.shape, dtype=torch.bool)
            moved, momentum[name] = entry_by_entry(SETTINGS, before[name], merged, momentum[name], everything)
            torch.testing.assert_close(model.state_dict()[name], moved, rtol=0, atol=1e-5)


def test_a_stage_can_switch_off_the_outer_optimizer_of_the_run() -> None:
    plain, stages = {"lr": 1.0, "momentum": 0.0}, [{"rounds": 2}, {}]
    networks = [seeded(NETWORKS["no batch norm"]) for _ in range(2)]
    with_step = coordinator(
        job_for(networks[0], recipe={"stages": stages, "outer": SETTINGS.model_dump()}), networks[0]
    )
    stages[0]["outer"] = plain
    without = coordinator(job_for(networks[1], recipe={"stages": stages, "outer": SETTINGS.model_dump()}), networks[1])

    for made in (with_step, without):
        completed(made.train_round(0))
        completed(made.train_round(1))

    momenta = [
        [t for n, t in made.checkpoint_state().items() if n.startswith("outer/")] for made in (with_step, without)
    ]
    assert all(bool(tensor.any()) for tensor in momenta[0])
    assert not any(bool(tensor.any()) for tensor in momenta[1])
    completed(without.train_round(2))
    assert any(n.startswith("outer/") and bool(t.any()) for n, t in without.checkpoint_state().items())


def test_a_resumed_outer_optimizer_continues_exactly() -> None:
    outer = {"recipe__outer": SETTINGS.model_dump()}
    model = seeded(NETWORKS["no batch norm"])
    made = coordinator(job_for(model, **outer), model)
    completed(made.train_round(0))
    saved = clone(made.checkpoint_state())
    completed(made.train_round(1))
    other = seeded(NETWORKS["no batch norm"])
    other.load_state_dict({name: tensor for name, tensor in saved.items() if not name.startswith("outer/")})

    resumed = coordinator(
        job_for(other, **outer), other, {name: t for name, t in saved.items() if name.startswith("outer/")}
    )
    completed(resumed.train_round(1))

    assert_same(clone(resumed.checkpoint_state()), clone(made.checkpoint_state()))


def test_without_momentum_and_at_learning_rate_one_there_is_no_outer_optimizer() -> None:
    model = seeded(NETWORKS["no batch norm"])
    made = coordinator(job_for(model, recipe__outer={"lr": 1.0, "momentum": 0.0}), model)

    assert Outer().is_plain
    assert not Outer(lr=0.5).is_plain
    assert not Outer(momentum=0.5).is_plain
    assert made._outer is None
    assert set(made.checkpoint_state()) == set(model.state_dict())
