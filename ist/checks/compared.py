"""Run a network, differentiate its outputs, and judge by how much the results of two networks differ.

Where it sits: `ist/checks/verify.py` and `ist/checks/lazy_verify.py` compare a submodel with the masked full network.
Not here: which networks are compared, and with which values.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ist.data.nested import call_model, tensors_in
from ist.errors import first_line
from ist.neurons.group import Group
from ist.neurons.trace import comparable, without_inner_dropout
from ist.neurons.tracing.untaken_paths import Detour, OnDetour
from ist.rng import Indices

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2}
"""Largest difference, relative to the largest value. Some networks compute in float32 for inputs of any precision. A
wrong cut gives differences as large as the values themselves."""

MOST_SEEDS = 4
"""Networks that draw random numbers are compared for at most this many seeds, until each parameter has a gradient."""

GRADIENT = "the gradient of "

ADVICE = (
    "Its forward depends on a number that could not be changed to the submodel's size. Name the attribute that holds "
    "it (partition.sizes), or do not split these neurons (partition.exclude); docs/groups.md says how"
)


@dataclass(frozen=True)
class Difference:
    """How much a result of two networks differs: the largest distance of two values, and the largest expected one."""

    distance: float
    size: float


def difference(expected: Tensor, found: Tensor | None) -> Difference:
    """Return the difference of two results; it is infinite if their shapes differ or one is missing."""
    return Difference(distance(expected, found), size(expected))


def run_differentiated(module: nn.Module, example: object) -> list[Tensor]:
    """Run a network, differentiate a fixed random combination of its outputs, and return the outputs."""
    without_inner_dropout(module)
    module.zero_grad()
    with comparable():
        outputs = [t for t in tensors_in(call_model(module, example)) if t.is_floating_point()]
        generator = np.random.Generator(np.random.Philox(0))  # torch's are replaced while networks are compared
        weights = [torch.from_numpy(generator.standard_normal(tuple(t.shape))).to(t.dtype) for t in outputs]
        terms = [(t * w).sum() for t, w in zip(outputs, weights, strict=True) if t.requires_grad]
        if terms:
            _differentiate(torch.stack(terms).sum())
    return outputs


def _differentiate(total: Tensor) -> None:
    """Compute the gradients of all parameters.

    `total.backward()` is a torch function, and the mode that switches dropout off is not active inside torch functions.
    Activations that are recomputed there (checkpointing) would have dropout.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward((total,), (torch.ones_like(total),), False, False, (), True, True)


@contextmanager
def repeatable(module: nn.Module, detour: Detour | None) -> Iterator[None]:
    """Restore the buffers of a network after a run, so that another run gives the same results.

    Args:
        module: The network.
        detour: Forces branches that the forward does not take on the example; None: it runs as usual.
    """
    before = [
        (child, {name: None if buffer is None else buffer.clone() for name, buffer in child._buffers.items()})
        for child in module.modules()
    ]
    try:
        with OnDetour(detour) if detour is not None else nullcontext():
            yield
    finally:
        for child, buffers in before:
            child._buffers.update(buffers)


def differing(found: Mapping[str, Difference], tolerance: float, noise: Mapping[str, float] | None = None) -> list[str]:
    """Return the names of results that differ by more than rounding errors, or by more than a twentieth of their size.

    Args:
        found: The differences of all outputs and gradients.
        tolerance: The largest difference, relative to the largest value.
        noise: For results of which it is known, by how much rounding errors change them.
    """
    noise = noise or {}
    largest = max((one.size for name, one in found.items() if name.startswith(GRADIENT)), default=0.0)

    def agrees(name: str, one: Difference) -> bool:
        # A vanishing gradient has the rounding errors of others.
        size = max(one.size, largest / 10) if name.startswith(GRADIENT) else one.size
        allowed = max(tolerance * size, min(1000 * noise.get(name, 0.0), size / 20))
        return one.distance <= allowed + 1e-12

    return [name for name, one in found.items() if not agrees(name, one)]


def distance(expected: Tensor, found: Tensor | None) -> float:
    """Return the largest distance of two values; infinity if the shapes differ or a result is missing."""
    if found is None or expected.shape != found.shape:
        return float("inf")
    pairs = zip(_pieces(expected), _pieces(found), strict=True)
    # The largest distance is NaN if one is NaN, wherever it is.
    return float(np.max([0.0, *(_distance_of_pieces(mine, theirs) for mine, theirs in pairs)]))


_PIECE = 2**22


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return a tensor in pieces, so that their difference needs little memory."""
    return torch.split(tensor.detach().reshape(-1), _PIECE) if tensor.numel() else ()


def _distance_of_pieces(expected: Tensor, found: Tensor) -> float:
    if np.isfinite(largest := _largest(expected - found)):
        return largest
    # Two equal infinities agree, and so do two NaNs.
    same = (expected == found) | (expected.isnan() & found.isnan())
    return float((expected - found).masked_fill(same, 0).abs().max())


def size(tensor: Tensor) -> float:
    """Return the largest absolute value that is finite."""
    if not tensor.numel():
        return 0.0
    if np.isfinite(largest := _largest(tensor)):
        return largest
    return float(tensor.abs().masked_fill(~tensor.isfinite(), 0).max())


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value, by one pass without a temporary tensor; NaN if the tensor contains one."""
    low, high = (tensor.abs() if tensor.is_complex() else tensor).aminmax()
    return max(float(high), -float(low))


def shares_text(groups: Sequence[Group], neurons: Sequence[Indices]) -> str:
    """Describe how many neurons of each group a submodel holds."""
    shares = [f"{len(held)} of {group.size} in '{group.name}'" for group, held in zip(groups, neurons, strict=True)]
    return "neurons " + ", ".join(shares[:3]) + (", ..." if len(shares) > 3 else "")


def difference_text(name: str, found: Difference) -> str:
    """Describe a result that differs."""
    return (
        f"computes other values than the masked full network: {name} differs by {found.distance:.2g}, where values are "
        f"up to {found.size:.2g}"
    )


def not_finite_text(name: str) -> str:
    """Describe a result without finite values."""
    return (
        f"{name} is not finite on an example of the data (with slightly changed parameters): "
        "a submodel cannot be compared with the full network"
    )


def fails_text(error: BaseException) -> str:
    """Describe a network that fails."""
    return f"the network fails on an example of the data: {first_line(error)}"


def not_residual_text(names: str) -> str:
    """Describe blocks that cannot be left out."""
    return (
        f"'partition.blocks' ({names}): with all their weights 0 they do not return their input, so they are not "
        "residual blocks that can be left out"
    )
