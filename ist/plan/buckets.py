"""The gradient buckets of data-parallel training.

Where it sits: `predict.py` computes seconds from them; the bytes of each method are in `ist/config/methods.py`.
Not here: activations and optimizer state, which are measured (`measure.py`).
"""

from collections.abc import Sequence

BUCKET_BYTES = (1 << 20, 25 << 20)
"""Size at which DistributedDataParallel closes its first bucket, and every further bucket."""


def buckets(sizes: Sequence[float]) -> list[range]:
    """Return the parameters in each bucket of DistributedDataParallel, given their bytes in the order of gradients."""
    found: list[range] = []
    start, held = 0, 0.0
    for number, size in enumerate(sizes):
        held += size
        if held >= BUCKET_BYTES[min(len(found), 1)]:
            found.append(range(start, number + 1))
            start, held = number + 1, 0.0
    return [*found, range(start, len(sizes))] if start < len(sizes) else found
