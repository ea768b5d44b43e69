"""Weights that a network starts with are read from files one tensor at a time, with the bits that PyTorch loads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ist.errors import ConfigError
from ist.export.distributed_checkpoint import write_distributed
from ist.export.initial_weights import open_weights
from ist.initialization.fill import built_with, fill
from ist.network.copies import on_meta
from ist.runs.build import build_job
from ist.storage.shards.read import SavedTensors
from ist.tensors import TensorSpec
from tests.conftest import assert_same, naming, small_config

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")


class Tied(nn.Module):
    """Tied weights, a list of parameters, a persistent and another buffer, and a frozen parameter."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = cast(nn.Embedding, self.body[0]).weight
        self.body[1].requires_grad_(requires_grad=False)
        self.listed = [self.head.weight]
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("angles", torch.arange(4) / 7, persistent=False)


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    state = Tied().state_dict()
    made = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    return made | {"count": torch.tensor(9), "head.weight": made["body.0.weight"]}


def in_a_file(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "some.safetensors")
    return folder / "some.safetensors"


def in_a_folder(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: t.clone() for name, t in tensors.items() if name != "head.weight"}, folder / "model.safetensors")
    return folder


def in_shards(folder: Path, tensors: dict[str, Tensor]) -> Path:
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors) if name != "head.weight"}
    for name, file in files.items():
        save_file({name: tensors[name].clone()}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def distributed(folder: Path, tensors: dict[str, Tensor]) -> Path:
    stored = {f"model.{name}": tensor for name, tensor in tensors.items()}
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}
    write_distributed(specs, stored.__getitem__, folder / "dcp")
    return folder / "dcp"


STORED = [in_a_file, in_a_folder, in_shards, distributed]


@pytest.mark.parametrize("store", STORED)
def test_a_network_is_filled_with_the_bits_that_pytorch_loads(store: Any, tmp_path: Path) -> None:
    expected = Tied()
    expected.load_state_dict(values())

    weights = open_weights(store(tmp_path, values()), on_meta(Tied()), "model.weights")
    built = cast(Tied, built_with(Tied, weights))
    filled = on_meta(Tied())
    fill(filled, weights)

    assert_same(built.state_dict(), expected.state_dict())
    assert_same(filled.state_dict(), expected.state_dict())
    assert built.listed[0] is built.head.weight is built.get_parameter("body.0.weight")
    assert torch.equal(built.get_buffer("angles"), torch.arange(4) / 7)
    assert [parameter.requires_grad for parameter in built.parameters()] == [True, False, False]
    assert torch.equal(weights.rows("head.weight", 2, 5), values()["head.weight"][2:5])
    assert torch.equal(weights.rows("count", 0, 1), torch.tensor(9))


def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    before = SavedTensors._read

    def counted(self: SavedTensors, place: Any, start: int, size: int) -> Tensor:
        read.append(size)
        return before(self, place, start, size)

    monkeypatch.setattr(SavedTensors, "_read", counted)
    weights = open_weights(in_shards(tmp_path, values()), on_meta(Tied()), "model.weights")
    assert read == []

    weights.rows("body.0.weight", 1, 3)

    assert read == [2 * 4 * 4]


def test_a_folder_of_transformers_may_hold_the_network_without_its_head(tmp_path: Path) -> None:
    settings = transformers.GPT2Config(vocab_size=11, n_positions=5, n_embd=8, n_layer=1, n_head=2)
    given = transformers.GPT2LMHeadModel(settings)
    given.transformer.save_pretrained(tmp_path)
    template = on_meta(transformers.GPT2LMHeadModel(settings))

    weights = open_weights(tmp_path, template, "model.weights")
    built = built_with(lambda: transformers.GPT2LMHeadModel(settings), weights)

    assert_same(built.state_dict(), given.state_dict())


def test_a_change_of_the_dtype_is_said_and_other_kinds_are_refused(tmp_path: Path) -> None:
    path = in_a_file(tmp_path, {name: t.double() if t.is_floating_point() else t for name, t in values().items()})
    with pytest.warns(UserWarning, match=naming("model.weights", "torch.float64", "torch.float32", "rounded")):
        weights = open_weights(path, on_meta(Tied()), "model.weights")
    assert torch.equal(weights["head.weight"], values()["head.weight"])

    path = in_a_file(tmp_path, {name: t.long() for name, t in values().items()})
    with pytest.raises(ConfigError, match=naming("model.weights", "int64", "float32", "weight")):
        open_weights(path, on_meta(Tied()), "model.weights")


WRONG = [
    (lambda tensors: tensors.pop("body.1.bias"), "body.1.bias"),
    (lambda tensors: tensors.update({"body.1.bias": torch.ones(9)}), "body.1.bias.*9.*4"),
]


@pytest.mark.parametrize("store", STORED)
@pytest.mark.parametrize(("change", "named"), WRONG)
def test_weights_of_another_network_are_refused_by_name(store: Any, change: Any, named: str, tmp_path: Path) -> None:
    tensors = values()
    change(tensors)
    path = store(tmp_path, tensors)

    with pytest.raises(ConfigError, match=f"'weights' is '{path}'.*{named}"):
        open_weights(path, on_meta(Tied()), "weights")


def test_a_tensor_that_the_network_lacks_is_refused_in_a_file_and_named_in_a_folder(tmp_path: Path) -> None:
    more = {**values(), "body.1.mask": torch.ones(2)}

    with pytest.raises(ConfigError, match=naming("body.1.mask", "lacks")):
        open_weights(in_a_file(tmp_path, more), on_meta(Tied()), "model.weights")
    with pytest.warns(UserWarning, match=naming("body.1.mask", "not used")):
        open_weights(in_a_folder(tmp_path, more), on_meta(Tied()), "model.weights")


def folders(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    for name in ("empty", "listed", "outside", "lacking", "short"):
        (tmp_path / name).mkdir()
    index = "model.safetensors.index.json"
    (tmp_path / "listed" / index).write_text("[]")
    (tmp_path / "outside" / index).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    (tmp_path / "lacking" / index).write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    save_file({"b": torch.ones(1)}, tmp_path / "lacking" / "a.safetensors")
    (tmp_path / "short" / "model.safetensors").write_bytes(b"too short")
    yield tmp_path / "empty", "has neither"
    yield tmp_path / "listed", "index"
    yield tmp_path / "outside", "'../a.safetensors'"
    yield tmp_path / "lacking", "'a'"
    yield tmp_path / "short", "model.safetensors"


def test_a_damaged_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    for path, named in folders(tmp_path):
        with pytest.raises(ConfigError, match=naming("model.weights", str(path), named)):
            open_weights(path, on_meta(Tied()), "model.weights")


def test_a_run_reads_the_folder_that_its_configuration_names(tmp_path: Path) -> None:
    settings: Any = {
        "model": {"name": "mlp", "args": {"widths": [64, 16, 10]}, "weights": str(tmp_path)},
        "data": {"name": "digits"},
    }
    given = build_job(small_config(**{**settings, "model": {**settings["model"], "weights": None}})).task.build()
    for tensor in given.state_dict().values():
        tensor.mul_(2)
    save_file(given.state_dict(), tmp_path / "model.safetensors")

    job = build_job(small_config(**settings))

    assert_same(job.task.build().state_dict(), load_file(tmp_path / "model.safetensors"))
    assert job.task.weights is not None
    assert_same(dict(job.task.weights()), load_file(tmp_path / "model.safetensors"))
