"""Residual blocks as the unit that is dealt: their scale when the whole network is used.

A worker trains a network with some of the blocks; the whole one has all of them, and their sum would be larger than
anything that was trained. So outside training the branch of each dealt block is multiplied by the share of the blocks
that a worker holds: 1 / number of workers, or more where `partition.min_depth` gives a block to several.

Reference: Dun et al., arXiv 2107.00961, section 3 (ResIST).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ist.errors import ModelError


@contextmanager
def scaled_blocks(model: nn.Module, scales: Mapping[str, float]) -> Iterator[None]:
    """Multiply what residual blocks add to their input, as long as the context lasts.

    Args:
        model: A network that was trained with the strategy 'blocks'.
        scales: For each block's path, the factor; `result.json` of the run has them as `block_scales`.

    Raises:
        ModelError: A block does not map one tensor to one of the same shape.

    Example:
        >>> import torch
        >>> class PlusOne(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x + 1
        >>> model = torch.nn.Sequential(PlusOne(), PlusOne())
        >>> with ist.scaled_blocks(model, {"0": 0.5, "1": 0.5}):  # as two workers trained them, a block each
        ...     model(torch.zeros(1))
        tensor([1.])
        >>> model(torch.zeros(1))
        tensor([2.])
    """

    def scaling(path: str, scale: float) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
            if not (isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor)):
                raise ModelError(f"'{path}' returns a {type(output).__name__}: a block must map one tensor to one")
            return inputs[0] + scale * (output - inputs[0])

        return hook

    handles = [model.get_submodule(path).register_forward_hook(scaling(path, s)) for path, s in scales.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
