"""Check the cuts of a network that is too large to hold several times: see `ist/checks/verify.py`.

The submodel and the masked full network have lazy parameters (`ist/network/lazy_tensor.py`): their values are made when
an operator needs them. The gradient of each parameter is cut to the submodel's part as soon as it is complete, and
compared. So the check needs about as much memory as the gradients of one share, and as the largest layer.

The values are not the initial ones, which cannot be made one by one. They are pseudo-random numbers with the mean and
the standard deviation of each parameter's initial values. Buffers and constants have their initial values.

Where it sits: `ist/checks/verify.py` calls it for large networks.
Not here: the check with whole copies of the network, which `partition.verify` `full` requests.
"""

from collections.abc import Callable, Mapping, Sequence
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
from ist.checks.gradient_reach import leaves
from ist.checks.made_values import Initial, MadeValues
from ist.data.nested import mapped, tensors_in
from ist.errors import ModelError, first_line
from ist.network.copies import copied, like
from ist.network.lazy_tensor import make_lazy
from ist.neurons.splittable import FAILURES
from ist.neurons.tracing.shared_draws import with_same_draws
from ist.neurons.tracing.untaken_paths import Detour
from ist.rng import Indices
from ist.subnet.cut import cut_specs, extract, positions
from ist.subnet.job import Job
from ist.subnet.module import along, leave_out
from ist.subnet.residual_blocks import scaled_blocks
from ist.subnet.split_model import SplitModel
from ist.tensors import TensorSpec, is_finite

Take = Callable[[str, Tensor], None]
"""Receives the gradient of a parameter, by its name."""


class CannotRunLazilyError(Exception):
    """The network does not run with lazy parameters; the message says why."""


class _Gradients:
    """Compares the gradients of the submodel with those of the masked full network, one by one, and drops them.

    Args:
        names: The parameters of the full network of which the submodel holds a part.
        held: The parameters of the submodel.
        part: Cuts a gradient of the full network to the submodel's part.
        summed: Parameters whose gradient comes in several pieces; further ones are added.
    """

    def __init__(
        self, names: Sequence[str], held: set[str], part: Callable[[str, Tensor], Tensor], summed: set[str]
    ) -> None:
        self._names, self._held, self._part, self._summed = names, held, part, summed
        self._found: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._differences: dict[str, Difference] = {}
        self.reached: set[str] = set()
        self.not_finite: list[str] = []

    def take_first(self, name: str, gradient: Tensor) -> None:
        """Receive a gradient of the submodel, or a piece of it."""
        if name in self._found:
            self._found[name] += gradient
        else:
            self._found[name] = gradient

    def take_second(self, name: str, gradient: Tensor) -> None:
        """Receive a gradient of the masked full network, or a piece of it."""
        if name not in self._names:
            return
        part = self._part(name, gradient)
        if name in self._summed:
            self._sums[name] = self._sums[name] + part if name in self._sums else part
        elif name in self._differences:
            self._summed.add(name)  # a further piece: the runs are repeated
        else:
            self._compare(name, part)

    def finished(self) -> dict[str, Difference]:
        """Return the differences of all gradients; a gradient that only one network has counts as zeros in the other.

        Gradients whose pieces had to be summed are wrong in the first pair of runs.
        """
        for name, part in self._sums.items():
            self._compare(name, part)
        for name in self._names:
            if name not in self._differences and name in self._found:
                self._compare(name, torch.zeros_like(self._found[name]))
            elif name not in self._differences:
                self._differences[name] = Difference(0.0 if name in self._held else float("inf"), 0.0)
        return {f"{GRADIENT}{name}": self._differences[name] for name in self._names}

    def _compare(self, name: str, part: Tensor) -> None:
        found = self._found.pop(name, None)
        if found is None and name in self._held:
            found = torch.zeros_like(part)
        if found is not None and size(found) > 0:
            self.reached.add(name)
        self._differences[name] = difference(part, found)
        if is_blank(part):
            self.not_finite.append(f"{GRADIENT}{name}")


def is_blank(tensor: Tensor) -> bool:
    """Return whether a tensor has values, but no finite one."""
    return bool(tensor.numel()) and size(tensor) == 0 and not bool(tensor.isfinite().any())


class Networks:
    """Makes submodels and full networks with lazy parameters.

    Args:
        split: The split network.
        initial: What is known of the initial values.
        example: Inputs of a batch.
        seed: The seed of the values.
        converted: The dtype of the comparison, by the dtype of a tensor of the network.
    """

    def __init__(
        self,
        split: SplitModel,
        initial: Initial,
        example: object,
        seed: int,
        converted: Mapping[torch.dtype, torch.dtype],
    ) -> None:
        self.split, self._initial, self._converted = split, initial, converted
        self.example = mapped(example, self._in_precision)
        parameters = split.template.named_parameters()
        self.specs = {name: TensorSpec(tuple(p.shape), self._dtype(p.dtype)) for name, p in parameters}
        self.precision = next(spec.dtype for spec in self.specs.values() if spec.dtype.is_floating_point)
        self.values = MadeValues(initial.sketches, self.specs, seed)

    def cut(self, neurons: Sequence[Indices]) -> "_Cut":
        """Return a submodel's part of the full network."""
        return _Cut(self.split, neurons, self.specs)

    def submodel(self, cut: "_Cut") -> nn.Module:
        """Return a submodel."""
        submodel = self.split.module(cut.neurons, torch.device("cpu"))
        sent = self.split.specs.keys() | self.split.frozen_specs.keys()
        for prefix, child in submodel.named_modules():
            for key, buffer in list(child._buffers.items()):
                name = f"{prefix}.{key}" if prefix else key
                if buffer is not None and name in sent:
                    buffer = cut.part(name, self._initial.buffers[name]).clone()
                if buffer is not None:
                    child._buffers[key] = self._in_precision(buffer)
        return make_lazy(submodel, lambda name: cut.part(name, self.values.of(name)), self._dtype)

    def plain_submodel(self, cut: "_Cut") -> nn.Module:
        """Return a submodel with ordinary parameters."""
        submodel = self.submodel(cut)
        for child in submodel.modules():
            for key, parameter in list(child._parameters.items()):
                if parameter is not None:
                    plain = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    setattr(child, key, plain)
        return submodel

    def masked(self, cut: "_Cut", values: Callable[[str], Tensor]) -> nn.Module:
        """Return the full network with the outgoing weights of all other neurons set to zero."""
        return self.full(cut.plan.absent, lambda name: cut.masked(name, values(name)))

    def full(self, absent: Sequence[str], values: Callable[[str], Tensor]) -> nn.Module:
        """Return the full network with the given values, without some of its modules.

        Raises:
            CannotRunLazilyError: A buffer has no initial values.
        """
        full = copied(self.split.template)
        for path in absent:
            leave_out(full, path)
        made: dict[int, Tensor] = {}

        def given(name: str, tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                if name not in self._initial.buffers:
                    raise CannotRunLazilyError(f"'{name}' has no initial values")
                made[id(tensor)] = like(tensor, self._in_precision(self._initial.buffers[name].clone()))
            return made[id(tensor)]

        for prefix, child in full.named_modules():
            path = f"{prefix}." if prefix else ""
            for key, buffer in list(child._buffers.items()):
                if buffer is not None:
                    child._buffers[key] = given(f"{path}{key}", buffer)
            for key, value in list(vars(child).items()):
                if isinstance(value, Tensor):
                    vars(child)[key] = given(f"{path}{key}", value)
        return make_lazy(full, values, self._dtype)

    def run(self, network: nn.Module, detour: Detour | None, take: Take) -> list[Tensor]:
        """Run a network forward and backward, and give away each gradient as soon as it is complete."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_give, name, take))  # type: ignore[no-untyped-call]
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        ]
        try:
            with repeatable(network, detour):
                return run_differentiated(network, self.example)
        finally:
            for hook in hooks:
                hook.remove()

    def run_full(self, network: nn.Module, detour: Detour | None, take: Take) -> list[Tensor]:
        """Run a full network; see `run`.

        Raises:
            CannotRunLazilyError: It fails.
        """
        try:
            return self.run(network, detour, take)
        except FAILURES as error:
            raise CannotRunLazilyError(first_line(error)) from error

    def run_submodel(self, cut: "_Cut", submodel: nn.Module, detour: Detour | None, take: Take) -> list[Tensor]:
        """Run a submodel; see `run`.

        Raises:
            ModelError: It fails, also with ordinary parameters, or the full network does.
            CannotRunLazilyError: It fails with lazy parameters only.
        """
        try:
            return self.run(submodel, detour, take)
        except FAILURES as error:
            try:
                self.run(self.plain_submodel(cut), detour, _drop)
            except FAILURES as own:
                try:
                    self.run(self.full((), self.values.of), None, _drop)
                except FAILURES as of_full:
                    raise ModelError(fails_text(of_full)) from of_full
                text = shares_text(self.split.groups, cut.neurons)
                raise ModelError(f"{text}: a submodel of this class fails: {first_line(own)}. {ADVICE}") from own
            raise CannotRunLazilyError(first_line(error)) from error

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._converted.get(dtype, dtype)

    def _in_precision(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype(tensor.dtype))


def verify_lazily(
    job: Job, initial: Initial, shares: Sequence[Sequence[Indices]], blocks: Sequence[str], most_for_double: int
) -> None:
    """Check some cuts of a network, and its residual blocks, with lazy parameters.

    Args:
        job: The run.
        initial: What is known of the network's initial values.
        shares: The neurons of each submodel, by group.
        blocks: Paths of residual blocks that are assigned like neurons.
        most_for_double: The most parameters of a network that is compared in float64.

    Raises:
        ModelError: A submodel fails, or computes other values than the masked full network; or blocks are not residual.
        CannotRunLazilyError: The network does not run with lazy parameters.
    """
    networks = _in_best_precision(job, initial, shares[0], most_for_double)
    if blocks:
        _verify_blocks(networks, blocks)
    for neurons in shares:
        cut = networks.cut(neurons)
        pair = _Pair(networks, cut)
        for detour in (None, *job.split.found.detours):
            found, wrong = pair.compared(detour)
            if wrong:
                raise ModelError(
                    f"{shares_text(job.split.groups, neurons)}: a submodel of this class "
                    f"{difference_text(wrong[0], found[wrong[0]])}. {ADVICE}"
                )


_HALF = (torch.bfloat16, torch.float16)


def _in_best_precision(job: Job, initial: Initial, neurons: Sequence[Indices], most_for_double: int) -> Networks:
    """Return networks in float64, or in float32 instead of 16 bits, if a submodel runs so and has finite results.

    A mask of -3e38 may mean minus infinity in float32 only.
    """
    parameters = [p for p in job.split.template.parameters() if p.is_floating_point()]
    to_double = dict.fromkeys((torch.float32, *_HALF), torch.float64)
    choices: list[dict[torch.dtype, torch.dtype]] = []
    if sum(p.numel() for p in job.split.template.parameters()) <= most_for_double:
        choices.append(to_double)
    elif any(p.dtype in _HALF for p in parameters):
        choices.append(dict.fromkeys(_HALF, torch.float32))
    choices.append({})
    best: tuple[int, Networks] | None = None
    for converted in choices:
        networks = Networks(job.split, initial, job.task.example, job.config.seed, converted)
        if len(choices) == 1:
            return networks
        try:
            bad = _num_not_finite(networks, neurons)
        except FAILURES:
            continue
        if best is None or bad < best[0]:
            best = bad, networks
        if not bad:
            break
    return best[1] if best is not None else networks  # which reports why it fails


def _num_not_finite(networks: Networks, neurons: Sequence[Indices]) -> int:
    """Return how many outputs and gradients of a submodel have non-finite values."""
    bad: list[bool] = []

    def take(_name: str, gradient: Tensor) -> None:
        bad.append(not is_finite([gradient]))

    outputs = networks.run(networks.submodel(networks.cut(neurons)), None, take)
    return sum(bad) + sum(not is_finite([output]) for output in outputs)


def _verify_blocks(networks: Networks, paths: Sequence[str]) -> None:
    """Check that assigned blocks are residual: with all weights 0 they must return their input.

    Raises:
        ModelError: They do not, or the network fails without them.
    """
    inside, of = tuple(f"{path}." for path in paths), networks.values.of
    empty = networks.full((), lambda name: of(name).zero_() if name.startswith(inside) else of(name))
    skipping = networks.full(paths, of)
    names = ", ".join(paths[:4])
    try:
        with scaled_blocks(empty, dict.fromkeys(paths, 1.0)):
            expected = networks.run(empty, None, _drop)
        found = networks.run(skipping, None, _drop)
        same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(expected, found, strict=True))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"'partition.blocks' ({names}): leaving them out fails: {error}") from error
    if not same:
        raise ModelError(not_residual_text(names))


class _Pair:
    """A submodel and the masked full network, which are compared."""

    def __init__(self, networks: Networks, cut: "_Cut") -> None:
        self._networks, self._cut = networks, cut
        self._submodel = networks.submodel(cut)
        self._masked = networks.masked(cut, networks.values.of)
        self._held = {name for name, _ in self._submodel.named_parameters()}
        self._summed: set[str] = set()
        self._outputs: list[Tensor] = []
        self._outside: dict[int, Tensor] = {}
        self._gradients = self._new_gradients()

    def compared(self, detour: Detour | None) -> tuple[dict[str, Difference], list[str]]:
        """Return the differences of all results, and the names of results that differ by more than rounding errors."""
        networks = self._networks
        tolerance = TOLERANCE.get(networks.precision, 1e-2)
        wanted = {name for name, p in self._submodel.named_parameters() if p.numel()}
        wanted -= set(networks.split.found.unreached)
        reached: set[str] = set()
        for seed in range(MOST_SEEDS):
            found, is_random = self._with_seed(seed, detour)
            wrong = differing(found, tolerance)
            reached |= self._gradients.reached
            if wrong or not is_random or wanted <= reached:
                break
        if self._gradients.not_finite and detour is None:
            self._refuse_blank()
        if wrong:
            # Batch norm of few samples magnifies rounding errors: measure by how much, and add that to the tolerance.
            wrong = differing(found, tolerance, self._noise(seed, detour, wrong))
        return found, wrong

    def _new_gradients(self) -> _Gradients:
        return _Gradients(self._cut.names, self._held, self._cut.gradient, self._summed)

    def _with_seed(self, seed: int, detour: Detour | None) -> tuple[dict[str, Difference], bool]:
        """Run both networks with the same random draws; return the differences, and whether anything was drawn."""

        def run_submodel() -> list[Tensor]:
            self._gradients = self._new_gradients()
            outputs = self._networks.run_submodel(self._cut, self._submodel, detour, self._gradients.take_first)
            self._outside = _foreign(outputs, self._submodel, self._networks.example)
            return [output.detach() for output in outputs]

        def run_masked() -> list[Tensor]:
            outputs = self._networks.run_full(self._masked, detour, self._gradients.take_second)
            shared = self._outside.keys() & _foreign(outputs, self._masked, self._networks.example)
            if shared:
                raise CannotRunLazilyError(
                    f"copies share a parameter of shape {tuple(self._outside[shared.pop()].shape)}"
                )
            return [output.detach() for output in outputs]

        while True:
            before = len(self._summed)
            (outputs, expected), is_random = with_same_draws(seed, [run_submodel, run_masked])
            if len(self._summed) == before:
                break
        missing = [None] * (len(expected) - len(outputs))
        found = {
            f"output {number}": difference(output, mine)
            for number, (output, mine) in enumerate(zip(expected, [*outputs, *missing], strict=False))
        }
        self._gradients.not_finite += [f"output {number}" for number, t in enumerate(expected) if is_blank(t)]
        return found | self._gradients.finished(), is_random

    def _noise(self, seed: int, detour: Detour | None, names: Sequence[str]) -> dict[str, float]:
        """Return by how much rounding errors change some results of the masked full network."""
        rounded = self._networks.masked(self._cut, self._networks.values.of_rounded)

        def results(network: nn.Module) -> dict[str, Tensor]:
            kept: dict[str, Tensor] = {}

            def take(name: str, gradient: Tensor) -> None:
                what = f"{GRADIENT}{name}"
                if what in names:
                    part = self._cut.gradient(name, gradient)
                    kept[what] = kept[what] + part if what in kept else part

            outputs = self._networks.run_full(network, detour, take)
            return kept | {f"output {number}": output.detach() for number, output in enumerate(outputs)}

        def run_submodel() -> dict[str, Tensor]:
            self._networks.run_submodel(self._cut, self._submodel, detour, _drop)
            return {}

        runs: list[Callable[[], dict[str, Tensor]]] = [
            run_submodel,
            partial(results, self._masked),
            partial(results, rounded),
        ]
        (_, expected, other), _ = with_same_draws(seed, runs)
        return {name: distance(expected[name], other.get(name)) for name in names if name in expected}

    def _refuse_blank(self) -> None:
        """Refuse a network of which an output or a gradient has no finite value, also without a mask.

        Raises:
            ModelError: There is one.
        """
        blank: list[str] = []

        def take(name: str, gradient: Tensor) -> None:
            if is_blank(gradient):
                blank.append(f"{GRADIENT}{name}")

        full = self._networks.full((), self._networks.values.of)
        outputs = self._networks.run_full(full, None, take)
        blank = [f"output {number}" for number, output in enumerate(outputs) if is_blank(output.detach())] + blank
        if blank:
            raise ModelError(not_finite_text(blank[0]))


class _Cut:
    """A submodel's part of the full network's tensors."""

    def __init__(self, split: SplitModel, neurons: Sequence[Indices], specs: Mapping[str, TensorSpec]) -> None:
        self.neurons = neurons
        self.plan = split.submodel_plan(neurons)
        self._cut = positions(split.groups, split.all_specs, neurons)
        self.names = [name for name in specs if name in self._cut]
        self._fills: dict[str, list[tuple[int, Tensor, float]]] = {}
        for group, held in zip(split.groups, neurons, strict=True):
            others = np.setdiff1d(np.arange(group.size), held)
            for slot in group.slots:
                if (slot.tensor, slot.dim) in group.outgoing and slot.tensor in specs:
                    indices = torch.from_numpy(np.sort(slot.positions(others)))
                    value = dict(group.masked_by).get(slot.tensor, 0.0)
                    self._fills.setdefault(slot.tensor, []).append((slot.dim, indices, value))

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Return the submodel's part of a tensor; the tensor itself if that is all of it."""
        if all(positions is None for positions in self._cut[name]):
            return tensor
        spec = TensorSpec(tuple(tensor.shape), tensor.dtype)
        part = torch.empty(cut_specs({name: spec}, self._cut)[name].shape, dtype=tensor.dtype)
        extract({name: tensor.contiguous()}, self._cut, into={name: part})
        return part

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        """Return the submodel's part of a gradient: the derivative of w * scale."""
        part = self.part(name, gradient)
        if name in self.plan.scales:
            dim, scale = self.plan.scales[name]
            part = part * along(scale, dim, part)
        return part

    def masked(self, name: str, tensor: Tensor) -> Tensor:
        """Mask the neurons that the submodel does not hold in a parameter, in place, and scale it; return it."""
        for dim, indices, value in self._fills.get(name, ()):
            tensor.index_fill_(dim, indices, value)
        if name in self.plan.scales:
            dim, scale = self.plan.scales[name]
            own = self._cut[name][dim]
            index = torch.from_numpy(own) if isinstance(own, np.ndarray) else torch.arange(tensor.shape[dim])
            part = tensor.index_select(dim, index)
            tensor.index_copy_(dim, index, part * along(scale, dim, part))
        return tensor


def _foreign(outputs: Sequence[Tensor], network: nn.Module, example: object) -> dict[int, Tensor]:
    """Return the parameters outside a network to which a backward pass from its outputs would add gradients."""
    own = {id(parameter) for parameter in network.parameters()} | {id(tensor) for tensor in tensors_in(example)}
    return {key: leaf for key, leaf in leaves(outputs).items() if key not in own}


def _give(name: str, take: Take, parameter: Tensor) -> None:
    """Give away a parameter's gradient."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is not None:
        take(name, gradient.to_dense())


def _drop(_name: str, _gradient: Tensor) -> None:
    """Forget a gradient."""
