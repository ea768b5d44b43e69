"""IST on quadratics: SGD with the permutation sketch, its limit, and the condition under which the value rises.

Node i minimizes f_i(x) = x^T L_i x / 2 - b_i^T x. Each round assigns the coordinates to the nodes at random, in equal
parts. The sketch of node i is C_i = n diag(1 on its part), and x <- x - gamma (1/n) sum_i C_i (L_i C_i x - b_i).

Reference: E. Shulgin, P. Richtarik, "Towards a Better Theoretical Understanding of Independent Subnetwork Training",
arXiv 2306.16484.

Where it sits: the experiment `bias` uses it.
Not here: [MRN]'s network (`algorithm.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ist.errors import ConfigError
from ist.theory.algorithm import check_finite


@dataclass(frozen=True)
class Quadratics:
    """The functions of n nodes of d coordinates.

    Attributes:
        matrices: L, (n, d, d), symmetric.
        vectors: b, (n, d).
    """

    matrices: Tensor
    vectors: Tensor

    def __post_init__(self) -> None:
        nodes, size = self.vectors.shape
        if size % nodes:
            raise ConfigError(f"'d' is {size}: expected a multiple of the {nodes} nodes ('n')")
        if float(torch.linalg.eigvalsh(self.mean_matrix)[0]) <= 0:
            raise ConfigError("the mean of the matrices L is not positive definite, so there is no minimum")

    @cached_property
    def mean_matrix(self) -> Tensor:
        """The mean of the matrices: (d, d)."""
        return self.matrices.mean(dim=0)

    @cached_property
    def solution(self) -> Tensor:
        """The minimum of the mean of the functions: (d,)."""
        found: Tensor = torch.linalg.solve(self.mean_matrix, self.vectors.mean(dim=0))
        return found

    def value(self, points: Tensor) -> Tensor:
        """Return the mean of the functions at (..., d), minus its minimum."""
        offsets = points - self.solution
        return ((offsets @ self.mean_matrix) * offsets).sum(dim=-1) / 2

    def preconditioned(self) -> "Quadratics":
        """Return the functions in coordinates in which the mean matrix has a unit diagonal: x = D^(-1/2) z."""
        scale = self.mean_matrix.diagonal().rsqrt()
        return Quadratics(self.matrices * scale[:, None] * scale, self.vectors * scale)


def mean_operator(quadratics: Quadratics) -> Tensor:
    """Return E[(1/n) sum_i C_i L_i C_i] over the sketches: (d, d).

    One of the n nodes holds a diagonal entry, with C_i^2 = n^2, so the result is n times that of the mean matrix. An
    entry (j, k) remains if one node holds both coordinates, which has the probability (d/n - 1)/(d - 1).
    """
    nodes, size = quadratics.vectors.shape
    mean = quadratics.mean_matrix
    together = (size / nodes - 1) / (size - 1) if size > 1 else 1.0
    diagonal = torch.diag(mean.diagonal())
    return nodes * (diagonal + together * (mean - diagonal))


def limit(quadratics: Quadratics) -> Tensor:
    """Return the limit of the mean of the iterates, for any step size: E[B]^-1 mean(b), (d,)."""
    found: Tensor = torch.linalg.solve(mean_operator(quadratics), quadratics.vectors.mean(dim=0))
    return found


def descent_matrix(quadratics: Quadratics) -> Tensor:
    """Return W = (L E[B] + E[B] L) / 2: if it is indefinite, f rises in the first step from some points."""
    mean, operator = quadratics.mean_matrix, mean_operator(quadratics)
    return (mean @ operator + operator @ mean) / 2


def iterate(
    quadratics: Quadratics, start: Tensor, step_size: float, rounds: int, seeds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Run IST with one local step per round, once for each seed.

    Returns:
        The values of the function minus its minimum, (seeds, rounds + 1), and the mean of the second half of each
        run's iterates, (seeds, d).

    Raises:
        DivergedError: The values have diverged.
    """
    nodes, size = quadratics.vectors.shape
    points = start.repeat(len(seeds), 1)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    values, total = [quadratics.value(points)], torch.zeros_like(points)
    for number in range(rounds):
        orders = torch.stack([torch.randperm(size, generator=generator) for generator in generators])
        owners = torch.empty_like(orders).scatter_(1, orders, (torch.arange(size) % nodes).expand_as(orders))
        sketch = nodes * (owners[:, None, :] == torch.arange(nodes)[:, None]).to(points.dtype)  # (seeds, n, d)
        gradients = torch.einsum("ijk,sik->sij", quadratics.matrices, sketch * points[:, None, :]) - quadratics.vectors
        points = points - step_size * (sketch * gradients).mean(dim=1)
        values.append(quadratics.value(points))
        check_finite(values[-1], lambda _: f"in round {number}: the step size eta={step_size:g}")  # noqa: B023
        if number >= rounds // 2:
            total += points
    return torch.stack(values, dim=1), total / (rounds - rounds // 2)
