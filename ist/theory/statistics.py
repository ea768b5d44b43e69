"""Rank correlations and power laws, with intervals of confidence."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Matrix = NDArray[np.float64]

_RESAMPLES = 2000


class RankCorrelations(NamedTuple):
    """How alike two maps rise and fall: Spearman's coefficient, 1 where the order is the same.

    Attributes:
        rows: Mean of the coefficients of corresponding rows.
        columns: Mean of the coefficients of corresponding columns.
        whole: Of all cells.
    """

    rows: float
    columns: float
    whole: float


def rank_correlations(ours: Matrix, theirs: Matrix) -> RankCorrelations:
    """Compare two maps of equal shape, at least 2 x 2."""
    along = [float(np.mean([_spearman(a, b) for a, b in zip(x, y, strict=True)])) for x, y in _ways(ours, theirs)]
    return RankCorrelations(along[0], along[1], _spearman(ours.ravel(), theirs.ravel()))


def rank_correlation(x: Matrix, y: Matrix) -> float:
    """Return Spearman's coefficient of all numbers of two arrays of equal shape; 0 where one does not vary."""
    return _spearman(x.ravel(), y.ravel())


def typical_ratio(ours: Matrix, theirs: Matrix) -> float:
    """Return by what factor two maps typically differ: exp of the root mean square of the log ratio."""
    return float(np.exp(np.sqrt(np.mean(np.log(ours / theirs) ** 2))))


class Exponent(NamedTuple):
    """A fitted exponent, and its 95 % interval of confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def exponent(x: Sequence[float], samples: Sequence[Sequence[float]]) -> Exponent:
    """Fit y = c x^e to the means of repeated measurements.

    Args:
        x: Positive numbers, at least two.
        samples: For each of them, the same number of positive measurements; number i of each is from seed i.

    Returns:
        e, and its interval by drawing seeds anew (percentile bootstrap).
    """
    values = np.asarray(samples, dtype=np.float64)
    logs = np.log(np.asarray(x, dtype=np.float64))
    drawn = np.random.default_rng(0).integers(values.shape[1], size=(_RESAMPLES, values.shape[1]))
    fits = [_slope(logs, np.log(values[:, seeds].mean(axis=1))) for seeds in drawn]
    low, high = np.percentile(fits, [2.5, 97.5])
    return Exponent(_slope(logs, np.log(values.mean(axis=1))), float(low), float(high))


def _slope(x: Matrix, y: Matrix) -> float:
    return float(np.polyfit(x, y, 1)[0])


def _ways(ours: Matrix, theirs: Matrix) -> list[tuple[Any, Any]]:
    return [(ours, theirs), (ours.T, theirs.T)]


def _spearman(x: Matrix, y: Matrix) -> float:
    """Spearman's coefficient; 0 where one side does not vary."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(stats.spearmanr(x, y).statistic)
