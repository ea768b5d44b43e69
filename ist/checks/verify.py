"""Check, before anything is trained, that a narrow network computes what the masked whole one does.

Identity 2 of the method: a subnet's outputs, and its gradients, are those of the whole network with every
other neuron's outgoing weights set to zero. Groups are inferred from a run of the network, and narrow
networks are made by changing attributes of modules, so this is checked on the example for the shares of the
first round and for the smallest cut; a network for which it does not hold is refused.

Where it sits: `ist/training/worker.py` calls it when a run is rehearsed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ist.data.nested import call_model, mapped, tensors_in
from ist.errors import ModelError, first_line
from ist.evaluation.task import Task
from ist.network.copies import copied
from ist.neurons.group import Group
from ist.neurons.splittable import FAILURES
from ist.neurons.trace import comparable, without_inner_dropout
from ist.neurons.tracing.shared_draws import with_same_draws
from ist.neurons.tracing.untaken_paths import Detour, OnDetour
from ist.rng import Indices, Purpose, seeded
from ist.subnet.assignments import Assignments
from ist.subnet.cut import Cut, cut_specs, extract, positions
from ist.subnet.job import Job, assignments
from ist.subnet.module import SubmodelPlan, along, bind, leave_out
from ist.subnet.residual_blocks import scaled_blocks
from ist.subnet.split_model import SplitModel
from ist.tensors import TensorSpec, named_tensors

MOST_FOR_DOUBLE = 100_000_000
"""Networks with more parameters are compared in their own precision: in float64 they would take much memory."""

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2}
"""Largest difference, relative to the largest value. Some networks compute in float32 whatever they are given; a
wrong cut is wrong by the order of the values themselves."""


MOST_SEEDS = 4
"""Networks that draw random numbers are compared for so many draws, until all of their parameters have a gradient."""


def verify_cuts(job: Job, original: nn.Module | None = None) -> None:
    """Check the first round's largest and smallest share, and the smallest cut of all.

    Costs the memory of two whole networks for a moment; changes nothing.

    Args:
        job: The run.
        original: The whole network with its initial weights, where it is at hand; None: it is built.

    Raises:
        ModelError: A narrow network fails, or computes something else than the masked whole network.
    """
    with seeded(torch.device("cpu"), job.config.seed, Purpose.TRAINING):
        original = job.task.build() if original is None else original
        _check_copies(original, job.task.example)
        whole, example = _in_double(job.task)
        held = assignments(job)
        if scales := held.block_scales():
            _verify_blocks(list(scales), whole, example)
        for neurons in _shares(job, held):
            verify_cut(job.split, whole, example, neurons)


def verify_cut(split: SplitModel, whole: nn.Module, example: object, neurons: Sequence[Indices]) -> None:
    """Check one cut of a whole network with values; see `verify_cuts`.

    Args:
        split: The network and its groups.
        whole: The whole network with the values to compare with, on the CPU; left as it was.
        example: Inputs of a batch, of the network's precision.
        neurons: For each group, the neurons that are held.

    Raises:
        ModelError: They differ.
    """
    precision = next(p.dtype for p in whole.parameters() if p.is_floating_point())
    narrow = split.module(neurons, torch.device("cpu"))
    if precision == torch.float64:
        narrow = narrow.double()  # unlike `to`, this leaves complex numbers complex
    cut = positions(split.groups, split.everything, neurons)
    state = {name: tensor.detach().contiguous() for name, tensor in named_tensors(whole).items() if name in cut}
    part = {
        name: torch.empty(spec.shape, dtype=state[name].dtype) for name, spec in _part_specs(split, cut, state).items()
    }
    extract(state, cut, into=part)
    # What a worker is not sent must be right by itself.
    bind(narrow, {name: tensor for name, tensor in part.items() if name in split.specs or name in split.frozen_specs})
    plan = split.plan(neurons)
    masked = _masked(split, whole, plan, cut, neurons)
    tolerance = TOLERANCE.get(precision, 1e-2)

    def run_narrow(detour: Detour | None) -> dict[str, Tensor]:
        try:
            return _repeatable_results(narrow, example, detour)
        except FAILURES as error:
            raise ModelError(
                f"{_held(split.groups, neurons)}: a narrow network of this class fails: {first_line(error)}. {_ADVICE}"
            ) from error

    for detour in (None, *split.found.detours):
        runs = [partial(run_narrow, detour), partial(_repeatable_results, masked, example, detour)]
        run = partial(_repeatable_results, example=example, detour=detour)
        expected, found, differing = _compared(split, plan, cut, masked, runs, run, tolerance)
        if differing:
            break
    if differing:
        name = differing[0]
        raise ModelError(
            f"{_held(split.groups, neurons)}: a narrow network of this class computes something else than the masked "
            f"whole one: {name} differs by {_distance(expected[name], found.get(name)):.2g}, where values are up to "
            f"{_size(expected[name]):.2g}. {_ADVICE}"
        )


def _compared(
    split: SplitModel,
    plan: SubmodelPlan,
    cut: Cut,
    masked: nn.Module,
    runs: Sequence[Callable[[], dict[str, Tensor]]],
    run: Callable[[nn.Module], dict[str, Tensor]],
    tolerance: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Return the results of the masked whole network, of the narrow one, and the names of those that differ."""

    def restricted(results: dict[str, Tensor]) -> dict[str, Tensor]:
        return _restricted(split, plan, cut, results)

    gradients: set[str] = set()
    absent = {f"{_GRADIENT}{name}" for name in split.found.unreached}
    for seed in range(MOST_SEEDS):
        (found, results), is_random = with_same_draws(seed, runs)
        expected = restricted(results)
        differing = [name for name in expected if not _agree(expected, found, name, tolerance)]
        gradients |= {name for name in found if name.startswith(_GRADIENT) and _size(found[name]) > 0}
        wanted = {name for name in found if name.startswith(_GRADIENT)} - absent
        if differing or not is_random or wanted <= gradients:
            break
    if differing:
        # Batch norm of few samples magnifies rounding errors: measure how much, and allow for that.
        rounded = copied(masked)
        _round_differently(rounded)
        three: list[Callable[[], dict[str, Tensor]]] = [*runs, partial(run, rounded)]
        (_, _, other), _ = with_same_draws(seed, three)
        noise = {name: _distance(expected[name], tensor) for name, tensor in restricted(other).items()}
        differing = [name for name in differing if not _agree(expected, found, name, tolerance, noise[name])]
    return expected, found, differing


_GRADIENT = "the gradient of "

_ADVICE = (
    "Its forward depends on a number that could not be narrowed. Name the attribute that holds it (partition.sizes), "
    "or share these neurons (partition.exclude); docs/groups.md tells how"
)


def _check_copies(original: nn.Module, example: object) -> None:
    """Check that a copy of the network runs, and uses its own parameters only.

    Raises:
        ModelError: It fails, or its forward reaches the original's parameters, as through a function that holds `self`.
    """
    gradients = [(parameter, parameter.grad) for parameter in original.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        _outputs_and_gradients(copied(original).cpu(), example)
        reached = [name for name, parameter in original.named_parameters() if parameter.grad is not None]
    except FAILURES as error:
        raise ModelError(f"the network fails on an example of the data: {first_line(error)}") from error
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    if reached:
        raise ModelError(
            f"a copy of the network uses '{reached[0]}' of the original, perhaps through a lambda or function that "
            "holds 'self': make it a method or a module, so that copies have their own"
        )


def _verify_blocks(paths: Sequence[str], whole: nn.Module, example: object) -> None:
    """Check that the blocks which are dealt add to their input: without weights, they must return it.

    Raises:
        ModelError: They do something else.
    """
    empty, skipping = copied(whole), copied(whole)
    for path in paths:
        for parameter in empty.get_submodule(path).parameters():
            nn.init.zeros_(parameter)
        leave_out(skipping, path)
    names = ", ".join(paths[:4])
    try:
        with scaled_blocks(empty, dict.fromkeys(paths, 1.0)):
            expected, _ = _outputs_and_gradients(empty, example)
        found, _ = _outputs_and_gradients(skipping, example)
        same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(expected, found, strict=True))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"'partition.blocks' ({names}): leaving them out fails: {error}") from error
    if not same:
        raise ModelError(
            f"'partition.blocks' ({names}): with all their weights 0 they do not return their input, so they are not "
            "residual blocks that can be left out"
        )


def _in_double(task: Task) -> tuple[nn.Module, object]:
    """Return a whole network to compare with and its inputs.

    They are in float64 if the network is not too large, can compute so, and then has no more values that are not
    finite: a mask of -3e38 may mean minus infinity in float32 only.

    Raises:
        ModelError: An output, or the gradient of a parameter, is not finite anywhere.
    """
    whole = task.build_copy()
    _disturb(whole)
    found = whole, task.example
    bad: dict[str, bool] | None = None
    if sum(p.numel() for p in whole.parameters()) <= MOST_FOR_DOUBLE:
        double = copied(whole).double(), mapped(task.example, lambda t: t.double() if t.is_floating_point() else t)
        with suppress(RuntimeError, ValueError, TypeError):
            bad = _not_finite(copied(double[0]), double[1])
            found = double
    if bad is None or bad:
        plain = _not_finite(copied(whole), task.example)
        if bad is None or len(plain) < len(bad):
            found, bad = (whole, task.example), plain
    if True in bad.values():
        name = next(name for name, everywhere in bad.items() if everywhere)
        raise ModelError(
            f"{name} is not finite on an example of the data (with parameters moved a little from their values): "
            "a narrow network cannot be compared with the whole one"
        )
    return found


def _not_finite(module: nn.Module, example: object) -> dict[str, bool]:
    """Return the outputs and gradients that hold values that are not finite, and whether all of them are so."""
    finite = {name: tensor.isfinite() for name, tensor in _named_results(module, example).items() if tensor.numel()}
    return {name: not bool(where.any()) for name, where in finite.items() if not bool(where.all())}


def _shares(job: Job, held: Assignments) -> Iterator[Sequence[Indices]]:
    shares = held.of(job.schedule.main_round)
    yield shares[0]
    if len(shares) > 1:
        yield shares[-1]
        yield [np.array([group.size // 2]) for group in job.split.groups]


def _disturb(module: nn.Module) -> None:
    """Move every parameter away from special values: a scale that starts at 0 would hide what is behind it."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                usual = parameter.abs() < 1e30  # neither infinite nor what stands for it, as in masks
                size = parameter[usual].square().mean().sqrt()
                moved = parameter + torch.randn_like(parameter) * torch.where(size > 0, size / 4, 0.1)
                parameter.copy_(torch.where(usual, moved, parameter))


def _masked(split: SplitModel, whole: nn.Module, plan: SubmodelPlan, cut: Cut, neurons: Sequence[Indices]) -> nn.Module:
    """The whole network with the outgoing weights of all other neurons set to zero: the oracle of a subnet."""
    masked = copied(whole)
    for path in plan.absent:
        leave_out(masked, path)
    tensors = dict(masked.named_parameters())
    with torch.no_grad():
        for group, held in zip(split.groups, neurons, strict=True):
            others = np.setdiff1d(np.arange(group.size), held)
            for slot in group.slots:
                if (slot.tensor, slot.dim) in group.outgoing and slot.tensor in tensors:
                    places = torch.from_numpy(np.sort(slot.positions(others)))
                    tensors[slot.tensor].index_fill_(slot.dim, places, dict(group.masked_by).get(slot.tensor, 0.0))
        for tensor, (dim, scale) in plan.scales.items():
            kept = cut[tensor][dim]
            index = torch.from_numpy(kept) if kept is not None else torch.arange(tensors[tensor].shape[dim])
            part = tensors[tensor].index_select(dim, index)
            tensors[tensor].index_copy_(dim, index, part * along(scale, dim, part))
    return masked


def _part_specs(split: SplitModel, cut: Cut, state: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return cut_specs({name: split.everything[name] for name in state}, cut)


def _outputs_and_gradients(module: nn.Module, example: object) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run a network, and differentiate a fixed random combination of its outputs."""
    without_inner_dropout(module)
    module.zero_grad()
    with comparable():
        outputs = [t for t in tensors_in(call_model(module, example)) if t.is_floating_point()]
        generator = np.random.Generator(np.random.Philox(0))  # torch's are replaced while networks are compared
        weights = [torch.from_numpy(generator.standard_normal(tuple(t.shape))).to(t.dtype) for t in outputs]
        terms = [(t * w).sum() for t, w in zip(outputs, weights, strict=True) if t.requires_grad]
        if terms:
            _differentiate(torch.stack(terms).sum())
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone()
        for name, p in module.named_parameters()
    }
    return [t.detach() for t in outputs], gradients


def _differentiate(total: Tensor) -> None:
    """Compute the gradients of all parameters.

    `total.backward()` is a torch function, inside which the mode that switches dropout off would not be active: what
    is computed anew there (checkpointing) would have it.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward((total,), (torch.ones_like(total),), False, False, (), True, True)


def _named_results(module: nn.Module, example: object) -> dict[str, Tensor]:
    outputs, gradients = _outputs_and_gradients(module, example)
    named = {f"output {number}": output for number, output in enumerate(outputs)}
    return named | {f"{_GRADIENT}{name}": gradient for name, gradient in gradients.items()}


def _repeatable_results(module: nn.Module, example: object, detour: Detour | None) -> dict[str, Tensor]:
    """Return the results of a run that leaves the buffers as they were, so that another run gives the same.

    Args:
        module: The network.
        example: Inputs of a batch.
        detour: How the way of the forward is changed.
    """
    before = [
        (child, {name: None if buffer is None else buffer.clone() for name, buffer in child._buffers.items()})
        for child in module.modules()
    ]
    try:
        with OnDetour(detour) if detour is not None else nullcontext():
            return _named_results(module, example)
    finally:
        for child, buffers in before:
            child._buffers.update(buffers)


def _restricted(split: SplitModel, plan: SubmodelPlan, cut: Cut, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Restrict the gradients of the masked whole network to the part that a narrow one has."""
    restricted = {}
    for what, tensor in results.items():
        name = what.removeprefix(_GRADIENT)
        if name == what:
            restricted[what] = tensor
        elif name in cut:
            spec = cut_specs({name: split.everything[name]}, cut)[name]
            part = torch.empty(spec.shape, dtype=tensor.dtype)
            extract({name: tensor.contiguous()}, {name: cut[name]}, into={name: part})
            if name in plan.scales:  # the derivative of w * scale
                dim, scale = plan.scales[name]
                part *= along(scale, dim, part)
            restricted[what] = part
    return restricted


def _agree(
    expected: dict[str, Tensor], found: dict[str, Tensor], what: str, tolerance: float, noise: float = 0.0
) -> bool:
    """Whether two results agree, up to rounding errors; never if they differ by more than a twentieth of their size."""
    size = _size(expected[what])
    if what.startswith(_GRADIENT):  # gradients that vanish are rounding errors of those that do not
        size = max(size, max(_size(tensor) for name, tensor in expected.items() if name.startswith(_GRADIENT)) / 10)
    allowed = max(tolerance * size, min(1000 * noise, size / 20))
    return _distance(expected[what], found.get(what)) <= allowed + 1e-12


def _distance(expected: Tensor, found: Tensor | None) -> float:
    if found is None or expected.shape != found.shape:
        return float("inf")
    # Two infinities, and two values that are not numbers, are the same.
    same = (expected == found) | (expected.isnan() & found.isnan())
    return float((expected - found).masked_fill(same, 0).abs().max()) if expected.numel() else 0.0


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().masked_fill(~tensor.isfinite(), 0).max()) if tensor.numel() else 0.0


def _round_differently(module: nn.Module) -> None:
    """Move every parameter by the smallest relative amount that it can be moved by."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + torch.randn_like(parameter) * torch.finfo(parameter.dtype).eps)


def _held(groups: Sequence[Group], neurons: Sequence[Indices]) -> str:
    """Name what was held in a cut."""
    shares = [f"{len(held)} of {group.size} in '{group.name}'" for group, held in zip(groups, neurons, strict=True)]
    return "neurons " + ", ".join(shares[:3]) + (", ..." if len(shares) > 3 else "")
