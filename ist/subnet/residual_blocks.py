"""Scale residual blocks when the full network runs, if whole blocks are assigned to workers.

A worker trains a network with some of the blocks. The full network has all of them, so their sum would be larger than
in any network that was trained. Outside training, each such block's residual branch is therefore multiplied by the
fraction of the blocks that a worker holds: 1 / number of workers, or more where `partition.min_depth` gives a block to
several workers.
Where it sits: evaluation, the checks and `ist.scaled_blocks` use it; the scales come from `Assignments.block_scales`.
Not here: which worker holds which block (`ist/subnet/partition.py`).

Reference: Dun et al., arXiv 2107.00961, section 3 (ResIST).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ist.errors import ModelError


@contextmanager
def scaled_blocks(model: nn.Module, scales: Mapping[str, float]) -> Iterator[None]:
    """Multiply the residual branch of each block by a factor inside the `with` block.

    Args:
        model: A network that was trained with the strategy 'blocks'.
        scales: The factor for each block's path; `result.json` of the run lists them as `block_scales`.

    Raises:
        ModelError: A block does not map one tensor to one tensor of the same shape.

    Example:
        >>> import torch
        >>> class PlusOne(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x + 1
        >>> model = torch.nn.Sequential(PlusOne(), PlusOne())
        >>> with ist.scaled_blocks(model, {"0": 0.5, "1": 0.5}):  # two workers have trained a block each
        ...     model(torch.zeros(1))
        tensor([1.])
        >>> model(torch.zeros(1))
        tensor([2.])
    """

    def scaling(path: str, scale: float) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
            if not (isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor)):
                raise ModelError(
                    f"'{path}' returns a {type(output).__name__}: a block must map one tensor to one tensor"
                )
            return inputs[0] + scale * (output - inputs[0])

        return hook

    handles = [model.get_submodule(path).register_forward_hook(scaling(path, s)) for path, s in scales.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
