"""What crosses a link in a round: the bytes of each worker's messages, from the partition alone.

Where it sits: `ist/plan/`, `ist inspect` and tests predict with it what a run's meter counts.
Not here: layouts of messages (`endpoints.py`, `frozen_parameters.py`), counting (`ist/monitoring/meter.py`).
"""

from collections.abc import Sequence

from ist.config.partition import Exchange
from ist.config.schema import Config
from ist.optimization.schedule import Schedule
from ist.rng import Indices
from ist.subnet.assignments import Assignments
from ist.subnet.split_model import SplitModel
from ist.subnet.stores.shards import shard_of
from ist.transport.endpoints import down_bytes, message_layouts
from ist.transport.frozen_parameters import frozen_bytes


def exchanged_bytes(
    split: SplitModel,
    exchange: Exchange,
    neurons: Sequence[Indices],
    before: Sequence[Indices] | None,
    round_number: int,
    has_rest: bool = False,
    had_rest: bool = False,
) -> tuple[int, int]:
    """Return (bytes to a worker, bytes from it) of a round's messages between a store and a worker.

    Args:
        split: The split network, or the shard that an owner stores.
        exchange: How messages are encoded.
        neurons: For each group, the neurons that the worker holds.
        before: The same in its last round; None: it has no frozen parameters yet.
        round_number: The round, from 0.
        has_rest: Whether the worker holds the frozen rest of the network in this round.
        had_rest: The same of its last round.
    """
    layouts = message_layouts(split, exchange, split.cut(neurons))
    frozen = frozen_bytes(split, exchange, neurons, before, has_rest, had_rest)
    return down_bytes(split, layouts, round_number) + frozen, layouts.up.nbytes


def stores_for(config: Config, split: SplitModel, worker: int) -> Sequence[SplitModel]:
    """Return what a worker exchanges with over a link: the full network, or shards.

    Under torchrun these are the shards of all other ranks. On Ray the owners are other processes than the workers.
    """
    if not config.store_is_sharded:
        return [split]
    owners, own = config.train.workers, worker if config.pool.spec.is_launched else None
    return [shard_of(split, owner, owners) for owner in range(owners) if owner != own]


def round_bytes(
    config: Config,
    split: SplitModel,
    worker: int,
    neurons: Sequence[Indices],
    before: Sequence[Indices] | None,
    round_number: int,
    has_rest: bool = False,
    had_rest: bool = False,
) -> tuple[int, int]:
    """Return (bytes to a worker, bytes from it) that cross a link in a round; for the arguments see `exchanged_bytes`.

    With a sharded store every owner sends and receives a piece; under torchrun the worker's own crosses no link.
    """
    pieces = [
        exchanged_bytes(store, config.exchange, neurons, before, round_number, has_rest, had_rest)
        for store in stores_for(config, split, worker)
    ]
    return sum(down for down, _ in pieces), sum(up for _, up in pieces)


def message_bytes(
    config: Config, split: SplitModel, schedule: Schedule, assignments: Assignments, worker: int
) -> tuple[int, int]:
    """Return (bytes to a worker, bytes from it) that cross a link in a full round after the first.

    Args:
        config: The configuration.
        split: The split network.
        schedule: The rounds of the run.
        assignments: The neurons of every worker in every round.
        worker: Which worker.
    """
    main = schedule.main_round
    held = assignments.of(main)[worker]
    has_rest = assignments.has_rest(main, held)
    down, up = round_bytes(config, split, worker, held, held, 1, has_rest, has_rest)
    continues = main + 1 < schedule.num_rounds and schedule.spans[main + 1].stage == schedule.spans[main].stage
    earlier, later = (main, main + 1) if continues else (max(0, main - 1), main)
    if split.frozen_specs and not has_rest:  # what is lacking depends on the round before
        before, neurons = assignments.of(earlier)[worker], assignments.of(later)[worker]
        down += sum(
            frozen_bytes(store, config.exchange, neurons, before) for store in stores_for(config, split, worker)
        )
    return down, up
