"""Shulgin & Richtarik's quadratic model: a bias that no step size removes, a rising value, and a remedy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from ist.theory.experiment import Point, Row, Section, Table
from ist.theory.experiment import Settings as Base
from ist.theory.quadratic import Quadratics, descent_matrix, iterate, limit

QUICK: Mapping[str, Any] = {"rounds": 400, "seeds": 4, "step_sizes": (0.5, 0.1)}


class Settings(Base):
    """Settings of the quadratic model."""

    n: int = Field(4, ge=2, description="nodes")
    d: int = Field(16, ge=2, description="coordinates, a multiple of n")
    step_sizes: tuple[float, ...] = Field(
        (0.5, 0.2, 0.1, 0.05), description="gamma times n times the largest eigenvalue"
    )
    rounds: int = Field(20_000, ge=10)
    seeds: int = Field(20, ge=2)
    two: tuple[float, float, float] = Field((1.0, 4.0, 1.8), description="a, b, c of the matrix [[a, c], [c, b]]")


CASES = {
    "equal optima at 0": "b = 0",
    "equal functions, b ≠ 0": "the same L and b at every node",
    "optima differ": "L and b of each node drawn independently",
    "optima differ, preconditioned": "the same, in coordinates in which the mean L has a unit diagonal",
}


def points(settings: Settings) -> Sequence[Point]:
    """Return a point for each case and step size, and two for the matrix of two coordinates."""
    _case("optima differ", settings)
    _two(settings)
    found: list[Point] = [{"case": case, "step": step} for case in CASES for step in settings.step_sizes]
    return [*found, {"case": "two", "step": 0.01}, {"case": "two, preconditioned", "step": 0.01}]


def measure(settings: Settings, point: Point) -> Sequence[Row]:
    """Measure the measured and the predicted limit of the mean iterate; for two coordinates, the values by round."""
    if point["case"].startswith("two"):
        return _measure_two(settings, point)
    quadratics = _case(point["case"], settings)
    largest = float(torch.linalg.eigvalsh(quadratics.mean_matrix)[-1]) * settings.n
    start = torch.ones(settings.d, dtype=torch.float64)
    values, means = iterate(quadratics, start, point["step"] / largest, settings.rounds, range(settings.seeds))
    predicted, solution = limit(quadratics), quadratics.solution
    scale = max(float(solution.norm()), 1e-300) if float(solution.norm()) > 0 else 1.0
    return [
        {
            **point, "index": seed, "value": float(values[seed, -(settings.rounds // 2) :].mean()),
            "bias": float((mean - solution).norm()) / scale,
            "predicted_bias": float((predicted - solution).norm()) / scale,
            "from_prediction": float((mean - predicted).norm()) / scale,
        }
        for seed, mean in enumerate(means)
    ]  # fmt: skip


def section(settings: Settings, rows: Sequence[Row]) -> Section:
    """Describe the bias by step size, and the values of the runs with two coordinates."""
    measured = {
        (case, step): [row for row in rows if (row["case"], row["step"]) == (case, step)]
        for case in CASES
        for step in settings.step_sizes
    }
    lines = [(case, f"{step:g}", *_numbers(own)) for (case, step), own in measured.items()]
    biased = [own for own in measured.values() if own[0]["predicted_bias"] > 1e-9]
    apart = max(float(np.mean([row["from_prediction"] for row in own])) for own in biased)
    bias = min(float(np.mean([row["bias"] for row in own])) for own in biased)
    a, b, c = settings.two
    before, after = (
        torch.linalg.eigvalsh(descent_matrix(q)) for q in (_two(settings), _two(settings).preconditioned())
    )
    peaks = {}
    for label in ("two", "two, preconditioned"):
        values = [row["value"] for row in rows if row["case"] == label]
        peaks[label] = max(values) / values[0]
    return Section(
        title="The quadratic model: a bias, and when IST increases the error",
        claim="On quadratics IST is SGD with the permutation sketch. It converges if b = 0 after diagonal "
        "preconditioning; if b ≠ 0 a bias remains that no step size removes; for [[a, c], [c, b]] with c > 2ab/(a "
        "+ b) the averaged matrix is indefinite (Shulgin & Richtárik, arXiv 2306.16484).",
        method=f"n = {settings.n} nodes, d = {settings.d} coordinates, {settings.rounds:,} rounds of one local step, "
        f"{settings.seeds} seeds; means over the second half of each run. The limit E[B]⁻¹b is predicted in closed "
        "form.",
        found=[
            f"If b ≠ 0 the mean iterate ends at most {apart:.3f} from its predicted limit, and at least {bias:.3f} "
            "from the solution, for every step size (both in units of the solution's norm).",
            f"For [[{a:g}, {c:g}], [{c:g}, {b:g}]] the threshold 2ab/(a + b) is {2 * a * b / (a + b):.2f}: the "
            f"averaged matrix has eigenvalues {before[0]:.2f} and {before[1]:.2f}, and from its worst direction f "
            f"is at most {peaks['two']:.3f} of its start. After diagonal preconditioning they are "
            f"{after[0]:.2f} and {after[1]:.2f}, and f is at most {peaks['two, preconditioned']:.3f} of its start.",
        ],
        figures={
            "bias": (_drawn(settings, rows, measured), "Left: bias by step size. Right: the matrix of two coordinates.")
        },
        tables={
            "Limits (in units of the solution's norm, or of 1 if the solution is 0)": Table(
                ("case", "γ", "bias", "predicted", "distance from the predicted limit"), lines
            )
        },
    )


def _numbers(rows: Sequence[Row]) -> tuple[str, str, str]:
    values = [row["bias"] for row in rows]
    apart = np.mean([row["from_prediction"] for row in rows])
    return f"{np.mean(values):.4f} ± {np.std(values):.4f}", f"{rows[0]['predicted_bias']:.4f}", f"{apart:.4f}"


def _drawn(settings: Settings, rows: Sequence[Row], measured: Mapping[tuple[str, float], Sequence[Row]]) -> Figure:
    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, case in enumerate(CASES):
        means = [np.mean([row["bias"] for row in measured[case, step]]) for step in settings.step_sizes]
        left.plot(settings.step_sizes, means, marker="o", color=f"C{number}", label=case)
        predicted = measured[case, settings.step_sizes[0]][0]["predicted_bias"]
        left.axhline(predicted, color=f"C{number}", linestyle=":")
    left.set_xscale("log")
    left.set_xlabel("step size γ, in units of 1 / (n × largest eigenvalue); dotted: predicted")
    left.set_ylabel("distance of the mean iterate from the solution")
    for label in ("two", "two, preconditioned"):
        own = [row for row in rows if row["case"] == label]
        right.plot([row["index"] for row in own], [row["value"] / own[0]["value"] for row in own], label=label)
    right.axhline(1, color="k", linestyle=":", linewidth=0.8)
    right.set_yscale("log")
    right.set_xlabel("round")
    right.set_ylabel("f / f at the start")
    for axes in (left, right):
        axes.legend(fontsize=7)
        axes.grid(visible=True, alpha=0.3)
    return figure


def _case(case: str, settings: Settings) -> Quadratics:
    """Draw the functions of a case; all cases use the same random numbers."""
    generator = torch.Generator().manual_seed(1)
    n, d = settings.n, settings.d
    factors = torch.randn(n, d, 2 * d, dtype=torch.float64, generator=generator)
    tilt = torch.linspace(0.5, 2, d, dtype=torch.float64)
    matrices = factors @ factors.mT / (2 * d) * tilt[:, None] * tilt
    vectors = torch.randn(n, d, dtype=torch.float64, generator=generator)
    if case == "equal optima at 0":
        return Quadratics(matrices, torch.zeros_like(vectors))
    if case == "equal functions, b ≠ 0":
        return Quadratics(matrices[:1].repeat(n, 1, 1), vectors[:1].repeat(n, 1))
    drawn = Quadratics(matrices, vectors)
    return drawn.preconditioned() if "preconditioned" in case else drawn


def _two(settings: Settings) -> Quadratics:
    a, b, c = settings.two
    matrix = torch.tensor([[a, c], [c, b]], dtype=torch.float64)
    return Quadratics(matrix.repeat(2, 1, 1), torch.zeros(2, 2, dtype=torch.float64))


def _worst_start(quadratics: Quadratics) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(descent_matrix(quadratics)).eigenvectors
    return vectors[:, 0]


def _measure_two(settings: Settings, point: Point) -> Sequence[Row]:
    quadratics = _two(settings)
    if "preconditioned" in point["case"]:
        quadratics = quadratics.preconditioned()
    values, _ = iterate(quadratics, _worst_start(quadratics), point["step"], 200, [0])
    return [
        {**point, "index": number, "value": float(v), "bias": 0.0, "predicted_bias": 0.0, "from_prediction": 0.0}
        for number, v in enumerate(values[0])
    ]
