"""Subnetworks that train against the frozen rest: compared with autograd, and with the closed form of their rate."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ist.errors import ConfigError
from ist.theory.algorithm import Basis, Run, initial_weights, signs, train
from ist.theory.noisy_inputs import train_on_masked_inputs
from ist.theory.practice import system_masks, train_with_system
from ist.theory.quantities import frozen_rest
from ist.theory.quantities.kernels import finite_ntk, infinite_ntk
from ist.theory.quantities.masks import Law
from ist.theory.quantities.problem import Problem, sphere
from ist.transport.quantize import dequantize, quantize
from tests.conftest import ROOT

PROBLEM = sphere(6, 9)
_LIMITS = (frozen_rest.largest_scale, frozen_rest.monotone_scale)


def run(xi: float | None = None, p: int = 3, tau: int = 2, rounds: int = 4, m: int = 14, **more: Any) -> Run:
    return Run(Law(m, p, xi), tau, rounds, more.pop("eta", 0.3), **{"rest": "frozen", **more})


def by_autograd(problem: Problem, one: Run) -> Tensor:
    """Train copies of the full network whose gradients are masked; return the final weights."""
    output = signs(one) / math.sqrt(one.law.width)
    weights = initial_weights(one, problem.inputs.shape[1])
    for k in range(one.rounds):
        mask = one.mask(k).double()
        change = torch.zeros_like(weights)
        for own in mask:
            local = weights.clone().requires_grad_()
            for _ in range(one.local_steps):
                loss = 0.5 * (output @ torch.relu(local @ problem.inputs.T) - problem.targets).square().sum()
                (slope,) = torch.autograd.grad(loss, local)
                local = (local - one.step_size * own[:, None] * slope).detach().requires_grad_()
            change += local.detach() - weights
        weights = weights + one.merge_scale * change / mask.sum(dim=0).clamp_min(1)[:, None]
    return weights


@pytest.mark.parametrize("basis", ["coefficients", "weights"])
@pytest.mark.parametrize(("xi", "p", "tau", "gamma"), [(None, 3, 1, 1.0), (None, 3, 4, 0.4), (0.4, 4, 3, 0.7)])
def test_it_equals_a_loop_that_masks_gradients(basis: Basis, xi: float | None, p: int, tau: int, gamma: float) -> None:
    one = run(xi, p, tau, merge_scale=gamma)

    trace = train(PROBLEM, [one], basis)
    weights = by_autograd(PROBLEM, one)

    torch.testing.assert_close(trace.weights[0], weights, rtol=0, atol=1e-13)
    predicted = signs(one) / math.sqrt(14) @ torch.relu(weights @ PROBLEM.inputs.T)
    assert float(trace.errors[0, -1]) == pytest.approx(float((predicted - PROBLEM.targets).square().mean()), rel=1e-12)


@pytest.mark.parametrize("tau", [1, 5])
def test_one_full_subnetwork_is_gradient_descent_bit_for_bit(tau: int) -> None:
    problem = sphere(20, 30)
    one = run(None, 1, tau, 10 // tau, m=200, eta=0.1)
    weights = initial_weights(one, 30).requires_grad_()
    output = (signs(one) / math.sqrt(200))[None]
    for _ in range(10):
        loss = 0.5 * (output @ torch.relu(weights @ problem.inputs.T) - problem.targets).square().sum()
        (slope,) = torch.autograd.grad(loss, weights)
        weights = (weights - 0.1 * slope).detach().requires_grad_()

    assert torch.equal(train(problem, [one], "weights").weights[0], weights)


def test_one_local_step_is_gradient_descent_for_any_number_of_subnetworks() -> None:
    errors = [train(PROBLEM, [run(None, p, 1, 10)]).errors for p in (1, 5)]

    torch.testing.assert_close(errors[1], errors[0], rtol=1e-12, atol=0)


def test_a_merge_scale_shortens_the_change_of_each_neuron() -> None:
    full, half = (train(PROBLEM, [run(0.5, rounds=1, rest="absent", merge_scale=g)]).weights[0] for g in (1.0, 0.5))
    first = initial_weights(run(), 9)

    torch.testing.assert_close(half - first, (full - first) / 2, rtol=0, atol=1e-14)


def test_only_networks_with_the_rest_absent_leave_a_perfect_fit() -> None:
    """This is why there is no error floor: the gradients of a perfect fit are 0, those of its subnetworks are not."""
    one = run(tau=5)
    first = initial_weights(one, 9)
    fitted = Problem(PROBLEM.inputs, signs(one) / math.sqrt(14) @ torch.relu(first @ PROBLEM.inputs.T))

    moved = [
        float((train(fitted, [run(tau=5, rest=rest)], "weights").weights[0] - first).abs().max())
        for rest in ("frozen", "absent")
    ]

    assert moved[0] < 1e-14
    assert moved[1] > 1e-3


def test_the_error_of_a_linearized_network_follows_the_recursion() -> None:
    """Train f(W_0) + <df(W_0), W - W_0> by explicit steps, with new masks in each round."""
    one = run(None, 3, 7, 4, m=60, eta=0.4, merge_scale=0.6)
    first = initial_weights(one, 9)
    output = signs(one) / math.sqrt(60)
    active = (first @ PROBLEM.inputs.T > 0).double()
    jacobian = torch.einsum("r,ri,id->ird", output, active, PROBLEM.inputs)
    error = PROBLEM.targets - output @ torch.relu(first @ PROBLEM.inputs.T)
    expected, start = error.clone(), error.norm()
    for k in range(one.rounds):
        mask = one.mask(k)
        change = torch.zeros_like(error)
        for own in mask.double():
            local = error.clone()
            for _ in range(7):
                step = 0.4 * own[:, None] * torch.einsum("ird,i->rd", jacobian, local)
                local -= torch.einsum("ird,rd->i", jacobian, step)
            change += error - local
        error = error - 0.6 * change
        expected = frozen_rest.round_matrix(finite_ntk(PROBLEM.inputs, first, mask), 7, 0.4, 0.6) @ expected

    torch.testing.assert_close(error, expected, rtol=1e-12, atol=0)
    assert error.norm() < 0.3 * start


@pytest.mark.parametrize(("xi", "gamma"), [(None, 0.3), (0.5, 0.5)])
def test_a_wide_network_follows_the_closed_form(xi: float | None, gamma: float) -> None:
    problem = sphere(5, 40)
    one = run(xi, 4, 10, 3, m=20_000, eta=1.0, merge_scale=gamma)
    values, directions = torch.linalg.eigh(infinite_ntk(problem.inputs))
    first = problem.targets - signs(one) @ torch.relu(initial_weights(one, 40) @ problem.inputs.T) / 20_000**0.5
    factors = frozen_rest.factors(values, one.law, 10, 1.0, gamma)

    errors = train(problem, [one]).errors[0]

    predicted = ((directions.T @ first) * factors ** torch.arange(4)[:, None]).square().mean(dim=1)
    # Kernels of 5,000 or 10,000 neurons differ by about 1 % from their limit, which three rounds multiply.
    torch.testing.assert_close(errors, predicted, rtol=0.1, atol=0)


def test_no_split_overshoots_more_than_equal_shares() -> None:
    """The largest eigenvalue of S is at most p g(lambda_max / p), with equality if all H_l are equal."""
    generator = torch.Generator().manual_seed(0)
    for tau in (1, 2, 3, 50):
        for p in (2, 5):
            for rank in (1, 2, 6):
                roots = torch.randn(p, 6, rank, dtype=torch.float64, generator=generator)
                kernels = roots @ roots.mT
                step = 1 / float(torch.linalg.eigvalsh(kernels).max())
                whole = torch.linalg.eigvalsh(kernels.sum(dim=0))

                largest = [
                    1 - float(torch.linalg.eigvalsh(frozen_rest.round_matrix(one, tau, step, 1.0))[0])
                    for one in (kernels, kernels.mean(dim=0).expand(p, 6, 6))
                ]

                bound = float(frozen_rest.removed(whole, Law(p, p, None), tau, step).max())
                assert largest[0] <= bound * (1 + 1e-9)
                assert largest[1] == pytest.approx(bound)


def test_the_error_falls_below_the_limit_and_grows_above_it() -> None:
    problem = sphere(5, 40)
    values = torch.linalg.eigvalsh(infinite_ntk(problem.inputs))
    limit = frozen_rest.largest_scale(values, Law(3000, 8, None), 10, 1.0)
    runs = [run(None, 8, 10, 30, m=3000, eta=1.0, merge_scale=share * limit) for share in (0.9, 1.1)]

    below, above = train(problem, runs, may_diverge=True).errors

    assert (below[1:] < below[:-1]).all()
    assert below[-1] < 1e-3 * below[0]
    assert above.max() > 2 * above[0]


def test_the_best_scale_is_between_one_over_p_and_one() -> None:
    values, law = torch.tensor([0.2, 0.5], dtype=torch.float64), Law(100, 8, None)

    def best(tau: int, law: Law = law) -> float:
        return frozen_rest.best_scale(values, law, tau, 1.0)

    assert best(1) == 1
    assert best(5000) == pytest.approx(1 / 8)
    assert [best(tau) for tau in (1, 5, 20, 80, 320)] == sorted(
        (best(tau) for tau in (1, 5, 20, 80, 320)), reverse=True
    )
    assert best(5000, Law(100, 8, 0.25)) == pytest.approx(0.25 / (1 - 0.75**8))  # xi / theta
    assert best(5000, Law(100, 1, None)) == best(5000, Law(100, 1, 0.25)) == 1
    assert frozen_rest.largest_scale(values, law, 5000, 1.0) == pytest.approx(2 / 8)
    assert frozen_rest.monotone_scale(values, law, 10, 1.0) == pytest.approx(1 / (8 * (1 - (1 - 0.5 / 8) ** 10)))
    grid = torch.linspace(0.01, 1, 991, dtype=torch.float64)
    worst = torch.stack([frozen_rest.factors(values, law, 10, 1.0, float(g)).abs().max() for g in grid])
    assert best(10) == pytest.approx(float(grid[worst.argmin()]), abs=1e-3)  # the grid's step


def test_the_page_about_merge_scales_has_the_numbers_of_the_closed_form() -> None:
    lines = (ROOT / "docs" / "merge_scale.md").read_text().splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| [\d.∞]+ \|", line)
    ]

    assert [row[0] for row in cells] == ["0.5", "1", "2", "5", "10", "20", "50", "∞"]
    unit, tau = torch.ones(1, dtype=torch.float64), 10_000
    for x, *found in cells:
        step = 0.5 if x == "∞" else float(x) / tau
        for p, cell in zip((2, 4, 8, 16), found, strict=True):
            limit, calm = (f(unit, Law(16, p, None), tau, step) for f in _LIMITS)
            assert cell == f"{limit:.3f} ({calm:.3f})"


def test_shared_parameters_lower_the_overshoot() -> None:
    """Compare with explicit steps of a linear model whose first columns are shared, and with the closed form."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(5, 4, 3, dtype=torch.float64, generator=generator) / 4  # samples, parts, parameters
    blocks = features.movedim(1, 0)
    kernels = blocks @ blocks.mT
    error = torch.randn(5, dtype=torch.float64, generator=generator)
    changes = []
    for own in (1, 2, 3):
        held = torch.cat([blocks[0], blocks[own]], dim=1)
        weights = torch.zeros(6, dtype=torch.float64)
        for _ in range(9):
            weights = weights + 0.3 * held.T @ (error - held @ weights)
        changes.append((blocks[0] @ weights[:3], blocks[own] @ weights[3:]))

    expected = error - torch.stack([s / 3 + 0.7 * o for s, o in changes]).sum(dim=0)

    found = frozen_rest.round_matrix(kernels[1:], 9, 0.3, 0.7, shared=kernels[0]) @ error
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    unit = torch.eye(5, dtype=torch.float64)
    equal, shared, part = (unit * 0.75 / 4).expand(4, 5, 5), unit * 0.25, 0.25 + 0.75 / 4
    for gamma in (1 / 4, 0.6):
        factor = 1 - (0.25 + gamma * 0.75) * (1 - (1 - 0.5 * part) ** 20) / part
        torch.testing.assert_close(frozen_rest.round_matrix(equal, 20, 0.5, gamma, shared), factor * unit)
    assert frozen_rest.round_matrix(equal, 2000, 0.5, 1 / 4, shared).abs().max() < 1e-12  # exact with 1/p


def test_the_limit_with_an_outer_optimizer_is_that_of_its_iteration() -> None:
    """Iterate Nesterov momentum on the merged change, as the system does, just below and above the limit."""
    values, law = torch.tensor([0.1, 0.4], dtype=torch.float64), Law(100, 4, None)
    s = frozen_rest.removed(values, law, 12, 1.0)
    for lr, momentum in ((1.0, 0.0), (0.7, 0.9), (1.0, 0.5)):
        limit = frozen_rest.largest_scale(values, law, 12, 1.0, lr, momentum)
        ends = []
        for gamma in (0.95 * limit, 1.05 * limit):
            error, velocity = torch.ones_like(s), torch.zeros_like(s)
            for _ in range(600):
                change = gamma * s * error
                velocity = momentum * velocity + change
                error = error - lr * (change + momentum * velocity)
            ends.append(float(error.norm()))
        assert ends[0] < 1e-3
        assert ends[1] > 1e3


def test_the_error_of_a_rounded_rest_compensates_for_the_rounding() -> None:
    """Train with the real system: e ends near -(1 - 1/p) (f(W) - f(Q(W)))."""
    problem = sphere(5, 20)
    law = Law(300, 4, None)
    one = run(None, 4, 20, 9, m=300, eta=1.0, merge_scale=0.3, draw=system_masks(law, 0))

    weights = train_with_system(problem, one, rest="int4")

    def outputs(of: Tensor) -> Tensor:
        return signs(one) @ torch.relu(of @ problem.inputs.T) / math.sqrt(300)

    rounded = dequantize(*quantize(weights, 4), 20, 4).double()
    error, expected = problem.targets - outputs(weights), -0.75 * (outputs(weights) - outputs(rounded))
    # The kernels of 75 neurons differ from H/p, and the last round has moved the weights to other levels.
    assert (error - expected).norm() < 0.5 * expected.norm()
    assert error.norm() > 100 * train(problem, [one]).errors[0, -1].sqrt()


def test_a_fitted_merge_scale_is_the_best_of_its_round() -> None:
    problem = sphere(5, 40)
    scales = (0.15, 0.2, 0.25, 0.3, 0.35)
    runs = [run(None, 8, 15, 1, m=4000, eta=1.0, merge_scale=scale) for scale in ("auto", *scales)]

    trace = train(problem, runs)

    values = torch.linalg.eigvalsh(infinite_ntk(problem.inputs))
    s = frozen_rest.removed(values, runs[0].law, 15, 1.0)
    assert 1 / float(s.max()) * 0.98 < float(trace.merge_scales[0]) < 1 / float(s.min()) * 1.02  # m is not infinite
    assert trace.errors[0, 1] < trace.errors[1:, 1].min()
    assert trace.merge_scales[1:, 0].tolist() == pytest.approx(scales)


def test_a_fitted_merge_scale_needs_no_limit_and_leaves_other_runs_alone() -> None:
    auto, half = (run(None, 3, 30, 20, m=600, eta=0.5, merge_scale=scale) for scale in ("auto", 0.3))

    together = train(PROBLEM, [auto, half])

    assert (together.errors[0, 1:8] < 0.5 * together.errors[0, :7]).all()
    torch.testing.assert_close(together.errors[1:], train(PROBLEM, [half]).errors, rtol=1e-9, atol=1e-25)
    fitted = Problem(PROBLEM.inputs, torch.zeros(6, dtype=torch.float64))
    one = run(None, 1, 1, 2, merge_scale="auto", kappa=1e-200)  # all outputs and gradients are 0 in float64
    assert train(fitted, [one]).merge_scales.tolist() == [[0.0, 0.0]]


def test_a_diverged_run_has_infinite_errors_and_leaves_others_alone() -> None:
    good, bad = run(eta=0.1, rounds=60), run(eta=0.1, rounds=60, tau=2, merge_scale=500.0)

    together = train(PROBLEM, [good, bad], may_diverge=True).errors

    assert torch.isinf(together[1]).any()
    assert not torch.isnan(together).any()
    torch.testing.assert_close(together[:1], train(PROBLEM, [good]).errors, rtol=1e-12, atol=0)


def test_impossible_settings_of_the_frozen_rest_are_named() -> None:
    for make, words in [
        (lambda: run(merge_scale=0.0), r"'gamma'.*\b0\.0\b"),
        (lambda: train(PROBLEM, [run(), run(rest="absent")]), "'rest'"),
        (lambda: train_with_system(PROBLEM, run(merge_scale="auto")), r"'gamma'.*auto.*number"),
        (lambda: train_on_masked_inputs(PROBLEM, [run(1.0, 1, 1, merge_scale=0.5)], 0.1), r"gamma"),
    ]:
        with pytest.raises(ConfigError, match=words):
            make()
