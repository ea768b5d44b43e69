"""Algorithm 1 of [MRN]: draw random subnetworks, train them, merge them; for many runs in one batch.

The network is f(W, x) = (1/sqrt m) sum_r a_r relu(<w_r, x>) with fixed signs a. In a round, subnetwork l trains the
neurons of its mask by tau steps of full-batch gradient descent on 0.5 ||y - f^l||^2, where f^l is the same sum over its
own neurons. Each neuron becomes the mean of its copies in the subnetworks that hold it. The full network's prediction
is scaled by xi.

A run can also mask the gradients instead of the function (`rest` 'frozen'): a subnetwork then trains its own neurons on
the loss of the full network, whose other neurons keep the values of the round's start. Predictions are not scaled. All
subnetworks correct the same error at once, so their changes are merged with a scale gamma of at most 1
(`merge_scale`); `quantities/frozen_rest.py` has its theory.

Subnetworks are cut out at their actual size and trained as one batch. The first local step needs no cut, because all
subnetworks still share the hidden values of the full network.

There are two representations of the weights, which give the same numbers up to rounding. `_Weights` stores W.
`_Coefficients` stores C in W = W_0 + C X: every gradient is a linear combination of inputs, so a step costs one product
with the Gram matrix X X^T instead of two with X. Use it if n is not much larger than d.

Where it sits: the experiments call `train`; `practice.py` compares it with the real system.
Not here: the distribution of the masks (`ist/theory/quantities/masks.py`).
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
from ist.theory.quantities.masks import Draw, Law
from ist.theory.quantities.problem import Problem

Basis = Literal["coefficients", "weights"]
Rest = Literal["absent", "frozen"]
MergeScale = float | Literal["auto"]

_DIVERGED = 1e12
"""A run whose mean squared error exceeds this has diverged."""

_WORKING_SET = 3_000_000
"""The most hidden values of the runs in one batch: more would not stay in the cache."""


@dataclass(frozen=True)
class Run:
    """One run of Algorithm 1.

    Attributes:
        law: The width m, the number p of subnetworks, and the distribution of their masks.
        local_steps: tau.
        rounds: K.
        step_size: eta, constant.
        kappa: The standard deviation of the initial weights.
        seed: The seed of the initial weights, the signs and the masks.
        draw: Draws the masks; None: `law` draws them.
        rest: What the other neurons of a subnetwork are in its local steps: absent, as in [MRN], or frozen.
        merge_scale: gamma: a neuron changes by gamma times the mean change of its copies. 'auto': the best value in
            [0, 1] for the full network's error after the round, if its outputs are linear in gamma.
    """

    law: Law
    local_steps: int
    rounds: int
    step_size: float
    kappa: float = 1.0
    seed: int = 0
    draw: Draw | None = None
    rest: Rest = "absent"
    merge_scale: MergeScale = 1.0

    def __post_init__(self) -> None:
        for key, value, least in (("tau", self.local_steps, 1), ("K", self.rounds, 1)):
            if value < least:
                raise ConfigError(f"'{key}' is {value}: expected at least {least}")
        gamma = 1.0 if self.merge_scale == "auto" else self.merge_scale
        for key, number in (("eta", self.step_size), ("kappa", self.kappa), ("gamma", gamma)):
            if not (number > 0 and math.isfinite(number)):
                raise ConfigError(f"'{key}' is {number}: expected a positive number")

    @property
    def prediction_scale(self) -> float:
        """The scale of the full network's predictions: xi if subnetworks are trained without the rest."""
        return self.law.probability if self.rest == "absent" else 1.0

    def mask(self, round_number: int) -> Tensor:
        """Return the round's mask, bool of shape (p, m)."""
        draw = self.draw or self.law.draw
        return torch.from_numpy(np.ascontiguousarray(draw(self.seed, round_number)))


@dataclass(frozen=True)
class Trace:
    """The recorded values of several runs of equal shape; errors are squared errors, averaged over the n samples.

    Attributes:
        errors: (B, K + 1): the errors of the full network, scaled by `Run.prediction_scale`, before each round and at
            the end; inf where a run has diverged.
        local_errors: (B, K, tau + 1): the mean error of the subnetworks, before each local step and after the last;
            None if not requested.
        weights: (B, m, d): the final weights.
        merge_scales: (B, K): the gamma of each round.
    """

    errors: Tensor
    local_errors: Tensor | None
    weights: Tensor
    merge_scales: Tensor


Observer = Callable[[int, Tensor, Tensor], None]
"""Called with (round, weights (B, m, d), masks (B, p, m)) before each round."""


def train(
    problem: Problem,
    runs: Sequence[Run],
    basis: Basis = "coefficients",
    dtype: torch.dtype = torch.float64,
    local_errors: bool = False,
    observe: Observer | None = None,
    may_diverge: bool = False,
) -> Trace:
    """Train several networks in one batch.

    Args:
        problem: The data.
        runs: Runs with equal m, p, tau, K and rest.
        basis: The representation of the weights, see the module's text.
        dtype: float64 or float32.
        local_errors: Whether to record the errors of the subnetworks too.
        observe: Gets weights and masks before each round; only with basis 'weights'.
        may_diverge: Whether a diverged run has infinite errors, instead of ending all runs.

    Returns:
        The trace, in the order of `runs`.

    Raises:
        ConfigError: The runs differ in shape.
        DivergedError: The error of a run has diverged, and `may_diverge` is false.
    """
    if len({(run.law.width, run.law.subnetworks, run.local_steps, run.rounds, run.rest) for run in runs}) != 1:
        raise ConfigError("runs in one batch must have equal m, p, tau and K, and the same 'rest'")
    if observe and basis != "weights":
        raise ConfigError("weights can be observed only with basis 'weights'")
    held = runs[0].law.width * runs[0].law.subnetworks * max(run.law.probability for run in runs)
    batch_size = len(runs) if observe else max(1, int(_WORKING_SET / (held * problem.num_samples)))
    parts = [
        _Batch(problem, runs[first : first + batch_size], basis, dtype, may_diverge).train(local_errors, observe)
        for first in range(0, len(runs), batch_size)
    ]
    return Trace(
        errors=torch.cat([part.errors for part in parts]),
        local_errors=torch.cat([p.local_errors for p in parts if p.local_errors is not None]) if local_errors else None,
        weights=torch.cat([part.weights for part in parts]),
        merge_scales=torch.cat([part.merge_scales for part in parts]),
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
    """Check that no run has diverged.

    Args:
        errors: (B,).
        describe: Returns for the index of a run where it is, and its step size.

    Raises:
        DivergedError: A run has diverged.
    """
    bad = ~(errors < _DIVERGED)
    if bad.any():
        number = int(bad.nonzero()[0])
        raise DivergedError(f"the error is {errors[number]:.3g} {describe(number)} is too large")


class _Basis(Protocol):
    """A representation of the weights; "rows" are neurons, or neurons of subnetworks: (..., k)."""

    def start(self) -> Tensor:
        """Return the initial rows: (B, m, k)."""

    def hidden(self, rows: Tensor, neurons: Tensor | None) -> Tensor:
        """Return <w, x_i> for each row: (..., n); `neurons` are the rows' flat indices, None for all in order."""

    def gradient(self, hidden_gradient: Tensor) -> Tensor:
        """Return the gradient of the rows from the gradient of their hidden values (..., n)."""

    def weights(self, rows: Tensor) -> Tensor:
        """Return the weights of all rows: (B, m, d)."""


class _Weights:
    def __init__(self, inputs: Tensor, first: Tensor) -> None:
        self._inputs = inputs
        self._first = first

    def start(self) -> Tensor:
        return self._first.clone()

    def hidden(self, rows: Tensor, neurons: Tensor | None) -> Tensor:  # noqa: ARG002
        return rows @ self._inputs.T

    def gradient(self, hidden_gradient: Tensor) -> Tensor:
        return hidden_gradient @ self._inputs

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

    def gradient(self, hidden_gradient: Tensor) -> Tensor:
        return hidden_gradient

    def weights(self, rows: Tensor) -> Tensor:
        return self._first + rows @ self._inputs


class _Batch:
    """Runs of equal shape, trained in one batch."""

    def __init__(
        self, problem: Problem, runs: Sequence[Run], basis: Basis, dtype: torch.dtype, may_diverge: bool
    ) -> None:
        self._runs = runs
        self._may_diverge = may_diverge
        self._frozen = runs[0].rest == "frozen"
        self._inputs = problem.inputs.to(dtype)
        self._targets = problem.targets.to(dtype)
        width = runs[0].law.width
        first = torch.stack([initial_weights(run, problem.inputs.shape[1]) for run in runs]).to(dtype)
        self._basis: _Basis = (_Weights if basis == "weights" else _Coefficients)(self._inputs, first)
        self._signs = torch.stack([signs(run) for run in runs]).to(dtype) / math.sqrt(width)
        self._scale = torch.tensor([run.prediction_scale for run in runs], dtype=dtype)
        self._is_auto = torch.tensor([run.merge_scale == "auto" for run in runs])
        self._gamma = torch.tensor([1.0 if run.merge_scale == "auto" else run.merge_scale for run in runs], dtype=dtype)
        self._is_plain = all(run.merge_scale == 1 for run in runs)
        self._eta = torch.tensor([run.step_size for run in runs], dtype=dtype)

    def train(self, local_errors: bool, observe: Observer | None) -> Trace:
        rows = self._basis.start()
        errors, local, scales = [], [], []
        for round_number in range(self._runs[0].rounds):
            masks = torch.stack([run.mask(round_number) for run in self._runs])
            if observe:
                observe(round_number, self._basis.weights(rows), masks)  # the weights change in place afterwards
            active = self._basis.hidden(rows, None).relu_()
            errors.append(self._full_error(active, round_number))
            if self._runs[0].local_steps == 1 and not local_errors:
                merged = self._one_step(rows, active, masks)
            else:
                merged, errors_of_round = self._round(rows, active, masks, local_errors)
                local.append(errors_of_round)
            if self._is_plain:
                scales.append(self._gamma)
                rows = merged
            else:
                scales.append(self._scales_of(rows, merged, active))
                rows = rows.lerp(merged, scales[-1][:, None, None])  # at 1 exactly `merged`
        errors.append(self._full_error(self._basis.hidden(rows, None).relu_(), self._runs[0].rounds))
        return Trace(
            errors=torch.stack(errors, dim=1),
            local_errors=torch.stack(local, dim=1) if local_errors else None,
            weights=self._basis.weights(rows),
            merge_scales=torch.stack(scales, dim=1),
        )

    def _predicted(self, active: Tensor) -> Tensor:
        """Return the scaled predictions of each full network: (B, n)."""
        return (self._signs.unsqueeze(1) @ active).squeeze(1) * self._scale[:, None]

    def _scales_of(self, rows: Tensor, merged: Tensor, active: Tensor) -> Tensor:
        """Return the gamma of each run: (B,).

        An automatic one minimizes ||e - gamma c||^2. c is the change of the outputs at gamma = 1, extrapolated from
        1/p, which is a change of the usual size.
        """
        if not self._is_auto.any():
            return self._gamma
        trial = 1 / self._runs[0].law.subnetworks
        before = self._predicted(active)
        change = (self._predicted(self._basis.hidden(torch.lerp(rows, merged, trial), None).relu_()) - before) / trial
        fitted = ((self._targets - before) * change).sum(dim=1) / change.square().sum(dim=1)
        return torch.where(self._is_auto, fitted.nan_to_num().clamp(0, 1), self._gamma)  # 0/0: nothing changes

    def _full_error(self, active: Tensor, round_number: int) -> Tensor:
        """Return the mean squared error of each full network with scaled predictions: (B,)."""
        found = (self._predicted(active) - self._targets).square().mean(dim=1)
        if self._may_diverge:
            return torch.where(found < _DIVERGED, found, torch.inf)  # NaN too
        check_finite(found, lambda number: self._describe(number, round_number))
        return found

    def _describe(self, number: int, round_number: int) -> str:
        run = self._runs[number]
        return (
            f"in round {round_number} with m={run.law.width}, p={run.law.subnetworks}, xi={run.law.probability:g}, "
            f"tau={run.local_steps}: the step size eta={run.step_size:g}"
        )

    def _one_step(self, rows: Tensor, active: Tensor, masks: Tensor) -> Tensor:
        """Make a round of one local step: all subnetworks compute a neuron's gradient from the same hidden values."""
        signed = masks * self._signs[:, None]
        residuals = (self._signs[:, None].expand_as(signed) if self._frozen else signed) @ active - self._targets
        hidden_gradient = _through_relu(signed.mT @ residuals, active)
        holders = masks.sum(dim=1).clamp_min(1)
        change = self._basis.gradient(hidden_gradient).mul_((self._eta[:, None] / holders)[..., None])
        return rows.sub_(change) if self._is_plain else rows - change

    def _round(self, rows: Tensor, active: Tensor, masks: Tensor, local_errors: bool) -> tuple[Tensor, Tensor]:
        """Make a round of tau local steps; return rows and mean subnetwork errors (B, tau + 1), if any."""
        num_runs, width = rows.shape[:2]
        neurons, held = _held(masks)
        flat = (neurons + torch.arange(num_runs)[:, None, None] * width).flatten()
        shape = (*neurons.shape, -1)
        cut = rows.flatten(0, 1)[flat].view(shape)
        own = active.flatten(0, 1)[flat].view(shape)
        # Padding of a smaller subnetwork gets the sign 0, so it adds nothing to the prediction and does not change.
        signed = self._signs.flatten()[flat].view(neurons.shape) * held
        eta = self._eta[:, None, None, None]
        targets = self._targets
        if self._frozen:  # the own neurons fit what the others leave
            others = ~masks * self._signs[:, None]
            targets = (targets - others @ active).unsqueeze(2)
        errors = []
        for step in range(self._runs[0].local_steps):
            if step:
                own = self._basis.hidden(cut, flat).relu_()
            residuals = signed.unsqueeze(2) @ own - targets  # (B, p, 1, n)
            errors.append(residuals)
            cut.sub_(self._basis.gradient(_through_relu(signed.unsqueeze(3) * residuals, own)).mul_(eta))
        if local_errors:
            own = self._basis.hidden(cut, flat).relu_()
            errors.append(signed.unsqueeze(2) @ own - targets)
        merged = _mean_of_holders(rows.flatten(0, 1), cut.flatten(0, 2), flat, held.flatten()).view(rows.shape)
        if not local_errors:
            return merged, rows.new_empty(0)
        return merged, torch.stack([error.square().mean(dim=(1, 2, 3)) for error in errors], dim=1)


def _through_relu(gradient: Tensor, active: Tensor) -> Tensor:
    """Turn the gradient after the relu into the gradient before it, in place: 0 where `active` is 0."""
    found: Tensor = torch.ops.aten.threshold_backward.grad_input(gradient, active, 0, grad_input=gradient)
    return found


def _held(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the neurons of each subnetwork, padded to the largest: indices, and which are real; both (B, p, N)."""
    counts = masks.sum(dim=2)
    most = max(1, int(counts.max()))
    real = torch.arange(most) < counts[..., None]
    neurons = torch.zeros(*counts.shape, most, dtype=torch.int64)
    neurons[real] = masks.nonzero()[:, 2]
    return neurons, real


def _mean_of_holders(rows: Tensor, cut: Tensor, owners: Tensor, held: Tensor) -> Tensor:
    """Return the mean of each neuron's copies; a neuron without copies does not change."""
    owners, cut = owners[held], cut[held]
    holders = torch.bincount(owners, minlength=len(rows))
    total = torch.zeros_like(rows).index_add_(0, owners, cut)
    return torch.where(holders[:, None] > 0, total / holders.clamp_min(1)[:, None], rows)
