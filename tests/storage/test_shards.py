"""A checkpoint that many ranks write, one tensor at a time, is read by any number of ranks, whole or by rows."""

import json
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ist.errors import CheckpointError, RunFolderError
from ist.storage.backend import LocalStorage, Storage, open_storage
from ist.storage.checkpoint import (
    Progress,
    commit_shards,
    latest_checkpoint,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    saved_tensors,
    shards_folder,
    sweep_shards,
)
from ist.storage.shards.plan import ShardFile, plan_shards
from ist.storage.shards.read import SavedTensors
from ist.storage.shards.write import COMMIT, begin, write_shards
from ist.tensors import TensorSpec
from tests.conftest import assert_same, naming
from tests.storage.test_storage import place

__all__ = ["place"]

NETWORK = {
    "embedding": torch.randn(40, 8),
    "norm": torch.randn(8),
    "half": torch.randn(7, 5).bfloat16(),
    "tiny": torch.randn(3).to(torch.float8_e4m3fn),
    "mask": torch.rand(2, 3) > 0.5,
    "count": torch.tensor(7),
    "nothing": torch.empty(0, 4),
    "waves": torch.randn(3, dtype=torch.complex64),
    "head": torch.randn(11, 8),
}
OTHERS = {"exp_avg@norm": torch.randn(8).double(), "outer/head": torch.randn(11, 8), "average/n": torch.tensor(3)}
ALL = NETWORK | OTHERS
PROGRESS = Progress(3, {"sent_bytes": 12}, {"loss": 0.5}, "id", "seed: 1")


def specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def saved(
    storages: Sequence[Storage],
    progress: Progress = PROGRESS,
    keep: int = 2,
    network: Mapping[str, Tensor] = NETWORK,
    others: Mapping[str, Tensor] = OTHERS,
) -> tuple[ShardFile, ...]:
    """Save as that many ranks, one after the other: a gather needs no other rank here, as everybody has the tensors."""
    num_ranks, folder = len(storages), shards_folder(progress.rounds_done)
    tensors = {**network, **others}
    files = plan_shards(specs(network), specs(others), num_ranks)
    begin(storages[0], folder)
    written, orders = {}, []
    for rank, storage in enumerate(storages):
        order: list[tuple[str, int]] = []
        held: weakref.WeakSet[Tensor] = weakref.WeakSet()

        def gather(
            name: str,
            to: int,
            rank: int = rank,
            order: list[tuple[str, int]] = order,
            held: weakref.WeakSet[Tensor] = held,
        ) -> Tensor | None:
            assert not held  # one tensor at a time
            order.append((name, to))
            if to != rank:
                return None
            held.add(whole := tensors[name].clone())
            return whole

        written |= write_shards(storage, folder, files, gather, rank)
        orders.append(order)
    assert all(order == orders[0] for order in orders)  # a gather is collective
    assert sorted(name for name, _ in orders[0]) == sorted(tensors)
    commit_shards(storages[0], files, written, progress, keep)
    return files


def joined(parts: Sequence[SavedTensors], name: str) -> Tensor:
    """The rows of all ranks as torch.chunk shares them out, one after the other."""
    shape = parts[0].spec(name).shape
    each = -(-(shape[0] if shape else 1) // len(parts))
    rows = [part.rows(name, rank * each, (rank + 1) * each) for rank, part in enumerate(parts)]
    if not shape:
        assert all(part.shape == (0,) for part in rows[1:])
        return rows[0]
    assert all(len(part) <= each for part in rows)
    return torch.cat(rows)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_tensors_written_by_some_ranks_are_read_whole_and_by_rows_of_other_numbers(place: str, num_ranks: int) -> None:
    storage = open_storage(place, "run")

    files = saved([storage] * num_ranks)

    assert latest_checkpoint(storage) == "round-00000003"
    tensors, progress = load_checkpoint(storage, "round-00000003")
    assert_same(tensors, ALL)
    assert progress == PROGRESS
    for readers in (1, 2, 3, 8):
        parts = [saved_tensors(storage, 3) for _ in range(readers)]
        assert_same({name: joined(parts, name) for name in ALL}, ALL)
    for file in files:
        of = specs(NETWORK if file.name.startswith("model") else OTHERS)
        total, largest = sum(spec.nbytes for spec in of.values()), max(spec.nbytes for spec in of.values())
        assert file.nbytes <= max(largest, -(-total // num_ranks))
    assert {file.writer for file in files} == set(range(num_ranks))


def test_the_files_are_those_of_hugging_face_and_safetensors_reads_them(tmp_path: Path) -> None:
    saved([LocalStorage(tmp_path)] * 3)
    folder = tmp_path / "round-00000003"

    index = json.loads((folder / "model.safetensors.index.json").read_text())

    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in NETWORK.values())
    found = {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}
    assert_same(found, NETWORK)
    count = len(set(index["weight_map"].values()))
    assert set(index["weight_map"].values()) == {f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)}


def test_the_newest_of_both_kinds_are_kept_and_each_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    save_checkpoint(storage, ALL, Progress(1), keep=2)
    saved([storage] * 2, Progress(2))
    save_checkpoint(storage, ALL, Progress(3), keep=2)
    assert storage.names() == ["round-00000002", "round-00000003.safetensors"]

    lazily = load_newest(storage, lazily=True)
    assert lazily is not None
    assert isinstance(lazily[0], SavedTensors)
    assert_same(lazily[0], ALL)
    assert_same({name: joined([saved_tensors(storage, 3)] * 3, name) for name in ALL}, ALL)

    saved([storage] * 4, Progress(4), keep=1)
    assert storage.names() == ["round-00000004"]


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "longer"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, storage = LocalStorage(tmp_path / "source"), LocalStorage(tmp_path / "run")
    save_checkpoint(source, ALL, Progress(2), keep=2)
    saved([source] * 2)
    for file in source.names("round-00000003"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "source", tmp_path / "run")
        path = tmp_path / "run" / "round-00000003" / file
        raw = bytearray(path.read_bytes())
        if how == "flipped":
            raw[len(raw) // 2] ^= 1
        path.write_bytes({"truncated": raw[:-3], "longer": raw + b"more"}.get(how, raw))
        if how == "missing":
            path.unlink()
            if file == COMMIT:
                continue  # then it is the rest of an interrupted save

        with pytest.raises(CheckpointError, match=naming(str(path))):
            load_checkpoint(storage, "round-00000003")
        found = load_newest(storage)

        assert found is not None
        assert found[1].rounds_done == 2
        assert storage.names() == ["round-00000002.safetensors", "round-00000003.damaged"]
        assert str(path) in caplog.text


def test_a_checkpoint_of_one_file_is_verified_when_it_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    name = save_checkpoint(LocalStorage(tmp_path), ALL, Progress(3), keep=2)
    raw = bytearray((tmp_path / name).read_bytes())
    raw[-30] ^= 1
    (tmp_path / name).write_bytes(raw)

    with pytest.raises(CheckpointError, match=naming(str(tmp_path / name), "checksum")):
        load_checkpoint(LocalStorage(tmp_path), name, lazily=True)


def test_an_interrupted_save_is_no_checkpoint_and_leaves_nothing_behind(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    saved([storage] * 2, Progress(2))
    files = plan_shards(specs(NETWORK), {}, 3)

    def gather(name: str, _to: int) -> Tensor:
        if name == "head":
            raise KeyboardInterrupt
        return NETWORK[name]

    with pytest.raises(KeyboardInterrupt):
        write_shards(storage, "round-00000003", files, gather, rank=files[-1].writer)

    assert "round-00000003" in storage.names()
    assert latest_checkpoint(storage) == "round-00000002"
    (tmp_path / "round-00000009").mkdir()
    (tmp_path / "round-00000009" / "thesis.tex").touch()
    sweep_shards(storage)
    assert storage.names() == ["round-00000002", "round-00000009"]


def test_an_interrupted_save_of_other_ranks_is_replaced(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    saved([storage] * 2)
    (tmp_path / "round-00000003" / COMMIT).unlink()

    saved([storage] * 3)

    assert_same(load_checkpoint(storage, "round-00000003")[0], ALL)
    listed = json.loads((tmp_path / "round-00000003" / COMMIT).read_text())["files"]
    assert storage.names("round-00000003") == sorted([*listed, COMMIT])


def test_ranks_that_do_not_share_the_folder_fail_before_the_checkpoint_is_valid(tmp_path: Path) -> None:
    here, elsewhere = LocalStorage(tmp_path / "here"), LocalStorage(tmp_path / "elsewhere")
    saved([here] * 2, Progress(2))

    with pytest.raises(RunFolderError, match=naming(str(tmp_path / "here"), "rank 1", "checkpoint.storage")):
        saved([here, elsewhere])

    assert latest_checkpoint(here) == "round-00000002"


def test_a_file_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    saved([storage])
    path = tmp_path / "round-00000003" / COMMIT
    path.write_text(path.read_text().replace('"model-00001', '"../model-00001'))

    with pytest.raises(CheckpointError, match=naming(str(path))):
        load_checkpoint(storage, "round-00000003")
