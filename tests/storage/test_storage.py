"""Checkpoints outside the run folder: every storage obeys the same laws; existing folders are reused or refused."""

import functools
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from ist.config.load import dump_config, parse_yaml, validate
from ist.errors import CheckpointError, ConfigError, RunFolderError
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.storage.backend import RemoteStorage, open_storage
from ist.storage.checkpoint import Progress, latest_checkpoint, load_checkpoint, read_tensors, save_checkpoint
from ist.storage.reopen import open_or_create
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.subnet.job import Job
from tests.conftest import a_record, assert_same, naming, small_config

TENSORS = {"weight": torch.randn(50, 3), "steps": torch.tensor(7), "half": torch.randn(4).bfloat16()}


class Fragile(MemoryFileSystem):
    """A file system whose writes can fail half-way, with or without an error, and that moves files by copying."""

    protocol = "fragile"
    breaks = ""

    def put_file(self, lpath: str, rpath: str, **_options: Any) -> None:  # type: ignore[override]
        value = Path(lpath).read_bytes()
        if self.breaks and "round" in rpath:
            self.pipe_file(rpath, value[: len(value) // 2])
            if self.breaks == "loudly":
                raise ConnectionResetError(104, "Connection reset by peer")
            return
        self.pipe_file(rpath, value)

    def mv(self, path1: str, path2: str, **_options: Any) -> None:  # type: ignore[override]
        self.pipe_file(path2, self.cat_file(path1)[: 20 if self.breaks_on_move else None])
        if self.breaks_on_move:
            raise TimeoutError("timed out")
        self.rm_file(path1)

    breaks_on_move = False


class FragileObjects(Fragile):
    """The same as an object store: a put succeeds, fails, or turns out to be incomplete."""

    protocol = ("fragile-objects", "s3")


fsspec.register_implementation("fragile", Fragile)
fsspec.register_implementation("fragile-objects", FragileObjects)


@pytest.fixture(params=["folder", "file", "memory", "fragile", "fragile-objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty storage of each kind."""
    unique = f"bucket-{uuid.uuid4().hex}"
    yield {"folder": f"{tmp_path}/kept", "file": f"file://{tmp_path}/kept"}.get(
        request.param, f"{request.param}://{unique}/runs"
    )
    MemoryFileSystem.store.clear()


def remote(place: str) -> tuple[RemoteStorage, Any]:
    storage = open_storage(place, "run")
    assert isinstance(storage, RemoteStorage)
    return storage, storage._system


def test_every_storage_returns_what_was_saved_and_keeps_the_newest(place: str) -> None:
    storage = open_storage(place, "run")
    assert latest_checkpoint(storage) is None

    for rounds in (9, 10, 100):
        save_checkpoint(storage, TENSORS, Progress(rounds, {"samples": rounds}), keep=2)

    assert storage.names() == ["round-00000010.safetensors", "round-00000100.safetensors"]
    tensors, progress = load_checkpoint(storage, "round-00000100.safetensors")
    assert_same(tensors, TENSORS)
    assert progress == Progress(100, {"samples": 100})
    assert open_storage(place, "another").names() == []


def test_damage_is_found_in_every_storage(place: str) -> None:
    storage = open_storage(place, "run")
    name = save_checkpoint(storage, TENSORS, Progress(1), keep=1)
    with storage.reading(name) as path:
        data = bytearray(path.read_bytes())

    data[-1] ^= 1
    storage.write(name, bytes(data))
    with pytest.raises(CheckpointError, match=naming("round-00000001.safetensors: ", "checksum")):
        load_checkpoint(storage, name)

    storage.write(name, bytes(data[:100]))
    with pytest.raises(CheckpointError, match=naming("round-00000001.safetensors: ", "truncated")):
        load_checkpoint(storage, name)

    storage.delete(name)
    with pytest.raises(CheckpointError, match=re.escape("round-00000001.safetensors: ")):
        load_checkpoint(storage, name)


def test_a_remote_storage_leaves_no_copy_on_this_machine_and_names_its_folder_if_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, _ = remote("memory://copies/runs")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name = save_checkpoint(storage, TENSORS, Progress(1), keep=1)

    assert_same(load_checkpoint(storage, name)[0], TENSORS)

    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(RunFolderError, match=naming("memory://", "round-00000002.safetensors", "TMPDIR")):
        save_checkpoint(storage, TENSORS, Progress(2), keep=1)
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("protocol", ["fragile", "fragile-objects"])
@pytest.mark.parametrize("breaks", ["loudly", "silently"])
def test_a_write_that_fails_half_way_leaves_the_earlier_checkpoints(
    protocol: str, breaks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, system = remote(f"{protocol}://half-{protocol}-{breaks}/runs")
    save_checkpoint(storage, TENSORS, Progress(1), keep=1)
    monkeypatch.setattr(type(system), "breaks", breaks)

    reason = "Connection reset by peer" if breaks == "loudly" else "bytes"
    with pytest.raises(RunFolderError, match=naming(f"{protocol}://", "round-00000002.safetensors: ", reason)):
        save_checkpoint(storage, TENSORS, Progress(2), keep=1)

    assert "round-00000001.safetensors" in storage.names()
    assert_same(load_checkpoint(storage, "round-00000001.safetensors")[0], TENSORS)
    if (protocol, breaks) != ("fragile-objects", "loudly"):  # a real object store keeps nothing of a failed put
        assert storage.names() == ["round-00000001.safetensors"]


def test_a_move_that_fails_half_way_leaves_no_partial_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, system = remote("fragile://moving/runs")
    save_checkpoint(storage, TENSORS, Progress(1), keep=1)
    monkeypatch.setattr(type(system), "breaks_on_move", True)

    with pytest.raises(RunFolderError, match=naming("round-00000002.safetensors: ", "TimeoutError: timed out")):
        save_checkpoint(storage, TENSORS, Progress(2), keep=1)

    assert storage.names() == ["round-00000001.safetensors"]


def test_user_and_password_in_a_url_are_not_shown() -> None:
    storage = RemoteStorage(MemoryFileSystem(), "/kept/run", "sftp://me:secret@host/kept/run")

    assert storage.where("file") == "sftp://***@host/kept/run/file"


@pytest.mark.parametrize(
    ("storage", "reason"),
    [("gopher://bucket/runs", "Protocol not"), ("nopackage://bucket/runs", "Install ist-nothing")],
)
def test_a_storage_that_cannot_be_opened_ends_the_run_before_a_folder_is_created(
    tmp_path: Path, storage: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = {"class": "ist_nothing.Nothing", "err": "Install ist-nothing to reach it"}
    monkeypatch.setitem(known_implementations, "nopackage", missing)

    with pytest.raises(ConfigError, match=naming(f"'checkpoint.storage' is '{storage}'", reason)):
        create_run_folder(small_config(checkpoint__storage=storage), tmp_path / "run")

    assert not (tmp_path / "run").exists()


@functools.cache
def job_of(text: str) -> Job:
    return build_job(validate(parse_yaml(text, "test"), "test"))


def run(folder: RunFolder, resume: bool) -> dict[str, torch.Tensor]:
    execute(job_of(dump_config(folder.load_config())), folder, resume, progress=False)
    return read_tensors(folder.path / "model.safetensors")[0]


@pytest.mark.parametrize("place", ["folder", "memory"], indirect=True)
def test_a_run_whose_machine_is_gone_is_resumed_from_the_storage(tmp_path: Path, place: str) -> None:
    config = small_config(checkpoint={"every": 2, "keep": 2, "storage": place})
    whole = create_run_folder(config, tmp_path / "first" / "run")
    expected = run(whole, resume=False)
    stable = ("rounds", "loss", "test_loss", "accuracy", "best_accuracy", "samples", "sent_bytes", "faults")

    for rounds in (4, 2):  # lost after the last round, and after the second
        found, resume = open_or_create(config, tmp_path / f"with {rounds}" / "run")
        assert resume
        assert_same(run(found, resume), expected)
        assert [record["round"] for record in found.records()] == list(range(rounds, 4))
        assert {key: found.result()[key] for key in stable} == {key: whole.result()[key] for key in stable}
        whole.storage.delete("round-00000004.safetensors")

    assert not (whole.path / "checkpoints").exists()
    assert [record["round"] for record in found.records()] == [2, 3]
    found.rewind()
    assert found.records() == []  # round 4 was deleted just now


def test_a_run_does_not_start_over_if_the_storage_has_lost_its_checkpoints(tmp_path: Path, place: str) -> None:
    folder = create_run_folder(small_config(checkpoint={"every": 1, "storage": place}), tmp_path / "run")
    for round_number in range(2):
        folder.append_record(a_record(round_number))

    for again in (folder.rewind, folder.check_checkpoint):
        with pytest.raises(CheckpointError, match=naming(str(folder.path), "2 rounds", "checkpoint.storage")):
            again()


def test_a_new_run_does_not_mix_with_a_run_of_the_same_name_in_the_storage(tmp_path: Path, place: str) -> None:
    config = small_config(checkpoint={"storage": place})
    create_run_folder(config, tmp_path / "here" / "run")

    with pytest.raises(RunFolderError, match=naming("checkpoint.storage", "--auto-resume", str(tmp_path / "there"))):
        create_run_folder(config, tmp_path / "there" / "run")

    with pytest.raises(RunFolderError, match=naming("'seed' is 3", "4")):
        open_or_create(config.model_copy(update={"seed": 4}), tmp_path / "there" / "run")


def test_a_relative_storage_is_found_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = create_run_folder(small_config(checkpoint={"storage": "kept"}), Path("run"))
    save_checkpoint(folder.storage, TENSORS, Progress(2), keep=2)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert RunFolder(tmp_path / "run").has_checkpoint()


def test_an_empty_or_missing_folder_becomes_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    for name in ("empty", "missing"):
        folder, resume = open_or_create(small_config(), tmp_path / name)
        assert not resume
        assert folder.load_config() == small_config()


def test_the_same_run_is_resumed_with_new_settings_of_how_it_is_run(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    for round_number in range(4):
        folder.append_record(a_record(round_number))
    save_checkpoint(folder.storage, TENSORS, Progress(2), keep=2)
    now = small_config(pool={"kind": "torchrun"}, watch={"tensorboard": True}, output="other", data__root="/data")

    found, resume = open_or_create(now, tmp_path / "run")

    assert resume
    assert found.load_config() == now
    assert found.rewind()[1].rounds_done == 2
    assert [record["round"] for record in found.records()] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"seed": 4}, ["'seed' is 3", "4"]),
        ({"train__optimizer": {"name": "SGD", "args": {"lr": 0.2}}}, ["'train.optimizer.args.lr' is 0.1", "0.2"]),
        ({"train__schedule": {"name": "StepLR", "args": {"step_size": 2}}}, ["'train.schedule.name'", "not set", "'StepLR'"]),
    ],
)  # fmt: skip
def test_a_folder_of_another_run_is_refused_by_the_first_key_that_differs(
    tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    folder.append_record(a_record(0))

    with pytest.raises(RunFolderError, match=naming(f"{tmp_path / 'run'}: ", *parts)):
        open_or_create(small_config(**changes), tmp_path / "run")


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(RunFolderError, match=naming(f"{tmp_path}: ", "empty")):
        open_or_create(small_config(), tmp_path)


TEXT = dump_config(small_config())
TORN: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: (path / "config.yaml").touch(),
    "half": lambda path: (path / "config.yaml").write_text(TEXT[:300]),
    "all but the end": lambda path: (path / "config.yaml").write_text(TEXT[:-4]),
    "zeros": lambda path: (path / "config.yaml").write_text("\0" * 500),
    "half, then zeros": lambda path: (path / "config.yaml").write_text(TEXT[:300] + "\0" * 99),
    "not yet renamed": lambda path: (path / ".config.yaml.17.tmp").write_text(TEXT[:300]),
}


@pytest.mark.parametrize("torn", TORN)
def test_a_folder_that_a_crash_left_incomplete_is_created_again(tmp_path: Path, torn: str) -> None:
    TORN[torn](tmp_path)

    folder, resume = open_or_create(small_config(), tmp_path)

    assert not resume
    assert folder.load_config() == small_config()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_checkpoints_are_not_left_behind_when_the_storage_changes(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    save_checkpoint(folder.storage, TENSORS, Progress(2), keep=2)

    with pytest.raises(
        RunFolderError, match=naming(f"{tmp_path}/run/checkpoints", "'checkpoint.storage'", str(tmp_path / "kept"))
    ):
        open_or_create(small_config(checkpoint={"storage": str(tmp_path / "kept")}), tmp_path / "run")
