"""Random numbers that every process can derive for itself.

Nothing in this package reads global random state. Whatever is random comes from a
counter-based generator (Philox) keyed by (run seed, purpose, round or epoch, worker),
so a partition is computed on every machine instead of being sent, and a resumed run
draws what the uninterrupted run would have drawn.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Purpose(IntEnum):
    """What a stream of random numbers is for; the values are part of the reproducible stream."""

    MODEL = 0
    PARTITION = 1
    SHARD = 2
    ORDER = 3
    TRAINING = 4
    STATISTICS = 5


def _bits(seed: int, purpose: Purpose, *counters: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([seed, int(purpose), *counters]))


def permutation(size: int, seed: int, purpose: Purpose, *counters: int) -> Indices:
    """Return a random permutation of `range(size)`.

    Sorting raw Philox output, rather than calling `Generator.permutation`, keeps the result
    the same for every NumPy version: NumPy freezes the raw stream, not the distributions.

    Args:
        size: Number of elements, >= 0.
        seed: The run's seed, >= 0.
        purpose: Which stream to draw from.
        counters: Further keys, such as the round and the group; each >= 0.

    Returns:
        int64 array of shape (size,).
    """
    raw = _bits(seed, purpose, *counters).random_raw(size)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)


def uniform(size: int, seed: int, purpose: Purpose, *counters: int) -> NDArray[np.float64]:
    """Return independent numbers, uniform in [0, 1): the upper 53 bits of raw Philox output; see `permutation`.

    Args:
        size: Number of elements, >= 0.
        seed: The run's seed, >= 0.
        purpose: Which stream to draw from.
        counters: Further keys, such as the round and the group; each >= 0.

    Returns:
        float64 array of shape (size,).
    """
    raw = _bits(seed, purpose, *counters).random_raw(size)
    return np.ldexp((raw >> np.uint64(11)).astype(np.float64), -53)


def torch_seed(seed: int, purpose: Purpose, *counters: int) -> int:
    """Return a 63-bit seed for a `torch.Generator`, keyed like `permutation`."""
    return int(_bits(seed, purpose, *counters).random_raw()) >> 1
