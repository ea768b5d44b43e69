"""The check of cuts with parameters whose values are made one layer at a time."""

import dataclasses
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ist.checks.verify
from ist.checks.lazy_verify import CannotRunLazilyError
from ist.checks.made_values import MadeValues, Sketch, sketch
from ist.checks.verify import verify_cuts
from ist.errors import ModelError
from ist.runs.rehearsal import _with_narrow_gradients
from ist.tensors import TensorSpec
from tests.conftest import ROOT, assert_same, clone, data, naming
from tests.networks import seeded
from tests.neurons.networks import CASES, IMAGE, Flipped, Heads, rand
from tests.neurons.test_neurons import case_job, job_of


@pytest.fixture(autouse=True)
def every_network_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ist.checks.verify, "MOST_FOR_WHOLE", -1)


@pytest.mark.parametrize("most_for_double", [0, 10**9], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["fused", "LSTM", "checkpointed", "tied autoencoder"])
@pytest.mark.parametrize("scale", ["none", "width"])
def test_right_cuts_pass_without_a_copy_of_the_network(
    name: str, scale: str, most_for_double: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ist.checks.verify, "MOST_FOR_DOUBLE", most_for_double)
    monkeypatch.setattr(ist.checks.verify, "_check_copies", None)  # the other check

    verify_cuts(case_job(CASES[name], train__activation_scale=scale))


def test_a_wrong_order_of_positions_is_refused() -> None:
    job = job_of(seeded(Flipped), IMAGE)
    wrong = [
        dataclasses.replace(group, slots=tuple(dataclasses.replace(s, order=None) for s in group.slots))
        for group in job.split.groups
    ]

    with pytest.raises(ModelError, match=naming("masked", "partition.exclude")):
        verify_cuts(dataclasses.replace(job, split=dataclasses.replace(job.split, groups=tuple(wrong))))


def test_a_size_that_was_not_found_is_refused_with_the_line_of_the_submodel() -> None:
    job = job_of(seeded(Heads), rand(2, 5, 20))
    found = dataclasses.replace(job.split.found, sizes=())

    with pytest.raises(ModelError, match=naming("a submodel of this class fails", "'q'", "partition.sizes")):
        verify_cuts(dataclasses.replace(job, split=dataclasses.replace(job.split, found=found)))


class ByPosition(nn.Module):
    """Weighs its hidden units by their position, through an attribute that no rule can see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.second(hidden * float(hidden.shape[1]))


def test_a_factor_that_depends_on_the_width_is_refused() -> None:
    with pytest.raises(ModelError, match=naming("computes other values", "output 0")):
        verify_cuts(job_of(seeded(ByPosition), rand(3, 12)))


class Numpy(nn.Module):
    """Reads a parameter past torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 5)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        factor = 1.0 if self.temperature.is_meta else float(self.temperature.detach().numpy()[0])
        return self.second(self.first(x).relu()) * factor


def test_a_network_that_does_not_run_lazily_is_checked_with_copies_after_a_warning_with_their_bytes() -> None:
    job = job_of(seeded(Numpy), rand(3, 12))

    with pytest.warns(UserWarning, match=naming("whole copies", "600 bytes", "numpy()")):
        verify_cuts(job)
    blind = dataclasses.replace(job.split.groups[0], outgoing=frozenset())
    with pytest.warns(UserWarning, match="whole copies"), pytest.raises(ModelError, match="masked"):
        verify_cuts(dataclasses.replace(job, split=dataclasses.replace(job.split, groups=(blind,))))


def test_full_requests_the_check_with_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise CannotRunLazilyError("it was asked")

    monkeypatch.setattr(ist.checks.verify, "verify_lazily", refused)
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)))

    verify_cuts(job_of(model, rand(3, 12), partition__verify="full"))
    with pytest.warns(UserWarning, match="it was asked"):
        verify_cuts(job_of(model, rand(3, 12)))


class Overflowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * float("inf")


def test_a_network_without_finite_outputs_is_refused() -> None:
    with pytest.raises(ModelError, match=naming("output 0", "not finite")):
        verify_cuts(job_of(seeded(Overflowing), rand(3, 12)))


def test_a_16_bit_network_is_compared_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ist.checks.verify, "MOST_FOR_DOUBLE", 0)
    seen: set[torch.dtype] = set()

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x.to(self.first.weight.dtype)).relu()
            if not hidden.is_meta:
                seen.add(hidden.dtype)
            return self.second(hidden)

    verify_cuts(job_of(seeded(Seen).bfloat16(), rand(3, 12)))

    assert seen == {torch.float32}


def test_made_values_follow_the_initial_ones_and_keep_masks() -> None:
    specs = {"scale": TensorSpec((700, 900), torch.float32), "mask": TensorSpec((2,), torch.float32)}
    mask = torch.tensor([0.0, float("-inf")])
    positive = sketch(torch.rand(700, 900, generator=torch.Generator().manual_seed(0)) + 1)
    values = MadeValues({"scale": positive, "mask": sketch(mask)}, specs, seed=3)

    made = values.of("scale").clone()

    assert made.min() > 0.8
    assert made.max() < 2.2
    assert abs(float(made.mean()) - 1.5) < 0.01
    assert len(made.unique(dim=0)) == 700
    assert torch.equal(values.of("mask"), mask)
    assert torch.equal(MadeValues({"scale": positive}, specs, seed=3).of("scale"), made)
    assert sketch(torch.zeros(5)) == Sketch(0.0, 0.1)
    assert sketch(torch.ones(5)) == Sketch(1.0, 0.25)


def test_the_memory_of_values_is_used_again_only_after_nobody_uses_them() -> None:
    specs = {name: TensorSpec((700, 900), torch.float32) for name in ("a", "b")}
    values = MadeValues({name: Sketch(float(ord(name)), 0.0) for name in specs}, specs, seed=3)

    first = values.of("a")
    row = first[3]
    address = first.data_ptr()
    del first
    other = values.of("b")

    assert np.all(row.numpy() == ord("a"))  # a view still uses the memory of the first
    assert other.data_ptr() != address
    del row
    assert values.of("b").data_ptr() == address


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(40, 24, sparse=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x).mean(1).relu())


def test_the_rehearsal_of_a_large_network_keeps_a_corner_of_each_gradient() -> None:
    torch.manual_seed(0)
    network = TwoLayers()
    x = torch.randint(40, (6, 3))
    network(x).sum().backward()
    expected = {name: p.grad for name, p in network.named_parameters()}
    network.zero_grad()

    narrow = _with_narrow_gradients(dict(network.named_parameters()), network(x).sum())

    assert {name: tuple(p.shape) for name, p in narrow.items()} == {
        "embed.weight": (16, 16), "out.weight": (5, 16), "out.bias": (5,),
    }  # fmt: skip
    for name, parameter in narrow.items():
        gradient, whole = parameter.grad, expected[name]
        assert gradient is not None
        assert whole is not None
        assert gradient.is_sparse == whole.is_sparse
        assert torch.equal(gradient.to_dense(), whole.to_dense()[tuple(slice(16) for _ in parameter.shape)])
    assert all(p.grad is None for p in network.parameters())


def test_a_large_network_trains_to_the_same_bits_as_one_that_is_checked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> dict[str, Tensor]:
        model = seeded(lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)))
        optimizer = {"name": "Adam", "args": {"lr": 0.01}}
        ist.train(model, data(), workers=2, local_steps=2, rounds=2, optimizer=optimizer, progress=False)
        return clone(model.state_dict())

    lazy = trained()
    monkeypatch.setattr(ist.checks.verify, "MOST_FOR_WHOLE", 10**9)

    assert_same(lazy, trained())


MEASURED = """
import sys

import torch
from torch import nn

import ist.checks.verify
from ist.runs.rehearsal import rehearse
from tests.conftest import job_for

ist.checks.verify.MOST_FOR_DOUBLE = 0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(768, 3072), nn.Linear(3072, 768)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name))


torch.set_num_threads(1)
with torch.device("meta"):
    network = nn.Sequential(nn.Linear(12, 768), *[Block() for _ in range(16)], nn.Linear(768, 5))
job = job_for(network, train__workers=4)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 768), *[Block() for _ in range(16)], nn.Linear(768, 5))


object.__setattr__(job.task, "build", build)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts here
before = status("VmRSS")
rehearse(job)
print(status("VmHWM") - before, sum(p.nbytes for p in network.parameters()) // 2**20)
"""


@pytest.mark.system
def test_the_rehearsal_of_a_large_network_needs_the_memory_of_a_share_and_some_layers() -> None:
    # The allocator must give freed layers back, or the peak depends on what it keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )

    peak, whole = map(int, done.stdout.split())
    assert whole == 288
    # The gradients of one share, and less than six layers of 9 MiB with what torch allocates once.
    assert peak < whole // 4 + 6 * 9
