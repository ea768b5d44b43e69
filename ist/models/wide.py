"""A network with one wide hidden layer, for sparse inputs and very many labels.

Not here: its split (`ist/neurons/` finds the hidden units, which are columns of both weights).
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WideClassifier(nn.Module):
    """A linear layer on sparse inputs, optional batch norm, ReLU, and a linear output.

    The first layer is a table with a row per word: its output is the weighted sum of the rows of an input's words.
    Initial rows have a standard deviation of 1, which suits inputs whose squared weights sum to about 1.

    Args:
        num_words: The number of input features.
        hidden: The number of hidden units.
        num_labels: The number of labels.
        norm: Whether the hidden units have batch norm.

    Raises:
        ValueError: A number is below 1.

    Reference: Yuan et al., arXiv 1910.02120, section 5 (extreme classification).
    """

    def __init__(self, num_words: int, hidden: int, num_labels: int, norm: bool = False) -> None:
        super().__init__()
        if min(num_words, hidden, num_labels) < 1:
            raise ValueError("num_words, hidden and num_labels: expected to be >= 1")
        self.words = nn.EmbeddingBag(num_words + 1, hidden, mode="sum", padding_idx=num_words)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.norm = nn.BatchNorm1d(hidden) if norm else nn.Identity()
        self.output = nn.Linear(hidden, num_labels)

    def forward(self, words: Tensor, weights: Tensor) -> Tensor:
        """Return the scores of each label: (batch, num_labels).

        Args:
            words: int64, (batch, words): the numbers of the nonzero features, padded with `num_words`.
            weights: float, (batch, words): their values, padded with 0.
        """
        hidden = F.relu(self.norm(self.words(words, per_sample_weights=weights) + self.bias))
        return cast(Tensor, self.output(hidden))
