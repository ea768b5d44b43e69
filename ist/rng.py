"""Random numbers that every process can derive for itself.

Nothing in this package reads global random state. Whatever is random comes from a
counter-based generator (Philox) keyed by (run seed, purpose, round or epoch, worker),
so a partition is computed on every machine instead of being sent, and a resumed run
draws what the uninterrupted run would have drawn.
A user's data set, network or loss does draw from the process's own generators, and so does
dropout: `seeded` makes these a function of the same key while such code runs.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from numpy.random import mtrand
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
    EVALUATION = 6
    REHEARSAL = 7
    DATA = 8
    CONTENT = 9


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


@contextmanager
def seeded(device: torch.device, seed: int, purpose: Purpose, *counters: int) -> Iterator[None]:
    """Seed the process's own generators for a while, and put them back as they were.

    These are torch's, `random`'s and `numpy.random`'s. A generator that an object holds for itself, such as a
    `numpy.random.Generator`, is not among them.

    Args:
        device: Where the code computes; on a GPU, the generators of all GPUs are seeded as well.
        seed: The run's seed, >= 0.
        purpose: Which stream to draw from.
        counters: Further keys, such as the round and the worker; each >= 0.
    """
    number = torch_seed(seed, purpose, *counters)
    on_gpu = device.type == "cuda"
    python = random.getstate()
    numpy, numpy_state = mtrand.get_bit_generator(), np.random.get_state(legacy=False)
    # manual_seed reaches every GPU, so every GPU's generator is put back.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else []):
        try:
            (torch if on_gpu else torch.default_generator).manual_seed(number)
            random.seed(number)
            mtrand.set_bit_generator(np.random.MT19937(number))
            yield
        finally:
            random.setstate(python)
            mtrand.set_bit_generator(numpy)  # the user may have chosen another kind, which cannot be seeded anew
            np.random.set_state(numpy_state)
