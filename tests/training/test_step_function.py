# ruff: noqa: ARG001, ARG005  # step functions have two arguments
"""A user's step function computes the loss of a whole batch, whatever the batch is."""

from collections import UserDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ist.api import train
from ist.data.batched import BatchedDataset
from ist.errors import ConfigError, DataError, ISTError, LoopError, ModelError
from ist.loops.part import Part
from ist.monitoring.exporters import scalars
from ist.rng import Indices
from ist.runs.execute import execute
from tests.conftest import assert_same, clone, data, job_for, naming
from tests.networks import NETWORKS, seeded
from tests.steps import Named, of_mappings, of_pairs, with_numbers

NORM = "two hidden layers, batch norm"


class Items(Dataset[Any]):
    """Items that a function makes of pairs."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        self.pairs, self.make = data(), make

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.make(*self.pairs[index])


class Encoded(UserDict[str, Any]):
    """A mapping with attributes, like a BatchEncoding of transformers."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


class Encodings(BatchedDataset):
    """Batches that are mappings with attributes."""

    def __init__(self, inputs: Tensor, classes: Tensor) -> None:
        self.inputs, self.classes = inputs, classes

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Indices) -> Any:
        return Encoded({"input": self.inputs[indices], "classes": self.classes[indices]})

    def part(self, indices: Indices) -> "Encodings":
        return Encodings(self.inputs[indices], self.classes[indices])


def cross_entropy(scores: Tensor, classes: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores, classes)


def test_one_worker_makes_the_steps_of_a_plain_loop_bit_for_bit() -> None:
    ours, plain = (seeded(NETWORKS[NORM]) for _ in range(2))
    items = Named(data())
    job = job_for(
        ours, items, train__workers=1, train__optimizer_state="carried", train__running_statistics="carried",
        train__step="tests.steps:of_mappings", train__accumulate=2,
    )  # fmt: skip

    execute(job, progress=False)

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    plain.train()
    for step in range(job.schedule.total_steps):
        optimizer.zero_grad()
        batch = job.schedule.sampler.shard(0)[job.schedule.sampler.batch(0, step)].tolist()
        half = (len(batch) + 1) // 2
        for numbers in (batch[:half], batch[half:]):
            loss = of_mappings(plain, torch.utils.data.default_collate([items[n] for n in numbers]))["loss"]
            (loss / (len(batch) / len(numbers))).backward()
        optimizer.step()
    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))


WHOLE: dict[str, tuple[Any, Callable[[nn.Module, Any], Any], Any]] = {
    "pairs": (data(), of_pairs, None),
    "mappings": (
        Items(lambda inputs, classes: {"input": inputs, "classes": classes, "number": 1}),
        lambda net, batch: {"loss": cross_entropy(net(batch["input"]), batch["classes"]), "scores": batch["number"]},
        None,
    ),
    "mappings with attributes": (
        Encodings(*data().tensors), lambda net, batch: cross_entropy(net(batch.input), batch.classes), None,
    ),
    "triples": (
        Items(lambda inputs, classes: (inputs, torch.zeros(1), classes)),
        lambda net, batch: cross_entropy(net(batch[0]), batch[2]), torch.zeros(2, 12),
    ),
    "single tensors": (
        Items(lambda inputs, classes: torch.cat([inputs, classes[None]])),
        lambda net, batch: cross_entropy(net(batch[:, :12].contiguous()), batch[:, 12].long()), torch.zeros(2, 12),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_batch_of_any_form_trains_as_a_pair_does(name: str) -> None:
    items, step, example = WHOLE[name]
    models = [seeded(NETWORKS[NORM]) for _ in range(2)]
    settings: dict[str, Any] = {"workers": 2, "rounds": 2, "local_steps": 3, "progress": False}

    by_loss = train(models[0], data(), test_data=data(), evaluate={"metric": "none"}, **settings)
    by_step = train(models[1], items, step=step, test_data=items, example=example, **settings)

    assert_same(clone(models[0].state_dict()), clone(models[1].state_dict()))  # with statistics of batch norm
    for expected, found in zip(by_loss.history, by_step.history, strict=True):
        assert [expected[key] for key in ("loss", "test_loss")] == [found[key] for key in ("loss", "test_loss")]


def test_a_metric_that_is_named_is_measured_on_pairs() -> None:
    histories = []
    for arguments in ({}, {"step": of_pairs}):
        model = seeded(NETWORKS["no batch norm"])
        result = train(
            model, data(), test_data=data(), workers=2, rounds=1, progress=False, evaluate={"metric": "accuracy"},
            **arguments,
        )  # fmt: skip
        histories.append([record["accuracy"] for record in result.history])

    assert histories[0] == histories[1]


def test_a_metric_of_batches_without_targets_is_refused() -> None:
    items = Named(data())

    with pytest.raises(ConfigError, match=naming("'evaluate.metric' is 'accuracy'", "dict", "'none'")):
        train(
            seeded(NETWORKS["no batch norm"]), items, step=of_mappings, test_data=items, workers=2, rounds=1,
            evaluate={"metric": "accuracy"},
        )  # fmt: skip


def fails_in_the_network(net: nn.Module, batch: Any) -> Any:
    return net(batch[0][:, :3])


def fails_itself(net: nn.Module, batch: Any) -> Any:
    return {}["no such key"]


BAD_STEPS: dict[str, tuple[Any, type[ISTError], list[str]]] = {
    "no tensor": (lambda net, batch: of_pairs(net, batch).item(), ConfigError, ["'train.step'", "a float", "tensor"]),
    "nothing": (lambda net, batch: None, ConfigError, ["'train.step'", "a NoneType", "tensor"]),
    "no loss": (lambda net, batch: {"scores": 1}, ConfigError, ["'train.step'", "dict with scores", "'loss'"]),
    "a loss of each sample": (
        lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none"),
        ConfigError, ["'train.step'", "shape (", "loss.mean()"],
    ),
    "a count": (lambda net, batch: batch[1].sum(), ConfigError, ["'train.step'", "torch.int64"]),
    "a loss without gradient": (
        lambda net, batch: of_pairs(net, batch).detach(), ConfigError, ["'train.step'", "without gradient", "detach()"],
    ),
    "a failing network": (fails_in_the_network, ModelError, ["the network fails in 'linear_1'", "shapes"]),
    "a failing step": (fails_itself, DataError, ["'train.step' fails for sample", "no such key", "test_step_function"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_step_that_computes_no_loss_is_refused_before_anything_starts(name: str) -> None:
    step, kind, message = BAD_STEPS[name]

    with pytest.raises(kind, match=naming(*message)) as caught:
        train(seeded(NETWORKS["no batch norm"]), data(), step=step, workers=2, rounds=1)

    assert "\n" not in str(caught.value)


def test_data_that_make_the_loss_non_finite_are_refused() -> None:
    inputs, classes = data().tensors
    inputs = inputs.clone()
    inputs[2:] = float("inf")  # the first two are the example

    with pytest.raises(DataError, match=naming("the loss is not finite", "inf in its inputs")):
        train(seeded(NETWORKS["no batch norm"]), TensorDataset(inputs, classes), step=of_pairs, workers=2, rounds=1)


def test_a_step_that_holds_the_network_is_refused() -> None:
    model = seeded(NETWORKS["no batch norm"])

    with pytest.raises(ModelError, match="holds the network"):
        train(model, data(), step=lambda _, batch: of_pairs(model, batch), workers=2, rounds=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda inputs, classes: (inputs, inputs, classes), ["list of 3 parts", "example="]),
        (lambda inputs, classes: {"pixels": inputs, "classes": classes}, ["'pixels', 'classes'", "'input'", "example="]),
    ],
)  # fmt: skip
def test_inputs_that_cannot_be_told_from_a_batch_are_asked_for(make: Any, message: list[str]) -> None:
    with pytest.raises(ConfigError, match=naming(*message)):
        train(seeded(NETWORKS["no batch norm"]), Items(make), step=of_pairs, workers=2, rounds=1)


@pytest.mark.parametrize("parts", [1, 3])
def test_numbers_that_a_step_returns_are_recorded_as_means_over_all_samples(parts: int) -> None:
    items = Named(data())

    result = train(
        seeded(NETWORKS["no batch norm"]), items, step=with_numbers, logged=["weight", "right"], workers=2, epochs=2,
        batch_size=10, local_steps=5, accumulate=parts, progress=False,
    )  # fmt: skip

    expected = sum(items[number]["weight"] for number in range(len(items))) / len(items)
    assert len(result.history) == 2  # each an epoch
    for record in result.history:
        assert list(record["logged"]) == ["weight", "right"]
        assert record["logged"]["weight"] == pytest.approx(expected)
        assert 0 < record["logged"]["right"] < 1
        assert scalars(record)["logged/right"] == record["logged"]["right"]


def test_a_loop_of_the_users_own_logs_numbers_too() -> None:
    inputs, classes = data().tensors

    def loop(part: Part, values: tuple[str, ...] = ("right", "worker")) -> None:
        for rows in part.take([torch.arange(5), torch.arange(5, 20)]):
            scores = part.model(inputs[rows])
            loss = cross_entropy(scores, classes[rows])
            loss.backward()
            part.optimizer.step()
            part.optimizer.zero_grad()
            found = {"right": (scores.argmax(dim=1) == classes[rows]).float().mean(), "worker": part.worker}
            part.log(loss, len(rows), {name: found[name] for name in values})

    arguments: dict[str, Any] = {
        "workers": 2, "rounds": 2, "local_steps": 3, "example": inputs[:2], "progress": False, "logged": ["right", "worker"],
    }  # fmt: skip
    result = train(seeded(NETWORKS["no batch norm"]), loop=loop, **arguments)

    assert [record["logged"]["worker"] for record in result.history] == [0.5, 0.5]
    assert all(0 <= record["logged"]["right"] <= 1 for record in result.history)
    with pytest.raises(LoopError, match=naming("['right']", "['right', 'worker']", "part.log")):
        train(seeded(NETWORKS["no batch norm"]), loop=partial(loop, values=("right",)), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": with_numbers}, ["'train.step' returns 'right', 'weight'", "'train.logged'", "logged: ['right', 'weight']"]),
        ({"step": with_numbers, "logged": ["right"]}, ["returns 'weight'", "logged: ['right', 'weight']"]),
        ({"step": of_mappings, "logged": ["right"]}, ["'train.logged' names 'right'", "no number beside the loss"]),
        ({"step": with_numbers, "logged": ["right", "wait"]}, ["names 'wait'", "only 'right', 'weight'"]),
        ({"step": with_numbers, "logged": ["right", "right"]}, ["'logged' names 'right' twice"]),
        ({"step": with_numbers, "logged": ["loss"]}, ["'logged' names 'loss'"]),
    ],
)  # fmt: skip
def test_numbers_that_are_not_the_named_ones_are_refused(arguments: dict[str, Any], message: list[str]) -> None:
    with pytest.raises(ConfigError, match=naming(*message)):
        train(seeded(NETWORKS["no batch norm"]), Named(data()), workers=2, rounds=1, **arguments)


def test_names_of_numbers_without_a_step_function_are_refused() -> None:
    with pytest.raises(ConfigError, match=naming("'train.logged' is ['right']", "'train.step'")):
        train(seeded(NETWORKS["no batch norm"]), data(), workers=2, rounds=1, logged=["right"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": of_pairs, "loss": "mse_loss"}, ["'step'", "'loss' is 'mse_loss'"]),
        ({"step": "tests.steps:no_such_step"}, ["'train.step' is 'tests.steps:no_such_step'"]),
        ({"step": "tests.steps:Named"}, ["'train.step' is 'tests.steps:Named'", "class", "(network, batch)"]),
        ({"step": 3}, ["step is 3", "(network, batch)"]),
        ({"step": nn.CrossEntropyLoss}, ["step is <class", "(network, batch)"]),
    ],
)
def test_a_step_that_is_no_function_is_refused(arguments: dict[str, Any], message: list[str]) -> None:
    with pytest.raises(ConfigError, match=naming(*message)):
        train(seeded(NETWORKS["no batch norm"]), data(), workers=2, rounds=1, **arguments)
