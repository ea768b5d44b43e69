"""Random numbers that every process derives from the run's seed.

Where it sits: every room that needs random numbers calls this module; no other code reads global random state.
Law: all random numbers come from a counter-based generator (Philox) keyed by (run seed, purpose, round or epoch,
worker). So every machine computes a partition instead of receiving it, and a resumed run draws the same numbers as an
uninterrupted one.
A user's data set, network or loss draws from the process's global generators, and so does dropout: while such code
runs, `seeded` seeds these generators from the same key. While an item of a data set is read, `drawing` seeds them for
this item, so that its random augmentation depends neither on the process that reads it nor on earlier reads.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

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
    ITEM = 11
    MERGE_SCALE = 12


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
    with preserved_generators(on_gpu):
        (torch if on_gpu else torch.default_generator).manual_seed(number)
        random.seed(number)
        mtrand.set_bit_generator(np.random.MT19937(number))
        yield


@contextmanager
def preserved_generators(on_gpu: bool = False) -> Iterator[None]:
    """Restore the state of the process's global generators after the context: of torch, `random` and `numpy.random`.

    Args:
        on_gpu: Whether the generators of all GPUs are restored as well; `torch.manual_seed` seeds every one.
    """
    python = random.getstate()
    numpy, numpy_state = mtrand.get_bit_generator(), np.random.get_state(legacy=False)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else []):
        try:
            yield
        finally:
            random.setstate(python)
            mtrand.set_bit_generator(numpy)  # the user may have chosen another kind, which cannot be seeded again
            np.random.set_state(numpy_state)


@dataclass(frozen=True)
class ItemDraws:
    """The key of the random numbers that a data set draws while its items are read.

    Attributes:
        seed: The run's seed, >= 0.
        purpose: What the items are read for.
        epoch: The pass over the data, >= 0: an augmenting data set draws new numbers in each.
    """

    seed: int
    purpose: Purpose
    epoch: int = 0

    def seeds(self, numbers: Indices) -> list[int]:
        """Return a 64-bit seed for each item, from its number in the full data set.

        The mixing function is that of SplitMix64: it is much faster than a Philox generator for each item.

        Reference: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
        """
        mixed = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed += np.uint64(_item_key(self.seed, self.purpose, self.epoch))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found: list[int] = (mixed ^ (mixed >> np.uint64(31))).tolist()
        return found


@lru_cache(maxsize=16)
def _item_key(seed: int, purpose: Purpose, epoch: int) -> int:
    return torch_seed(seed, Purpose.ITEM, int(purpose), epoch)


@contextmanager
def drawing(draws: ItemDraws | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that seeds the generators of torch, `random` and `numpy.random` for one item.

    Their states are restored at the end. Generators of GPUs are not seeded: items are read on the CPU.

    Args:
        draws: The key of the items; None: the yielded function does nothing.
    """
    if draws is None:
        yield lambda _: None
        return
    with preserved_generators():
        if type(mtrand.get_bit_generator()) is not np.random.MT19937:  # only this kind can be seeded again
            mtrand.set_bit_generator(np.random.MT19937(0))
        yield _seed_generators


def _seed_generators(number: int) -> None:
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number >> 32)
