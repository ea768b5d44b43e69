"""Checkpoints are loaded as they were saved, bit for bit, or refused."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from ist.errors import CheckpointError, RunFolderError
from ist.monitoring.meter import MemoryGauge
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


def test_a_checkpoint_is_a_file_of_safetensors_as_earlier_versions_wrote_it(tmp_path: Path) -> None:
    storage, tied = LocalStorage(tmp_path), {**TENSORS, "tied": TENSORS["weight"], "turned": TENSORS["weight"].t()}
    written = tmp_path / save_checkpoint(storage, tied, Progress(3), keep=2)
    plain = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tied.items()}
    with safe_open(written, framework="pt") as file:
        metadata = file.metadata()

    assert_same(load_file(written), tied)
    digest = hashlib.sha256(
        json.dumps({key: metadata[key] for key in metadata if key != "sha256"}, sort_keys=True).encode()
    )
    for name, tensor in sorted(plain.items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    assert metadata["sha256"] == digest.hexdigest()

    written.write_bytes(save(plain, metadata))  # how earlier versions made the file
    tensors, progress = load_checkpoint(storage, written.name)
    assert_same(tensors, tied)
    assert progress == Progress(3)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows memory that is not mapped from files")
def test_checkpoints_are_written_and_read_without_a_copy_of_the_tensors(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    tensors = {f"weight {number}": torch.ones(2**22) for number in range(4)}  # 16 MB each
    gauge = MemoryGauge(torch.device("cpu"))

    name = save_checkpoint(storage, tensors, Progress(1), keep=1)

    assert gauge.peak_bytes() < 16 * 2**20
    before = anonymous_bytes()
    loaded, _ = load_checkpoint(storage, name)
    assert anonymous_bytes() - before < 16 * 2**20  # they are mapped from the file
    assert_same(loaded, tensors)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon:")).split()[1])


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
