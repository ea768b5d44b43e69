"""Losses that torch.nn.functional does not have.

`LOSSES` maps short names, as used in a configuration's `train.loss`, to import paths.
"""

import torch.nn.functional as F
from torch import Tensor

LOSSES = {"next_token": "ist.losses:next_token"}


def next_token(scores: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of predicting each token of a sequence from those before it.

    Args:
        scores: float, shape (batch, length, vocabulary): after each token, the scores of the next one.
        tokens: int64, shape (batch, length): the same sequence as the inputs; -100 is left out.
    """
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
