"""Check before training that a submodel computes the same as the masked full network.

Identity 2 of the method: the outputs and gradients of a subnet are those of the full network with the outgoing weights
of all other neurons set to zero. Groups are inferred from a run of the network, and submodels are made by changing
attributes of modules. So the identity is checked on the example, for the largest and the smallest share of a round and
for one neuron of each group. A network for which it does not hold is refused.

Where it sits: `ist/runs/rehearsal.py` calls it before a run. Small networks are checked here, with whole copies of
them; `ist/checks/lazy_verify.py` checks the others.
Not here: changes of the forward during training (`ist/checks/drift.py`).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ist.checks.compared import (
    ADVICE,
    GRADIENT,
    MOST_SEEDS,
    TOLERANCE,
    Difference,
    difference,
    difference_text,
    differing,
    distance,
    fails_text,
    not_finite_text,
    not_residual_text,
    repeatable,
    run_differentiated,
    shares_text,
    size,
)  # fmt: skip
from ist.checks.lazy_verify import CannotRunLazilyError, verify_lazily
from ist.checks.made_values import Initial, read_initial
from ist.data.nested import mapped
from ist.errors import ModelError, first_line
from ist.evaluation.task import Task
from ist.network.copies import copied
from ist.neurons.splittable import FAILURES
from ist.neurons.tracing.shared_draws import with_same_draws
from ist.neurons.tracing.untaken_paths import Detour
from ist.rng import Indices, Purpose, seeded
from ist.subnet.assignments import Assignments
from ist.subnet.cut import Cut, cut_specs, extract, positions
from ist.subnet.job import Job, assignments
from ist.subnet.module import SubmodelPlan, along, bind, leave_out
from ist.subnet.residual_blocks import scaled_blocks
from ist.subnet.split_model import SplitModel
from ist.tensors import TensorSpec, named_tensors

MOST_FOR_DOUBLE = 100_000_000
"""Networks with more parameters are compared in their own precision, or in float32 instead of 16 bits: float64 would
need too much memory."""

MOST_FOR_WHOLE = 5_000_000
"""Networks with more parameters are checked with lazy parameters: whole copies of them need too much memory."""


def is_checked_whole(job: Job) -> bool:
    """Return whether the cuts are checked with whole copies of the network, in float64 if possible."""
    return job.config.partition.verify == "full" or _num_parameters(job) <= MOST_FOR_WHOLE


def verify_cuts(job: Job, original: nn.Module | None = None, initial: Initial | None = None) -> None:
    """Check the cuts of the first and the last worker in a round, and the cut with one neuron of each group.

    A small network is checked with whole copies of it. The check of a larger one needs the memory of one share and of
    the largest layer for a short time. It is weaker in three ways, which `partition.verify` `full` avoids: parameters
    have pseudo-random values instead of the initial ones; the last worker's cut is not checked if it has the sizes of
    the first one; and attributes that the class computes from values are not compared with those of a built network.

    Args:
        job: The run.
        original: The full network with its initial weights; None: it is built if it is needed.
        initial: What a large network's check needs of its initial values; None: they are read from `original`.

    Raises:
        ModelError: A submodel fails, or computes other values than the masked full network.
    """
    by_round = assignments(job)
    blocks = list(by_round.block_scales())
    with seeded(torch.device("cpu"), job.config.seed, Purpose.TRAINING):
        if not is_checked_whole(job):
            if initial is None:
                given = job.task.build() if original is None else original
                initial = read_initial(job.split, named_tensors(given).items())
                del given
            shares = list(_shares(job, by_round))
            if len(shares) > 1 and not job.split.depends_on_which_neurons and _sizes(shares[0]) == _sizes(shares[1]):
                del shares[1]
            try:
                verify_lazily(job, initial, shares, blocks, MOST_FOR_DOUBLE)
                return
            except CannotRunLazilyError as error:
                nbytes = sum(p.numel() * p.element_size() for p in job.split.template.parameters())
                warnings.warn(
                    f"the cuts are checked with several whole copies of the network ({nbytes:,} bytes each), because "
                    f"it does not run with parameters whose values are made when they are needed: {error}",
                    stacklevel=3,
                )
        original = job.task.build() if original is None else original
        _check_copies(original, job.task.example)
        full, example = _in_double(job.task)
        if blocks:
            _verify_blocks(blocks, full, example)
        for neurons in _shares(job, by_round):
            verify_cut(job.split, full, example, neurons)


def _num_parameters(job: Job) -> int:
    return sum(parameter.numel() for parameter in job.split.template.parameters())


def _sizes(neurons: Sequence[Indices]) -> tuple[int, ...]:
    return tuple(map(len, neurons))


def verify_cut(split: SplitModel, full: nn.Module, example: object, neurons: Sequence[Indices]) -> None:
    """Check one cut of a full network with values; see `verify_cuts`.

    Args:
        split: The split network.
        full: The full network with the values for the comparison, on the CPU; it does not change.
        example: Inputs of a batch, of the network's precision.
        neurons: For each group, the neurons that the submodel holds.

    Raises:
        ModelError: The submodel fails, or computes other values than the masked full network.
    """
    precision = next(p.dtype for p in full.parameters() if p.is_floating_point())
    submodel = split.module(neurons, torch.device("cpu"))
    if precision == torch.float64:
        submodel = submodel.double()  # unlike `to`, it does not convert complex numbers
    cut = positions(split.groups, split.all_specs, neurons)
    state = {name: tensor.detach().contiguous() for name, tensor in named_tensors(full).items() if name in cut}
    part = {
        name: torch.empty(spec.shape, dtype=state[name].dtype) for name, spec in _part_specs(split, cut, state).items()
    }
    extract(state, cut, into=part)
    # Bind only tensors that a worker is sent: the module itself must provide all others.
    bind(submodel, {name: tensor for name, tensor in part.items() if name in split.specs or name in split.frozen_specs})
    plan = split.submodel_plan(neurons)
    masked = _masked(split, full, plan, cut, neurons)
    tolerance = TOLERANCE.get(precision, 1e-2)

    def run_submodel(detour: Detour | None) -> dict[str, Tensor]:
        try:
            return _repeatable_results(submodel, example, detour)
        except FAILURES as error:
            raise ModelError(
                f"{shares_text(split.groups, neurons)}: a submodel of this class fails: {first_line(error)}. {ADVICE}"
            ) from error

    for detour in (None, *split.found.detours):
        runs = [partial(run_submodel, detour), partial(_repeatable_results, masked, example, detour)]
        run = partial(_repeatable_results, example=example, detour=detour)
        found, wrong = _compared(split, plan, cut, masked, runs, run, tolerance)
        if wrong:
            raise ModelError(
                f"{shares_text(split.groups, neurons)}: a submodel of this class "
                f"{difference_text(wrong[0], found[wrong[0]])}. {ADVICE}"
            )


def _compared(
    split: SplitModel,
    plan: SubmodelPlan,
    cut: Cut,
    masked: nn.Module,
    runs: Sequence[Callable[[], dict[str, Tensor]]],
    run: Callable[[nn.Module], dict[str, Tensor]],
    tolerance: float,
) -> tuple[dict[str, Difference], list[str]]:
    """Return the differences between the masked full network and the submodel, and the names of results that differ."""

    def restricted(results: dict[str, Tensor]) -> dict[str, Tensor]:
        return _restricted(split, plan, cut, results)

    gradients: set[str] = set()
    absent = {f"{GRADIENT}{name}" for name in split.found.unreached}
    for seed in range(MOST_SEEDS):
        (found, results), is_random = with_same_draws(seed, runs)
        expected = restricted(results)
        differences = {name: difference(tensor, found.get(name)) for name, tensor in expected.items()}
        wrong = differing(differences, tolerance)
        gradients |= {name for name in found if name.startswith(GRADIENT) and size(found[name]) > 0}
        wanted = {name for name in found if name.startswith(GRADIENT)} - absent
        if wrong or not is_random or wanted <= gradients:
            break
    if wrong:
        # Batch norm of few samples magnifies rounding errors: measure by how much, and add that to the tolerance.
        rounded = copied(masked)
        _round_differently(rounded)
        three: list[Callable[[], dict[str, Tensor]]] = [*runs, partial(run, rounded)]
        (_, _, other), _ = with_same_draws(seed, three)
        noise = {name: distance(expected[name], tensor) for name, tensor in restricted(other).items() if name in wrong}
        wrong = differing(differences, tolerance, noise)
    return differences, wrong


def _check_copies(original: nn.Module, example: object) -> None:
    """Check that a copy of the network runs and uses only its own parameters.

    Raises:
        ModelError: It fails, or its forward uses parameters of the original, as through a function that holds `self`.
    """
    gradients = [(parameter, parameter.grad) for parameter in original.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        _outputs_and_gradients(copied(original).cpu(), example)
        reached = [name for name, parameter in original.named_parameters() if parameter.grad is not None]
    except FAILURES as error:
        raise ModelError(fails_text(error)) from error
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    if reached:
        raise ModelError(
            f"a copy of the network uses '{reached[0]}' of the original, perhaps through a lambda or function that "
            "holds 'self': make it a method or a module, so that copies have their own"
        )


def _verify_blocks(paths: Sequence[str], full: nn.Module, example: object) -> None:
    """Check that assigned blocks are residual: with all weights 0 they must return their input.

    Raises:
        ModelError: They do not, or the network fails without them.
    """
    empty, skipping = copied(full), copied(full)
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
        raise ModelError(not_residual_text(names))


def _in_double(task: Task) -> tuple[nn.Module, object]:
    """Return a full network for the comparison, and its inputs.

    They are in float64 if the network is not too large, runs in float64, and then has no additional non-finite values:
    a mask of -3e38 may mean minus infinity in float32 only.

    Raises:
        ModelError: All values of an output, or of the gradient of a parameter, are non-finite.
    """
    full = task.build_copy()
    _disturb(full)
    found = full, task.example
    bad: dict[str, bool] | None = None
    if sum(p.numel() for p in full.parameters()) <= MOST_FOR_DOUBLE:
        double = copied(full).double(), mapped(task.example, lambda t: t.double() if t.is_floating_point() else t)
        with suppress(RuntimeError, ValueError, TypeError):
            bad = _not_finite(copied(double[0]), double[1])
            found = double
    if bad is None or bad:
        plain = _not_finite(copied(full), task.example)
        if bad is None or len(plain) < len(bad):
            found, bad = (full, task.example), plain
    if True in bad.values():
        name = next(name for name, everywhere in bad.items() if everywhere)
        raise ModelError(not_finite_text(name))
    return found


def _not_finite(module: nn.Module, example: object) -> dict[str, bool]:
    """Return the names of outputs and gradients with non-finite values, and whether all their values are non-finite."""
    finite = {name: tensor.isfinite() for name, tensor in _named_results(module, example).items() if tensor.numel()}
    return {name: not bool(where.any()) for name, where in finite.items() if not bool(where.all())}


def _shares(job: Job, by_round: Assignments) -> Iterator[Sequence[Indices]]:
    shares = by_round.of(job.schedule.main_round)
    yield shares[0]
    if len(shares) > 1:
        yield shares[-1]
        yield [np.array([group.size // 2]) for group in job.split.groups]


def _disturb(module: nn.Module) -> None:
    """Move every parameter away from special values: a scale that starts at 0 would hide errors behind it."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                usual = parameter.abs() < 1e30  # not infinite, and not a large number instead of infinity, as in masks
                size = parameter[usual].square().mean().sqrt()
                moved = parameter + torch.randn_like(parameter) * torch.where(size > 0, size / 4, 0.1)
                parameter.copy_(torch.where(usual, moved, parameter))


def _masked(split: SplitModel, full: nn.Module, plan: SubmodelPlan, cut: Cut, neurons: Sequence[Indices]) -> nn.Module:
    """Return the full network with the outgoing weights of all other neurons set to zero: the reference of a subnet."""
    masked = copied(full)
    for path in plan.absent:
        leave_out(masked, path)
    tensors = dict(masked.named_parameters())
    with torch.no_grad():
        for group, held in zip(split.groups, neurons, strict=True):
            others = np.setdiff1d(np.arange(group.size), held)
            for slot in group.slots:
                if (slot.tensor, slot.dim) in group.outgoing and slot.tensor in tensors:
                    indices = torch.from_numpy(np.sort(slot.positions(others)))
                    tensors[slot.tensor].index_fill_(slot.dim, indices, dict(group.masked_by).get(slot.tensor, 0.0))
        for tensor, (dim, scale) in plan.scales.items():
            own = cut[tensor][dim]
            index = torch.from_numpy(own) if own is not None else torch.arange(tensors[tensor].shape[dim])
            part = tensors[tensor].index_select(dim, index)
            tensors[tensor].index_copy_(dim, index, part * along(scale, dim, part))
    return masked


def _part_specs(split: SplitModel, cut: Cut, state: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return cut_specs({name: split.all_specs[name] for name in state}, cut)


def _outputs_and_gradients(module: nn.Module, example: object) -> tuple[list[Tensor], dict[str, Tensor]]:
    outputs = run_differentiated(module, example)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone()
        for name, p in module.named_parameters()
    }
    return [t.detach() for t in outputs], gradients


def _named_results(module: nn.Module, example: object) -> dict[str, Tensor]:
    outputs, gradients = _outputs_and_gradients(module, example)
    named = {f"output {number}": output for number, output in enumerate(outputs)}
    return named | {f"{GRADIENT}{name}": gradient for name, gradient in gradients.items()}


def _repeatable_results(module: nn.Module, example: object, detour: Detour | None) -> dict[str, Tensor]:
    """Run a network so that another run gives the same results."""
    with repeatable(module, detour):
        return _named_results(module, example)


def _restricted(split: SplitModel, plan: SubmodelPlan, cut: Cut, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Restrict the gradients of the masked full network to the submodel's part."""
    restricted = {}
    for what, tensor in results.items():
        name = what.removeprefix(GRADIENT)
        if name == what:
            restricted[what] = tensor
        elif name in cut:
            spec = cut_specs({name: split.all_specs[name]}, cut)[name]
            part = torch.empty(spec.shape, dtype=tensor.dtype)
            extract({name: tensor.contiguous()}, {name: cut[name]}, into={name: part})
            if name in plan.scales:  # the derivative of w * scale
                dim, scale = plan.scales[name]
                part *= along(scale, dim, part)
            restricted[what] = part
    return restricted


def _round_differently(module: nn.Module) -> None:
    """Change every parameter by about the smallest possible relative amount."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + torch.randn_like(parameter) * torch.finfo(parameter.dtype).eps)
