"""Gradient descent on inputs with Gaussian masks: the same network, but noise is on what it sees.

Every step sees x * c, elementwise, with c ~ N(1, sigma^2 I) drawn anew for each sample: Gaussian dropout of the
inputs.

Reference: A. Kolomvaki, F. Liao et al., "Convergence Analysis of Two-Layer Neural Networks under Gaussian Input
Masking", arXiv 2602.17423.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ist.errors import ConfigError
from ist.rng import Purpose, torch_seed
from ist.theory.algorithm import Run, check_finite, initial_weights, signs
from ist.theory.problem import Problem


def train_on_masked_inputs(problem: Problem, runs: Sequence[Run], sigma: float) -> Tensor:
    """Train whole networks, a step a round, on inputs that are masked anew in every step.

    Args:
        problem: What to learn.
        runs: They agree in width and rounds; p and tau must be 1, xi 1.
        sigma: Standard deviation of the masks, at least 0.

    Returns:
        (B, K + 1): the mean squared error on the inputs as they are, before every step and at the end.

    Raises:
        ConfigError: A run has subnetworks or local steps, or sigma is negative.
        DivergedError: The error of a run has grown beyond all bounds.
    """
    if sigma < 0:
        raise ConfigError(f"'sigma' is {sigma}: a standard deviation is at least 0")
    if any((run.law.subnetworks, run.local_steps, run.law.probability) != (1, 1, 1.0) for run in runs):
        raise ConfigError("masks are on the inputs here: p, tau and xi must be 1")
    inputs, targets = problem.inputs, problem.targets
    weights = torch.stack([initial_weights(run, inputs.shape[1]) for run in runs])
    output = torch.stack([signs(run) for run in runs]).unsqueeze(1) / runs[0].law.width ** 0.5  # (B, 1, m)
    eta = torch.tensor([run.step_size for run in runs], dtype=torch.float64)[:, None, None]
    generators = [torch.Generator().manual_seed(torch_seed(run.seed, Purpose.TRAINING, 0)) for run in runs]
    errors = []
    for step in range(runs[0].rounds + 1):
        errors.append((output @ torch.relu(weights @ inputs.T) - targets).square().mean(dim=(1, 2)))
        check_finite(
            errors[-1],
            lambda number: f"in step {step} with sigma={sigma:g}: the step size eta={runs[number].step_size:g}",  # noqa: B023
        )
        if step == runs[0].rounds:
            break
        noise = [torch.randn(inputs.shape, dtype=torch.float64, generator=generator) for generator in generators]
        seen = inputs * (1 + sigma * torch.stack(noise))
        hidden = weights @ seen.mT  # (B, m, n)
        residuals = output @ torch.relu(hidden) - targets
        weights = weights - eta * ((output.mT * residuals) * (hidden > 0)) @ seen
    return torch.stack(errors, dim=1)
