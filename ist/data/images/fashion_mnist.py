"""Fashion-MNIST: 60,000 + 10,000 gray images of 28x28 pixels, 10 classes (Zalando Research, MIT license).

Where it sits: the loader `fashion_mnist` of `ist/data/registry.py`.
Not here: the file format (`idx.py`).
"""

from pathlib import Path

from torch import Tensor
from torch.utils.data import TensorDataset

from ist.data.images.idx import read_idx
from ist.data.registry import Splits
from ist.errors import DataError

DEBIAN_ROOT = Path("/usr/share/datasets/fashion-mnist")

NUM_VALIDATION = 10_000

_MEAN, _STD = 0.2860, 0.3530  # of the training pixels scaled to [0, 1]


def fashion_mnist(root: Path | None = None, validation: bool = False, flat: bool = True) -> Splits:
    """Load Fashion-MNIST as standardized float32 of shape (784,), or (1, 28, 28), and int64 targets in 0..9.

    Args:
        root: A folder with the four standard IDX files, gzipped or not; None: the folder of Debian's package.
        validation: Hold out the last 10,000 training images instead of the test images: for tuning.
        flat: Whether an image is one row of 784 pixels; otherwise it is a channel of 28 x 28 pixels.

    Raises:
        DataError: A file is missing or malformed.
    """
    folder = root or DEBIAN_ROOT
    train = _part(folder, "train", flat)
    if validation:
        inputs, targets = train.tensors
        return Splits(
            TensorDataset(inputs[:-NUM_VALIDATION], targets[:-NUM_VALIDATION]),
            TensorDataset(inputs[-NUM_VALIDATION:], targets[-NUM_VALIDATION:]),
        )
    return Splits(train, _part(folder, "t10k", flat))


def _part(folder: Path, name: str, flat: bool) -> TensorDataset:
    pixels = read_idx(_find(folder, f"{name}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{name}-labels-idx1-ubyte"))
    if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
        raise DataError(f"{folder}: {name} images {tuple(pixels.shape)} do not match labels {tuple(labels.shape)}")
    inputs: Tensor = (pixels.flatten(1).float() / 255 - _MEAN) / _STD
    return TensorDataset(inputs if flat else inputs.view(-1, 1, *pixels.shape[1:]), labels.long())


def _find(folder: Path, stem: str) -> Path:
    for candidate in (folder / f"{stem}.gz", folder / stem):
        if candidate.exists():
            return candidate
    raise DataError(
        f"{folder}: no '{stem}.gz' or '{stem}'. On Debian: apt-get install dataset-fashion-mnist; "
        "elsewhere set data.root to a folder with the four standard IDX files"
    )
