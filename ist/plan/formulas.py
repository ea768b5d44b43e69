"""Bytes and memory of a round by each method, as formulas; nothing is measured here.

A *round* is `train.local_steps` steps of every worker, whatever the method. Every method but IST all-reduces: of B
bytes among n ranks a ring sends 2 (n - 1) / n B from each rank and to each rank. IST sends messages, whose sizes the
job knows (`ist.transport.frozen_parameters.message_bytes`). Bytes are payload; framing belongs to the link
(`predict.py`).

Where it sits: `COLLECTIVES` is the one table of methods; `predict.py` turns bytes into seconds.
Not here: activations and optimiser state, which are measured (`measure.py`).

Shape letters: n workers, B bytes that are all-reduced, P bytes of the trained parameters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ist.transport.quantize import BLOCK

Shapes = Sequence[tuple[int, ...]]
"""The shapes of parameters, in the order in which their gradients are ready."""

FLOAT_BYTES = 4
BUCKET_BYTES = (1 << 20, 25 << 20)
"""DistributedDataParallel's first bucket and every further one are closed when they hold so much."""

MIN_COMPRESSION_RATE = 2
"""powerSGD_hook's default: a matrix is compressed where that makes it more than so many times smaller."""


@dataclass(frozen=True)
class Collective:
    """How a method all-reduces.

    Attributes:
        every: After every step, while the backward pass goes on; or once a round, after the last step.
        payload: (shapes, PowerSGD's rank) to B, the bytes that one exchange all-reduces.
        memory: (shapes, PowerSGD's rank) to the bytes that a worker holds beside parameters, gradients, optimiser
            state and activations.
        passes: How often a worker goes over P bytes of memory in one exchange, such as to divide a sum: an estimate.
        calls: All-reduces, one after the other, of one bucket or one exchange.
    """

    every: Literal["step", "round"]
    payload: Callable[[Shapes, int], float]
    memory: Callable[[Shapes, int], float]
    passes: int
    calls: int = 1


def parameter_bytes(shapes: Shapes, _rank: int = 0) -> float:
    """Return P."""
    return FLOAT_BYTES * sum(math.prod(shape) for shape in shapes)


def _half(shapes: Shapes, _rank: int) -> float:
    return parameter_bytes(shapes) / 2


def powersgd_bytes(shapes: Shapes, rank: int) -> float:
    """Return what PowerSGD all-reduces in a step after its plain first ones.

    Reference: Vogels et al., arXiv 1905.13727; torch.distributed's `powerSGD_hook`.
    """
    return sum(_factor_bytes(shape, rank) or parameter_bytes([shape]) for shape in shapes)


def _factor_bytes(shape: tuple[int, ...], rank: int) -> float:
    """Bytes of a matrix's two factors; 0 where it is not worth to compress it, as for every vector."""
    if len(shape) < 2:
        return 0.0
    rows, columns = shape[0], math.prod(shape[1:])
    entries = (rows + columns) * min(rank, rows, columns)
    return FLOAT_BYTES * entries if entries * MIN_COMPRESSION_RATE < rows * columns else 0.0


def _powersgd_memory(shapes: Shapes, rank: int) -> float:
    factors = sum(_factor_bytes(shape, rank) for shape in shapes)
    return 2 * parameter_bytes(shapes) + factors  # the error that is fed back, the gradient before it was compressed


def int8_bytes(shapes: Shapes, _rank: int = 0) -> float:
    """Return the bytes of all parameters as int8, in blocks with a float32 scale each; padding is left out."""
    return parameter_bytes(shapes) / FLOAT_BYTES * (1 + FLOAT_BYTES / BLOCK)


def _nothing(_shapes: Shapes, _rank: int) -> float:
    return 0.0


def _outer_state(shapes: Shapes, _rank: int) -> float:
    return 3 * parameter_bytes(shapes)  # the outer copy, its momentum, the change that is all-reduced


COLLECTIVES: dict[str, Collective] = {
    "ddp": Collective("step", parameter_bytes, _nothing, passes=2),  # gradients are views of the buckets
    "ddp_fp16": Collective("step", _half, _half, passes=3),
    "ddp_bf16": Collective("step", _half, _half, passes=3),
    "powersgd": Collective("step", powersgd_bytes, _powersgd_memory, passes=6, calls=3),
    "local_sgd": Collective("round", parameter_bytes, parameter_bytes, passes=4),
    "diloco": Collective("round", parameter_bytes, _outer_state, passes=7),
    # An all-to-all of shards and an all-gather of their means send what a ring would; both ends hold int8 copies.
    "diloco_int8": Collective("round", int8_bytes, lambda s, r: _outer_state(s, r) + 2 * int8_bytes(s, r), passes=12),
}
PLANNED = ("ist", *COLLECTIVES)
"""Methods that can be planned."""


def ring_bytes(payload: float, num_workers: int) -> float:
    """Return what one rank sends, and receives, in a ring all-reduce of `payload` bytes."""
    return 2 * (num_workers - 1) / num_workers * payload


def exchanges(method: str, local_steps: int) -> int:
    """Return how many exchanges a method makes in a round."""
    return local_steps if COLLECTIVES[method].every == "step" else 1


def rank_bytes(
    method: str, shapes: Shapes, num_workers: int, local_steps: int, rank: int = 1, plain_steps: int = 0
) -> float:
    """Return what one rank sends in a round by a method that all-reduces.

    Args:
        method: A key of `COLLECTIVES`.
        shapes: Of the trained parameters.
        num_workers: Ranks.
        local_steps: Steps of the round.
        rank: PowerSGD's.
        plain_steps: How many of the steps are among PowerSGD's first, which all-reduce whole gradients.
    """
    payload = COLLECTIVES[method].payload(shapes, rank)
    plain = plain_steps if method == "powersgd" else 0
    exchanged = (exchanges(method, local_steps) - plain) * payload + plain * parameter_bytes(shapes)
    return ring_bytes(exchanged, num_workers)


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


def trained_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters that are trained."""
    return [tuple(parameter.shape) for parameter in module.parameters() if parameter.requires_grad]
