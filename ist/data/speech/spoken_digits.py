"""Free Spoken Digits: 3,000 recordings of the digits by 6 speakers (Z. Jackson et al., CC-BY-SA-4.0).

Where it sits: the loader `spoken_digits` of `ist/data/registry.py`.
Not here: spectrograms (`log_mel.py`).
"""

import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ist.data.registry import Splits
from ist.data.speech.log_mel import Samples, as_splits, log_mel, read_wave
from ist.errors import DataError
from ist.rng import Indices

RATE_HZ = 8000

HELD_OUT_EACH = 5
"""The number of recordings per digit and speaker for testing, and the same number for validation."""

_GET = (
    "Set data.root to the folder 'recordings' of a copy of github.com/Jakobovski/free-spoken-digit-dataset, or to a "
    ".npz with the arrays samples, offsets, digit, speaker and index"
)


class _Recordings(NamedTuple):
    samples: list[Samples]
    digits: Indices
    speakers: NDArray[np.str_]
    indices: Indices


def spoken_digits(
    root: Path | None = None, split: Literal["official", "speaker"] = "official", validation: bool = False
) -> Splits:
    """Load the recordings as log-mel spectrograms, standardized float32 of shape (4096,), and int64 targets in 0..9.

    Args:
        root: A folder with files `{digit}_{speaker}_{index}.wav` of 8 kHz, or with such a folder `recordings`; or a
            .npz with the arrays samples (int16, all recordings), offsets (recordings + 1,), digit, speaker and index.
        split: The test data: `official`, the recordings 0 to 4 of each digit and speaker; or `speaker`, all recordings
            of the last speaker by name.
        validation: Hold out the recordings 5 to 9, or the second to last speaker, instead: for tuning.

    Returns:
        Train (never with the test data) and the held-out recordings; both are standardized with the statistics of the
        former.

    Raises:
        DataError: The recordings are missing or malformed, or a part has none.
        ValueError: The split is unknown.
    """
    if split not in ("official", "speaker"):
        raise ValueError(f"split is '{split}': expected 'official' or 'speaker'")
    found = _read(root)
    if split == "official":
        groups = found.indices // HELD_OUT_EACH
        test, tuning = 0, 1
    else:
        names, groups = np.unique(found.speakers, return_inverse=True)
        test, tuning = len(names) - 1, len(names) - 2
    wanted = tuning if validation else test
    train, held_out = (groups != test) & (groups != wanted), groups == wanted
    if not train.any() or not held_out.any():
        raise DataError(
            f"{root}: {train.sum()} recordings for training, {held_out.sum()} held out: each part needs at least one"
        )
    spectrograms = log_mel(found.samples, RATE_HZ)
    targets = torch.from_numpy(found.digits)
    parts = [torch.from_numpy(np.flatnonzero(part)) for part in (train, held_out)]
    return as_splits(spectrograms[parts[0]], targets[parts[0]], spectrograms[parts[1]], targets[parts[1]])


def _read(root: Path | None) -> _Recordings:
    if root is None:
        raise DataError(f"no package of this system provides the spoken digits. {_GET}")
    if root.is_file():
        return _read_arrays(root)
    folder = root / "recordings" if (root / "recordings").is_dir() else root
    paths = sorted(folder.glob("*.wav"))
    if not paths:
        raise DataError(f"{root}: no such file, or a folder without recordings. {_GET}")
    names = [path.stem.split("_") for path in paths]
    for path, name in zip(paths, names, strict=True):
        if len(name) != 3 or name[0] not in "0123456789" or not name[2].isdecimal():
            raise DataError(f"{path}: expected a name like '7_jackson_32.wav': digit, speaker, index")
    return _Recordings(
        [read_wave(path, RATE_HZ) for path in paths],
        np.array([int(name[0]) for name in names], dtype=np.int64),
        np.array([name[1] for name in names]),
        np.array([int(name[2]) for name in names], dtype=np.int64),
    )


def _read_arrays(path: Path) -> _Recordings:
    try:
        with np.load(path, allow_pickle=False) as stored:
            samples, offsets = stored["samples"], stored["offsets"]
            digits, speakers, indices = stored["digit"], stored["speaker"], stored["index"]
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a .npz of the spoken digits: {error}. {_GET}") from error
    if not len(digits) == len(speakers) == len(indices) == len(offsets) - 1:
        raise DataError(
            f"{path}: has {len(digits)} digits, {len(speakers)} speakers, {len(indices)} indices and {len(offsets)} "
            "offsets: expected equal numbers, and one more offset"
        )
    recordings = np.split(samples.astype(np.int16, copy=False), offsets[1:-1])
    return _Recordings(recordings, digits.astype(np.int64), speakers, indices.astype(np.int64))
