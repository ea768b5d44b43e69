"""The column `most of the network that a worker ever held` of the benchmarks' tables."""

from typing import Any

import pytest

from benchmarks.held import held
from ist.runs.build import build_job
from tests.conftest import small_config

# 64-24-20-10 with batch norm among 4 workers: each holds 6 and 5 neurons.
QUARTER = (64 * 6 + 3 * 6 + 6 * 5 + 3 * 5 + 5 * 10 + 10) / (64 * 24 + 3 * 24 + 24 * 20 + 3 * 20 + 20 * 10 + 10)


@pytest.mark.parametrize(
    ("changes", "fraction", "steps", "cell"),
    [
        ({}, QUARTER, 1.0, "22%"),
        (
            {"recipe": {"stages": [{}, {"rounds": 1, "keep": 1, "local_steps": 9}]}},
            1.0,
            0.5,
            "100%, in 50% of its steps",
        ),
        ({"recipe": {"stages": [{"keep": 1}]}}, 1.0, 1.0, "100%"),
        ({"method": "local_sgd", "pool": {"kind": "torchrun"}}, 1.0, 1.0, "100%"),
    ],
    ids=str,
)
def test_a_cell_says_the_most_that_a_worker_holds_and_in_which_part_of_its_steps(
    changes: dict[str, Any], fraction: float, steps: float, cell: str
) -> None:
    most = held(build_job(small_config(**changes)))

    assert (most.fraction, most.steps) == (fraction, steps)
    assert str(most) == cell
