"""Damaged files of a run: intact checkpoints are used, damaged files are refused by name."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import ist
from ist.config.schema import Config
from ist.errors import CheckpointError, RunFolderError
from ist.report.page import write_report
from ist.storage.backend import LocalStorage, open_storage
from ist.storage.checkpoint import Progress, load_checkpoint, load_newest, read_tensors, save_checkpoint, write_tensors
from ist.storage.run_folder import RunFolder, create_run_folder
from tests.conftest import a_record, assert_same, data, naming, small_config
from tests.networks import NETWORKS, seeded
from tests.runs.started import started
from tests.runs.test_resume import KEPT, PowerCutError, run

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda raw: raw[: len(raw) // 2],
    "empty": lambda _: b"",
    "zeroed": lambda raw: bytes(len(raw)),
    "zeroed at the end": lambda raw: raw[:-4] + bytes(4),
    "another bit": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    "something else": lambda _: b"Not a checkpoint at all.",
}


def cut_off(config: Config, path: Path, rounds: int) -> RunFolder:
    """A run that was cut off in the given round; its checkpoints may be in a storage."""
    folder = create_run_folder(config, path)
    with pytest.raises(PowerCutError):
        run(folder, resume=False, stop_after=rounds)
    return folder


def damage(path: Path, how: str) -> None:
    path.write_bytes(DAMAGE[how](path.read_bytes()))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_checkpoint_is_renamed_and_the_one_before_is_resumed(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(train__rounds=5, checkpoint={"every": 1, "keep": 2})
    whole, broken = started(config, tmp_path / "whole"), started(config, tmp_path / "broken", stop_after=4)
    expected = read_tensors(whole.path / "model.safetensors")[0]
    checkpoints = broken.path / "checkpoints"
    damage(checkpoints / "round-00000004.safetensors", how)

    broken.check_checkpoint()  # a launcher does this before it starts processes

    assert names(checkpoints) == ["round-00000003.safetensors", "round-00000004.safetensors.damaged"]
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{checkpoints}/round-00000004.safetensors: " in warning.message
    assert "round-00000004.safetensors.damaged" in warning.message
    assert "round-00000003.safetensors" in warning.message
    assert broken.rewind()[1].rounds_done == 3
    assert [record["round"] for record in broken.records()] == [0, 1, 2]
    assert_same(run(broken, resume=True), expected)
    assert [record["round"] for record in broken.records()] == [0, 1, 2, 3, 4]
    assert "round-00000004.safetensors.damaged" in names(checkpoints)


def test_two_damaged_checkpoints_are_renamed_and_a_second_one_of_a_round_gets_its_own_name(tmp_path: Path) -> None:
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
def test_a_damaged_checkpoint_in_a_storage_is_renamed_there(tmp_path: Path, place: str) -> None:
    place = f"file://{tmp_path}/kept" if place == "file" else place
    config = small_config(train__rounds=5, checkpoint={"every": 1, "storage": place})
    folder = cut_off(config, tmp_path / "run", 3)
    storage = open_storage(place, "run")
    storage.write("round-00000003.safetensors", b"half")

    run(folder, resume=True)

    assert [record["round"] for record in folder.records()] == [0, 1, 2, 3, 4]
    assert "round-00000003.safetensors.damaged" in storage.names()
    MemoryFileSystem.store.clear()


def test_a_program_resumes_from_the_intact_checkpoint(tmp_path: Path) -> None:
    def trained(resume: bool) -> list[dict[str, Any]]:
        return ist.train(
            seeded(NETWORKS["no batch norm"]), data(), workers=2, local_steps=2, rounds=3, run_dir=tmp_path / "run",
            progress=False, resume=resume,
        ).history  # fmt: skip

    first = trained(resume=False)
    damage(tmp_path / "run" / "checkpoints" / "round-00000003.safetensors", "truncated")
    again = trained(resume=True)

    assert [record["loss"] for record in again] == [record["loss"] for record in first]


def test_workers_resume_with_the_state_of_the_intact_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(**KEPT, train__rounds=6, checkpoint={"every": 1, "keep": 2})
    whole, broken = started(config, tmp_path / "whole"), started(config, tmp_path / "broken", stop_after=4)
    expected = read_tensors(whole.path / "model.safetensors")[0]
    damage(broken.path / "checkpoints" / "round-00000004.safetensors", "truncated")

    assert_same(run(broken, resume=True), expected)

    assert "no saved state" not in caplog.text


def test_a_damaged_file_of_a_workers_state_costs_only_that_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(**KEPT, train__rounds=5, checkpoint={"every": 1})
    folder = started(config, tmp_path / "run", 3)
    damage(folder.path / "checkpoints" / "worker-0002.round-00000003.safetensors", "truncated")

    run(folder, resume=True)

    (warning,) = [text for text in caplog.messages if "worker 2" in text]
    assert re.search(naming("round 4", "worker-0002", "truncated"), warning)


def test_if_no_checkpoint_is_intact_none_is_renamed_and_the_error_says_so(tmp_path: Path) -> None:
    folder = started(small_config(checkpoint={"every": 1}), tmp_path / "run", 3)
    checkpoints = folder.path / "checkpoints"
    for path in checkpoints.iterdir():
        damage(path, "empty")
    before = names(checkpoints)

    with pytest.raises(CheckpointError, match=naming("round-00000003", "truncated", "2 damaged", str(checkpoints))):
        folder.rewind()

    assert names(checkpoints) == before
    assert [record["round"] for record in folder.records()] == [0, 1, 2]


PROGRESS: dict[str, Any] = {
    "none": None,
    "not JSON": "{",
    "a list": "[]",
    "a word instead of a number": json.dumps({"rounds_done": "three"}),
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


def altered(path: Path, change: Callable[[dict[str, torch.Tensor]], Any], names_too: bool = True) -> None:
    """Change a checkpoint's tensors, with a right checksum, and with a right list of names or with the old one."""
    tensors, metadata = read_tensors(path)
    change(tensors)
    if names_too:
        metadata["tensors"] = json.dumps(sorted(tensors))
    write_tensors(path, tensors, metadata)


CARRIED: dict[str, Any] = {
    "train__optimizer": {"name": "Adam", "args": {"lr": 0.01}},
    "train__optimizer_state": "carried",
    "recipe": {"outer": {"momentum": 0.5}, "average": {"kind": "ema"}},
}


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_off(
        small_config(**CARRIED, checkpoint={"every": 1, "keep": 1}), tmp_path_factory.mktemp("carried") / "run", 2
    ).path


@pytest.mark.parametrize(
    "name",
    ["linear_2.weight", "exp_avg@linear_1.weight", "step@linear_1.bias", "outer/linear_1.bias",
     "average/module.linear_1.weight", "average/n_averaged"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["missing", "superfluous", "of another shape", "of another dtype"])
def test_a_tensor_that_is_missing_superfluous_or_another_is_named(
    carried: Path, tmp_path: Path, name: str, how: str
) -> None:
    folder = RunFolder(Path(shutil.copytree(carried, tmp_path / "run")))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors.pop(name)
        if how != "missing":
            another = {
                "superfluous": tensor,
                "of another shape": tensor[None],
                "of another dtype": tensor.to(torch.complex64),
            }
            tensors[name] = another[how]
        if how == "superfluous":
            tensors[name + "_2"] = tensor

    altered(folder.path / "checkpoints" / "round-00000002.safetensors", change)

    with pytest.raises(CheckpointError, match=naming("checkpoint", f"'{name}")):
        run(folder, resume=True)


def test_a_checkpoint_that_lacks_a_listed_tensor_is_damaged(tmp_path: Path) -> None:
    save_checkpoint(LocalStorage(tmp_path), {"a": torch.ones(2), "b": torch.ones(2)}, Progress(3), keep=1)
    altered(tmp_path / "round-00000003.safetensors", lambda tensors: tensors.pop("b"), names_too=False)

    with pytest.raises(CheckpointError, match=naming("round-00000003.safetensors: ", "'b'", "1 tensors missing")):
        load_checkpoint(LocalStorage(tmp_path), "round-00000003.safetensors")


def test_a_checkpoint_after_more_rounds_than_the_run_has_is_refused(tmp_path: Path) -> None:
    folder = started(small_config(checkpoint={"every": 1}), tmp_path / "run", 2)
    tensors, _ = load_checkpoint(folder.storage, "round-00000002.safetensors")
    save_checkpoint(folder.storage, tensors, Progress(9), keep=2)

    with pytest.raises(CheckpointError, match=naming("checkpoint", "9", "4")):
        run(folder, resume=True)


def test_a_last_checkpoint_without_a_loss_is_refused_by_name(tmp_path: Path) -> None:
    folder = started(small_config(checkpoint={"every": 1}), tmp_path / "run", 2)
    tensors, _ = load_checkpoint(folder.storage, "round-00000002.safetensors")
    save_checkpoint(folder.storage, tensors, Progress(4), keep=2)
    (folder.path / "metrics.jsonl").unlink()

    with pytest.raises(CheckpointError, match=naming("checkpoint", "'loss'")):
        run(folder, resume=True)


RECORDS = [a_record(number) for number in range(4)]
WHOLE = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
LINES = WHOLE.splitlines(keepends=True)
BAD_RECORDS: dict[str, tuple[Any, ...]] = {
    "binary in the middle": (LINES[0] + b"\x00\xff\x80\n" + LINES[2], "line 2", "JSON"),
    "half a line in the middle": (LINES[0][:40] + b"\n" + LINES[1], "line 1", "JSON"),
    "a list": (LINES[0] + b"[1, 2]\n" + LINES[2], "line 2", "mapping"),
    "a word instead of a number": (WHOLE.replace(b'"loss": 0.5', b'"loss": "low"', 1), "line 1", "'loss'"),
    "infinite seconds": (
        json.dumps(RECORDS[0] | {"merge_s": float("inf")}).encode() + b"\n" + LINES[1], "line 1", "'merge_s'"
    ),
    "negative bytes": (WHOLE.replace(b'"sent_bytes": 1000', b'"sent_bytes": -1000', 1), "line 1", "'sent_bytes'"),
    "no loss": (WHOLE.replace(b'"loss": 0.5, ', b"", 1), "line 1", "'loss'"),
    "a metric in words": (WHOLE.replace(b'"accuracy"}', b'"accuracy"}').replace(b"0.875", b'"good"', 1), "line 1", "'accuracy'"),
    "a round twice": (LINES[0] + LINES[1] + WHOLE[len(LINES[0]) :], "line 3", "round 1"),
    "another metric in words": (json.dumps(RECORDS[0] | {"metric": "mine", "mine": "good"}).encode() + b"\n" + LINES[1], "line 1", "'mine'"),
    "lost workers as a word": (json.dumps(RECORDS[0] | {"lost": "all"}).encode() + b"\n", "line 1", "'lost'"),
}  # fmt: skip


@pytest.mark.parametrize("how", BAD_RECORDS)
def test_damaged_records_are_named_by_file_line_and_key_when_a_run_is_resumed(tmp_path: Path, how: str) -> None:
    raw, *parts = BAD_RECORDS[how]
    folder = create_run_folder(small_config(), tmp_path / "run")
    folder.metrics_path.write_bytes(raw)

    for again in (folder.rewind, folder.check_checkpoint):
        with pytest.raises(RunFolderError, match=naming(f"{folder.metrics_path}: ", *parts)):
            again()


CUT = {
    "half a line": WHOLE + LINES[0][:30],
    "zeros": WHOLE + bytes(50),
    "half a line, then zeros": WHOLE + b'{"ro' + bytes(9),
    "half of a letter": WHOLE + b'{"a": "\xc3',
    "only zeros": bytes(99),
}


@pytest.mark.parametrize("how", CUT)
def test_an_end_that_a_crash_has_damaged_is_deleted_with_a_warning(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    folder.metrics_path.write_bytes(CUT[how])
    save_checkpoint(folder.storage, {"weight": torch.ones(2)}, Progress(4), keep=1)

    folder.rewind()

    whole = 0 if how == "only zeros" else 4
    assert re.search(naming(f"{folder.metrics_path}: ", f"{whole} intact lines"), caplog.text)
    assert folder.records() == RECORDS[:whole]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = create_run_folder(small_config(), tmp_path_factory.mktemp("finished") / "run")
    run(folder, resume=False)
    return folder.path


def with_key(key: str, value: Any) -> Callable[[bytes], bytes]:
    return lambda raw: json.dumps({**json.loads(raw), key: value}).encode()


BAD_FINISHED: dict[str, tuple[Any, ...]] = {
    "result.json cut": ("result.json", lambda raw: raw[:50], "JSON"),
    "result.json empty": ("result.json", lambda _: b"", "JSON"),
    "result.json binary": ("result.json", lambda _: b"\xff\x00", "JSON"),
    "result.json a list": ("result.json", lambda _: b"[]", "mapping"),
    "result.json without bytes": ("result.json", lambda raw: raw.replace(b'"sent_bytes"', b'"sent"'), "'sent_bytes'"),
    "result.json with words": ("result.json", with_key("memory_bytes", "few"), "'memory_bytes'"),
    "result.json with a list of metrics": ("result.json", with_key("metrics", []), "'metrics'"),
    "result.json with faults in words": ("result.json", with_key("faults", {"lost": "2"}), "'faults.lost'"),
    "metrics.jsonl cut": ("metrics.jsonl", lambda raw: raw[:-20], "line 4", "JSON"),
    "metrics.jsonl cut at a line": ("metrics.jsonl", lambda raw: raw[: raw.rindex(b"{")], "round 3", "4"),
    "metrics.jsonl binary": ("metrics.jsonl", lambda _: b"\xff\x00\n", "line 1", "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("how", BAD_FINISHED)
def test_a_report_names_the_damaged_file_in_one_line(finished: Path, tmp_path: Path, how: str) -> None:
    name, change, *parts = BAD_FINISHED[how]
    folder = RunFolder(Path(shutil.copytree(finished, tmp_path / "run")))
    (folder.path / name).write_bytes(change((folder.path / name).read_bytes()))

    with pytest.raises(RunFolderError, match=naming(f"{folder.path}/{name}", "damaged", *parts)) as caught:
        write_report([folder], tmp_path / "report.html")

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["empty", "missing"])
def test_a_report_of_a_run_without_records_says_so(
    finished: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(Path(shutil.copytree(finished, tmp_path / "run")))
    folder.metrics_path.unlink()
    if how == "empty":
        folder.metrics_path.touch()

    write_report([folder], tmp_path / "report.html")

    assert re.search(naming(f"{folder.metrics_path}: ", "no records", "4 rounds"), caplog.text)
