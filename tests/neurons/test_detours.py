"""Parts of a network that the example does not reach: experts, branches, empty selections."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ist.checks.verify import verify_cuts
from ist.neurons.tracing.untaken_paths import not_empty
from ist.subnet.job import assignments
from tests.networks import seeded
from tests.neurons.networks import rand
from tests.neurons.test_neurons import job_of

Send = Callable[[nn.ModuleList, Tensor, Tensor, Tensor], Tensor]


def _asks_any(experts: nn.ModuleList, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        mask = chosen == number
        if mask.any():
            y[mask] = weight[mask, None] * expert(x[mask])
    return y


def _runs_on_nothing(experts: nn.ModuleList, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        mask = chosen == number
        y[mask] = weight[mask, None] * expert(x[mask])
    return y


def _counts_rows(experts: nn.ModuleList, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        rows = (chosen == number).nonzero().flatten()
        if len(rows) == 0:
            continue
        y.index_add_(0, rows, weight[rows, None] * expert(x[rows]))
    return y


def _sums(experts: nn.ModuleList, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    for number, expert in enumerate(experts):
        mask = chosen == number
        if mask.sum() == 0:
            continue
        x = x.index_put((mask,), weight[mask, None] * expert(x[mask]))
    return x


class Mixture(nn.Module):
    """Sends each sample to one of five experts; two samples reach at most two of them."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self.stem, self.router, self.out = nn.Linear(12, 10), nn.Linear(10, 5), nn.Linear(10, 4)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 10)) for _ in range(5)])
        self.send = send

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weight, chosen = self.router(x).softmax(1).max(1)
        return self.out(x + self.send(self.experts, x, chosen, weight))


@pytest.mark.parametrize("send", [_asks_any, _runs_on_nothing, _counts_rows, _sums])
def test_experts_that_the_example_does_not_reach_are_split_and_checked(send: Send) -> None:
    job = job_of(seeded(lambda: Mixture(send)), rand(2, 12))

    verify_cuts(job)
    assert [group.name for group in job.split.groups] == [f"experts.{number}" for number in range(5)]
    assert job.split.found.detours
    assert not job.split.found.unreached


class Exits(nn.Module):
    """Continues only if the early exit is not confident."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.exit, self.second, self.out = (nn.Linear(*s) for s in ((12, 8), (8, 5), (8, 7), (7, 5)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        early = self.exit(h)
        if early.softmax(1).max() > 0.01:
            return early
        return self.out(self.second(h).tanh())


def test_a_branch_that_the_example_does_not_take_is_cut_along_its_inputs() -> None:
    model = seeded(Exits)
    job = job_of(model, rand(4, 12))

    verify_cuts(job)
    assert [(group.name, group.size) for group in job.split.groups] == [("first", 8), ("second", 7)]
    submodel = job.split.module(assignments(job).of(0)[0], torch.device("cpu"))
    assert submodel.get_parameter("second.weight").shape == (4, 4)


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(12, 8), nn.Linear(12, 12), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(x) if len(x) > 100 else x
        return self.out(self.first(x).tanh())


def test_parameters_that_no_detour_reaches_are_not_split_and_are_named() -> None:
    job = job_of(seeded(Large), rand(4, 12))

    assert [group.name for group in job.split.groups] == ["first"]
    assert job.split.found.unreached == ("second.weight", "second.bias")


def test_a_product_with_a_sparse_matrix_does_not_join_hidden_units() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(12, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            edges = torch.tensor([[0, 1, 2], [1, 2, 3]])
            with torch.sparse.check_sparse_tensor_invariants():
                adjacency = torch.sparse_coo_tensor(edges, torch.ones(3, dtype=x.dtype), (4, 4))
            return self.out(torch.sparse.mm(adjacency, self.first(x).tanh()))

    job = job_of(seeded(Sparse), rand(4, 12))

    verify_cuts(job)
    assert [group.size for group in job.split.groups] == [8]


def test_a_mask_that_selects_nothing_selects_its_first_element_on_a_detour() -> None:
    assert not_empty(torch.zeros(2, 2, dtype=torch.bool)).tolist() == [[True, False], [False, False]]  # type: ignore[union-attr]
    assert not_empty(torch.tensor([False, True])).tolist() == [False, True]  # type: ignore[union-attr]
    assert not_empty(torch.tensor([3])).tolist() == [3]  # type: ignore[union-attr]
    assert not_empty(None) is None
