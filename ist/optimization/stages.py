"""Which local steps a round has, and which stage of the run it belongs to: a pure function of the configuration.

Where it sits: `ist/config/recipe.py` holds the keys; `ist/subnet/job.py` asks.
Not here: what a stage changes (`ist/subnet/partition.py`, `ist/subnet/job.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from ist.config.recipe import Stage
from ist.errors import ConfigError

WHOLE_RUN = Stage()

MAX_ROUNDS = 1_000_000
"""Most rounds of a run; `ist inspect` looks at every one of them."""


@dataclass(frozen=True)
class Span:
    """A round: its local steps, numbered over the run, and its stage."""

    steps: range
    stage: Stage


class Spans(Sequence[Span]):
    """Every round of a run, made when it is asked for: a run may have very many.

    Args:
        parts: For each stage the first local steps of its rounds, and the step after its last one.
    """

    def __init__(self, parts: Sequence[tuple[range, int, Stage]]) -> None:
        self._parts = tuple(parts)
        self._length = sum(len(firsts) for firsts, _, _ in parts)

    def __len__(self) -> int:
        """Return the number of rounds."""
        return self._length

    @overload
    def __getitem__(self, number: int) -> Span: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Span]: ...
    def __getitem__(self, number: int | slice) -> Span | Sequence[Span]:
        """Return a round, or several."""
        if isinstance(number, slice):
            return [self[one] for one in range(self._length)[number]]
        left = range(self._length)[number]
        for firsts, end, stage in self._parts:
            if left < len(firsts):
                return Span(range(firsts[left], min(firsts[left] + firsts.step, end)), stage)
            left -= len(firsts)
        raise AssertionError(number)

    def __iter__(self) -> Iterator[Span]:
        """Yield every round, in order."""
        for firsts, end, stage in self._parts:
            for first in firsts:
                yield Span(range(first, min(first + firsts.step, end)), stage)


def spans(
    stages: Sequence[Stage], local_steps: int, rounds: int | None = None, total_steps: int | None = None
) -> Spans:
    """Return every round of a run.

    Args:
        stages: In order; none is one stage that is the whole run. Exactly one does not say how long it lasts.
        local_steps: Steps of a round in a stage that does not say.
        rounds: Length of the run; give this or `total_steps`. Then every round is whole.
        total_steps: Length of the run in local steps; the last round of the stage that takes what is left may be
            shorter.

    Raises:
        ConfigError: The stages that say how long they last leave nothing for the one that does not, or there are more
            than `MAX_ROUNDS` rounds.
    """
    stages = list(stages) or [WHOLE_RUN]
    steps_of = [stage.local_steps or local_steps for stage in stages]
    rounds_of = [_own_rounds(stage, steps, rounds, total_steps) for stage, steps in zip(stages, steps_of, strict=True)]
    fixed = sum(rounds_of)
    taken = sum(number * steps for number, steps in zip(rounds_of, steps_of, strict=True))
    found: list[tuple[range, int, Stage]] = []
    begin = 0
    for stage, steps, number in zip(stages, steps_of, rounds_of, strict=True):
        if not stage.is_open:
            end = begin + number * steps
        elif rounds is not None:
            end = begin + (rounds - fixed) * steps
        else:
            assert total_steps is not None
            end = begin + total_steps - taken
        if end <= begin:
            length = f"{rounds} rounds" if rounds is not None else f"{total_steps} local steps"
            used = f"{fixed} of them" if rounds is not None else f"{taken} of them"
            raise ConfigError(
                f"'recipe.stages': the run has {length}, and the stages that say how long they last take {used}: "
                "nothing is left for the one that does not. Lengthen the run, or shorten those"
            )
        found.append((range(begin, end, steps), end, stage))
        if sum(len(firsts) for firsts, _, _ in found) > MAX_ROUNDS:
            raise ConfigError(
                f"the run has more than {MAX_ROUNDS:,} rounds ('train.rounds', or 'train.epochs' and "
                "'train.local_steps'): shorten it, or make rounds longer"
            )
        begin = end
    return Spans(found)


def _own_rounds(stage: Stage, steps: int, rounds: int | None, total_steps: int | None) -> int:
    """Return how many rounds a stage says that it lasts; 0 where it takes what is left."""
    if stage.share is None:
        return stage.rounds or 0
    if rounds is not None:
        return max(1, round(stage.share * rounds))
    assert total_steps is not None
    return max(1, round(stage.share * total_steps / steps))
