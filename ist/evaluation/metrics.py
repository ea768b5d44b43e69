"""What is reported of the whole network beside its loss.

`METRICS` maps short names, as used in a configuration's `evaluate.metric`, to import paths of `Metric`s; any other may
be named by its own. `ist/evaluation/evaluate.py` sums them over batches.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ist.data.batched import IGNORED

METRICS = {
    "accuracy": "ist.evaluation.metrics:ACCURACY",
    "bits_per_byte": "ist.evaluation.metrics:BITS_PER_BYTE",
    "precision": "ist.evaluation.metrics:PRECISION",
    "rmse": "ist.evaluation.metrics:RMSE",
}


def _as_it_is(mean: float) -> float:
    return mean


@dataclass(frozen=True)
class Metric:
    """Means over a data set, each of a number that batches add up to.

    Attributes:
        names: What it reports; the first is what tables show.
        batch: From (scores, targets) of a batch to the sum of each and how many they are of.
        finish: What is reported, of a mean.
        higher_is_better: Whether more is better.

    Example:
        >>> import torch
        >>> def in_first_two(scores, labels):
        ...     best = scores.topk(2, dim=1).indices
        ...     return (best == labels[:, None]).any(dim=1).sum()[None].double(), len(labels)
        >>> metric = ist.Metric(names=("in_first_two",), batch=in_first_two)
        >>> scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
        >>> metric.values(*metric.batch(scores, torch.tensor([1, 2])))
        {'in_first_two': 0.5}
    """

    names: tuple[str, ...]
    batch: Callable[[Tensor, Any], tuple[Tensor, int]]
    finish: Callable[[float], float] = _as_it_is
    higher_is_better: bool = True

    def values(self, sums: Tensor, count: int) -> Mapping[str, float]:
        """Return what is reported, by name, of sums over `count` things."""
        return {name: self.finish(float(total) / count) for name, total in zip(self.names, sums, strict=True)}


def _correct(scores: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Scores (things, classes), and class numbers (things,), of which some may be ignored."""
    if targets.is_floating_point():
        raise ValueError("accuracy is of class numbers: set evaluate.metric to 'rmse' or 'none'")
    counts = targets != IGNORED
    return ((scores.argmax(dim=1) == targets) & counts).sum()[None].double(), int(counts.sum())


def _bits(scores: Tensor, tokens: Tensor) -> tuple[Tensor, int]:
    """Scores (batch, length, 256) after each byte, and the bytes (batch, length)."""
    chances = torch.log_softmax(scores[:, :-1].float(), dim=-1)
    spent = -chances.gather(-1, tokens[:, 1:, None]).double().sum() / math.log(2)
    return spent[None], tokens[:, 1:].numel()


_TOP = (1, 3, 5)


def _precision(scores: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Scores (batch, all labels), and label numbers (batch, most of an item), negative where there are no more."""
    best = scores.topk(max(_TOP), dim=1).indices
    right = (best[:, :, None] == labels[:, None, :]).any(dim=2)
    return torch.stack([right[:, :top].double().mean(dim=1).sum() for top in _TOP]), len(labels)


def _squared_errors(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    if outputs.shape != targets.shape:  # they would be spread over each other
        raise ValueError(f"outputs have the shape {tuple(outputs.shape)}, targets {tuple(targets.shape)}")
    return (outputs.double() - targets).square().sum()[None], targets.numel()


ACCURACY = Metric(("accuracy",), _correct)
BITS_PER_BYTE = Metric(("bits_per_byte",), _bits, higher_is_better=False)
PRECISION = Metric(tuple(f"precision_at_{top}" for top in _TOP), _precision)
"""The part of the best-scored 1, 3 and 5 labels that an item has. Reference: Prabhu and Varma, KDD 2014 (P@k)."""
RMSE = Metric(("rmse",), _squared_errors, math.sqrt, higher_is_better=False)
