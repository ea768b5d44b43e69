"""Losses that torch.nn.functional does not have.

`LOSSES` maps short names, as used in a configuration's `train.loss`, to import paths.
"""

import torch.nn.functional as F
from torch import Tensor

LOSSES = {"label_softmax": "ist.evaluation.losses:label_softmax", "next_token": "ist.evaluation.losses:next_token"}


def next_token(scores: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of predicting each token of a sequence from those before it.

    Args:
        scores: float, shape (batch, length, vocabulary): after each token, the scores of the next one.
        tokens: int64, shape (batch, length): the same sequence as the inputs; -100 is left out.
    """
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def label_softmax(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy with all labels of an item, which share its probability equally.

    Args:
        scores: float, shape (batch, all labels).
        labels: int64, shape (batch, most labels of an item): label numbers; negative where there are no more.
    """
    present = labels >= 0
    chances = F.log_softmax(scores, dim=1).gather(1, labels.clamp(min=0))
    return -((chances * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)).mean()
