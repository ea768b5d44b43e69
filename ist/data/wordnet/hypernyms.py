"""What is it a kind of? WordNet's glosses, and the synsets that each explained noun is a kind or an instance of.

Extreme multi-label classification: of 10,486 labels an item has a few. Every fifth synset is for testing.
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
"""What fills up the labels of an item that has fewer than another."""

_MIN_WORD, _MIN_LABEL = 3, 2  # a word or a label of fewer training items is left out

SparseBatch = tuple[tuple[Tensor, Tensor], Tensor]


class SparseDataset(BatchedDataset):
    """Items with weighted words and several labels; a batch is ((words, weights), labels).

    Args:
        words: int32, shape (items, max_words), filled up with `num_words`.
        weights: float32, shape (items, max_words), filled up with 0.
        labels: int32, shape (items, most labels of an item), each row sorted, filled up with -1.
        num_words: Words are numbered from 0 to this, which stands for none.
        num_labels: Labels are numbered from 0 to below this.
    """

    def __init__(self, words: Tensor, weights: Tensor, labels: Tensor, num_words: int, num_labels: int) -> None:
        self.words, self.weights, self.labels = words, weights, labels
        self.num_words, self.num_labels = num_words, num_labels

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.words)

    def __getitem__(self, index: int) -> SparseBatch:
        """Return one item, without the dimension of the batch."""
        return (self.words[index].long(), self.weights[index]), self.labels[index].long()

    def batch(self, indices: Indices) -> SparseBatch:
        """Return the items at `indices`.

        Returns:
            ((words int64 (batch, max_words), weights float32 (batch, max_words)), labels int64 (batch, most labels)).
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
    """Load glosses as TF-IDF rows of length 1, and all hypernyms within `levels` steps as labels.

    Words are those of at least three training items, labels those of at least two, and both are the same with and
    without `validation`: of WordNet 3.0 18,182 words and, with 3 levels, 10,486 labels (1 level: 9,494). They are the
    attributes `num_words` and `num_labels` of both parts.

    Args:
        root: WordNet's `data.noun` or its folder; default: where Debian's package puts it.
        levels: How far up; at least 1.
        validation: Hold out every tenth training item instead of the test items: for tuning.
        max_words: Words of an item, those with the largest weights; at least 1.

    Returns:
        Train and test, `SparseDataset`s of those glosses that have a known label.

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
        raise DataError(f"{len(numbers)} nouns leave {len(train)} items to train on and {len(test)} to test: too few")
    tensors = torch.from_numpy(words), torch.from_numpy(weights), torch.from_numpy(labels)
    everything = SparseDataset(*tensors, rows.width, num_labels)
    return Splits(everything.part(train), everything.part(test))


def _labels(offsets: Indices, found: Indices, fitted: Indices) -> tuple[NDArray[np.int32], int]:
    """Number the labels that enough of the `fitted` items have, and return all items' in rows, and how many."""
    entries, _ = expand(offsets, fitted)
    known = np.bincount(found[entries], minlength=len(offsets) - 1) >= _MIN_LABEL
    number_of = np.cumsum(known) - 1
    kept = known[found]
    items = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[kept]
    columns = _rank(items)
    labels = np.full((len(offsets) - 1, int(columns.max(initial=0)) + 1), NO_LABEL, dtype=np.int32)
    labels[items, columns] = number_of[found[kept]]
    return labels, int(known.sum())


def _heaviest(rows: SparseRows, most: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the `most` heaviest words of each row, heaviest first, and their weights, again of length 1."""
    of_row = rows.row_of_entries()
    order = np.lexsort((rows.columns, -rows.values, of_row))
    columns = _rank(of_row)  # the same for the ordered entries, as rows stay together
    kept = columns < most
    order, of_row, columns = order[kept], of_row[kept], columns[kept]
    words = np.full((len(rows), most), rows.width, dtype=np.int32)
    weights = np.zeros((len(rows), most), dtype=np.float32)
    words[of_row, columns] = rows.columns[order]
    weights[of_row, columns] = rows.values[order]
    return words, weights / np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), np.float32(1e-12))


def _rank(groups: Indices) -> Indices:
    """Return the position of each entry within its group; `groups` is sorted."""
    return np.arange(len(groups), dtype=np.int64) - np.searchsorted(groups, groups)
