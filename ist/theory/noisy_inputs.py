"""Gradient descent on inputs with Gaussian masks: the same network with noise on its inputs.

Each step uses x * c, elementwise, with a new c ~ N(1, sigma^2 I) for each sample: Gaussian dropout of the inputs.

Reference: A. Kolomvaki, F. Liao et al., "Convergence Analysis of Two-Layer Neural Networks under Gaussian Input
Masking", arXiv 2602.17423.

Where it sits: the experiment `inputs` uses it.
Not here: masks on neurons (`algorithm.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ist.errors import ConfigError
from ist.rng import Purpose, torch_seed
from ist.theory.algorithm import Run, check_finite, initial_weights, signs
from ist.theory.quantities.problem import Problem


def train_on_masked_inputs(problem: Problem, runs: Sequence[Run], sigma: float) -> Tensor:
    """Train full networks, one step per round, with new input masks in each step.

    Args:
        problem: The data.
        runs: Runs with equal width and rounds; p, tau, xi and gamma must be 1.
        sigma: The standard deviation of the masks, at least 0.

    Returns:
        (B, K + 1): the mean squared error on the inputs without masks, before each step and at the end.

    Raises:
        ConfigError: A run has subnetworks or local steps, or sigma is negative.
        DivergedError: The error of a run has diverged.
    """
    if sigma < 0:
        raise ConfigError(f"'sigma' is {sigma}: expected at least 0")
    if any((r.law.subnetworks, r.local_steps, r.law.probability, r.merge_scale) != (1, 1, 1.0, 1.0) for r in runs):
        raise ConfigError("this experiment masks inputs, not neurons: p, tau and xi must be 1, as must gamma")
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
        masked = inputs * (1 + sigma * torch.stack(noise))
        hidden = weights @ masked.mT  # (B, m, n)
        residuals = output @ torch.relu(hidden) - targets
        weights = weights - eta * ((output.mT * residuals) * (hidden > 0)) @ masked
    return torch.stack(errors, dim=1)
