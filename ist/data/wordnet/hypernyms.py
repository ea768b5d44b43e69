"""WordNet's glosses, labeled with the hypernyms of the noun: the synsets of which it is a kind or an instance.

This is extreme multi-label classification: an item has a few of 10,486 labels. Every fifth synset is for testing.

Where it sits: the loader `wordnet_hypernyms` of `ist/data/registry.py`.
Not here: reading the file (`nouns.py`), features (`tfidf.py`).
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ist.data.batched import BatchedDataset
from ist.data.graphs.sparse import SparseRows, expand
from ist.data.registry import Splits
from ist.data.wordnet.nouns import ancestors, read_nouns
from ist.data.wordnet.tfidf import tfidf
from ist.errors import DataError
from ist.rng import Indices

TEST_EVERY, VALIDATION_EVERY = 5, 10

NO_LABEL = -1
"""The padding for items with fewer labels than others."""

_MIN_WORD, _MIN_LABEL = 3, 2  # words and labels of fewer training items are dropped

SparseBatch = tuple[tuple[Tensor, Tensor], Tensor]


class SparseDataset(BatchedDataset):
    """Items with weighted words and several labels; a batch is ((words, weights), labels).

    Args:
        words: int32, shape (items, max_words), padded with `num_words`.
        weights: float32, shape (items, max_words), padded with 0.
        labels: int32, shape (items, largest number of labels of an item), each row sorted, padded with -1.
        num_words: Words have numbers from 0 to `num_words` - 1; `num_words` is the padding.
        num_labels: Labels have numbers from 0 to `num_labels` - 1.
    """

    def __init__(self, words: Tensor, weights: Tensor, labels: Tensor, num_words: int, num_labels: int) -> None:
        self.words, self.weights, self.labels = words, weights, labels
        self.num_words, self.num_labels = num_words, num_labels

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.words)

    def __getitem__(self, index: int) -> SparseBatch:
        """Return one item, without a batch dim."""
        return (self.words[index].long(), self.weights[index]), self.labels[index].long()

    def batch(self, indices: Indices) -> SparseBatch:
        """Return the items at `indices`.

        Returns:
            ((words int64 (batch, max_words), weights float32 (batch, max_words)), labels int64 (batch, max_labels)).
        """
        rows = torch.from_numpy(indices)
        return (self.words[rows].long(), self.weights[rows]), self.labels[rows].long()

    def part(self, indices: Indices) -> "SparseDataset":
        """Return a copy of the items at `indices`."""
        rows = torch.from_numpy(indices)
        return SparseDataset(self.words[rows], self.weights[rows], self.labels[rows], self.num_words, self.num_labels)


def wordnet_hypernyms(
    root: Path | None = None, levels: int = 3, validation: bool = False, max_words: int = 32
) -> Splits:
    """Load glosses as TF-IDF rows of norm 1, with all hypernyms within `levels` steps as labels.

    The vocabulary is the words of at least three training items, the labels are those of at least two; both are the
    same with and without `validation`. For WordNet 3.0 there are 18,182 words and, with 3 levels, 10,486 labels (1
    level: 9,494). Both parts have these numbers as attributes `num_words` and `num_labels`.

    Args:
        root: WordNet's `data.noun` or its folder; None: the folder of Debian's package.
        levels: The largest number of steps up to a hypernym; at least 1.
        validation: Hold out every tenth training item instead of the test items: for tuning.
        max_words: The largest number of words of an item, those with the largest weights; at least 1.

    Returns:
        Train and test: `SparseDataset`s of the glosses with a known label.

    Raises:
        DataError: The file is missing, malformed or too small.
        ValueError: An argument is out of range.
    """
    if levels < 1 or max_words < 1:
        raise ValueError(f"levels is {levels} and max_words {max_words}: expected at least 1 of each")
    nouns = read_nouns(root)
    numbers = np.arange(len(nouns.classes), dtype=np.int64)
    is_test = numbers % TEST_EVERY == TEST_EVERY - 1
    rows, _ = tfidf(nouns.glosses, numbers[~is_test], min_documents=_MIN_WORD)
    labels, num_labels = _labels(*ancestors(nouns, levels), numbers[~is_test])
    words, weights = _heaviest(rows, max_words)

    usable = labels[:, 0] != NO_LABEL
    train, test = numbers[~is_test & usable], numbers[is_test & usable]
    if validation:
        held_out = np.arange(len(train)) % VALIDATION_EVERY == VALIDATION_EVERY - 1
        train, test = train[~held_out], train[held_out]
    if not len(train) or not len(test):
        raise DataError(
            f"{len(numbers)} nouns are too few: they give {len(train)} training and {len(test)} test items with "
            "a known label, and each part needs at least one"
        )
    tensors = torch.from_numpy(words), torch.from_numpy(weights), torch.from_numpy(labels)
    everything = SparseDataset(*tensors, rows.width, num_labels)
    return Splits(everything.part(train), everything.part(test))


def _labels(offsets: Indices, found: Indices, fitted: Indices) -> tuple[NDArray[np.int32], int]:
    """Number the labels of enough `fitted` items; return the labels of all items as padded rows, and their number."""
    entries, _ = expand(offsets, fitted)
    known = np.bincount(found[entries], minlength=len(offsets) - 1) >= _MIN_LABEL
    number_of = np.cumsum(known) - 1
    is_known = known[found]
    items = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[is_known]
    columns = _rank(items)
    labels = np.full((len(offsets) - 1, int(columns.max(initial=0)) + 1), NO_LABEL, dtype=np.int32)
    labels[items, columns] = number_of[found[is_known]]
    return labels, int(known.sum())


def _heaviest(rows: SparseRows, most: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the `most` words with the largest weights of each row, in this order, and their weights, of norm 1."""
    of_row = rows.row_of_entries()
    order = np.lexsort((rows.columns, -rows.values, of_row))
    columns = _rank(of_row)  # valid for the ordered entries too, because rows stay together
    selected = columns < most
    order, of_row, columns = order[selected], of_row[selected], columns[selected]
    words = np.full((len(rows), most), rows.width, dtype=np.int32)
    weights = np.zeros((len(rows), most), dtype=np.float32)
    words[of_row, columns] = rows.columns[order]
    weights[of_row, columns] = rows.values[order]
    return words, weights / np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), np.float32(1e-12))


def _rank(groups: Indices) -> Indices:
    """Return the position of each entry within its group; `groups` is sorted."""
    return np.arange(len(groups), dtype=np.int64) - np.searchsorted(groups, groups)
