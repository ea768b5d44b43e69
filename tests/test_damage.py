"""Damaged files of a run: what is whole is gone on from, the rest is refused by its name."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import ist
from ist.checkpoint import Progress, load_checkpoint, load_newest, save_checkpoint, write_tensors
from ist.config import Config
from ist.errors import CheckpointError
from ist.run_folder import RunFolder, create_run_folder
from ist.storage import LocalStorage, open_storage
from tests.conftest import assert_same, data, small_config
from tests.networks import NETWORKS, seeded
from tests.test_resume import KEPT, PowerCutError, run

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda raw: raw[: len(raw) // 2],
    "empty": lambda _: b"",
    "zeroed": lambda raw: bytes(len(raw)),
    "zeroed at the end": lambda raw: raw[:-4] + bytes(4),
    "another bit": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    "something else": lambda _: b"Not a checkpoint at all.",
}


def cut_off(config: Config, path: Path, rounds: int) -> RunFolder:
    """A run that was cut off in the given round."""
    folder = create_run_folder(config, path)
    with pytest.raises(PowerCutError):
        run(folder, resume=False, stop_after=rounds)
    return folder


def damage(path: Path, how: str) -> None:
    path.write_bytes(DAMAGE[how](path.read_bytes()))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_resumed(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(train__rounds=5, checkpoint={"every": 1, "keep": 2})
    whole, broken = create_run_folder(config, tmp_path / "whole"), cut_off(config, tmp_path / "broken", 4)
    expected = run(whole, resume=False)
    checkpoints = broken.path / "checkpoints"
    damage(checkpoints / "round-00000004.safetensors", how)

    broken.check_checkpoint()  # as a launcher does before it starts processes

    assert names(checkpoints) == ["round-00000003.safetensors", "round-00000004.safetensors.damaged"]
    (told,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{checkpoints}/round-00000004.safetensors: " in told.message
    assert "now called round-00000004.safetensors.damaged" in told.message
    assert "goes on from round-00000003.safetensors" in told.message
    assert broken.rewind()[1].rounds_done == 3
    assert [record["round"] for record in broken.records()] == [0, 1, 2]
    assert_same(run(broken, resume=True), expected)
    assert [record["round"] for record in broken.records()] == [0, 1, 2, 3, 4]
    assert "round-00000004.safetensors.damaged" in names(checkpoints)


def test_two_damaged_checkpoints_are_set_aside_and_a_second_one_of_a_round_gets_a_name_too(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for rounds in (1, 2, 3):
        save_checkpoint(storage, {"weight": torch.ones(2)}, Progress(rounds), keep=3)
    for rounds in (2, 3):
        damage(tmp_path / f"round-0000000{rounds}.safetensors", "empty")
    (tmp_path / "round-00000003.safetensors.damaged").touch()

    found = load_newest(storage)

    assert found is not None
    assert found[1].rounds_done == 1
    assert names(tmp_path) == [
        "round-00000001.safetensors", "round-00000002.safetensors.damaged", "round-00000003.safetensors.damaged",
        "round-00000003.safetensors.damaged-2",
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["memory://damaged/runs", "file"])
def test_a_damaged_checkpoint_in_a_storage_is_set_aside_there(tmp_path: Path, place: str) -> None:
    place = f"file://{tmp_path}/kept" if place == "file" else place
    config = small_config(train__rounds=5, checkpoint={"every": 1, "storage": place})
    folder = cut_off(config, tmp_path / "run", 3)
    storage = open_storage(place, "run")
    storage.write("round-00000003.safetensors", b"half")

    run(folder, resume=True)

    assert [record["round"] for record in folder.records()] == [0, 1, 2, 3, 4]
    assert "round-00000003.safetensors.damaged" in storage.names()
    MemoryFileSystem.store.clear()


def test_a_program_that_resumes_goes_on_from_the_whole_checkpoint(tmp_path: Path) -> None:
    def trained(resume: bool) -> list[dict[str, Any]]:
        return ist.train(
            seeded(NETWORKS["no batch norm"]), data(), workers=2, local_steps=2, rounds=3, run_dir=tmp_path / "run",
            progress=False, resume=resume,
        ).history  # fmt: skip

    first = trained(resume=False)
    damage(tmp_path / "run" / "checkpoints" / "round-00000003.safetensors", "truncated")
    again = trained(resume=True)

    assert [record["loss"] for record in again] == [record["loss"] for record in first]


def test_what_workers_kept_with_the_whole_checkpoint_is_gone_on_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(**KEPT, train__rounds=6, checkpoint={"every": 1, "keep": 2})
    whole, broken = create_run_folder(config, tmp_path / "whole"), cut_off(config, tmp_path / "broken", 4)
    expected = run(whole, resume=False)
    damage(broken.path / "checkpoints" / "round-00000004.safetensors", "truncated")

    assert_same(run(broken, resume=True), expected)

    assert "goes on without" not in caplog.text


def test_a_damaged_file_of_what_a_worker_kept_costs_what_it_kept_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(**KEPT, train__rounds=5, checkpoint={"every": 1})
    folder = cut_off(config, tmp_path / "run", 3)
    damage(folder.path / "checkpoints" / "worker-0002.round-00000003.safetensors", "truncated")

    run(folder, resume=True)

    assert re.search("worker 2 goes on without what it kept before round 4.*worker-0002.*: truncated", caplog.text)
    assert caplog.text.count("goes on without") == 1


def test_where_no_checkpoint_is_whole_nothing_is_renamed_and_the_error_says_so(tmp_path: Path) -> None:
    folder = cut_off(small_config(checkpoint={"every": 1}), tmp_path / "run", 3)
    checkpoints = folder.path / "checkpoints"
    for path in checkpoints.iterdir():
        damage(path, "empty")
    before = names(checkpoints)

    with pytest.raises(
        CheckpointError, match=r"round-00000003.*: truncated.* No other checkpoint is whole \(2 damaged\)"
    ):
        folder.rewind()

    assert names(checkpoints) == before
    assert [record["round"] for record in folder.records()] == [0, 1, 2]


PROGRESS: dict[str, Any] = {
    "none": None,
    "not JSON": "{",
    "a list": "[]",
    "a word for a number": json.dumps({"rounds_done": "three"}),
    "a negative number": json.dumps({"rounds_done": -1}),
    "a fraction": json.dumps({"rounds_done": 3.0}),
    "a total that is none": json.dumps({"rounds_done": 3, "totals": {"samples": None}}),
    "an unknown key": json.dumps({"rounds_done": 3, "rounds": 3}),
    "another round": json.dumps({"rounds_done": 4}),
}


@pytest.mark.parametrize("entry", PROGRESS)
def test_a_checkpoint_with_a_right_checksum_and_a_wrong_progress_entry_is_refused(tmp_path: Path, entry: str) -> None:
    name = "round-00000003.safetensors"
    metadata = {} if PROGRESS[entry] is None else {"progress": PROGRESS[entry]}
    write_tensors(tmp_path / name, {"weight": torch.ones(2)}, metadata)

    with pytest.raises(CheckpointError, match=f"{tmp_path}/{name}: .*progress entry"):
        load_checkpoint(LocalStorage(tmp_path), name)
