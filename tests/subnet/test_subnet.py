"""Identities 1, 2 and 4: the round trip, a subnet as the masked full model, disjoint and complete shares."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ist.neurons.group import Group, Slot
from ist.subnet.cut import Cut, cut_specs, exclusive_names, extract, positions, reassemble
from ist.subnet.job import Job, assignments
from ist.subnet.module import bind
from ist.subnet.partition import assign
from ist.tensors import TensorSpec
from tests.conftest import assert_same, clone, job_for, whole_state
from tests.networks import NETWORKS, seeded

by_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())
by_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def cut_all(job: Job, state: dict[str, Tensor], round_number: int) -> list[dict[str, Tensor]]:
    parts = []
    for cut in assignments(job).cuts(round_number):
        part = {name: torch.full(s.shape, 7, dtype=s.dtype) for name, s in cut_specs(job.split.specs, cut).items()}
        extract(state, cut, part)
        parts.append(part)
    return parts


@by_network
@by_dtype
@pytest.mark.parametrize("workers", [1, 3])
def test_subnets_that_are_extracted_and_merged_unchanged_give_the_same_model(
    build: Callable[[], nn.Module], dtype: torch.dtype, workers: int
) -> None:
    model = seeded(build).to(dtype)
    inputs = TensorDataset(torch.zeros(100, 12, dtype=dtype), torch.zeros(100, dtype=torch.int64))
    job = job_for(model, inputs, train__workers=workers, train__running_statistics="carried")
    state = whole_state(job, model)
    before = clone(state)

    for round_number in range(3):
        parts = cut_all(job, state, round_number)
        reassemble(state, assignments(job).cuts(round_number), list(enumerate(parts)), assignments(job).exclusive(0))

    assert_same(state, before)


def mask_others(model: nn.Module, job: Job, worker: int, round_number: int) -> None:
    """Set the outgoing weights of all neurons that the worker does not hold to 0: the reference for a subnet."""
    neurons = assign(job.split.groups, job.config.train.workers, job.config.seed, round_number)[worker]
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for group, held in zip(job.split.groups, neurons, strict=True):
            others = np.setdiff1d(np.arange(group.size), held)
            for slot in (slot for slot in group.slots if slot.dim == 1):
                tensors[slot.tensor][:, torch.from_numpy(others)] = 0


@by_network
@pytest.mark.parametrize("scaled", [False, True])
def test_a_subnet_is_the_masked_full_model_in_outputs_and_gradients(
    build: Callable[[], nn.Module], scaled: bool
) -> None:
    model = seeded(build).double()
    job = job_for(model, train__activation_scale="width" if scaled else "none")
    state = clone(whole_state(job, model))
    inputs = torch.randn(6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.arange(6) % 5

    for worker, (cut, part) in enumerate(zip(assignments(job).cuts(2), cut_all(job, state, 2), strict=True)):
        plan = job.split.submodel_plan(assignments(job).of(2)[worker])
        assert bool(plan.scales) == scaled
        submodel = job.split.module(assignments(job).of(2)[worker], torch.device("cpu")).double()
        bind(submodel, part)
        model.load_state_dict(state, strict=False)
        mask_others(model, job, worker, 2)
        for name, (_, scale) in plan.scales.items():  # the reference: scale the weights instead of the activations
            model.get_parameter(name).data.mul_(scale)
        model.zero_grad()
        model.train()

        expected = model(inputs)
        found = submodel(inputs)
        nn.functional.cross_entropy(expected, targets).backward()
        nn.functional.cross_entropy(found, targets).backward()

        # float64: sums of the same numbers in another order
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        full = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, parameter in submodel.named_parameters():
            expected_gradient = torch.empty_like(parameter)
            extract({name: full[name]}, cut, {name: expected_gradient})
            if name in plan.scales:
                expected_gradient *= plan.scales[name][1]  # d/dw of w * scale
            torch.testing.assert_close(parameter.grad, expected_gradient, rtol=1e-10, atol=1e-12)


@by_network
def test_entries_of_exclusive_tensors_have_one_holder_and_shared_ones_all_workers(
    build: Callable[[], nn.Module],
) -> None:
    model = seeded(build)
    job = job_for(model)
    counts = {name: torch.zeros(spec.shape, dtype=torch.int64) for name, spec in job.split.specs.items()}

    for cut in assignments(job).cuts(0):
        for name, held in cut.items():
            index = np.ix_(*(np.arange(n) if h is None else h for n, h in zip(counts[name].shape, held, strict=True)))
            counts[name].numpy()[index] += 1

    for group in job.split.groups:
        for slot in group.slots:
            if slot.tensor in counts and counts[slot.tensor].ndim == 1:
                assert (counts[slot.tensor] == 1).all()
    for name, count in counts.items():
        assert count.max() == (1 if name in assignments(job).exclusive(0) else 4)
        if count.ndim == 2 and name in assignments(job).exclusive(0):
            inner = sum(slot.tensor == name for group in job.split.groups for slot in group.slots) == 2
            assert bool((count == 0).any()) == inner


def test_an_entry_that_no_worker_returned_does_not_change() -> None:
    model = seeded(NETWORKS["no batch norm"])
    job = job_for(model)
    state = whole_state(job, model)
    before = clone(state)
    parts = cut_all(job, state, 0)
    for part in parts:
        for tensor in part.values():
            tensor += 1

    reassemble(state, assignments(job).cuts(0), [(1, parts[1]), (3, parts[3])], assignments(job).exclusive(0))

    lost = assign(job.split.groups, 4, job.config.seed, 0)
    for group, neurons in zip(job.split.groups, zip(*lost, strict=True), strict=True):
        bias = next(slot.tensor for slot in group.slots if slot.tensor.endswith("bias"))
        change = state[bias] - before[bias]
        torch.testing.assert_close(change[np.concatenate([neurons[1], neurons[3]])], torch.ones(group.size // 2))
        assert (change[np.concatenate([neurons[0], neurons[2]])] == 0).all()
    torch.testing.assert_close(state["output.bias"], before["output.bias"] + 1)


ORDERS = ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0])


def wide(shape: tuple[int, ...], worker: int) -> Tensor:
    """Return random numbers of many magnitudes: another order of addition gives another sum."""
    generator = torch.Generator().manual_seed(worker)
    return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-12, 12, shape, generator=generator)


def test_a_shared_entry_becomes_the_mean_whatever_the_order_of_arrival() -> None:
    model = seeded(NETWORKS["no batch norm"])
    job = job_for(model, partition__strategy="bernoulli", partition__keep=0.7)
    before = whole_state(job, model)
    parts = cut_all(job, before, 0)
    for worker, part in enumerate(parts):
        for tensor in part.values():
            tensor += wide(tuple(tensor.shape), worker)
    results = []
    for order in ORDERS:
        state = clone(before)
        reassemble(
            state,
            assignments(job).cuts(0),
            [(worker, parts[worker]) for worker in order],
            assignments(job).exclusive(0),
        )
        results.append(state)

    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    # A tensor that all workers hold completely, and one of which each worker holds some rows.
    expected = torch.stack([part["output.bias"].double() for part in parts]).mean(dim=0)
    sums, counts = torch.zeros(16, dtype=torch.float64), torch.zeros(16)
    for cut, part in zip(assignments(job).cuts(0), parts, strict=True):
        rows = cut["linear_1.bias"][0]
        assert rows is not None
        sums[rows] += part["linear_1.bias"].double()
        counts[rows] += 1
    # float32 rounding of numbers up to a few thousand
    torch.testing.assert_close(results[0]["output.bias"].double(), expected, rtol=1e-6, atol=1e-3)
    some = counts > 0
    torch.testing.assert_close(results[0]["linear_1.bias"][some].double(), (sums / counts)[some], rtol=1e-6, atol=1e-3)


def test_sums_of_these_numbers_depend_on_the_order() -> None:
    changes = [wide((5,), worker) for worker in range(4)]
    sums = [sum((changes[worker] for worker in order), torch.zeros(5)) for order in ORDERS]

    assert not torch.equal(sums[0], sums[1])
    assert not torch.equal(sums[0], sums[2])


def test_a_large_integer_count_survives_the_mean() -> None:
    state = {"steps": torch.tensor(2**40 + 1)}
    parts = [(worker, {"steps": torch.tensor(2**40 + 1)}) for worker in range(3)]

    reassemble(state, [{"steps": ()}] * 3, parts, frozenset())

    assert state["steps"].item() == 2**40 + 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slots_with_blocks_offsets_and_gaps_round_trip(draw: st.DataObject) -> None:
    neurons, block = draw.draw(st.integers(2, 6)), draw.draw(st.integers(1, 3))
    lead, gap, tail = (draw.draw(st.integers(0, 2)) for _ in range(3))
    width = lead + neurons * block + gap + neurons * block + tail
    shape = draw.draw(st.sampled_from([(width,), (width, 3), (3, width), (2, 3, width), (2, width, 3)]))
    dim = shape.index(width) if shape.count(width) == 1 else len(shape) - 1 - shape[::-1].index(width)
    group = Group("g", neurons, (Slot("w", dim, block, lead), Slot("w", dim, block, lead + neurons * block + gap)))
    specs = {"w": TensorSpec(shape, torch.float32)}
    whole = torch.arange(float(np.prod(shape))).view(shape)
    state = {"w": whole.clone()}
    workers = draw.draw(st.integers(1, neurons))
    cuts = [positions([group], specs, held) for held in assign([group], workers, 0, 0)]

    parts = []
    for worker, cut in enumerate(cuts):
        part = {"w": torch.empty(cut_specs(specs, cut)["w"].shape)}
        extract(state, cut, part)
        parts.append((worker, part))
    state["w"].fill_(-1)
    reassemble(state, cuts, parts, exclusive_names([group], specs))

    assert torch.equal(state["w"], whole)
    held = sum(cut_specs(specs, cut)["w"].shape[dim] for cut in cuts)
    assert held == width + (workers - 1) * (lead + gap + tail)


def test_a_dim_that_is_held_completely_is_not_indexed() -> None:
    group = Group("g", 4, (Slot("w", 0), Slot("v", 1)))
    specs = {"w": TensorSpec((4, 3), torch.float32), "v": TensorSpec((2, 4), torch.float32)}

    assert positions([group], specs, [np.arange(4)]) == {"w": (None, None), "v": (None, None)}


class MadeWhenRead(Mapping[str, Tensor]):
    """A worker's changes, added to the full tensors when they are read; counts the tensors in memory at a time."""

    alive: ClassVar[list[weakref.ref[Tensor]]] = []
    most = 0

    def __init__(self, state: Mapping[str, Tensor], cut: Cut, changes: Mapping[str, Tensor]) -> None:
        self.state, self.cut, self.changes = state, cut, changes

    def __getitem__(self, name: str) -> Tensor:
        part = torch.empty_like(self.changes[name])
        extract(self.state, self.cut, {name: part})
        part += self.changes[name]
        self.alive.append(weakref.ref(part))
        MadeWhenRead.most = max(self.most, sum(made() is not None for made in self.alive))
        return part

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)


@pytest.mark.parametrize("held", [(0, 1, 2, 3), (0, 1, 2), (1, 2, 3)])
def test_parts_may_be_computed_from_the_full_tensors_when_they_are_read(held: tuple[int, ...]) -> None:
    group = Group("g", 4, (Slot("w", 0), Slot("v", 1)))
    specs = {"w": TensorSpec((4, 3), torch.float32), "v": TensorSpec((2, 4), torch.float32)}
    state = {name: torch.zeros(spec.shape) for name, spec in specs.items()}
    cuts = [positions([group], specs, [np.array(neurons)]) for neurons in (held, (0, 1, 2, 3), (0, 1, 2))]
    changes = [{name: torch.full(s.shape, 3.0**w) for name, s in cut_specs(specs, cuts[w]).items()} for w in range(3)]
    MadeWhenRead.most = 0

    trained = [(worker, MadeWhenRead(state, cuts[worker], changes[worker])) for worker in (2, 0, 1)]
    reassemble(state, cuts, trained, frozenset())

    for neuron in range(4):
        of = [3.0**w for w, neurons in enumerate((held, (0, 1, 2, 3), (0, 1, 2))) if neuron in neurons]
        assert torch.allclose(state["w"][neuron], torch.tensor(sum(of) / len(of)))
        assert torch.allclose(state["v"][:, neuron], torch.tensor(sum(of) / len(of)))
    assert MadeWhenRead.most <= 2


def test_two_dims_other_than_the_first_are_cut() -> None:
    group = Group("g", 4, (Slot("w", 1), Slot("w", 2)))
    specs = {"w": TensorSpec((3, 4, 4), torch.float32)}
    state = {"w": torch.randn(3, 4, 4)}
    before = state["w"].clone()
    cuts = [positions([group], specs, held) for held in assign([group], 2, 0, 0)]
    parts = [(w, {"w": torch.empty(3, 2, 2)}) for w in range(2)]
    for worker, part in parts:
        extract(state, cuts[worker], part)
        rows, columns = cuts[worker]["w"][1:]
        assert torch.equal(part["w"], before[:, rows][:, :, columns])
    reassemble(state, cuts, parts, exclusive_names([group], specs))

    assert torch.equal(state["w"], before)


def test_the_groups_of_the_shipped_network_are_its_hidden_layers() -> None:
    groups = job_for(NETWORKS["two hidden layers, batch norm"]()).split.groups

    assert [(group.name, group.size) for group in groups] == [("linear_1", 16), ("linear_2", 8)]
    assert Slot("linear_2.weight", 1) in groups[0].slots
    assert Slot("norm_1.weight", 0) in groups[0].slots


def test_a_tensor_that_slots_cover_partly_is_not_exclusive() -> None:
    specs = {name: TensorSpec((10, 4), torch.float32) for name in ("covered", "in part", "by two", "whole")}
    groups = (
        Group("a", 5, (Slot("covered", 0, block=2), Slot("in part", 0), Slot("by two", 0))),
        Group("b", 5, (Slot("by two", 0, offset=5),)),
    )

    assert exclusive_names(groups, specs) == {"covered", "by two"}
