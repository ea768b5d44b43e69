"""Identity 7: a resumed run is the same run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ist.build import build_job
from ist.checkpoint import read_tensors
from ist.errors import CheckpointError
from ist.rounds import run_rounds
from ist.run import Leading, open_run
from ist.run_folder import RunFolder, create_run_folder
from tests.conftest import assert_same, small_config


class PowerCutError(Exception):
    pass


def run(folder: RunFolder, resume: bool, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    with open_run(build_job(folder.load_config()), folder, resume, progress=False) as part:
        assert isinstance(part, Leading)
        if stop_after is not None:
            note = part.recorder.round_done

            def cut(round_number: int, *rest: Any) -> None:
                if round_number == stop_after:
                    raise PowerCutError
                note(round_number, *rest)

            part.recorder.round_done = cut  # type: ignore[method-assign]
        run_rounds(part.job, part.method, part.recorder, part.first_round, part.device)
        part.recorder.finish(part.method.model)
    return read_tensors(folder.path / "model.safetensors")[0]


VARIANTS: dict[str, dict[str, Any]] = {
    "reset": {},
    "carried Adam": {
        "train__optimizer": {"name": "Adam", "args": {"lr": 0.01}},
        "train__optimizer_state": "carried",
        "train__schedule": {"name": "CosineAnnealingLR", "args": {"T_max": "total_steps"}},
    },
    "dropout": {"model__args": {"widths": [64, 24, 20, 10], "dropout": 0.3}},
    "carried statistics": {"train__running_statistics": "carried"},
    "rounding that is fed back": {
        "exchange": {"down": "int8", "up": "int3", "values": "deltas", "error_feedback": True},
    },
    "stages": {
        "train__activation_scale": "folded",
        "recipe": {
            "stages": [{"rounds": 1, "keep": 1}, {}, {"rounds": 2, "keep": 1, "lr_scale": 0.5, "local_steps": 2}]
        },
    },
    "state that is kept": {
        "train__optimizer": {"name": "Adam", "args": {"lr": 0.01}},
        "train__optimizer_state": "kept",
        "recipe": {"stages": [{}, {"rounds": 4, "keep": 1}]},
        "checkpoint": {"every": 2},
    },
    "a global shuffle": {"data__shuffle": "global"},
    "outer momentum": {"recipe": {"outer": {"lr": 0.9, "momentum": 0.5}}, "train__optimizer_state": "carried"},
    "exponential average": {"recipe": {"average": {"kind": "ema", "decay": 0.6}}},
    "average of the last rounds": {"recipe": {"average": {"kind": "swa", "start": 0.4}}},
    "all of a recipe": {
        "partition": {"coverage": "balanced", "keep": 0.5},
        "recipe": {
            "stages": [{}, {"rounds": 2, "keep": 1}], "outer": {"momentum": 0.5}, "average": {"kind": "ema"},
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 4])
def test_a_run_stopped_anywhere_and_resumed_ends_in_the_same_weights(
    tmp_path: Path, variant: str, stop_after: int
) -> None:
    config = small_config(**VARIANTS[variant], train__rounds=5)
    whole = create_run_folder(config, tmp_path / "whole")
    broken = create_run_folder(config, tmp_path / "broken")
    expected = run(whole, resume=False)

    with pytest.raises(PowerCutError):
        run(broken, resume=False, stop_after=stop_after)
    found = run(broken, resume=True)

    assert_same(found, expected)
    stable = ("round", "loss", "accuracy", "samples", "sent_bytes")
    records = [[{key: record[key] for key in stable} for record in f.records()] for f in (whole, broken)]
    assert records[0] == records[1]
    assert broken.result()["rounds"] == 5


def test_half_a_line_that_a_crash_left_does_not_hurt(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    with pytest.raises(PowerCutError):
        run(folder, resume=False, stop_after=3)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "los')

    run(folder, resume=True)

    assert [record["round"] for record in folder.records()] == [0, 1, 2, 3]


def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    with pytest.raises(PowerCutError):
        run(folder, resume=False, stop_after=3)
    newest = next((folder.path / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-4])

    with pytest.raises(CheckpointError, match="round-00000002.safetensors"):
        run(folder, resume=True)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    with pytest.raises(PowerCutError):
        run(folder, resume=False, stop_after=3)
    other = small_config(model__args={"widths": [64, 28, 20, 10]})
    folder.config_path.unlink()
    from ist.config_file import dump_config

    folder.config_path.write_text(dump_config(other))

    with pytest.raises(CheckpointError, match="does not fit the configured network"):
        run(folder, resume=True)


def test_the_result_loads_into_the_plain_network(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from ist.models.mlp import MLP

    folder = create_run_folder(small_config(), tmp_path / "run")
    run(folder, resume=False)
    model = MLP([64, 24, 20, 10])

    model.load_state_dict(load_file(folder.path / "model.safetensors"))

    assert all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values())
