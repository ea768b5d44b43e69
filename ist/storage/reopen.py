"""Open the folder of an existing run in order to resume it, with the same configuration or with changed keys.

Where it sits: the command line and `ist.train` resume runs through `reopen`; `ist train --auto-resume` through
`open_or_create`, which refuses changed keys, because nobody watches a restarted job.
Not here: which keys may change (`ist/storage/same_run.py`), recording a change (`RunFolder.rewind`), reading a
checkpoint (`ist/storage/checkpoint.py`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ist.config.load import load_config, validate
from ist.config.schema import Config
from ist.config.yaml_text import parse_yaml
from ist.errors import RunFolderError
from ist.storage.backend import Storage, refuse_link
from ist.storage.checkpoint import Progress, latest_checkpoint, load_newest
from ist.storage.run_folder import (
    CONFIG,
    RunFolder,
    created_and_locked,
    refuse_contents,
    storage_of,
    with_absolute_storage,
    write_config,
)
from ist.storage.run_lock import LOCK, sole_writer
from ist.storage.same_run import CHANGEABLE, is_in, refused_changes, run_changes
from ist.storage.saved_config import saved_text

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reopened:
    """A run that is about to be resumed.

    Attributes:
        folder: Its folder.
        before: The configuration of the rounds that are done.
        rounds_done: Their number; 0 also if keys that say what is trained are the same, because then nobody asks.
        is_changed: Whether such a key has changed since the newest checkpoint.
    """

    folder: RunFolder
    before: Config
    rounds_done: int = 0
    is_changed: bool = False


def reopen(config: Config, path: Path, num_rounds: int, explicit: Sequence[str] | None = None) -> Reopened:
    """Open the folder of a run in order to resume it, and refuse changed keys that must not change.

    Args:
        config: The configuration of the rounds to come.
        path: The folder.
        num_rounds: The number of rounds of the run with this configuration.
        explicit: The keys that the user has given; None: all keys. If config.yaml was edited by hand, its other keys
            must be restored first.

    Raises:
        RunFolderError: The folder does not contain a run, a changed key must not change, config.yaml was edited by
            hand, the run has more rounds than `num_rounds`, or another process is writing into the folder.
        CheckpointError: All checkpoints are damaged.
    """
    folder = RunFolder(path)
    existing = folder.load_config()
    _refuse_lost_checkpoints(path, existing, config)
    if not run_changes(existing, config) and not folder.is_edited():
        return Reopened(folder, existing)
    with sole_writer(path):
        _, progress = load_newest(folder.storage, lazily=True) or ({}, Progress())
    before = folder.config_of(progress)
    if before is None and progress.rounds_done:
        raise RunFolderError(
            f"{path}: its newest checkpoint was saved by an earlier version, without the configuration: resume the run "
            "without changes first, and change it after its next checkpoint"
        )
    _refuse_edits(folder, before, explicit)
    before = before or existing
    refuse_changes(before, config, path)
    is_changed = bool(run_changes(before, config))
    _refuse_wrong_length(folder, progress.rounds_done, num_rounds, is_changed)
    return Reopened(folder, before, progress.rounds_done, is_changed)


def refuse_changes(before: Config, config: Config, path: Path) -> None:
    """Refuse to resume a run with changed keys that must not change.

    Raises:
        RunFolderError: The message names each such key, and why it must not change.
    """
    if refused := refused_changes(before, config):
        raise RunFolderError(
            f"{path}: contains a different run: {'; '.join(refused)}. Restore the old value, or start a new run"
        )


def save_config(run: Reopened, config: Config) -> None:
    """Make a configuration that of the run; a finished run whose keys have changed has not finished any more.

    Raises:
        RunFolderError: The folder or the storage is not writable, or another process is writing into the folder.
    """
    if saved_text(with_absolute_storage(config)) == saved_text(run.folder.load_config()) and not run.is_changed:
        return
    with sole_writer(run.folder.path):
        if run.is_changed:
            run.folder.reopen_result()  # first: a run with a result has finished, whatever its configuration says
        write_config(config, run.folder.path)


def _refuse_edits(folder: RunFolder, before: Config | None, explicit: Sequence[str] | None) -> None:
    """Refuse a config.yaml that was edited by hand in keys that the user has not given; warn if all were given."""
    if not folder.is_edited():
        return
    edits = run_changes(before, folder.load_config()) if before else []
    if explicit is None:
        _log.warning("%s: was edited by hand: it is replaced by the arguments of this call", folder.config_path)
        return
    left = [edit for edit in edits if not is_in(edit.key, explicit) and not any(is_in(k, [edit.key]) for k in explicit)]
    if left or before is None:
        raise RunFolderError(folder.edited_text(left))


def _refuse_wrong_length(folder: RunFolder, rounds_done: int, num_rounds: int, is_changed: bool) -> None:
    """Refuse a length with which the run would already be over."""
    if num_rounds < rounds_done:
        raise RunFolderError(
            f"{folder.path}: the run has finished {rounds_done} rounds, so it cannot have only {num_rounds}: give at "
            f"least {rounds_done} (train.rounds, or the train.epochs that make as many)"
        )
    if is_changed and folder.is_finished() and num_rounds == rounds_done:
        raise RunFolderError(
            f"{folder.path}: the run has finished all its {rounds_done} rounds, so no round is left for the changed "
            f"keys: also make it longer, such as --set train.rounds={2 * rounds_done}"
        )


def _refuse_lost_checkpoints(path: Path, existing: Config, config: Config) -> None:
    """Refuse a new `checkpoint.storage` in which the run's checkpoints would not be found."""
    before, now = (storage_of(c, path) for c in (existing, config))
    if before.where() != now.where() and latest_checkpoint(before) and not latest_checkpoint(now):
        raise RunFolderError(
            f"{path}: its checkpoints are in {before.where()}, but 'checkpoint.storage' now means {now.where()}: "
            "restore the old value, or move the checkpoints"
        )


def open_or_create(config: Config, path: Path) -> tuple[RunFolder, bool]:
    """Open the folder of a run, or create it; for jobs that are restarted until they finish.

    If the folder is missing and `checkpoint.storage` still has the run, the run is resumed from there.

    Args:
        config: The resolved configuration; keys of an existing run that may change get their new values.
        path: The folder.

    Returns:
        The folder, and whether its run has to be resumed.

    Raises:
        ConfigError: `checkpoint.storage` cannot be opened, or a package for it is missing.
        RunFolderError: The folder or the storage contains a different run or other files, is not writable, or another
            process is writing into the folder.
    """
    storage = storage_of(config, path)
    with created_and_locked(path):
        return _open_or_create_locked(config, path, storage)


def _open_or_create_locked(config: Config, path: Path, storage: Storage) -> tuple[RunFolder, bool]:
    file = path / CONFIG
    refuse_link(file)
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        torn = saved_text(with_absolute_storage(config)).startswith(text.rstrip("\0"))
        inside = set(path.iterdir()) - {path / LOCK}
        if text and not (torn and inside == {file}):
            _refuse_moved(path, config)
            _refuse_foreign(storage, config)
            return write_config(config, path), True
        torn_files = {file, *path.glob(f".{CONFIG}.*.tmp")}  # a crash while the folder was created
        if inside <= torn_files:
            for left in torn_files:
                left.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read or written: {error.strerror or error}") from error
    refuse_contents(path)
    _refuse_foreign(storage, config)
    return write_config(config, path), latest_checkpoint(storage) is not None


def _refuse_moved(path: Path, config: Config) -> None:
    """Refuse to resume a different run, or this run if its checkpoints would not be found."""
    existing = load_config(path / CONFIG, is_saved=True)
    _refuse_other(existing, config, str(path), f"ist train --resume {path}")
    _refuse_lost_checkpoints(path, existing, config)


def _refuse_foreign(storage: Storage, config: Config) -> None:
    """Refuse a storage that contains a different run of the same name."""
    if config.checkpoint.storage is None:
        return
    if CONFIG in storage.names():
        with storage.reading(CONFIG) as saved:
            text = saved.read_bytes().decode()
        where = storage.where(CONFIG)
        _refuse_other(validate(parse_yaml(text, where), where), config, storage.where())
    elif latest_checkpoint(storage):
        raise RunFolderError(
            f"{storage.where()}: contains checkpoints but no {CONFIG}, so their run is unknown: put the run's "
            f"{CONFIG} beside them, or give another folder"
        )


def _refuse_other(existing: Config, config: Config, where: str, command: str = "") -> None:
    """Refuse a folder or storage that contains a different run; `command` can change some keys of the run."""
    for change in run_changes(existing, config):
        able = command and is_in(change.key, CHANGEABLE)
        raise RunFolderError(
            f"{where}: contains a different run: its '{change.key}' is {change.old}, not {change.new}. Give another "
            f"folder, or restore the old value{f'. To change it: {command} --set {change.key}=...' if able else ''}"
        )
