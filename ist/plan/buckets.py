"""What data-parallel training sends together.

Where it sits: `predict.py` turns bytes into seconds by these; the bytes of each method are in `ist/config/methods.py`.
Not here: activations and optimiser state, which are measured (`measure.py`).
"""

from collections.abc import Sequence

BUCKET_BYTES = (1 << 20, 25 << 20)
"""DistributedDataParallel's first bucket and every further one are closed when they hold so much."""


def buckets(sizes: Sequence[float]) -> list[range]:
    """Return which parameters share a bucket of DistributedDataParallel, given their bytes in gradients' order."""
    found: list[range] = []
    start, held = 0, 0.0
    for number, size in enumerate(sizes):
        held += size
        if held >= BUCKET_BYTES[min(len(found), 1)]:
            found.append(range(start, number + 1))
            start, held = number + 1, 0.0
    return [*found, range(start, len(sizes))] if start < len(sizes) else found
