"""`ist.join`, and `ist.train` with a loop of the user's own."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import ist
from ist.loops.batch_source import MAX_LOADERS
from tests.conftest import assert_same, clone, data, naming, run_forked_ranks
from tests.networks import seeded
from tests.own_loop_program import (
    BATCH,
    ROUNDS,
    SEED,
    SETTINGS,
    STEPS,
    Dropped,
    Loader,
    joined,
    network,
    step_all,
    train,
)

PROGRAM = "tests/own_loop_program.py"


def loop(part: ist.Part) -> None:
    """The steps of the built-in loop, as its user would write them."""
    loader = part.state.setdefault("loader", Loader(part.worker, part.num_workers))
    for inputs, targets in part.take(loader):
        loss = nn.functional.cross_entropy(part.model(inputs), targets)
        loss.backward()
        part.optimizer.step()
        part.optimizer.zero_grad()
        part.log(loss, len(inputs))


def trained_by(function: Any, model: nn.Module, **settings: Any) -> ist.TrainResult:
    return ist.train(
        model,
        loop=function,
        **{
            "example": data().tensors[0][:2], "local_steps": STEPS, "rounds": ROUNDS, "seed": SEED, "progress": False,
            "workers": 2, "statistics": [data().tensors[0]], **settings,
        },
    )  # fmt: skip


@pytest.mark.procs
def test_own_loops_on_two_ranks_train_as_the_built_in_loop_fail_together_and_resume(tmp_path: Path) -> None:
    names = (
        "same_as_built_in",
        "interrupted",
        "resumed",
        "state_saved",
        "stopped",
        "no_step",
        "dedicated",
        "users_group",
    )

    run_forked_ranks(*((2, PROGRAM, tmp_path, name) for name in names))

    learnt, said = json.loads((tmp_path / "learnt").read_text())
    assert learnt - float((tmp_path / "left").read_text()) < 5
    assert all(word in said for word in ("rank 1 failed", "worker 1", "round 2 of 4", "left"))
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["0 of 2", "1 of 2"]
    failed = [(tmp_path / f"failed-{rank}").read_text() for rank in (0, 1)]
    times = [float((tmp_path / f"time-{rank}").read_text()) for rank in (0, 1)]
    assert times[0] - times[1] < 5
    assert failed[0].startswith("WorkerLostError: rank 1 failed: LoopError: worker 1 made no optimizer step in round 0")
    assert failed[1].startswith("LoopError: worker 1 made no optimizer step in round 0")


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_function_as_the_loop_gives_the_weights_of_the_built_in_loop(setting: str) -> None:
    built_in, own, settings = network(setting), network(setting), SETTINGS[setting]

    result = ist.train(
        built_in, data(), workers=2, local_steps=STEPS, rounds=ROUNDS, batch_size=BATCH, seed=SEED, progress=False,
        **settings,
    )  # fmt: skip
    by_function = trained_by(loop, own, **settings)

    assert_same(dict(built_in.named_parameters()), dict(own.named_parameters()))
    assert [record["loss"] for record in by_function.history] == [record["loss"] for record in result.history]
    assert "epoch" not in by_function.history[0]


@pytest.mark.ray
def test_a_function_as_the_loop_trains_on_ray_as_inline(ray_address: str) -> None:
    inline, on_ray = network("plain"), network("plain")

    trained_by(loop, inline)
    trained_by(loop, on_ray, pool=ist.Pool(kind="ray", ray=ist.Ray(address=ray_address)))

    assert_same(clone(inline.state_dict()), clone(on_ray.state_dict()))


def test_one_worker_with_its_own_loop_is_plain_training() -> None:
    own, plain, loader = network("plain"), network("plain"), Loader(0, 1)
    run = joined(own, workers=1, optimizer=lambda named: torch.optim.AdamW(named.values(), lr=0.01))

    for part in run:
        for inputs, targets in part.take(loader):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(part.model(inputs), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(part.model.parameters(), 0.5)
            part.optimizer.step()
            part.optimizer.zero_grad()
            part.log(loss, len(inputs))

    optimizer, batches = torch.optim.AdamW(plain.parameters(), lr=0.01), iter(Loader(0, 1))
    for _ in range(ROUNDS * STEPS):
        inputs, targets = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(plain(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(clone(plain.state_dict()), clone(own.state_dict()))


def test_the_module_is_the_same_object_while_shapes_hold_and_steps_are_counted() -> None:
    seen = []

    for part in joined(network("plain"), workers=1):
        seen.append((id(part.model), part.round, part.step, part.local_steps))
        loop(part)
        assert (part.step, part.steps_made) == (STEPS * (part.round + 1), STEPS)

    assert {module for module, *_ in seen} == {seen[0][0]}
    assert [rest for _, *rest in seen] == [[number, number * STEPS, STEPS] for number in range(ROUNDS)]


def test_a_schedule_is_applied_before_each_step() -> None:
    rates, loader = [], Loader(0, 1)
    run = joined(network("plain"), workers=1, schedule=ist.Schedule(name="ExponentialLR", args={"gamma": 0.5}))

    for part in run:
        for inputs, targets in part.take(loader):
            rates.append(part.optimizer.param_groups[0]["lr"])
            nn.functional.cross_entropy(part.model(inputs), targets).backward()
            part.optimizer.step()
            part.log(1.0)

    assert rates == [0.1 * 0.5**step for step in range(ROUNDS * STEPS)]


def test_the_users_evaluation_sees_the_full_network_at_its_intervals() -> None:
    model = seeded(Dropped)
    run = joined(model, workers=1)
    seen = []

    def score(whole: nn.Module) -> dict[str, float]:
        seen.append((whole is model, whole.training, torch.is_grad_enabled()))
        return {"loss": 0.5, "score": len(seen), "accuracy": 0.25}

    run.evaluate(score, every=3)
    train(run, Loader(0, 1))

    assert seen == [(True, False, False)] * 2  # after the third round and the last
    evaluated = [record["round"] for record in run.history if "test_loss" in record]
    assert evaluated == [2, 3]
    last = run.history[-1]
    assert (last["test_loss"], last["metric"], last["score"], last["accuracy"]) == (0.5, "score", 2, 0.25)
    assert model.training
    with pytest.raises(ist.LoopError, match="before the loop"):
        run.evaluate(score)
    with pytest.raises(ist.LoopError, match=naming("already", "resume=True")):
        next(iter(run))


def test_the_bodys_random_numbers_are_the_rounds_and_the_callers_are_restored() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    drawn: list[list[float]] = []

    for _ in range(2):
        torch.manual_seed(1)
        run = joined(network("plain"), workers=1)
        drawn.append([])
        for part in run:
            loop(part)
            drawn[-1].append(float(torch.rand(())))
        assert torch.equal(torch.rand(2), expected)

    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == ROUNDS


def test_a_run_that_is_left_alone_can_be_resumed_with_any_loader(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader: DataLoader[Any] = DataLoader(data(), batch_size=BATCH)
    for part in joined(network("plain"), workers=1, run_dir=tmp_path / "run"):
        for inputs, targets in part.take(loader):
            nn.functional.cross_entropy(part.model(inputs), targets).backward()
            part.optimizer.step()
            part.log(1.0)
        if part.round == 2:
            break

    run = joined(network("plain"), workers=1, run_dir=tmp_path / "run", resume=True)
    with caplog.at_level(logging.WARNING):
        train(run, loader)

    assert [record["round"] for record in run.history] == list(range(ROUNDS))
    assert all(word in caplog.text for word in ("DataLoader", "state_dict", "next epoch"))


class Epochs:
    """A loader of three batches whose sampler knows the epoch."""

    def __init__(self) -> None:
        self.sampler, self.epochs = self, [0]

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[Any]:
        return iter([data()[number : number + 4] for number in range(3)])


def test_a_state_is_complete_only_before_the_steps_of_a_round_and_belongs_to_one_worker(tmp_path: Path) -> None:
    run = joined(network("plain"), workers=1)
    with pytest.raises(ist.LoopError, match="before the loop"):
        run.state_dict()
    for part in run:
        state = run.state_dict()
        loop(part)
        with pytest.raises(
            ist.LoopError, match=naming("round", "after 3 batches and 3 steps", "top of the loop's body")
        ):
            run.state_dict()

    with pytest.raises(ist.ConfigError, match=naming("state", "resume=True")):
        joined(network("plain"), workers=1, state=state, run_dir=tmp_path, resume=True)
    with pytest.raises(ist.ConfigError, match=naming("state", "'network'", "state_dict()")):
        joined(network("plain"), workers=1, state={key: state[key] for key in state if key != "network"})
    with pytest.raises(ist.ConfigError, match=naming("worker 3 of 4", "worker 0 of 1")):
        joined(network("plain"), workers=1, state={**state, "workers": [3, 4]})
    with pytest.raises(ist.ConfigError, match=naming("other arguments", "seed")):
        joined(network("plain"), workers=1, state=state, seed=SEED + 1)


class Halved(torch.optim.SGD):
    """An optimizer whose step calls that of its base class, so that torch calls the hooks of a step twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_step_that_calls_the_base_class_counts_once() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # torch wraps the step of every class when it is first used
    made = []
    for part in joined(network("plain"), workers=1, optimizer=lambda named: Halved(named.values(), lr=0.1)):
        loader = part.state.setdefault("loader", Loader(0, 1))
        step_all(part, loader)
        made.append((part.steps_made, loader.position))

    assert made == [(STEPS, STEPS * (number + 1)) for number in range(ROUNDS)]


def test_a_schedule_reaches_a_loop_that_does_not_take() -> None:
    rates = []
    stages = ist.Recipe(stages=[ist.Stage(), ist.Stage(rounds=1, keep=1, lr_scale=0.5)])
    for part in joined(network("plain"), workers=1, recipe=stages):
        for _ in range(part.local_steps):
            rates.append(part.optimizer.param_groups[0]["lr"])
            backward(part)
            part.optimizer.step()
            part.optimizer.zero_grad()
            part.log(1.0)

    assert rates == [0.1] * (ROUNDS - 1) * STEPS + [0.05] * STEPS


def test_a_scheduler_of_torch_on_an_optimizer_that_is_gone_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def scheduled(part: ist.Part) -> None:
        if part.round == 0:
            torch.optim.lr_scheduler.ExponentialLR(part.optimizer, 0.5)
        loop(part)

    with caplog.at_level(logging.WARNING):
        trained_by(scheduled, network("plain"))

    assert all(word in caplog.text for word in ("worker 0", "scheduler", "schedule=", "part.step"))


def test_state_and_loaders_last_when_the_shares_of_workers_change() -> None:
    rounds: list[int] = []

    def remembering(part: ist.Part) -> None:
        loop(part)
        if part.worker == 0:
            rounds.append(part.state.setdefault("rounds", 0))
            part.state["rounds"] += 1
            rounds.append(part.state["loader"].position)

    trained_by(remembering, network("plain"), partition=ist.Partition(balance="speed"), rounds=3)

    assert rounds == [0, STEPS, 1, 2 * STEPS, 2, 3 * STEPS]


def test_a_loader_with_one_position_is_not_shared_by_workers_of_a_process() -> None:
    shared = Loader(0, 1)

    with pytest.raises(ist.LoopError, match=naming("two workers", "Loader", "part.state")):
        trained_by(lambda part: step_all(part, shared), network("plain"))


class Shuffled(Loader):
    """A loader that draws from torch's generator whenever it is started, as a DataLoader does."""

    def __iter__(self) -> Iterator[Any]:
        torch.rand(3)
        return super().__iter__()


def test_a_resumed_loop_with_dropout_draws_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, continued = seeded(Dropped), seeded(Dropped)
    train(joined(whole, workers=1), Shuffled(0, 1))
    loader = Shuffled(0, 1)
    for part in joined(seeded(Dropped), workers=1, run_dir=tmp_path / "run"):
        step_all(part, loader)
        if part.round == 2:
            break

    train(joined(continued, workers=1, run_dir=tmp_path / "run", resume=True), Shuffled(0, 1))

    assert_same(dict(whole.named_parameters()), dict(continued.named_parameters()))


def test_a_loader_without_a_position_goes_on_with_its_next_epoch(tmp_path: Path) -> None:
    loader = Epochs()
    for part in joined(network("plain"), workers=1, run_dir=tmp_path / "run"):
        step_all(part, loader)
        if part.round == 1:
            break
    loader = Epochs()

    train(joined(network("plain"), workers=1, run_dir=tmp_path / "run", resume=True), loader)

    assert loader.epochs[1] == 1  # the one after the epoch of the last checkpoint, which ended with the first round


def test_positions_of_other_loaders_are_refused(tmp_path: Path) -> None:
    for part in joined(network("plain"), workers=1, run_dir=tmp_path / "run"):
        step_all(part, part.state.setdefault("loader", Loader(0, 1)))
        if part.round == 2:
            break

    with pytest.raises(ist.LoopError, match=naming("Epochs", "Loader", "same order")):
        train(joined(network("plain"), workers=1, run_dir=tmp_path / "run", resume=True), Epochs())


def test_inline_workers_are_refused_where_each_process_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ist.ConfigError, match=naming("'inline'", "workers is 2", "loop=function")):
        joined(network("plain"), pool="inline")


def test_a_loader_that_ends_starts_its_next_epoch_where_the_round_is() -> None:
    loader = Epochs()

    train(joined(network("plain"), workers=1, local_steps=5, rounds=2), loader)

    assert loader.epochs == [0, 0, 1, 2, 3]  # ten batches, three an epoch


def failing(body: Any, **settings: Any) -> None:
    for part in joined(network("plain"), workers=1, **settings):
        body(part)


def dry(part: ist.Part) -> None:
    once = part.state.setdefault("once", iter([data()[:4]]))
    for inputs, targets in part.take(once):
        nn.functional.cross_entropy(part.model(inputs), targets).backward()
        part.optimizer.step()
        part.log(1.0)


def empty(part: ist.Part) -> None:
    for _ in part.take([]):
        pass


def backward(part: ist.Part) -> None:
    inputs, targets = data()[:4]
    nn.functional.cross_entropy(part.model(inputs), targets).backward()


def no_loss(part: ist.Part) -> None:
    backward(part)
    part.optimizer.step()


def no_step(part: ist.Part) -> None:
    part.log(1.0)


def never_a_step(part: ist.Part) -> None:
    for _ in part.take([1, 2, 3]):
        part.log(1.0)


def another_optimizer(part: ist.Part) -> None:
    optimizer = torch.optim.SGD(part.model.parameters(), lr=0.1)
    for inputs, targets in part.take(Loader(0, 1)):
        nn.functional.cross_entropy(part.model(inputs), targets).backward()
        optimizer.step()
        part.log(1.0, len(inputs))


def no_step_after_nan(part: ist.Part) -> None:
    for number, _ in enumerate(part.take(Loader(0, 1))):
        part.log(float("nan") if number else 1.0)
        if not number:
            backward(part)
            part.optimizer.step()


def negative(part: ist.Part) -> None:
    part.log(1.0, -4)


def a_new_loader_each_round(part: ist.Part) -> None:
    step_all(part, Loader(0, 1))


def by_the_full_network(part: ist.Part) -> None:
    full = network("plain")
    for inputs, targets in part.take([data()[:4]]):
        nn.functional.cross_entropy(full(inputs), targets).backward()
        part.optimizer.step()
        part.log(1.0)


def losses(part: ist.Part) -> None:
    part.log(torch.ones(3), 3)


def new_loaders(part: ist.Part) -> None:
    for _ in range(MAX_LOADERS + 1):
        next(iter(part.take([1])))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (dry, ("ran dry", "round 0", "worker 0", "iterator")),
        (empty, ("empty", "list")),
        (no_loss, ("no loss", "round 0", "part.log(")),
        (no_step, ("no optimizer step", "round 0", "part.optimizer.step()")),
        (never_a_step, ("10,000 batches", "part.optimizer.step()")),
        (by_the_full_network, ("worker 0", "round 0", "gradient", "part.model", "backward()")),
        (losses, ("part.log", "(3,)", "mean")),
        (negative, ("part.log", "-4", "at least 1")),
        (another_optimizer, ("part.model", "part.optimizer", "round 0")),
        (no_step_after_nan, ("not finite", "100 batches", "learning rate")),
        (a_new_loader_each_round, ("three rounds", "part.state")),
        (new_loaders, ("loaders", "part.state")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_loop_that_does_not_do_what_a_round_needs_is_named(body: Any, named: tuple[str, ...]) -> None:
    with pytest.raises(ist.LoopError, match=naming(*named)):
        failing(body)


def test_a_task_of_slurm_without_a_rank_learns_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")

    with pytest.raises(ist.ConfigError, match=naming("alone", "Slurm", "RANK", "WORLD_SIZE", "workers=1")):
        joined(network("plain"))


def raising(part: ist.Part) -> None:
    raise KeyError(f"no column in round {part.round}")


def test_the_exception_of_a_function_names_worker_round_and_line() -> None:
    with pytest.raises(ist.LoopError, match=naming("worker 0", "round 0", "KeyError", "test_own_loop.py")) as caught:
        trained_by(raising, network("plain"))

    assert isinstance(caught.value.__cause__, KeyError)


def on_another_device(part: ist.Part) -> None:
    for inputs, _ in part.take(Loader(0, 1)):
        part.model(inputs.to("meta")).sum().backward()


def test_a_batch_on_another_device_than_the_model_is_one_line() -> None:
    with pytest.raises(ist.LoopError, match=naming("worker 0", "round 0", "device", "test_own_loop.py")) as caught:
        trained_by(on_another_device, network("plain"))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({}, ist.ConfigError, ("alone", "torchrun", "workers=1")),
        ({"workers": 4}, ist.ConfigError, ("workers is 4", "alone", "torchrun --nproc-per-node 4")),
        ({"workers": 1, "clip_grad_norm": 1.0}, ist.ConfigError, ("clip_grad_norm", "own loop")),
        ({"workers": 1, "example": "text"}, ist.DataError, ("example", "str", "tensor")),
        ({"workers": 1, "pool": "ray"}, ist.ConfigError, ("'ray'", "loop=function")),
        ({"workers": 1, "local_step": 3}, TypeError, ("local_step", "local_steps")),
        (
            {"workers": 1, "optimizer": lambda _: torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)},
            ist.ConfigError,
            ("optimizer", "shape (2,)", "not given"),
        ),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(
    settings: dict[str, Any], error: type[Exception], named: tuple[str, ...]
) -> None:
    with pytest.raises(error, match=naming(*named)):
        joined(network("plain"), **settings)


def test_a_batch_norm_needs_inputs_for_its_statistics() -> None:
    with pytest.raises(ist.ModelError, match=naming("'norm'", "statistics=", "running_statistics='carried'")):
        joined(seeded(Dropped), workers=1, statistics=None)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"data": data()}, ("data", "built-in")),
        ({"epochs": 3, "rounds": None}, ("epochs", "built-in")),
        ({"batch_size": 4}, ("batch_size", "built-in")),
        ({"accumulate": 4}, ("accumulate", "built-in")),
        ({"function": 3}, ("loop is 3", "function")),
    ],
)
def test_arguments_of_the_built_in_loop_are_refused_with_an_own_one(
    settings: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(ist.ConfigError, match=naming(*named)):
        trained_by(settings.pop("function", loop), network("plain"), **settings)


def test_arguments_of_an_own_loop_are_refused_with_the_built_in_one() -> None:
    with pytest.raises(ist.ConfigError, match=naming("example", "loop=")):
        ist.train(network("plain"), data(), workers=2, rounds=1, example=torch.ones(2, 12))
    with pytest.raises(ist.DataError, match=naming("data", "loop=")):
        ist.train(network("plain"), workers=2, rounds=1)


def test_a_function_as_the_loop_can_be_evaluated_on_test_data() -> None:
    result = trained_by(loop, network("plain"), test_data=data())

    assert result.history[-1]["accuracy"] is not None


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    def diverging(part: ist.Part) -> None:
        backward(part)
        part.optimizer.step()
        part.log(float("nan"))

    with pytest.raises(ist.DivergedError, match=naming("worker 0", "round 0", "nan")):
        trained_by(diverging, network("plain"))
