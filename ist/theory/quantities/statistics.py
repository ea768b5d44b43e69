"""Rank correlations, and fits of power laws with confidence intervals.

Where it sits: the experiments summarize their measurements with it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ist.errors import ConfigError

Matrix = NDArray[np.float64]

_RESAMPLES = 2000


class RankCorrelations(NamedTuple):
    """Spearman's rank correlation of two maps: 1 if their values have the same order.

    Attributes:
        rows: The mean of the coefficients of corresponding rows.
        columns: The mean of the coefficients of corresponding columns.
        whole: The coefficient of all cells.
    """

    rows: float
    columns: float
    whole: float


def rank_correlations(ours: Matrix, theirs: Matrix) -> RankCorrelations:
    """Compare two maps of equal shape, at least 2 x 2; rows and columns in which a map is constant are skipped."""
    along = []
    for one, other in ((ours, theirs), (ours.T, theirs.T)):
        found = [_spearman(a, b) for a, b in zip(one, other, strict=True) if _varies(a) and _varies(b)]
        along.append(float(np.mean(found)) if found else 0.0)
    return RankCorrelations(along[0], along[1], rank_correlation(ours, theirs))


def rank_correlation(x: Matrix, y: Matrix) -> float:
    """Return Spearman's coefficient of all numbers of two arrays of equal shape; 0 if one is constant."""
    return _spearman(x.ravel(), y.ravel()) if _varies(x) and _varies(y) else 0.0


def typical_ratio(ours: Matrix, theirs: Matrix) -> float:
    """Return the typical factor between two maps: exp of the root mean square of the log ratio."""
    return float(np.exp(np.sqrt(np.mean(np.log(ours / theirs) ** 2))))


class Exponent(NamedTuple):
    """A fitted exponent, and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def exponent(x: Sequence[float], samples: Sequence[Sequence[float]]) -> Exponent:
    """Fit y = c x^e to the means of repeated measurements.

    Args:
        x: Positive numbers, at least two.
        samples: For each of them, the same number of positive measurements; measurement i belongs to seed i.

    Returns:
        e, and its interval from resampled seeds (percentile bootstrap). The interval covers the choice of seeds, not
        the quality of the power law.

    Raises:
        ConfigError: There are fewer than two different x.
    """
    if len(set(x)) < 2:
        raise ConfigError(
            f"an exponent cannot be fitted to {len(set(x))} value(s): expected at least two different ones"
        )
    values = np.asarray(samples, dtype=np.float64)
    logs = np.log(np.asarray(x, dtype=np.float64))
    drawn = np.random.default_rng(0).integers(values.shape[1], size=(_RESAMPLES, values.shape[1]))
    fits = [_slope(logs, np.log(values[:, seeds].mean(axis=1))) for seeds in drawn]
    low, high = np.percentile(fits, [2.5, 97.5])
    return Exponent(_slope(logs, np.log(values.mean(axis=1))), float(low), float(high))


def _slope(x: Matrix, y: Matrix) -> float:
    return float(np.polyfit(x, y, 1)[0])


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of at least two measurements."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def _varies(values: Matrix) -> bool:
    """Whether values differ by more than rounding."""
    return bool(np.ptp(values) > 1e-6 * np.abs(values).max())


def _spearman(x: Matrix, y: Matrix) -> float:
    return float(stats.spearmanr(x, y).statistic)
