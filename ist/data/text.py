"""Text as bytes, in windows of fixed length: a language-modelling data set that needs no tokenizer.

Not here: predicting the next byte, which is the loss `next_token` (`ist/losses.py`).
"""

import importlib.util
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from ist.data import Splits
from ist.errors import DataError


def text(root: Path | None = None, length: int = 64, held_out: float = 0.1) -> Splits:
    """Load a text file, or all `.txt` files of a folder, as windows of bytes.

    Args:
        root: A file or a folder; default: the 460 kB of English that CPython brings along as the help topics of
            `pydoc`.
        length: Bytes of a window.
        held_out: Part of the text, at its end, that is kept for testing.

    Returns:
        Train and test; an item is (bytes, bytes): int64, shape (length,), twice the same.

    Raises:
        DataError: There is no text, or too little for a window of each part.
    """
    if root is None:
        spec = importlib.util.find_spec("pydoc_data.topics")
        if spec is None or spec.origin is None:
            raise DataError("this Python has no pydoc_data.topics: give a text file (data.root)")
        files = [Path(spec.origin)]
    else:
        files = sorted(root.glob("*.txt")) if root.is_dir() else [root]
    try:
        content = b"\n".join(path.read_bytes() for path in files)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
    windows = len(content) // length
    num_test = int(windows * held_out)
    if windows - num_test < 1 or num_test < 1:
        raise DataError(
            f"{root or files[0]}: {len(content)} bytes make {windows} windows of {length}, of which {num_test} are "
            "held out: both parts need one"
        )
    tokens = torch.frombuffer(bytearray(content[: windows * length]), dtype=torch.uint8).long().view(windows, length)
    train, test = tokens[: windows - num_test], tokens[windows - num_test :]
    return Splits(TensorDataset(train, train), TensorDataset(test, test))
