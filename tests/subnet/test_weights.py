"""A run can start from given weights: fine-tuning."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ist.errors import ConfigError
from ist.models.mlp import MLP
from ist.runs.build import build_job
from tests.conftest import naming, small_config

WIDTHS = [64, 16, 10]


def config(weights: Path) -> object:
    return small_config(
        model={"name": "mlp", "args": {"widths": WIDTHS}, "weights": str(weights)}, data={"name": "digits"}
    )


def test_a_run_starts_from_the_given_weights(tmp_path: Path) -> None:
    given = MLP(WIDTHS)
    save_file(given.state_dict(), tmp_path / "model.safetensors")

    built = build_job(config(tmp_path / "model.safetensors")).task.build()  # type: ignore[arg-type]

    for name, tensor in given.state_dict().items():
        assert torch.equal(built.state_dict()[name], tensor)


def test_weights_of_another_network_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    save_file(MLP([64, 8, 10]).state_dict(), tmp_path / "small.safetensors")

    with pytest.raises(ConfigError, match=naming("'model.weights'", "small.safetensors'", "linear_1.weight")):
        build_job(config(tmp_path / "small.safetensors")).task.build()  # type: ignore[arg-type]


def test_weights_that_cannot_be_read_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")

    for name in ("broken.safetensors", "missing.safetensors"):
        with pytest.raises(ConfigError, match=naming("'model.weights'", f"{name}'")):
            build_job(config(tmp_path / name)).task.build()  # type: ignore[arg-type]
