"""Algorithm 1: compared with a plain loop and with finite differences, and its special cases."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from ist.errors import ConfigError, DivergedError
from ist.theory.algorithm import Basis, Run, initial_weights, signs, train
from ist.theory.noisy_inputs import train_on_masked_inputs
from ist.theory.quantities.masks import Law
from ist.theory.quantities.problem import Problem, sphere
from tests.theory import loop

PROBLEM = sphere(6, 9)


def run(xi: float | None = 0.5, p: int = 3, tau: int = 2, rounds: int = 4, m: int = 14, **more: Any) -> Run:
    return Run(Law(m, p, xi), tau, rounds, more.pop("eta", 0.3), **more)


def by_loop(problem: Problem, one: Run) -> tuple[Any, list[float]]:
    masks = [one.mask(k).numpy().astype(np.float64) for k in range(one.rounds)]
    start = initial_weights(one, problem.inputs.shape[1]).numpy()
    return loop.algorithm_1(
        start, signs(one).numpy(), masks, problem.inputs.numpy(), problem.targets.numpy(), one.local_steps,
        one.step_size, one.law.probability,
    )  # fmt: skip


@pytest.mark.parametrize("basis", ["coefficients", "weights"])
@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize(("xi", "p"), [(None, 1), (None, 3), (0.2, 1), (0.5, 4), (1.0, 2)])
def test_it_equals_the_plain_loop(basis: Basis, tau: int, xi: float | None, p: int) -> None:
    one = run(xi, p, tau)

    trace = train(PROBLEM, [one], basis)
    weights, errors = by_loop(PROBLEM, one)

    np.testing.assert_allclose(trace.weights[0].numpy(), weights, rtol=0, atol=1e-13)
    np.testing.assert_allclose(trace.errors[0].numpy(), errors, rtol=1e-12)


def test_gradients_of_the_loop_equal_finite_differences() -> None:
    one = run()
    inputs, targets = PROBLEM.inputs.numpy(), PROBLEM.targets.numpy()
    weights, a, mask = initial_weights(one, 9).numpy(), signs(one).numpy(), one.mask(0)[0].numpy().astype(float)

    def loss(w: Any) -> float:
        return 0.5 * float(np.sum((targets - loop.predict(w, a, mask, inputs)) ** 2))

    found = loop.gradient(weights, a, mask, inputs, targets)

    for r, j in [(0, 0), (3, 5), (13, 8)]:
        up, down = weights.copy(), weights.copy()
        up[r, j] += 1e-6
        down[r, j] -= 1e-6
        assert found[r, j] == pytest.approx((loss(up) - loss(down)) / 2e-6, abs=1e-7)


def test_runs_in_one_batch_equal_separate_runs() -> None:
    runs = [run(xi, seed=seed, eta=eta) for seed, (xi, eta) in enumerate([(0.1, 0.1), (0.5, 0.3), (0.9, 0.2)])]

    together = train(PROBLEM, runs, local_errors=True)
    alone = [train(PROBLEM, [one], local_errors=True) for one in runs]

    assert together.local_errors is not None
    assert together.local_errors.shape == (3, 4, 3)
    for number, one in enumerate(alone):
        assert one.local_errors is not None
        torch.testing.assert_close(together.errors[number], one.errors[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(together.local_errors[number], one.local_errors[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(together.weights[number], one.weights[0], rtol=0, atol=1e-13)


def test_one_full_subnetwork_is_gradient_descent_bit_for_bit() -> None:
    """Compare with autograd; for gradient descent only the total number of steps matters."""
    problem = sphere(20, 30)
    for tau, rounds in ((1, 20), (5, 4)):
        one = run(1.0, 1, tau, rounds, m=200, eta=0.1)
        weights = initial_weights(one, 30).requires_grad_()
        output = (signs(one) / math.sqrt(200))[None]
        for _ in range(20):
            loss = 0.5 * (output @ torch.relu(weights @ problem.inputs.T) - problem.targets).square().sum()
            (slope,) = torch.autograd.grad(loss, weights)
            weights = (weights - 0.1 * slope).detach().requires_grad_()

        assert torch.equal(train(problem, [one], "weights").weights[0], weights)


def test_dropout_is_one_subnetwork_and_one_step() -> None:
    """Compare with autograd through a network whose hidden values are dropped without scaling."""
    problem = sphere(20, 30)
    one = run(0.5, 1, 1, 10, m=100, eta=0.1)
    weights = initial_weights(one, 30).requires_grad_()
    for k in range(10):
        mask = one.mask(k)[0].double()
        hidden = torch.relu(problem.inputs @ weights.T) * mask
        loss = 0.5 * (hidden @ signs(one) / 10 - problem.targets).square().sum()
        (slope,) = torch.autograd.grad(loss, weights)
        weights = (weights - 0.1 * slope).detach().requires_grad_()

    torch.testing.assert_close(train(problem, [one]).weights[0], weights.detach(), rtol=0, atol=1e-13)


def test_a_neuron_without_holders_does_not_change() -> None:
    one = run(0.1, 2, 3, 1, m=50)
    held = one.mask(0).any(dim=0)

    moved = (train(PROBLEM, [one], "weights").weights[0] != initial_weights(one, 9)).any(dim=1)

    assert 0 < held.sum() < 50
    assert not moved[~held].any()


def test_float32_is_near_float64() -> None:
    one = run(m=300, rounds=50)

    torch.testing.assert_close(
        train(PROBLEM, [one], dtype=torch.float32).errors.double(), train(PROBLEM, [one]).errors, rtol=1e-3, atol=1e-6
    )


def test_the_expectation_of_a_masked_network_is_the_scaled_one() -> None:
    """This is why predictions are scaled by xi: the mean of f^l over masks is u."""
    one = run(0.3, 4000, 1, 1, m=4000)
    mask = one.mask(0).double()
    hidden = torch.relu(PROBLEM.inputs @ initial_weights(one, 9).T) * signs(one) / math.sqrt(4000)

    torch.testing.assert_close((hidden @ mask.T).mean(dim=1), 0.3 * hidden.sum(dim=1), rtol=0, atol=0.05)


def test_impossible_settings_are_named() -> None:
    for make, words in [
        (lambda: Law(10, 2, 0.0), r"'xi'.*\b0\.0\b"),
        (lambda: Law(10, 2, 1.5), r"'xi'.*\b1\.5\b"),
        (lambda: Law(3, 4, None), r"'m'.*\b3\b.*\b4\b.*'p'"),
        (lambda: Law(3, 0, None), r"'p'.*\b0\b"),
        (lambda: run(tau=0), r"'tau'.*\b0\b"),
        (lambda: run(eta=-1.0), r"'eta'.*-1\.0"),
        (lambda: train(PROBLEM, [run(tau=1), run(tau=2)]), "m, p, tau and K"),
        (lambda: train(PROBLEM, [run()], observe=lambda *_: None), "'weights'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            make()
    with pytest.raises(DivergedError, match=r"eta=50\b"):
        train(PROBLEM, [run(rounds=100, eta=50.0)])


def test_masked_inputs_without_variance_are_gradient_descent() -> None:
    one = run(1.0, 1, 1, 20)

    torch.testing.assert_close(train_on_masked_inputs(PROBLEM, [one], 0.0), train(PROBLEM, [one]).errors)


def test_the_error_floor_of_masked_inputs_grows_with_the_variance() -> None:
    runs = [run(1.0, 1, 1, 300, m=200, seed=seed) for seed in range(4)]

    left = [float(train_on_masked_inputs(PROBLEM, runs, sigma)[:, -100:].mean()) for sigma in (0.0, 0.1, 0.2)]

    assert left[0] < left[1] / 10
    assert left[2] / left[1] == pytest.approx(4, rel=0.5)  # proportional to the variance
    with pytest.raises(ConfigError, match=r"'sigma'.*-1\b"):
        train_on_masked_inputs(PROBLEM, runs, -1)
    with pytest.raises(ConfigError, match=r"p, tau and xi .*\b1\b"):
        train_on_masked_inputs(PROBLEM, [run()], 0.1)
