"""A compiled network trains uncompiled, with a warning, and is compiled again afterwards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ist
from ist.errors import ModelError
from ist.runs.build import build_job
from ist.runs.open import _restored
from tests.conftest import assert_same, data, small_config
from tests.networks import seeded

pytestmark = pytest.mark.timeout(60)  # importing the compiler takes seconds


def plain() -> Any:
    return seeded(lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)))


def compiled() -> Any:
    return torch.compile(plain(), backend="eager")


def in_part() -> Any:
    model = plain()
    model[0] = torch.compile(model[0], backend="eager")
    return model


def in_place() -> Any:
    model = plain()
    model[2].compile(backend="eager")
    return model


def by_method() -> Any:
    model = plain()
    model[0].forward = torch.compile(model[0].forward, backend="eager")
    return model


def train(model: nn.Module, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"workers": 2, "local_steps": 3, "rounds": 2, "batch_size": 10, "progress": False}
    return ist.train(model, data(60), test_data=data(20), **settings | options).model


@pytest.mark.parametrize(
    ("build", "named"),
    [(compiled, "the network"), (in_part, "'0'"), (in_place, "'2'"), (by_method, r"'0\.forward'")],
)
def test_a_compiled_network_trains_as_the_plain_one(build: Callable[[], Any], named: str, tmp_path: Path) -> None:
    model, expected = build(), train(plain()).state_dict()
    before = set(model.state_dict())

    with pytest.warns(UserWarning, match=rf"torch\.compile .*{named}\W"):
        trained = train(model, run_dir=tmp_path / "run")

    assert trained is model
    assert set(model.state_dict()) == before  # everything is compiled again
    assert_same({name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}, expected)
    assert_same(load_file(tmp_path / "run" / "model.safetensors"), expected)


def test_a_module_compiled_in_place_is_compiled_again() -> None:
    model, by_hand = in_place(), by_method()

    with pytest.warns(UserWarning, match=r"torch\.compile"):
        train(model)
    with pytest.warns(UserWarning, match=r"torch\.compile"):
        train(by_hand)

    assert model[2]._compiled_call_impl is not None
    assert hasattr(by_hand[0].forward, "_torchdynamo_orig_callable")


def for_digits() -> Any:
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def compiled_for_digits() -> Any:
    return torch.compile(for_digits(), backend="eager")


@pytest.mark.filterwarnings("ignore:torch.compile")
def test_files_of_compiled_networks_can_be_used_as_weights_and_checkpoints(tmp_path: Path) -> None:
    values = for_digits().state_dict()
    old = {f"_orig_mod.{name}": tensor for name, tensor in values.items()}
    save_file(old, tmp_path / "old.safetensors")
    network = {"name": f"{__name__}:compiled_for_digits", "weights": str(tmp_path / "old.safetensors")}

    job = build_job(small_config(model=network))
    resumed, further = _restored(job, {name: tensor + 1 for name, tensor in old.items()} | {"more": torch.ones(1)})

    assert_same(job.task.build().state_dict(), values)
    assert_same(resumed.state_dict(), {name: tensor + 1 for name, tensor in values.items()})
    assert set(further) == {"more"}


def test_a_network_that_is_wrapped_for_parallel_training_is_refused() -> None:
    with pytest.raises(ModelError, match=r"the network\b.*DataParallel.*pass the module"):
        train(nn.DataParallel(plain()))
    with pytest.raises(ModelError, match=r"'0'.*DataParallel.*pass the module"):
        train(nn.Sequential(nn.DataParallel(plain()), nn.ReLU()))
