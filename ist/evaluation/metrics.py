"""Metrics of the full network, reported beside its loss.

`METRICS` maps the short names that a configuration may use in `evaluate.metric` to import paths of `Metric` objects. A
configuration may also give the import path of another `Metric`. `ist/evaluation/evaluate.py` sums them over batches.

Where it sits: `ist/runs/build.py` looks up metrics here.
Not here: evaluating a network (`evaluate.py`), losses (`losses.py`).
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


def _identity(mean: float) -> float:
    return mean


@dataclass(frozen=True)
class Metric:
    """One or more values over a data set, each a function of a mean.

    Attributes:
        names: The names of the values; tables show the first.
        batch: Maps (scores, targets) of a batch to the sum for each value, and the number of items in the sums.
        finish: Maps a mean to the reported value.
        higher_is_better: Whether a higher value is better.

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
    finish: Callable[[float], float] = _identity
    higher_is_better: bool = True

    def values(self, sums: Tensor, count: int) -> Mapping[str, float]:
        """Return the reported values by name, from sums over `count` items."""
        return {name: self.finish(float(total) / count) for name, total in zip(self.names, sums, strict=True)}


def _correct(scores: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Count correct classes; scores (items, classes), class numbers (items,), some of which may be `IGNORED`."""
    if targets.is_floating_point():
        raise ValueError("accuracy needs class numbers as targets: set evaluate.metric to 'rmse' or 'none'")
    counts = targets != IGNORED
    return ((scores.argmax(dim=1) == targets) & counts).sum()[None].double(), int(counts.sum())


def _bits(scores: Tensor, tokens: Tensor) -> tuple[Tensor, int]:
    """Sum the bits of each next byte; scores (batch, length, 256) at each byte, bytes (batch, length)."""
    chances = torch.log_softmax(scores[:, :-1].float(), dim=-1)
    spent = -chances.gather(-1, tokens[:, 1:, None]).double().sum() / math.log(2)
    return spent[None], tokens[:, 1:].numel()


_TOP = (1, 3, 5)


def _precision(scores: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Sum the precision at `_TOP`; scores (batch, labels), label numbers (batch, most per item), padded negative."""
    best = scores.topk(max(_TOP), dim=1).indices
    right = (best[:, :, None] == labels[:, None, :]).any(dim=2)
    return torch.stack([right[:, :top].double().mean(dim=1).sum() for top in _TOP]), len(labels)


def _squared_errors(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    if outputs.shape != targets.shape:  # they would be broadcast
        raise ValueError(f"outputs have the shape {tuple(outputs.shape)}, targets {tuple(targets.shape)}")
    return (outputs.double() - targets).square().sum()[None], targets.numel()


ACCURACY = Metric(("accuracy",), _correct)
BITS_PER_BYTE = Metric(("bits_per_byte",), _bits, higher_is_better=False)
PRECISION = Metric(tuple(f"precision_at_{top}" for top in _TOP), _precision)
"""The fraction of the 1, 3 and 5 best-scored labels that an item has. Reference: Prabhu and Varma, KDD 2014 (P@k)."""
RMSE = Metric(("rmse",), _squared_errors, math.sqrt, higher_is_better=False)
