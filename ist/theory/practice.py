"""Train the network of the theory with the real system.

Where it sits: it calls `ist.train`, as a user's program does.
Not here: Algorithm 1 (`algorithm.py`).
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ist import api
from ist.config.partition import Coding, Exchange, Partition
from ist.config.recipe import MergeScale, Recipe
from ist.config.schema import Optimizer
from ist.errors import ConfigError
from ist.neurons.group import Group
from ist.subnet.partition import assign
from ist.theory.algorithm import Run, initial_weights, signs
from ist.theory.quantities.masks import Draw, Law, Mask
from ist.theory.quantities.problem import Problem


class Perceptron(nn.Module):
    """f(W, x) = (1/sqrt m) sum_r a_r relu(<w_r, x>): a trained hidden layer, and fixed signs.

    Args:
        weights: W, (m, d).
        signs: a, (m,).
    """

    def __init__(self, weights: Tensor, signs: Tensor) -> None:
        super().__init__()
        width, inputs = weights.shape
        self.hidden = nn.Linear(inputs, width, bias=False, dtype=weights.dtype)
        self.output = nn.Linear(width, 1, bias=False, dtype=weights.dtype).requires_grad_(False)
        with torch.no_grad():
            self.hidden.weight.copy_(weights)
            self.output.weight.copy_(signs / math.sqrt(width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return predictions (..., n) of inputs (..., n, d)."""
        predicted: Tensor = self.output(torch.relu(self.hidden(inputs))).squeeze(-1)
        return predicted


def half_squared_error(predicted: Tensor, targets: Tensor) -> Tensor:
    """Return 0.5 ||y - f||^2, the loss of the theory: a sum over the samples."""
    return (predicted - targets).square().sum() / 2


def system_partition(law: Law) -> Partition:
    """Return the partition of the real system whose masks have the same distribution."""
    return Partition(strategy="categorical") if law.xi is None else Partition(strategy="bernoulli", keep=law.xi)


def system_masks(law: Law, seed: int) -> Draw:
    """Return a function that returns the masks of the real system for a seed."""
    groups = [Group("hidden", law.width, ())]

    def draw(_: int, round_number: int) -> Mask:
        mask = np.zeros((law.subnetworks, law.width), dtype=np.bool_)
        shares = assign(groups, law.subnetworks, seed, round_number, system_partition(law))
        for row, (neurons,) in zip(mask, shares, strict=True):
            row[neurons] = True
        return mask

    return draw


def train_with_system(problem: Problem, run: Run, rest: Coding = "exact") -> Tensor:
    """Train the network of a run by real IST with p workers in this process; each worker has all samples.

    Args:
        problem: The data.
        run: Gives the initial weights, and the number and size of steps; the masks are those of
            `system_masks(run.law, run.seed)`.
        rest: How workers hold the rest of the network, if the run has it.

    Returns:
        The trained W, (m, d).

    Raises:
        ConfigError: The run has a fitted merge scale, which this comparison does not have.
        ConfigError, ModelError: As for `ist.train`.
    """
    if run.merge_scale == "auto":
        raise ConfigError("'gamma' is auto: the comparison with the system needs a number")
    workers = run.law.subnetworks
    model = Perceptron(initial_weights(run, problem.inputs.shape[1]), signs(run))
    # One sample of this data set is the full problem, so a shard of one sample is a full batch.
    data = TensorDataset(problem.inputs.repeat(workers, 1, 1), problem.targets.repeat(workers, 1))
    api.train(
        model,
        data,
        loss=half_squared_error,
        workers=workers,
        local_steps=run.local_steps,
        rounds=run.rounds,
        batch_size=1,
        optimizer=Optimizer(name="SGD", args={"lr": run.step_size}),
        pool="inline",
        seed=run.seed,
        progress=False,
        partition=system_partition(run.law).model_copy(update={"rest": run.rest}),
        exchange=Exchange(rest=rest) if run.rest == "frozen" else None,
        activation_scale="none",
        recipe=Recipe(merge_scale=MergeScale(own=run.merge_scale, shared=run.merge_scale)),
    )
    return model.hidden.weight.detach()
