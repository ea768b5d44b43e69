"""Make values like a network's initial ones, one parameter at a time.

Initial values come from a constructor, which draws them in order, so they cannot be made one by one. The comparison of
two networks does not need them: pseudo-random numbers with the mean and the standard deviation of each parameter's
initial values will do.

Where it sits: `ist/checks/lazy_verify.py` compares networks with these values.
Not here: the comparison.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ist.subnet.split_model import SplitModel
from ist.tensors import TensorSpec


@dataclass(frozen=True)
class Sketch:
    """The initial values of a parameter in short.

    Attributes:
        mean: The mean of its usual values.
        scale: The standard deviation for the comparison: at least a quarter of their root mean square.
        kept: All of its values, if some are infinite, or large numbers instead of infinity as in masks, or are not
            floating-point numbers; None: no values.
    """

    mean: float
    scale: float
    kept: Tensor | None = None


_MOST_SAMPLED = 1_000_000
_UNUSUAL = 1e30
_PERIOD = 262_147  # a prime number, so that no two rows of a weight are equal
_SMALL = 1_000_000
_ROUNDED = "rounded differently"


def sketch(tensor: Tensor) -> Sketch:
    """Return the sketch of a parameter's initial values."""
    values = tensor.detach()
    if not values.is_floating_point() or not values.numel():
        return Sketch(0.0, 0.0, values.cpu())
    low, high = values.aminmax()
    if not (float(low) > -_UNUSUAL and float(high) < _UNUSUAL):
        return Sketch(0.0, 0.0, values.cpu())
    some = values.reshape(-1)[:: 1 + values.numel() // _MOST_SAMPLED].double()
    # A scale that starts at 0 would hide errors behind it, and so would equal values.
    root_mean_square = float(some.square().mean().sqrt())
    deviation = float(some.std(correction=0))
    return Sketch(float(some.mean()), max(deviation, root_mean_square / 4) if root_mean_square > 0 else 0.1)


@dataclass(frozen=True)
class Initial:
    """What the check needs of a network's initial values.

    Attributes:
        sketches: For each parameter, its values in short.
        buffers: The values of buffers and of tensors that are plain attributes.
    """

    sketches: Mapping[str, Sketch]
    buffers: Mapping[str, Tensor]


def read_initial(split: SplitModel, tensors: Iterable[tuple[str, Tensor]]) -> Initial:
    """Read initial values one tensor at a time.

    Args:
        split: The split network.
        tensors: The names and the values of all parameters and buffers.
    """
    parameters = {name for name, _ in split.template.named_parameters()}
    sketches, buffers = {}, dict(split.constants)
    for name, tensor in tensors:
        if name in parameters:
            sketches[name] = sketch(tensor)
        else:
            buffers[name] = tensor.detach().cpu()
    return Initial(sketches, buffers)


class MadeValues:
    """Pseudo-random values of parameters like their initial ones: a function of the name and the seed alone.

    Args:
        sketches: The initial values in short.
        specs: The spec of each parameter, with the dtype of the comparison.
        seed: The seed.
    """

    def __init__(self, sketches: Mapping[str, Sketch], specs: Mapping[str, TensorSpec], seed: int) -> None:
        self._sketches, self._specs = sketches, specs
        generator = np.random.Generator(np.random.Philox(seed))
        # Uniform with variance 1: positive initial values such as scales mostly stay positive.
        block = torch.from_numpy(generator.uniform(-(3**0.5), 3**0.5, _PERIOD).astype(np.float32))
        self._blocks = block.repeat(2)  # so that a block from any place on is a slice
        self._memory: Tensor | None = None

    def of(self, name: str) -> Tensor:
        """Return the values of a parameter; the tensor is the caller's."""
        spec, known = self._specs[name], self._sketches[name]
        if known.kept is not None:
            return known.kept.to(spec.dtype, copy=True)
        dtype = spec.dtype if spec.dtype in (torch.float32, torch.float64) else torch.float32
        made = self._empty(torch.Size(spec.shape), dtype)
        self._fill(made.view(-1), zlib.crc32(name.encode()), known.mean, known.scale)
        return made.to(spec.dtype)

    def of_rounded(self, name: str) -> Tensor:
        """Return values that differ from those of `of` by about the smallest possible relative amount."""
        made = self.of(name)
        if made.is_floating_point() and made.numel():
            noise = torch.empty(made.shape)
            self._fill(noise.view(-1), zlib.crc32(f"{name} {_ROUNDED}".encode()), 0.0, 1.0)
            made.mul_(1 + noise.to(made.dtype) * torch.finfo(made.dtype).eps)
        return made

    def _fill(self, flat: Tensor, number: int, mean: float, scale: float) -> None:
        """Fill a tensor from a place in the block on, again and again if it is longer."""
        start, length = number % _PERIOD, len(flat)
        if length <= _PERIOD:
            flat.copy_(self._blocks[start : start + length]).mul_(scale).add_(mean)
            return
        block = (self._blocks[start : start + _PERIOD].to(flat.dtype) * scale).add_(mean)
        whole = length // _PERIOD
        flat[: whole * _PERIOD].view(whole, _PERIOD).copy_(block.expand(whole, -1))
        flat[whole * _PERIOD :] = block[: length - whole * _PERIOD]

    def _empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return memory for values: that of earlier ones, because fresh memory costs more time than the values."""
        nbytes = shape.numel() * dtype.itemsize
        if nbytes < _SMALL:
            return torch.empty(shape, dtype=dtype)
        if self._memory is None or not self._is_unused(self._memory):
            fresh = torch.empty(nbytes, dtype=torch.uint8)
            self._memory = fresh if self._memory is None else self._memory
            return fresh.view(dtype).view(shape)
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[:nbytes].view(dtype).view(shape)

    @staticmethod
    def _is_unused(memory: Tensor) -> bool:
        """Return whether no result and no graph still refers to values made in some memory."""
        storage = memory.untyped_storage()
        used: int = torch._C._storage_Use_Count(storage._cdata)
        return used == 2  # `memory` and `storage`
