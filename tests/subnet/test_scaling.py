"""How bytes decrease with the number of workers: the IST paper's formula, compared with the bytes that are sent."""

import pytest
import torch
from torch.utils.data import TensorDataset

from ist.models.mlp import MLP
from ist.runs.execute import execute
from tests.conftest import job_for

WIDTHS = (784, 1024, 1024, 10)


def law(workers: int) -> float:
    """Return the bytes that a worker is sent in a round.

    Matrices between hidden layers are divided by n^2, other tensors of hidden neurons by n, the rest is not divided.
    """
    inputs, first, second, outputs = WIDTHS
    divided = inputs * first + second * outputs + 3 * (first + second)  # with bias, and scale and shift of batch norm
    return 4 * (first * second / workers**2 + divided / workers + outputs)


@pytest.mark.system
@pytest.mark.parametrize("workers", [2, 4, 8, 16])
def test_a_workers_bytes_follow_the_law_to_a_percent(workers: int) -> None:
    data = TensorDataset(torch.zeros(16 * workers, WIDTHS[0]), torch.arange(16 * workers) % 10)
    job = job_for(
        MLP(WIDTHS, batch_norm=True), data, train__workers=workers, train__rounds=1, train__local_steps=1,
        pool__coordinator="dedicated",
    )  # fmt: skip

    part = execute(job, progress=False)
    record = part.recorder.history[0]

    for counted in (record["bytes_to_worker"], record["bytes_from_worker"]):
        assert len(counted) == workers
        assert all(law(workers) <= nbytes <= 1.01 * law(workers) for nbytes in counted)


def test_bytes_decrease_faster_than_with_the_number_of_workers_and_slower_than_with_its_square() -> None:
    for workers in (2, 4, 8):
        assert 2 < law(workers) / law(2 * workers) < 4
