"""Text as bytes, in windows of fixed length: a language-modelling data set that needs no tokenizer.

Not here: predicting the next byte, which is the loss `next_token` (`ist/evaluation/losses.py`).
"""

import importlib.util
import re
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import TensorDataset

from ist.data.registry import Splits
from ist.errors import DataError
from ist.rng import Indices

SOURCES = ("topics", "stdlib", "kjv")
SPLITS = ("end", "spread")
_PASSAGE = 64

# Tests, what others installed, and parts that some systems package apart or some versions lack.
_NOT_LIBRARY = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"),
    *("idlelib", "turtledemo", "tkinter", "lib2to3", "ensurepip", "distutils", "pydoc_data"),
}
_ABOUT_THE_BUILD = re.compile(r"_sysconfigdata|sitecustomize|usercustomize")

_VERSE = re.compile(rb"^\w+:\d+ ", re.MULTILINE)


def text(
    root: Path | None = None,
    length: int = 64,
    held_out: float = 0.1,
    source: Literal["topics", "stdlib", "kjv"] = "topics",
    max_bytes: int | None = None,
    validation: bool = False,
    split: Literal["end", "spread"] = "end",
) -> Splits:
    """Load a text as windows of bytes: a file, all `.txt` files of a folder, or a text that the system has.

    Args:
        root: A file or a folder; default: `source`.
        length: Bytes of a window.
        held_out: Part of the text that is kept for testing.
        source: Without `root`: `topics`, the 460 kB of English that CPython brings along as the help topics of `pydoc`;
            `stdlib`, the sources of CPython's own library, 10 MB; or `kjv`, the King James Bible, 4 MB of English, by
            Debian's command `bible`.
        max_bytes: Use only so many bytes, the first; default: all.
        validation: Hold out as much text again, right before that for testing, instead of it: for tuning.
        split: Where the part for testing is: `end`, where the style may be another, as in an anthology; or `spread`,
            passages of 64 windows at even distances.

    Returns:
        Train and test; an item is (bytes, bytes): int64, shape (length,), twice the same.

    Raises:
        DataError: There is no text, or too little for a window of each part.
        ValueError: There is no such source or split, or both a source and a `root` are given.
    """
    if source not in SOURCES:
        raise ValueError(f"source is '{source}': expected one of {', '.join(SOURCES)}")
    if split not in SPLITS:
        raise ValueError(f"split is '{split}': expected one of {', '.join(SPLITS)}")
    if root is not None and source != "topics":
        raise ValueError(f"source is '{source}', but data.root is '{root}': give one of them")
    content = (_source(source) if root is None else _files(root))[:max_bytes]
    windows = len(content) // length
    testing, tuning = _held_out(windows, held_out, split)
    held = tuning if validation else testing
    train = np.setdiff1d(np.arange(windows), np.concatenate([testing, tuning]) if validation else testing)
    if min(len(train), len(held)) < 1:
        raise DataError(
            f"{root or source}: {len(content)} bytes make {windows} windows of {length}, of which {len(testing)} are "
            "held out: both parts need one"
        )
    tokens = torch.frombuffer(bytearray(content[: windows * length]), dtype=torch.uint8).long().view(windows, length)
    return Splits(*(TensorDataset(part, part) for part in (tokens[torch.from_numpy(w)] for w in (train, held))))


def _held_out(windows: int, part: float, split: str) -> tuple[Indices, Indices]:
    """Return the numbers of the windows that are kept for testing, and of those for tuning before them."""
    if split == "end":
        count = int(windows * part)
        return np.arange(windows - count, windows), np.arange(max(0, windows - 2 * count), windows - count)
    passages = np.arange(windows) // _PASSAGE

    def chosen(passage: Indices) -> Indices:
        # One more whenever so many passages have come that their part is a whole number.
        return np.flatnonzero(np.floor((passage + 1) * part) > np.floor(passage * part))

    return chosen(passages), chosen(passages + 1)


def _files(root: Path) -> bytes:
    return _joined(sorted(root.glob("*.txt")) if root.is_dir() else [root])


def _joined(files: Sequence[Path]) -> bytes:
    try:
        return b"\n".join(path.read_bytes() for path in files)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _source(source: str) -> bytes:
    if source == "kjv":
        return _bible()
    if source == "stdlib":
        return _library()
    spec = importlib.util.find_spec("pydoc_data.topics")
    if spec is None or spec.origin is None:
        raise DataError("this Python has no pydoc_data.topics: give a text file (data.root)")
    return _joined([Path(spec.origin)])


def _library() -> bytes:
    """Return the modules of CPython's library, sorted by path, that every installation of a version should have."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    relative = [path.relative_to(folder) for path in folder.rglob("*.py")]
    kept = [
        path
        for path in relative
        if not _NOT_LIBRARY.intersection(path.parts)
        and not path.parts[0].startswith("config-")
        and not _ABOUT_THE_BUILD.match(path.name)
    ]
    if not kept:
        raise DataError(f"{folder}: this Python keeps no sources of its library there: give a text file (data.root)")
    return _joined([folder / path for path in sorted(kept)])


def _bible() -> bytes:
    """Return all verses, one a line, without their numbers."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    try:
        # It would prefer a bible.data of the current folder.
        verses = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, cwd="/", check=True).stdout
    except FileNotFoundError as error:
        raise DataError(
            "source 'kjv' needs Debian's command 'bible': apt-get install bible-kjv; or give a text file (data.root)"
        ) from error
    except (OSError, subprocess.CalledProcessError) as error:
        raise DataError(f"source 'kjv': the command {' '.join(command)} failed: {error}") from error
    return _VERSE.sub(b"", verses)
