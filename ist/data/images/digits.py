"""scikit-learn's digits: 1,797 images of 8x8 pixels, 10 classes; they are installed with scikit-learn.

Where it sits: the loader `digits` of `ist/data/registry.py`.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from ist.data.registry import Splits
from ist.errors import DataError


def digits(root: Path | None = None, test_fraction: float = 0.2) -> Splits:
    """Load the digits as float32 in [-1, 1], shape (64,), and int64 targets in 0..9.

    Args:
        root: Must be None: the data come with scikit-learn.
        test_fraction: The fraction of the samples that is held out, every k-th one; in (0, 0.5].

    Raises:
        DataError: scikit-learn is not installed, or `root` is given.
        ValueError: `test_fraction` is out of range.
    """
    if root is not None:
        raise DataError(f"data.root is '{root}', but the digits come with scikit-learn: remove data.root")
    if not 0 < test_fraction <= 0.5:
        raise ValueError(f"test_fraction is {test_fraction}: expected a number in (0, 0.5]")
    table = torch.from_numpy(np.loadtxt(_find_csv(), delimiter=",", dtype=np.float32))
    inputs, targets = table[:, :-1] / 8 - 1, table[:, -1].long()
    held_out = torch.arange(len(targets)) % round(1 / test_fraction) == 0
    return Splits(
        TensorDataset(inputs[~held_out], targets[~held_out]),
        TensorDataset(inputs[held_out], targets[held_out]),
    )


def _find_csv() -> Path:
    """Find the file without importing scikit-learn: every process of a run would wait for that import."""
    package = find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise DataError("data set 'digits' comes with scikit-learn: pip install scikit-learn")
    path = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if not path.exists():
        raise DataError(
            f"{path}: no such file: this version of scikit-learn has the digits elsewhere; install the version of "
            "constraints.txt"
        )
    return path
