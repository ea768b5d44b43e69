"""Values that a forward reads, and branches that it takes at random."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ist.checks.verify import verify_cuts
from ist.errors import ModelError
from ist.neurons.tracing.code_location import users_line
from tests.networks import seeded
from tests.neurons.networks import rand
from tests.neurons.test_draws import Hidden
from tests.neurons.test_neurons import job_of


def _asserts(h: Tensor) -> Tensor:
    assert torch.isfinite(h).all()
    return h


def _raises(h: Tensor) -> Tensor:
    if torch.isnan(h).any():
        raise ValueError("not a number")
    return h


def _prints(h: Tensor) -> Tensor:
    print(f"{h.detach().mean().item():.3f}")
    return h


def _bounds(h: Tensor) -> Tensor:
    if h.detach().max().item() > 1e6:
        raise RuntimeError("too large")
    return h


def _entropy(h: Tensor) -> Tensor:
    chances = h.softmax(1)
    float(-(chances * chances.log()).sum(1).mean().detach())
    return h


def _equal(h: Tensor) -> Tensor:
    assert torch.equal(h, h.clone())
    return h


def _validated(h: Tensor) -> Tensor:
    return torch.distributions.Normal(h, 1.0, validate_args=True).mean


CHECKS = {
    "assert": _asserts, "raise": _raises, "print": _prints, "bound": _bounds, "entropy": _entropy, "equal": _equal,
    "distribution": _validated,
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_a_check_of_values_does_not_prevent_a_split(check: Callable[[Tensor], Tensor]) -> None:
    job = job_of(seeded(lambda: Hidden(check)), rand(4, 12))

    verify_cuts(job)
    assert [group.size for group in job.split.groups] == [8, 6]


def test_a_hook_that_reads_a_float_does_not_prevent_a_split() -> None:
    model, seen = seeded(lambda: Hidden(torch.tanh)), []
    model.second.register_forward_hook(lambda *call: seen.append(float(call[2].detach().std())))
    job = job_of(model, rand(4, 12))

    verify_cuts(job)
    assert [group.size for group in job.split.groups] == [8, 6]
    assert seen


def _divides(h: Tensor) -> Tensor:
    return h / h.detach().abs().max().item()


def _branches(h: Tensor) -> Tensor:
    return 2 * h if h.detach().mean() > 0 else h


def _counts(h: Tensor) -> Tensor:
    return h * int((h.detach() > 0).sum())


@pytest.mark.parametrize("use", [_divides, _branches, _counts])
def test_a_value_that_the_outputs_depend_on_prevents_a_split_and_its_line_is_named(
    use: Callable[[Tensor], Tensor],
) -> None:
    line = use.__code__.co_firstlineno + 1

    with pytest.raises(ModelError, match=rf"aten\.\S+ in .*test_reads\.py:{line}\)"):
        job_of(seeded(lambda: Hidden(use)), rand(4, 12))


def test_an_operator_that_mixes_hidden_neurons_is_named_with_its_module_and_line() -> None:
    network = seeded(lambda: Hidden(lambda h: h.cumsum(1)))
    line = Hidden.forward.__code__.co_firstlineno + 1

    with pytest.raises(ModelError, match=r"aten\.cumsum\.default in .*test_reads\.py"):
        job_of(network, rand(4, 12))
    with pytest.raises(ModelError, match=rf"aten\._softmax\.default in function \(.*test_draws\.py:{line}\)"):
        job_of(seeded(lambda: Hidden(nn.Softmax(1))), rand(4, 12))
    with pytest.raises(ModelError, match=r"aten\._softmax\.default in 1$"):
        job_of(nn.Sequential(nn.Linear(12, 8), nn.Softmax(1), nn.Linear(8, 5)), rand(4, 12))


def test_code_of_packages_named_like_torch_counts_as_the_networks_code_and_torchs_own_does_not() -> None:
    def line_of(file: str) -> str:
        names: dict[str, Callable[[], str]] = {"users_line": users_line}
        exec(compile("def line(): return users_line()", file, "exec"), names)
        return names["line"]()

    torchs = Path(torch.__file__).parent
    assert line_of(f"{torchs}_geometric/conv.py") == f"{torchs}_geometric/conv.py:1"
    assert line_of(f"{torchs}/nn/functional.py").startswith(f"{__file__}:")


class Skipping(nn.Module):
    """Skips blocks at random, as stochastic depth does."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(12, 8) for _ in range(3)])
        self.down = nn.ModuleList([nn.Linear(8, 12) for _ in range(3)])
        self.stem, self.out, self.draw = nn.Linear(12, 12), nn.Linear(12, 5), draw

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            if self.draw() < 0.5:
                x = x + down(up(x).relu())
        return self.out(x)


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(1).item()], ids=["python", "torch"])
def test_blocks_that_are_skipped_at_random_are_all_found(draw: Callable[[], float]) -> None:
    job = job_of(seeded(lambda: Skipping(draw)), rand(4, 12))

    verify_cuts(job)
    assert [group.name for group in job.split.groups] == ["up.0", "up.1", "up.2"]
    assert not job.split.found.unreached
