"""Text as bytes, in windows of fixed length: a language-modeling data set that needs no tokenizer.

Where it sits: the loader `text` of `registry.py`.
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

# Tests, installed packages, and parts that some systems package separately or some versions lack.
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
    """Load a text as windows of bytes: a file, all `.txt` files of a folder, or a text on the system.

    Args:
        root: A file or a folder; None: use `source`.
        length: The number of bytes in a window.
        held_out: The fraction of the text for testing.
        source: Without `root`: `topics`, the help topics of CPython's `pydoc`, 460 kB of English; `stdlib`, the
            sources of CPython's standard library, 10 MB; or `kjv`, the King James Bible, 4 MB of English, from
            Debian's command `bible`.
        max_bytes: Use only this many bytes from the start; None: all.
        validation: Test on an equally large part right before the test part instead: for tuning.
        split: The position of the test part: `end`, where the style may differ, as in an anthology; or `spread`,
            passages of 64 windows at equal distances.

    Returns:
        Train and test; an item is (bytes, bytes): the same int64 tensor of shape (length,) twice.

    Raises:
        DataError: There is no text, or too little for one window in each part.
        ValueError: The source or the split is unknown, or both a source and a `root` are given.
    """
    if source not in SOURCES:
        raise ValueError(f"source is '{source}': expected one of {', '.join(SOURCES)}")
    if split not in SPLITS:
        raise ValueError(f"split is '{split}': expected one of {', '.join(SPLITS)}")
    if root is not None and source != "topics":
        raise ValueError(f"source is '{source}', but data.root is '{root}': give only one of them")
    content = (_source(source) if root is None else _files(root))[:max_bytes]
    windows = len(content) // length
    testing, tuning = _held_out(windows, held_out, split)
    held = tuning if validation else testing
    train = np.setdiff1d(np.arange(windows), np.concatenate([testing, tuning]) if validation else testing)
    if min(len(train), len(held)) < 1:
        raise DataError(
            f"{root or source}: {len(content)} bytes make {windows} windows of {length} bytes, and {len(testing)} of "
            "them are held out: each part needs at least one"
        )
    tokens = torch.frombuffer(bytearray(content[: windows * length]), dtype=torch.uint8).long().view(windows, length)
    return Splits(*(TensorDataset(part, part) for part in (tokens[torch.from_numpy(w)] for w in (train, held))))


def _held_out(windows: int, part: float, split: str) -> tuple[Indices, Indices]:
    """Return the numbers of the windows for testing, and of the windows for tuning before them."""
    if split == "end":
        count = int(windows * part)
        return np.arange(windows - count, windows), np.arange(max(0, windows - 2 * count), windows - count)
    passages = np.arange(windows) // _PASSAGE

    def chosen(passage: Indices) -> Indices:
        # Choose a passage whenever `part` times the number of passages so far reaches another integer.
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
        raise DataError("this Python has no pydoc_data.topics: set data.root to a text file")
    return _joined([Path(spec.origin)])


def _library() -> bytes:
    """Return the standard library's modules, sorted by path, that every installation of this CPython should have."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    relative = [path.relative_to(folder) for path in folder.rglob("*.py")]
    modules = [
        path
        for path in relative
        if not _NOT_LIBRARY.intersection(path.parts)
        and not path.parts[0].startswith("config-")
        and not _ABOUT_THE_BUILD.match(path.name)
    ]
    if not modules:
        raise DataError(f"{folder}: no sources of the standard library: set data.root to a text file")
    return _joined([folder / path for path in sorted(modules)])


def _bible() -> bytes:
    """Return all verses, one per line, without their numbers."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    try:
        # Run in '/': the command would prefer a file bible.data in the current folder.
        verses = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, cwd="/", check=True).stdout
    except FileNotFoundError as error:
        raise DataError(
            "source 'kjv' needs Debian's command 'bible': apt-get install bible-kjv, or set data.root to a text file"
        ) from error
    except (OSError, subprocess.CalledProcessError) as error:
        raise DataError(f"source 'kjv': the command {' '.join(command)} failed: {error}") from error
    return _VERSE.sub(b"", verses)
