"""Checkpoints are loaded as they were saved, bit for bit, or refused."""

import os
from pathlib import Path

import pytest
import torch

from ist.errors import CheckpointError, RunFolderError
from ist.storage.backend import LocalStorage, write_atomically
from ist.storage.checkpoint import (
    Progress,
    latest_checkpoint,
    load_checkpoint,
    load_worker_state,
    save_checkpoint,
    save_worker_state,
)
from tests.conftest import assert_same, naming

TENSORS = {
    "weight": torch.randn(5, 3),
    "steps": torch.tensor(7),
    "half": torch.randn(4).bfloat16(),
    "exp_avg@weight": torch.randn(5, 3).double(),
}


def test_loading_what_was_saved_gives_the_same_bits(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    name = save_checkpoint(storage, TENSORS, Progress(3, {"sent_bytes": 12}, {"loss": 0.5}), keep=2)

    tensors, progress = load_checkpoint(storage, name)

    assert_same(tensors, TENSORS)
    assert progress == Progress(3, {"sent_bytes": 12}, {"loss": 0.5})


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for rounds in (9, 10, 11, 100):
        save_checkpoint(LocalStorage(tmp_path), TENSORS, Progress(rounds), keep=2)

    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "round-00000011.safetensors",
        "round-00000100.safetensors",
    ]
    assert latest_checkpoint(LocalStorage(tmp_path)) == "round-00000100.safetensors"


@pytest.mark.parametrize("position", [9, 200, -1, -30])
def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, position: int) -> None:
    path = tmp_path / save_checkpoint(LocalStorage(tmp_path), TENSORS, Progress(3), keep=2)
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)

    with pytest.raises(CheckpointError, match=f"{path}"):
        load_checkpoint(LocalStorage(tmp_path), path.name)


def test_an_altered_round_number_is_found(tmp_path: Path) -> None:
    path = tmp_path / save_checkpoint(LocalStorage(tmp_path), TENSORS, Progress(3), keep=2)
    raw = path.read_bytes()
    assert raw.count(b'rounds_done\\": 3') == 1
    path.write_bytes(raw.replace(b'rounds_done\\": 3', b'rounds_done\\": 4'))

    with pytest.raises(CheckpointError, match=naming(str(path), "checksum")):
        load_checkpoint(LocalStorage(tmp_path), path.name)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_found(tmp_path: Path, size: int) -> None:
    path = tmp_path / save_checkpoint(LocalStorage(tmp_path), TENSORS, Progress(3), keep=2)
    path.write_bytes(path.read_bytes()[:size])

    with pytest.raises(CheckpointError, match=naming(str(path), "truncated")):
        load_checkpoint(LocalStorage(tmp_path), path.name)


def test_a_workers_state_is_loaded_only_for_the_same_neurons_and_incarnation(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    save_worker_state(storage, 1, 3, TENSORS, "these neurons, this incarnation", keep=2)

    found = load_worker_state(storage, 1, 3, "these neurons, this incarnation")

    assert found is not None
    assert_same(found, TENSORS)
    assert load_worker_state(storage, 1, 3, "other neurons, this incarnation") is None
    assert load_worker_state(storage, 1, 3, "these neurons, another incarnation") is None
    assert load_worker_state(storage, 0, 3, "these neurons, this incarnation") is None


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path / "round-00000001.safetensors")):
        load_checkpoint(LocalStorage(tmp_path), "round-00000001.safetensors")


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(RunFolderError, match=naming("round-00000001.safetensors: ", "No space left on device")):
        save_checkpoint(LocalStorage(tmp_path), TENSORS, Progress(1), keep=1)
