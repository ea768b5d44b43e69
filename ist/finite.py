"""Whether numbers are finite: what is not must neither be merged nor kept.

Where it sits: workers ask before they keep anything, the coordinator and the other methods before they take anything.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no tensor holds a NaN or an infinity; those of whole numbers never do."""
    real = (torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor for tensor in tensors)
    return all(_holds_finite(tensor) for tensor in real if tensor.is_floating_point() and tensor.numel())


def _holds_finite(tensor: Tensor) -> bool:
    # aminmax carries NaN along and needs one pass and no temporary, unlike isfinite().all().
    low, high = tensor.detach().aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())
