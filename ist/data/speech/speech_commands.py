"""Google Speech Commands: 105,829 recordings of 35 words, of one second (P. Warden, arXiv 1804.03209, version 2).

The spectrograms of the full set take 1.7 GB, and each process of a run computes them.

Where it sits: the loader `speech_commands` of `ist/data/registry.py`.
Not here: spectrograms (`log_mel.py`).
"""

from pathlib import Path

import torch
from torch import Tensor

from ist.data.registry import Splits
from ist.data.speech.log_mel import NUM_FRAMES, NUM_MELS, as_splits, log_mel, read_wave
from ist.errors import DataError

RATE_HZ = 16_000

VALIDATION_LIST, TESTING_LIST = "validation_list.txt", "testing_list.txt"

_AT_ONCE = 2048

_GET = "Set data.root to the unpacked folder of speech_commands_v0.02.tar.gz, as its publishers provide it"


def speech_commands(root: Path | None = None, validation: bool = False) -> Splits:
    """Load the recordings as log-mel spectrograms, standardized float32 of shape (4096,), and int64 targets in 0..34.

    Args:
        root: The standard folder: for each word a folder of .wav files with 16 kHz, and two lists of files.
        validation: Hold out the files of `validation_list.txt` instead of those of `testing_list.txt`: for tuning.

    Returns:
        Train (the files in neither list) and the held-out files; both are standardized with the statistics of the
        former. Targets are the numbers of the words' folders, sorted by name; folders whose name starts with '_', such
        as the background noise, are skipped.

    Raises:
        DataError: The folder is missing or malformed, or a part has no files.
    """
    if root is None:
        raise DataError(f"no package of this system provides Speech Commands. {_GET}")
    words = (
        sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] not in "._")
        if root.is_dir()
        else []
    )
    if not words:
        raise DataError(f"{root}: has no folders of words. {_GET}")
    lists = {name: _listed(root, name) for name in (VALIDATION_LIST, TESTING_LIST)}
    files = [f"{word}/{path.name}" for word in words for path in sorted((root / word).glob("*.wav"))]
    missing = set.union(*lists.values()) - set(files)
    if missing:
        raise DataError(f"{root}: {len(missing)} listed files are missing, such as '{min(missing)}'")
    wanted = lists[VALIDATION_LIST if validation else TESTING_LIST]
    train = [file for file in files if not any(file in listed for listed in lists.values())]
    held_out = [file for file in files if file in wanted]
    if not train or not held_out:
        raise DataError(
            f"{root}: {len(train)} files for training, {len(held_out)} held out: each part needs at least one"
        )
    return as_splits(*_loaded(root, train, words), *_loaded(root, held_out, words))


def _listed(root: Path, name: str) -> set[str]:
    try:
        return set((root / name).read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{root / name}: cannot be read: {error}. {_GET}") from error


def _loaded(root: Path, files: list[str], words: list[str]) -> tuple[Tensor, Tensor]:
    spectrograms = torch.empty(len(files), NUM_MELS, NUM_FRAMES)
    for start in range(0, len(files), _AT_ONCE):
        some = files[start : start + _AT_ONCE]
        spectrograms[start : start + len(some)] = log_mel([read_wave(root / file, RATE_HZ) for file in some], RATE_HZ)
    number_of = {word: number for number, word in enumerate(words)}
    return spectrograms, torch.tensor([number_of[file.partition("/")[0]] for file in files])
