"""The weights of a run: those of the trained network, or of its newest checkpoint.

Where it sits: `ist export` reads weights here, and writes them by the other files of this room.
Not here: building the network (`ist/runs/build.py`), reading a checkpoint (`ist/storage/checkpoint.py`).
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ist.errors import RunFolderError
from ist.network.compiled import plain_name
from ist.storage.checkpoint import load_newest, open_tensors
from ist.storage.run_folder import RunFolder
from ist.storage.shards.read import SavedTensors

_AVERAGE = "average/module."
"""Prefix of the average over rounds in a checkpoint (`ist/training/average.py`)."""


@dataclass(frozen=True)
class RunWeights:
    """The weights of a run.

    Attributes:
        tensors: The tensors of the network's state dict; each is read when it is asked for.
        rounds_done: The rounds after which they were saved, if the run has not finished; None for a finished run.
    """

    tensors: SavedTensors
    rounds_done: int | None


def run_weights(folder: RunFolder, names: Collection[str] | None) -> RunWeights:
    """Return the weights of a run: of the trained network, or of the newest checkpoint if the run has not finished.

    With `recipe.average`, they are the average over rounds.

    Args:
        folder: The run folder.
        names: The names in the network's state dict; None if the network cannot be built. They are needed only for a
            run that has not finished, because a checkpoint has other tensors too.

    Raises:
        CheckpointError: The file is damaged, or lacks a tensor of the network.
        RunFolderError: The run has no weights yet, or it has not finished and the names are unknown.
    """
    if folder.is_finished():
        return RunWeights(_plain(open_tensors(folder.path / "model.safetensors")), None)
    newest = load_newest(folder.storage, lazily=True)
    if newest is None:
        raise RunFolderError(
            f"{folder.path}: the run has no checkpoint yet, so there are no weights: run ist train --resume "
            f"{folder.path}"
        )
    if names is None:
        raise RunFolderError(
            f"{folder.path}: the run has not finished, and its network was passed from Python, so that its tensors in "
            "the checkpoint are unknown: resume the run to its end first"
        )
    assert isinstance(newest[0], SavedTensors)
    saved, progress = _plain(newest[0]), newest[1]
    prefix = _AVERAGE if any(name.startswith(_AVERAGE) for name in saved) else ""
    if missing := [name for name in names if prefix + name not in saved]:
        raise RunFolderError(
            f"{folder.path}: the newest checkpoint has no '{missing[0]}' ({len(missing)} tensors missing): it belongs "
            "to another network than that of config.yaml (model)"
        )
    return RunWeights(saved.named({name: prefix + name for name in names}), progress.rounds_done)


def _plain(tensors: SavedTensors) -> SavedTensors:
    return tensors.named({plain_name(name): name for name in tensors})


def check_target(path: Path) -> None:
    """Refuse a folder to write to that contains files.

    Raises:
        RunFolderError: It is a file, or not empty.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise RunFolderError(f"{path}: is not empty: give a new folder")
