"""A network whose forward changes during training: an error names module and operator, unless it does not matter."""

import warnings
from collections import deque
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ist
from ist.checks import drift
from ist.errors import ISTError, ModelError
from ist.runs.rehearsal import rehearse
from tests.conftest import assert_same, clone, data, job_for, naming
from tests.networks import seeded

AFTER = 5


class Counter(nn.Module):
    """Counts its runs, and computes something else after some of them."""

    shared: ClassVar[list[int]] = [0]

    def __init__(self, kind: str, later: str) -> None:
        super().__init__()
        self.kind, self.later = kind, later
        self.calls = 0
        self.state = SimpleNamespace(calls=0)
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))

    def count(self) -> int:
        if self.kind == "attribute":
            self.calls += 1
            return self.calls
        if self.kind == "class":
            self.shared[0] += 1
            return self.shared[0]
        if self.kind == "object":
            self.state.calls += 1
            return self.state.calls
        self.counted += 1
        return int(self.counted)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.count() <= AFTER:
            return inputs.relu()
        if self.later == "norm":
            return functional.layer_norm(inputs, inputs.shape[-1:])
        return inputs.tanh()


def network(kind: str, later: str) -> nn.Module:
    Counter.shared[0] = -20  # the checks before the run count too
    return seeded(lambda: nn.Sequential(nn.Linear(12, 16), Counter(kind, later), nn.Linear(16, 5)))


def trained(model: nn.Module, workers: int = 2, rounds: int = 8, **options: Any) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"attribute '1\.calls'")
        ist.train(model, data(), workers=workers, rounds=rounds, local_steps=2, progress=False, **options)
    return clone(model.state_dict())


@pytest.mark.parametrize(("kind", "state"), [("attribute", ["'1.calls' is now"]), ("buffer", []), ("class", [])])
def test_a_norm_that_is_switched_on_over_hidden_units_ends_the_run_by_name(kind: str, state: list[str]) -> None:
    parts = ["worker 0", "'1' (Counter)", "layer_norm", "neurons of '0'", "partition.exclude", *state]
    with pytest.raises(ModelError, match=naming(*parts)):
        trained(network(kind, "norm"))


def test_the_run_ends_after_the_first_checked_round_since_the_change() -> None:
    # Two steps a round, checked after rounds 1, 3 and 7: the sixth run is in round 2.
    with pytest.raises(ModelError, match=naming("round 3, worker 0")):
        trained(network("attribute", "norm"), rounds=20)


@pytest.mark.parametrize("rounds", [3, 6])
def test_the_last_round_is_checked(rounds: int) -> None:
    with pytest.raises(ModelError, match=naming("round ", "partition.exclude")):
        trained(network("attribute", "norm"), rounds=rounds)


def test_a_change_that_does_not_mix_neurons_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(network("attribute", "tanh"))

    monkeypatch.setattr(drift, "check_forward", lambda *_: pytest.fail("the forward was checked"))
    monkeypatch.setattr("ist.training.worker.is_due", lambda *_: False)
    assert_same(found, trained(network("attribute", "tanh")))


def test_the_forward_of_a_worker_that_holds_the_full_network_may_change() -> None:
    trained(network("attribute", "norm"), workers=1)


def test_a_change_that_cannot_be_checked_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=naming("'1' (Counter)", "layer_norm", "Cannot check")):
        trained(network("object", "norm"))


class Keeping(nn.Module):
    """Stores its activations in an attribute, as hooks that collect features do."""

    def __init__(self, where: Any) -> None:
        super().__init__()
        self.up, self.down, self.where = nn.Linear(12, 16), nn.Linear(16, 5), where

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if isinstance(self.where, dict):
            self.where["hidden"] = [hidden]
        elif isinstance(self.where, deque):
            self.where.append(hidden)
        elif self.where is not None:
            self.where.hidden = hidden
        return self.down(hidden.relu())


@pytest.mark.parametrize("where", [dict, lambda: deque(maxlen=2)])
def test_a_network_that_stores_its_activations_trains_as_without(where: Any) -> None:
    found = trained(seeded(lambda: Keeping(where())))

    assert_same(found, trained(seeded(lambda: Keeping(None))))


def test_a_network_that_can_no_longer_be_copied_is_trained_further_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=naming("cannot check", "'where'", "cannot be copied")):
        found = trained(seeded(lambda: Keeping(SimpleNamespace())))

    assert_same(found, trained(seeded(lambda: Keeping(None))))


def test_a_network_that_fails_after_some_rounds_is_an_error() -> None:
    class Broken(Counter):
        def forward(self, inputs: Tensor) -> Tensor:
            if self.count() > AFTER:
                raise ArithmeticError("worn out")
            return inputs.relu()

    model = seeded(lambda: nn.Sequential(nn.Linear(12, 16), Broken("attribute", ""), nn.Linear(16, 5)))
    with pytest.raises(ISTError, match=naming("round ", "worker ", "'1' (Broken)", "worn out")):
        trained(model)


def test_a_number_that_changes_when_the_network_runs_is_warned_of_and_a_buffer_is_not() -> None:
    with pytest.warns(UserWarning, match=naming("'1.calls'", "0 -> 1", "buffer")):
        rehearse(job_for(network("attribute", "tanh")))
    rehearse(job_for(network("buffer", "tanh")))


def test_checks_become_rarer_except_after_the_first_round_of_a_stage_and_the_last_round() -> None:
    stages = [{"rounds": 10, "keep": 1}, {}, {"rounds": 3, "keep": 1}]
    plain = job_for(network("attribute", "tanh"), train__rounds=100)
    staged = job_for(network("attribute", "tanh"), train__rounds=100, recipe__stages=stages)

    assert [r for r in range(100) if drift.is_due(plain, r)] == [1, 3, 7, 15, 31, 63, 99]
    assert [r for r in range(100) if drift.is_due(staged, r)] == [1, 3, 7, 10, 15, 31, 63, 97, 99]
