"""Random numbers that every process derives from the run's seed.

Where it sits: every room that needs random numbers calls this module; no other code reads global random state.
Law: all random numbers come from a counter-based generator (Philox) keyed by (run seed, purpose, round or epoch,
worker). So every machine computes a partition instead of receiving it, and a resumed run draws the same numbers as an
uninterrupted one.
A user's data set, network or loss draws from the process's global generators, and so does dropout: while such code
runs, `seeded` seeds these generators from the same key.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Purpose(IntEnum):
    """The purpose of a stream of random numbers; the values are part of the key."""

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
    SKEW = 10


def _bits(seed: int, purpose: Purpose, *counters: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([seed, int(purpose), *counters]))


def permutation(size: int, seed: int, purpose: Purpose, *counters: int) -> Indices:
    """Return a random permutation of `range(size)`.

    It sorts raw Philox output instead of calling `Generator.permutation`, so the result is the same for every NumPy
    version: NumPy guarantees the raw stream, not the distributions.

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
    """Return independent uniform numbers in [0, 1), from the upper 53 bits of raw Philox output (see `permutation`).

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


def generator_states() -> tuple[bytes, ...]:
    """Return the states of the process's global generators on the CPU, which `seeded` seeds, for a comparison."""
    return (
        torch.get_rng_state().numpy().tobytes(),
        repr(random.getstate()).encode(),
        _flat_bytes(np.random.get_state(False)),
    )


def _flat_bytes(value: Any) -> bytes:
    if isinstance(value, dict | tuple):
        return b"".join(map(_flat_bytes, value.values() if isinstance(value, dict) else value))
    return value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()


@contextmanager
def seeded(device: torch.device, seed: int, purpose: Purpose, *counters: int) -> Iterator[None]:
    """Seed the process's global generators within the context, and restore their state afterwards.

    These are the generators of torch, `random` and `numpy.random`. A generator that an object owns, such as a
    `numpy.random.Generator`, is not seeded.

    Args:
        device: Device on which the code computes; for a GPU, the generators of all GPUs are seeded as well.
        seed: The run's seed, >= 0.
        purpose: Which stream to draw from.
        counters: Further keys, such as the round and the worker; each >= 0.
    """
    number = torch_seed(seed, purpose, *counters)
    on_gpu = device.type == "cuda"
    python = random.getstate()
    numpy, numpy_state = mtrand.get_bit_generator(), np.random.get_state(legacy=False)
    # manual_seed seeds every GPU, so every GPU's generator is restored.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else []):
        try:
            (torch if on_gpu else torch.default_generator).manual_seed(number)
            random.seed(number)
            mtrand.set_bit_generator(np.random.MT19937(number))
            yield
        finally:
            random.setstate(python)
            mtrand.set_bit_generator(numpy)  # the user may have chosen another kind, which cannot be seeded again
            np.random.set_state(numpy_state)
