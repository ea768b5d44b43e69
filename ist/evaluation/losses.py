"""Losses that torch.nn.functional does not have.

`LOSSES` maps the short names that a configuration may use in `train.loss` to import paths.
Where it sits: `ist/runs/build.py` looks up losses here.
Not here: the losses of torch.nn.functional, which `ist/runs/build.py` finds by name.
"""

import torch.nn.functional as F
from torch import Tensor

LOSSES = {"label_softmax": "ist.evaluation.losses:label_softmax", "next_token": "ist.evaluation.losses:next_token"}


def next_token(scores: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of predicting each token of a sequence from those before it.

    Args:
        scores: float, shape (batch, length, vocabulary): at each token, the scores of the next one.
        tokens: int64, shape (batch, length): the same sequence as the inputs; -100 is ignored.
    """
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def label_softmax(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy with a uniform distribution over an item's labels.

    Args:
        scores: float, shape (batch, number of labels).
        labels: int64, shape (batch, largest number of labels of an item): label numbers, padded with negative numbers.
    """
    present = labels >= 0
    chances = F.log_softmax(scores, dim=1).gather(1, labels.clamp(min=0))
    return -((chances * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)).mean()
