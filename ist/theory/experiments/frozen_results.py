"""What the experiment `frozen` measures: its settings, a point's setup, and measured beside predicted factors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ist.theory.algorithm import MergeScale, Run, initial_weights, signs
from ist.theory.experiment import Count, DataSettings, Point, Probability, Row, rows_at
from ist.theory.quantities import frozen_rest
from ist.theory.quantities.kernels import infinite_ntk
from ist.theory.quantities.masks import Law
from ist.theory.quantities.problem import Problem, Scaling, sphere

DONE = 1e-16
"""Below this fraction of the first squared error, rounding is near: rates are measured down to here."""

RISE = 1.01
"""An error that grows by more than this factor in a round has risen."""

Vector = NDArray[np.float64]


class Settings(DataSettings):
    """Settings of the experiment, with inputs from the sphere and from the data set."""

    samples: int = Field(30, ge=2, description="n, the first rows of the file")
    scaling: Scaling = Field("standardised", description="'standardised' columns, or 'raw' ones")
    n: int = Field(10, ge=2, description="inputs on the sphere")
    d: int = Field(40, ge=2, description="their dimensions")
    m: int = Field(1024, ge=1, description="hidden neurons")
    p: tuple[Count, ...] = Field((1, 2, 4, 8, 16), min_length=1, description="subnetworks on the sphere, categorical")
    p_data: tuple[Count, ...] = Field((4,), min_length=1, description="subnetworks on the data set, categorical")
    p_bernoulli: int = Field(8, ge=1, description="subnetworks on the sphere with Bernoulli masks")
    xi: Probability = Field(0.25, description="probability of the Bernoulli masks")
    tau: tuple[Count, ...] = Field((1, 5, 20, 100), min_length=1, description="local steps")
    step: float = Field(0.75, gt=0, le=1, description="step size eta, in units of 1 / largest eigenvalue of H")
    K: int = Field(40, ge=6, description="rounds")
    scales: int = Field(11, ge=2, description="values of the merge scale gamma, from 1/(2p) to 1")
    seeds: int = Field(2, ge=1)


class Setup:
    """What a point trains, and its spectrum."""

    def __init__(self, settings: Settings, point: Point) -> None:
        self.problem: Problem = sphere(settings.n, settings.d) if point["case"] == "sphere" else settings.problem()
        self.law = Law(settings.m, point["p"], point["xi"])
        self.tau: int = point["tau"]
        self.eigenvalues, self.directions = torch.linalg.eigh(infinite_ntk(self.problem.inputs))
        self.eta = settings.step / float(self.eigenvalues[-1])
        shares = np.linspace(0, 1, settings.scales)
        self.scales: list[float] = [float((2 * point["p"]) ** -share) for share in shares]

    def predicted(self, gamma: float, seed: int, rounds: int) -> Vector:
        """Return the predicted mean squared error before each round and at the end, from the first error of a seed."""
        run = Run(self.law, self.tau, 1, self.eta, seed=seed)
        active = torch.relu(initial_weights(run, self.problem.inputs.shape[1]) @ self.problem.inputs.T)
        first: Tensor = self.problem.targets - signs(run) @ active / self.law.width**0.5
        factors = frozen_rest.factors(self.eigenvalues, self.law, self.tau, self.eta, gamma)
        parts = (self.directions.T @ first) * factors ** torch.arange(rounds + 1)[:, None]
        return np.asarray(parts.square().mean(dim=1))


@dataclass(frozen=True)
class Rate:
    """A merge scale: measured and predicted mean factor of ||e|| per round, and whether the error rose in a round.

    For a fitted scale, the prediction is that of the minimax scale.
    """

    gamma: float
    measured: float
    predicted: float
    rose: bool


class Measured:
    """The measurements of a point with the rest frozen."""

    def __init__(self, settings: Settings, point: Point, rows: Sequence[Row]) -> None:
        self.point = point
        self.place = place_of(point)
        self.setup = Setup(settings, point)
        self.grid_step = float(np.log(2 * point["p"])) / (settings.scales - 1)
        own = rows_at(rows, point)
        every: list[MergeScale] = [*self.setup.scales, "auto"]
        self._curves: dict[MergeScale, list[Vector]] = {
            gamma: [np.array(errors_of(own, gamma, seed)) for seed in range(settings.seeds)] for gamma in every
        }
        self._fitted = _fitted(own)
        spectrum = (self.setup.eigenvalues, self.setup.law, self.setup.tau, self.setup.eta)
        self.largest = float(frozen_rest.removed(*spectrum).max())
        self.limit = frozen_rest.largest_scale(*spectrum)
        self.minimax = frozen_rest.best_scale(*spectrum)

    def curves(self, gamma: MergeScale) -> list[Vector]:
        """Return the errors by round, of each seed."""
        return self._curves[gamma]

    @cached_property
    def rates(self) -> list[Rate]:
        """The measured and predicted factors, of each gamma."""
        return [self._rate(self._curves[gamma], gamma) for gamma in self.setup.scales]

    @cached_property
    def auto(self) -> Rate:
        """The factors of a gamma that is fitted in each round."""
        return self._rate(self._curves["auto"], self.minimax)

    def _rate(self, curves: Sequence[Vector], gamma: float) -> Rate:
        predicted = [self.setup.predicted(gamma, seed, len(curve) - 1) for seed, curve in enumerate(curves)]
        pairs = [_factors(*pair) for pair in zip(curves, predicted, strict=True)]
        measured, expected = (float(np.exp(np.log(values).mean())) for values in zip(*pairs, strict=True))
        return Rate(gamma, measured, expected, any(_rose(curve) for curve in curves))

    def measured_at(self, gamma: float) -> float:
        """Return the measured factor of a gamma of the grid."""
        return next(rate.measured for rate in self.rates if rate.gamma == gamma)

    @property
    def best(self) -> float:
        """The gamma with the smallest measured factor."""
        return min(self.rates, key=lambda rate: rate.measured).gamma

    @property
    def predicted_best(self) -> float:
        """The gamma with the smallest predicted factor."""
        return min(self.rates, key=lambda rate: rate.predicted).gamma

    @property
    def bracket(self) -> tuple[float, float]:
        """The largest gamma below all at which the error rose, and the smallest at which it rose (or infinity)."""
        above = min((rate.gamma for rate in self.rates if rate.rose), default=float("inf"))
        return max((rate.gamma for rate in self.rates if rate.gamma < above), default=0.0), above

    @property
    def left(self) -> float:
        """The error that the best gamma leaves at the end, as a part of the first one."""
        return float(np.mean([curve[-1] / curve[0] for curve in self.curves(self.best)]))

    def line(self, absent: Sequence[Vector]) -> tuple[str, ...]:
        """Return the row of the table."""
        best = next(rate for rate in self.rates if rate.gamma == self.best)
        low, high = self.bracket
        xi = self.point["xi"]
        return (
            self.point["case"], "categorical" if xi is None else f"Bernoulli, ξ = {xi:g}", str(self.point["p"]),
            str(self.point["tau"]), f"{self.largest:.2f}", f"{self.limit:.3f}",
            f"{low:.3f} to {high:.3f}" if np.isfinite(high) else f"above {low:.3f}", f"{self.minimax:.3f}",
            f"{self.predicted_best:.3f}", f"{self.best:.3f}", f"{best.predicted:.3f}", f"{best.measured:.3f}",
            f"{self.auto.measured:.3f}", f"{self._fitted[0]:.3f} to {self._fitted[1]:.3f}",
            f"{self.left:.1e}", f"{floor_of(absent):.1e}",
        )  # fmt: skip


def place_of(point: Point) -> tuple[Any, ...]:
    """Return what a point with the rest frozen and its counterpart with the rest absent have in common."""
    return tuple(point[key] for key in ("case", "p", "xi", "tau"))


def errors_of(rows: Sequence[Row], gamma: MergeScale, seed: int) -> list[float]:
    """Return the errors of a merge scale and seed, by round."""
    return [row["error"] for row in rows if row["gamma"] == gamma and row["seed"] == seed]


def floor_of(curves: Sequence[Vector]) -> float:
    """Return the mean error over the last third, as a part of the first one."""
    return float(np.mean([curve[-(len(curve) // 3) :].mean() / curve[0] for curve in curves]))


def _fitted(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the smallest and the largest fitted gamma, in rounds before rounding."""
    own = [row for row in rows if row["gamma"] == "auto"]
    first = {row["seed"]: row["error"] for row in own if row["round"] == 0}
    scales = [
        row["scale_of_round"]
        for row in own
        if row["scale_of_round"] is not None and row["error"] > DONE * first[row["seed"]]
    ]
    return min(scales), max(scales)


def _factors(measured: Vector, predicted: Vector) -> tuple[float, float]:
    """Return the mean factors of the norm per round, over the rounds before rounding or infinity."""
    usable = np.isfinite(measured) & (measured > DONE * measured[0]) & (predicted > DONE * predicted[0])
    last = max(1, int(np.argmin(usable)) - 1 if not usable.all() else len(usable) - 1)
    low = np.finfo(np.float64).tiny
    return tuple(  # type: ignore[return-value]
        float(max(curve[last] / curve[0], low) ** (0.5 / last)) for curve in (measured, predicted)
    )


def _rose(curve: Vector) -> bool:
    """Whether the error grew in a round, before rounding."""
    before, after = curve[:-1], curve[1:]
    return bool(((after > RISE * before) & (before > DONE * curve[0])).any())
