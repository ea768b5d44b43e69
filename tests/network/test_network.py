"""A network with parts that cannot be trained, merged or saved is refused by name before anything starts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

import ist
from ist.errors import ConfigError, DataError, ISTError, ModelError
from ist.runs.build import build_job
from tests.conftest import assert_same, data, small_config
from tests.networks import seeded


def train(model: Any, dataset: Any = None, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"workers": 2, "local_steps": 3, "rounds": 2, "batch_size": 10, "progress": False}
    return ist.train(model, dataset or data(60), **settings | options).model


def plain() -> Any:
    return seeded(lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)))


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None: ...


class Renamed(nn.Sequential):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name.replace("0.", "first."): tensor for name, tensor in super().state_dict(*args, **kwargs).items()}


def changed(change: Callable[[Any, str], None]) -> Any:
    model = plain()
    model[2]._register_state_dict_hook(lambda module, state, prefix, meta: change(state, prefix))  # noqa: ARG005
    return model


def failing(*_: Any) -> None:
    raise ValueError("no state today")


def with_buffer(**tensors: Tensor) -> Any:
    model = plain()
    for name, tensor in tensors.items():
        model[0].register_buffer(name, tensor)
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))


def partly_on_meta() -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    model[1].running_var = model[1].running_var.to("meta")
    return model


def overlapping() -> Any:
    memory = torch.zeros(20)
    return with_buffer(low=memory[:12], high=memory[8:])


def aliased() -> Any:
    model = plain()
    model[0].register_buffer("start", model[0].weight.data)
    return model


def sparse() -> Any:
    model = plain()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    return model


def frozen() -> Any:
    return plain().requires_grad_(False)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(*plain()[:2], Extra(8, 5)), r"'2' \(Extra\).*get_extra_state.*register_buffer"),
        (lambda: Renamed(*plain()), r"'0\.weight' .*not .*state_dict"),
        (
            lambda: changed(lambda state, prefix: state.update({f"{prefix}more": torch.ones(1)})),
            r"'2\.more' .*state_dict .*not .*parameters and buffers",
        ),
        (
            lambda: changed(lambda state, prefix: state.update({f"{prefix}bias": torch.ones(5)})),
            r"state_dict .*copy .*'2\.bias'",
        ),
        (lambda: changed(failing), "state_dict .*ValueError: no state today"),
        (on_meta, r"'0\.weight' .*'meta'.*to_empty"),
        (partly_on_meta, r"'1\.running_var' .*'meta'.*to_empty"),
        (overlapping, r"'0\.low' and '0\.high' .*clone\(\)"),
        (aliased, r"'0\.weight' and '0\.start' .*clone\(\)"),
        (sparse, r"'0\.weight' .*torch\.sparse_coo.*dense"),
        (lambda: with_buffer(graph=torch.eye(3).to_sparse()), r"'0\.graph' .*torch\.sparse_coo.*dense"),
        (lambda: nn.Sequential(nn.ReLU()), "no parameter .*gradient"),
        (frozen, "no parameter .*gradient"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        train(build())


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_quantized_network_is_refused() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch was built without quantized operators")
    model = torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear})

    with pytest.raises(ModelError, match=r"'0' .*quanti[sz]ed"):
        train(model)


def test_parameters_that_are_disjoint_views_of_one_memory_are_trained(tmp_path: Path) -> None:
    class Flat(nn.Module):
        """Has all its weights in one block of memory, as recurrent layers have on a GPU."""

        def __init__(self, apart: bool) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 5)
            if not apart:
                memory = torch.cat([self.first.weight.flatten(), self.last.weight.flatten()]).detach()
                self.first.weight.data, self.last.weight.data = memory[:96].view(8, 12), memory[96:].view(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    found, expected = (
        train(seeded(lambda apart=apart: Flat(apart)), run_dir=tmp_path / str(apart)).state_dict()
        for apart in (False, True)
    )

    assert_same(found, expected)


class NoValues(nn.Module):
    """Is built without values, on any default device."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).to("meta")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_configured_network_without_values_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'net\.0\.weight' .*'meta'.*to_empty"):
        build_job(small_config(model={"name": f"{__name__}:NoValues"}, train__workers=2)).task.build()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(12), 0

    def __len__(self) -> int:
        return 60


class Unreadable(Dataset[Any]):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        raise KeyError(f"row {index}")


@pytest.mark.parametrize(
    ("model", "options", "kind", "message"),
    [
        (plain, {"test_data": Stream()}, DataError, "Stream .*IterableDataset"),
        (plain, {"dataset": Unreadable()}, DataError, "0 of Unreadable .*KeyError: 'row 0'"),
        (lambda: len, {}, ConfigError, r"model .*<built-in function len>.*torch\.nn\.Module"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(model: Any, options: Any, kind: type[ISTError], message: str) -> None:
    with pytest.raises(kind, match=message):
        train(model(), **options)


def test_numbers_of_numpy_and_torch_are_accepted_as_arguments(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {
        "workers": np.int64(2),
        "optimizer_args": {"lr": torch.tensor(0.25)},
        "schedule": "StepLR",
        "schedule_args": {"step_size": np.int64(2), "gamma": np.float64(0.5)},
        "partition": {"capacities": np.array([1.0, 3.0])},
    }
    usual: dict[str, Any] = {
        "workers": 2,
        "optimizer_args": {"lr": 0.25},
        "schedule": "StepLR",
        "schedule_args": {"step_size": 2, "gamma": 0.5},
        "partition": {"capacities": [1.0, 3.0]},
    }

    found = train(plain(), run_dir=tmp_path / "run", **numbers).state_dict()

    assert_same(found, train(plain(), **usual).state_dict())
