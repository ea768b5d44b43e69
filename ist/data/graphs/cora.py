"""Cora: 2,708 papers that cite each other, in 7 classes, with the split of Planetoid (Z. Yang et al., 2016).

Where it sits: the loader `cora` of `ist/data/registry.py`.
Not here: batches of graphs (`graph.py`).
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ist.data.graphs.graph import Graph, GraphDataset, only, undirected
from ist.data.graphs.sparse import SparseRows
from ist.data.registry import Splits
from ist.errors import DataError

ARRAYS = ("indptr", "indices", "shape", "edges", "labels", "train", "val", "test")

_GET = (
    f"Set data.root to a .npz with the arrays {', '.join(ARRAYS)}: the rows of the features (CSR, every entry 1), the "
    "edges (2, n), the labels, and the nodes of each part. torch_geometric.datasets.Planetoid(root, 'Cora') has them"
)


def cora(root: Path | None = None, parts: int = 4, validation: bool = False) -> Splits:
    """Load Cora as graphs: float32 features (2708, 1433), rows of sum 1, and edges int64 (2, 10556).

    Args:
        root: The .npz file, or a folder that contains it as `cora.npz`.
        parts: The number of training items, over which the 140 training nodes are distributed evenly within each
            class; one item per worker.
        validation: Hold out the 500 validation nodes instead of the 1,000 test nodes: for tuning.

    Returns:
        Train: `parts` times the full graph, in the same memory, each with a different part of the training nodes as
        targets; test: the full graph with the held-out nodes as targets. All other targets are -100.

    Raises:
        DataError: The file is missing or malformed.
        ValueError: `parts` is less than 1 or more than there are training nodes.
    """
    path = _find(root)
    arrays = _read(path)
    width = int(arrays["shape"][1])
    labels = arrays["labels"].astype(np.int64)
    offsets = arrays["indptr"].astype(np.int64)
    lengths = np.diff(offsets)
    if len(lengths) != len(labels):
        raise DataError(
            f"{path}: features of {len(lengths)} nodes, but labels of {len(labels)}: expected equal numbers"
        )
    values = np.repeat(1 / np.maximum(lengths, 1), lengths).astype(np.float32)
    features = SparseRows(offsets, arrays["indices"].astype(np.int32), values, width).dense()
    edges = torch.from_numpy(undirected(arrays["edges"].astype(np.int64), len(labels)))

    train = arrays["train"].astype(np.int64)
    if not 1 <= parts <= len(train):
        raise ValueError(f"parts is {parts}: expected 1 to {len(train)}, the number of training nodes")
    by_class = train[np.argsort(labels[train], kind="stable")]
    held_out = arrays["val" if validation else "test"].astype(np.int64)
    return Splits(
        GraphDataset([Graph(features, edges, only(labels, by_class[part::parts])) for part in range(parts)]),
        GraphDataset([Graph(features, edges, only(labels, held_out))]),
    )


def _find(root: Path | None) -> Path:
    if root is None:
        raise DataError(f"no package of this system provides Cora. {_GET}")
    path = root / "cora.npz" if root.is_dir() else root
    if not path.is_file():
        raise DataError(f"{path}: no such file. {_GET}")
    return path


def _read(path: Path) -> dict[str, NDArray[np.integer]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in ARRAYS}
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a .npz of Cora: {error}. {_GET}") from error
