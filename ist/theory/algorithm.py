"""Algorithm 1 of [MRN]: create random subnetworks, train them, put them together; many runs side by side.

The network is f(W, x) = (1/sqrt m) sum_r a_r relu(<w_r, x>) with fixed signs a. In a round, subnetwork l trains the
neurons of its mask by tau steps of full-batch gradient descent on 0.5 ||y - f^l||^2, f^l the same sum over its own
neurons. Every neuron becomes the mean of what its holders made of it. The whole network's prediction is scaled by xi.

Subnetworks are cut out, as small as they are, and trained as one batch. The first local step needs no cut: all
subnetworks still share the hidden values of the whole network.

Two bases of the weights give the same numbers up to rounding. `Weights` keeps W itself, as any program would.
`Coefficients` keeps C of W = W_0 + C X: every gradient is a sum of inputs, so a step costs one product with the
Gram matrix X X^T in place of two with X. Use it where n is not much larger than d.

Not here: the law of the masks (`masks.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ist.errors import ConfigError, DivergedError
from ist.rng import Purpose, torch_seed
from ist.theory.masks import Draw, Law
from ist.theory.problem import Problem

Basis = Literal["coefficients", "weights"]

_DIVERGED = 1e12
"""A mean squared error from which no run has come back."""

_WORKING_SET = 3_000_000
"""Numbers that the hidden values of runs trained side by side may have together: more would leave the cache."""


@dataclass(frozen=True)
class Run:
    """One run of Algorithm 1.

    Attributes:
        law: Width m, number p of subnetworks, and their masks.
        local_steps: tau.
        rounds: K.
        step_size: eta, constant.
        kappa: Standard deviation of the initial weights.
        seed: Of the initial weights, the signs and the masks.
        draw: Where masks come from; None: from `law`.
    """

    law: Law
    local_steps: int
    rounds: int
    step_size: float
    kappa: float = 1.0
    seed: int = 0
    draw: Draw | None = None

    def __post_init__(self) -> None:
        for key, value, least in (("tau", self.local_steps, 1), ("K", self.rounds, 1)):
            if value < least:
                raise ConfigError(f"'{key}' is {value}: at least {least} is needed")
        for key, number in (("eta", self.step_size), ("kappa", self.kappa)):
            if not (number > 0 and math.isfinite(number)):
                raise ConfigError(f"'{key}' is {number}: a positive number is needed")

    def mask(self, round_number: int) -> Tensor:
        """Return the round's mask, bool of shape (p, m)."""
        draw = self.draw or self.law.draw
        return torch.from_numpy(np.ascontiguousarray(draw(self.seed, round_number)))


@dataclass(frozen=True)
class Trace:
    """What was seen of several runs of equal shape; errors are means over the n samples of the squared error.

    Attributes:
        errors: (B, K + 1): of the whole network, xi-scaled, before every round and at the end.
        local_errors: (B, K, tau + 1): of a subnetwork, before each local step and after the last: the mean over the
            subnetworks. None unless asked for.
        weights: (B, m, d): at the end.
    """

    errors: Tensor
    local_errors: Tensor | None
    weights: Tensor


Watch = Callable[[int, Tensor, Tensor], None]
"""Called with (round, weights (B, m, d), masks (B, p, m)) before each round."""


def train(
    problem: Problem,
    runs: Sequence[Run],
    basis: Basis = "coefficients",
    dtype: torch.dtype = torch.float64,
    local_errors: bool = False,
    watch: Watch | None = None,
) -> Trace:
    """Train several networks side by side.

    Args:
        problem: What to learn.
        runs: They agree in m, p, tau and K.
        basis: See above.
        dtype: float64 or float32.
        local_errors: Whether to watch the subnetworks too.
        watch: Looks at weights and masks; only with basis 'weights'.

    Returns:
        The trace, in the order of `runs`.

    Raises:
        ConfigError: The runs differ in shape.
        DivergedError: The error of a run has grown beyond all bounds.
    """
    if len({(run.law.width, run.law.subnetworks, run.local_steps, run.rounds) for run in runs}) != 1:
        raise ConfigError("runs side by side must agree in m, p, tau and K")
    if watch and basis != "weights":
        raise ConfigError("weights can be watched with basis 'weights' only")
    held = runs[0].law.width * runs[0].law.subnetworks * max(run.law.probability for run in runs)
    side_by_side = len(runs) if watch else max(1, int(_WORKING_SET / (held * problem.num_samples)))
    parts = [
        _Batch(problem, runs[first : first + side_by_side], basis, dtype).train(local_errors, watch)
        for first in range(0, len(runs), side_by_side)
    ]
    return Trace(
        errors=torch.cat([part.errors for part in parts]),
        local_errors=torch.cat([p.local_errors for p in parts if p.local_errors is not None]) if local_errors else None,
        weights=torch.cat([part.weights for part in parts]),
    )


def initial_weights(run: Run, inputs: int) -> Tensor:
    """Return W_0: (m, d), float64, independent N(0, kappa^2)."""
    generator = torch.Generator().manual_seed(torch_seed(run.seed, Purpose.MODEL, 0))
    return run.kappa * torch.randn(run.law.width, inputs, dtype=torch.float64, generator=generator)


def signs(run: Run) -> Tensor:
    """Return a: (m,), float64, each -1 or 1 with equal probability."""
    generator = torch.Generator().manual_seed(torch_seed(run.seed, Purpose.MODEL, 1))
    return torch.randint(0, 2, (run.law.width,), generator=generator).double() * 2 - 1


def check_finite(errors: Tensor, describe: Callable[[int], str]) -> None:
    """Check that no run has left all bounds.

    Args:
        errors: (B,).
        describe: Says of a run's number where it is, and names its step size.

    Raises:
        DivergedError: One has.
    """
    bad = ~(errors < _DIVERGED)
    if bad.any():
        number = int(bad.nonzero()[0])
        raise DivergedError(f"the error is {errors[number]:.3g} {describe(number)} is too large")


class _Basis(Protocol):
    """How weights are kept; "rows" are neurons, or neurons of subnetworks: (..., k)."""

    def start(self) -> Tensor:
        """Return all rows as they are at first: (B, m, k)."""

    def hidden(self, rows: Tensor, neurons: Tensor | None) -> Tensor:
        """Return <w, x_i> for every row: (..., n); `neurons` (flat numbers) where rows are not all neurons in order."""

    def gradient(self, pull: Tensor) -> Tensor:
        """Return the rows' gradient from that of their hidden values (..., n)."""

    def weights(self, rows: Tensor) -> Tensor:
        """Return all rows' weights: (B, m, d)."""


class _Weights:
    def __init__(self, inputs: Tensor, first: Tensor) -> None:
        self._inputs = inputs
        self._first = first

    def start(self) -> Tensor:
        return self._first.clone()

    def hidden(self, rows: Tensor, neurons: Tensor | None) -> Tensor:  # noqa: ARG002
        return rows @ self._inputs.T

    def gradient(self, pull: Tensor) -> Tensor:
        return pull @ self._inputs

    def weights(self, rows: Tensor) -> Tensor:
        return rows


class _Coefficients:
    def __init__(self, inputs: Tensor, first: Tensor) -> None:
        self._inputs = inputs
        self._gram = inputs @ inputs.T
        self._first = first
        self._first_hidden = (first @ inputs.T).flatten(0, 1)

    def start(self) -> Tensor:
        return self._first.new_zeros(*self._first.shape[:2], len(self._inputs))

    def hidden(self, rows: Tensor, neurons: Tensor | None) -> Tensor:
        first = self._first_hidden if neurons is None else self._first_hidden[neurons]
        return torch.addmm(first, rows.flatten(0, -2), self._gram).view(rows.shape)

    def gradient(self, pull: Tensor) -> Tensor:
        return pull

    def weights(self, rows: Tensor) -> Tensor:
        return self._first + rows @ self._inputs


class _Batch:
    """Runs of equal shape, trained side by side."""

    def __init__(self, problem: Problem, runs: Sequence[Run], basis: Basis, dtype: torch.dtype) -> None:
        self._runs = runs
        self._inputs = problem.inputs.to(dtype)
        self._targets = problem.targets.to(dtype)
        width = runs[0].law.width
        first = torch.stack([initial_weights(run, problem.inputs.shape[1]) for run in runs]).to(dtype)
        self._basis: _Basis = (_Weights if basis == "weights" else _Coefficients)(self._inputs, first)
        self._signs = torch.stack([signs(run) for run in runs]).to(dtype) / math.sqrt(width)
        self._xi = torch.tensor([run.law.probability for run in runs], dtype=dtype)
        self._eta = torch.tensor([run.step_size for run in runs], dtype=dtype)

    def train(self, local_errors: bool, watch: Watch | None) -> Trace:
        rows = self._basis.start()
        errors, local = [], []
        for round_number in range(self._runs[0].rounds):
            masks = torch.stack([run.mask(round_number) for run in self._runs])
            if watch:
                watch(round_number, self._basis.weights(rows), masks)  # changed in place afterwards
            active = self._basis.hidden(rows, None).relu_()
            errors.append(self._whole_error(active, round_number))
            if self._runs[0].local_steps == 1 and not local_errors:
                rows = self._one_step(rows, active, masks)
            else:
                rows, seen = self._round(rows, active, masks, local_errors)
                local.append(seen)
        errors.append(self._whole_error(self._basis.hidden(rows, None).relu_(), self._runs[0].rounds))
        return Trace(
            errors=torch.stack(errors, dim=1),
            local_errors=torch.stack(local, dim=1) if local_errors else None,
            weights=self._basis.weights(rows),
        )

    def _whole_error(self, active: Tensor, round_number: int) -> Tensor:
        """Return the mean squared error of every whole network, xi-scaled: (B,)."""
        predicted = (self._signs.unsqueeze(1) @ active).squeeze(1) * self._xi[:, None]
        found = (predicted - self._targets).square().mean(dim=1)
        check_finite(found, lambda number: self._describe(number, round_number))
        return found

    def _describe(self, number: int, round_number: int) -> str:
        run = self._runs[number]
        return (
            f"in round {round_number} with m={run.law.width}, p={run.law.subnetworks}, xi={run.law.probability:g}, "
            f"tau={run.local_steps}: the step size eta={run.step_size:g}"
        )

    def _one_step(self, rows: Tensor, active: Tensor, masks: Tensor) -> Tensor:
        """A round of one local step: all subnetworks' gradients of a neuron are sums over the same hidden values."""
        signed = masks * self._signs[:, None]
        residuals = signed @ active - self._targets
        pull = _through_relu(signed.mT @ residuals, active)
        holders = masks.sum(dim=1).clamp_min(1)
        return rows.sub_(self._basis.gradient(pull).mul_((self._eta[:, None] / holders)[..., None]))

    def _round(self, rows: Tensor, active: Tensor, masks: Tensor, watch: bool) -> tuple[Tensor, Tensor]:
        """A round of tau local steps; also returns the subnetworks' mean errors (B, tau + 1), if they are watched."""
        num_runs, width = rows.shape[:2]
        neurons, held = _held(masks)
        flat = (neurons + torch.arange(num_runs)[:, None, None] * width).flatten()
        shape = (*neurons.shape, -1)
        cut = rows.flatten(0, 1)[flat].view(shape)
        own = active.flatten(0, 1)[flat].view(shape)
        # What is no neuron, but fills up a smaller subnetwork, has no sign: it predicts nothing and stays.
        signed = self._signs.flatten()[flat].view(neurons.shape) * held
        eta = self._eta[:, None, None, None]
        errors = []
        for step in range(self._runs[0].local_steps):
            if step:
                own = self._basis.hidden(cut, flat).relu_()
            residuals = signed.unsqueeze(2) @ own - self._targets  # (B, p, 1, n)
            errors.append(residuals)
            cut.sub_(self._basis.gradient(_through_relu(signed.unsqueeze(3) * residuals, own)).mul_(eta))
        if watch:
            own = self._basis.hidden(cut, flat).relu_()
            errors.append(signed.unsqueeze(2) @ own - self._targets)
        merged = _mean_of_holders(rows.flatten(0, 1), cut.flatten(0, 2), flat, held.flatten()).view(rows.shape)
        seen = torch.stack([e.square().mean(dim=(1, 2, 3)) for e in errors], dim=1) if watch else rows.new_empty(0)
        return merged, seen


def _through_relu(pull: Tensor, active: Tensor) -> Tensor:
    """Turn the gradient of hidden values after the relu into that before it, in place: 0 where `active` is 0."""
    return torch.ops.aten.threshold_backward.grad_input(pull, active, 0, grad_input=pull)  # type: ignore[no-any-return]


def _held(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the neurons of every subnetwork, filled up to the largest: numbers, and which are real; both (B, p, N)."""
    counts = masks.sum(dim=2)
    most = max(1, int(counts.max()))
    real = torch.arange(most) < counts[..., None]
    neurons = torch.zeros(*counts.shape, most, dtype=torch.int64)
    neurons[real] = masks.nonzero()[:, 2]
    return neurons, real


def _mean_of_holders(rows: Tensor, cut: Tensor, owners: Tensor, held: Tensor) -> Tensor:
    """Return every neuron's mean over its holders; where there are none, what it was."""
    owners, cut = owners[held], cut[held]
    holders = torch.bincount(owners, minlength=len(rows))
    total = torch.zeros_like(rows).index_add_(0, owners, cut)
    return torch.where(holders[:, None] > 0, total / holders.clamp_min(1)[:, None], rows)
