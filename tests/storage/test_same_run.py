"""A run is resumed with its own configuration: changed keys are refused by name, or allowed with a warning."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ist.config.load import dump_config, load_config
from ist.config.yaml_text import parse_yaml
from ist.errors import RunFolderError
from ist.redact import redacted
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.storage.checkpoint import Progress, load_checkpoint, save_checkpoint
from ist.storage.reopen import reopen, save_config
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.storage.same_run import allowed_changes, run_changes
from ist.storage.saved_config import is_edited, saved_text
from tests.conftest import naming, small_config
from tests.runs.test_resume import PowerCutError, run


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A run that was cut off after two rounds."""
    folder = create_run_folder(small_config(checkpoint={"every": 1}), tmp_path / "run")
    with pytest.raises(PowerCutError):
        run(folder, resume=False, stop_after=2)
    return folder.path


def edited(path: Path, *changes: tuple[str, str]) -> RunFolder:
    text = (path / "config.yaml").read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (path / "config.yaml").write_text(text)
    return RunFolder(path)


def test_all_keys_that_were_edited_are_named_with_old_and_new_values(broken: Path) -> None:
    folder = edited(broken, ("seed: 3", "seed: 4"), ("lr: 0.1", "lr: 0.2"), ("  batch_size: 16", "  batch_size: 8"))
    message = naming(
        f"{broken}/config.yaml: ", "'seed' was 3, is 4", "'train.batch_size' was 16, is 8",
        "'train.optimizer.args.lr' was 0.1, is 0.2",
    )  # fmt: skip

    for again in (folder.check_checkpoint, folder.rewind, lambda: run(folder, resume=True)):
        with pytest.raises(RunFolderError, match=message):
            again()

    records = len(RunFolder(broken).records())
    run(
        edited(broken, ("seed: 4", "seed: 3"), ("lr: 0.2", "lr: 0.1"), ("  batch_size: 8", "  batch_size: 16")),
        resume=True,
    )
    assert records == 2
    assert len(RunFolder(broken).records()) == 4


def test_an_edit_is_noticed_before_the_first_checkpoint_too(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    edited(folder.path, ("seed: 3", "seed: 4"))

    for again in (folder.check_checkpoint, folder.rewind):
        with pytest.raises(RunFolderError, match=naming(f"{folder.config_path}: ", "--resume", "--set")):
            again()

    edited(
        folder.path, ("seed: 4", "seed: 3"), ("label: null", "label: mine"), ("name: small", "# a comment\nname: small")
    )
    assert folder.rewind()[1].rounds_done == 0  # where it runs, what it is called, and the layout are no part of it


def test_an_edit_of_a_key_that_may_change_is_refused_with_the_command_that_changes_it(broken: Path) -> None:
    folder = edited(broken, ("rounds: 4", "rounds: 6"))
    message = naming("'train.rounds' was 4, is 6", f"ist train --resume {broken} --set train.rounds=")

    with pytest.raises(RunFolderError, match=message):
        run(folder, resume=True)
    with pytest.raises(RunFolderError, match=message):  # another key does not make it right
        reopen(load_config(folder.config_path, ["train.workers=2"]), broken, 6, ["train.workers"])

    found = reopen(load_config(folder.config_path, ["train.rounds=7"]), broken, 7, ["train.rounds"])
    assert (found.before.train.rounds, found.rounds_done) == (4, 2)


def test_an_edited_configuration_is_replaced_with_a_warning_if_a_program_gives_all_keys(
    broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edited(broken, ("rounds: 4", "rounds: 6"))
    config = small_config(checkpoint={"every": 1})

    found = reopen(config, broken, 4)
    save_config(found, config)

    assert re.search(naming(str(broken), "edited"), caplog.text)
    assert found.folder.load_config() == config
    assert not found.folder.is_edited()


def test_a_configuration_without_a_digest_is_that_of_an_earlier_version(broken: Path) -> None:
    folder = RunFolder(broken)
    folder.config_path.write_text(dump_config(folder.load_config()))

    run(folder, resume=True)

    assert folder.result()["rounds"] == 4


def test_the_digest_does_not_depend_on_passwords_and_survives_their_removal() -> None:
    url = "s3://me:secret@bucket/x"
    text = saved_text(small_config(data__args={"url": url}))

    assert url in text
    assert is_edited(text) is is_edited(redacted(text)) is False
    assert is_edited(text.replace("seed: 3", "seed: 4")) is True


@pytest.mark.parametrize("damaged", ["{", "[]", '{"round": -1, "changes": [], "config": ""}'])
def test_a_damaged_record_of_changes_is_refused_with_its_line(broken: Path, damaged: str) -> None:
    (broken / "changes.jsonl").write_text(f'{{"round": 1, "changes": [], "config": ""}}\n{damaged}\n')

    with pytest.raises(RunFolderError, match=naming(f"{broken / 'changes.jsonl'}: ", "line 2", "move the file away")):
        run(RunFolder(broken), resume=True)


def test_an_allowed_change_is_logged_and_the_run_is_resumed(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = edited(broken, ("every: 1\n  keep: 2", "every: 3\n  keep: 1"), ("label: null", "label: mine"))

    run(folder, resume=True)

    for key, old, new in (("checkpoint.every", 1, 3), ("checkpoint.keep", 2, 1), ("label", None, "'mine'")):
        assert re.search(f"{broken}/config.yaml: '{key}'.*{old}.*{new}", caplog.text)
    assert caplog.text.count(f"{broken}/config.yaml: ") == 3
    assert folder.result()["label"] == "mine"


def test_a_run_of_an_earlier_version_is_resumed_although_its_checkpoint_has_no_configuration(broken: Path) -> None:
    folder = RunFolder(broken)
    tensors, progress = load_checkpoint(folder.storage, "round-00000002.safetensors")
    assert progress.config == dump_config(folder.load_config())
    save_checkpoint(folder.storage, tensors, Progress(2, progress.totals, progress.numbers, progress.start), keep=2)

    run(folder, resume=True)

    assert len(folder.records()) == 4


def test_a_checkpoint_has_the_configuration_from_the_start_of_the_run_not_a_later_edit(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    folder.begin()
    edited(folder.path, ("seed: 3", "seed: 4"))

    folder.save_checkpoint({"weight": torch.ones(2)}, Progress(1), keep=1)

    with pytest.raises(RunFolderError, match=naming("'seed'", "3", "4")):
        RunFolder(folder.path).rewind()


def test_config_yaml_is_parsed_once_for_a_run_and_again_after_an_edit(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    real = parse_yaml

    def counted(text: str, source: str) -> Any:
        parsed.append(source)
        return real(text, source)

    monkeypatch.setattr("ist.config.load.parse_yaml", counted)
    folder = RunFolder(broken)
    job = build_job(folder.load_config())

    execute(job, folder, resume=True, progress=False)

    assert parsed == [str(folder.config_path)]
    edited(broken, ("label: null", "label: mine"))
    assert folder.load_config().label == "mine"


WHERE_AND_BY_WHOM: list[dict[str, Any]] = [
    {"output": "elsewhere"}, {"label": "mine"}, {"checkpoint": {"every": 9}}, {"watch": {"tensorboard": True}},
    {"pool": {"kind": "torchrun"}}, {"compare": {"methods": ["ddp"]}}, {"data__root": "/data"},
    {"data__loader": {"workers": 2}},
]  # fmt: skip
WHAT: list[dict[str, Any]] = [
    {"seed": 4}, {"train__rounds": 5}, {"data__shuffle": "global"}, {"model__args": {"widths": [64, 8, 8, 10]}},
    {"evaluate": {"every": 3}}, {"partition": {"exclude": ["linear_1.*"]}}, {"name": "another"},
]  # fmt: skip


@pytest.mark.parametrize(("changes", "allowed"), [(c, True) for c in WHERE_AND_BY_WHOM] + [(c, False) for c in WHAT])
def test_where_a_run_is_trained_may_change_and_what_is_trained_may_not(changes: dict[str, Any], allowed: bool) -> None:
    old, new = small_config(), small_config(**changes)

    assert run_changes(old, old) == allowed_changes(old, old) == []
    assert bool(allowed_changes(old, new)) == allowed
    assert bool(run_changes(old, new)) != allowed


def test_a_key_that_a_later_version_adds_is_not_a_change(broken: Path) -> None:
    folder = RunFolder(broken)
    tensors, progress = load_checkpoint(folder.storage, "round-00000002.safetensors")
    without = "".join(line + "\n" for line in progress.config.splitlines() if "schedule_unit" not in line)
    assert without != progress.config
    save_checkpoint(folder.storage, tensors, Progress(2, progress.totals, progress.numbers, "", without), keep=2)

    assert folder.rewind()[1].rounds_done == 2
    assert load_config(folder.config_path).train.schedule_unit == "step"
