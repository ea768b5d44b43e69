"""The rounds of a run: the local steps of each, and the stage to which it belongs, as a function of the configuration.

Where it sits: `ist/config/recipe.py` defines the keys of a stage; the run's schedule is built from these rounds.
Not here: the changes that a stage makes (`ist/subnet/partition.py`, `step_settings.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from ist.config.recipe import Stage
from ist.errors import ConfigError

WHOLE_RUN = Stage()

MAX_ROUNDS = 1_000_000
"""The most rounds of a run: `ist inspect` visits each of them."""


@dataclass(frozen=True)
class Span:
    """One round: its local steps, numbered over the whole run, and its stage."""

    steps: range
    stage: Stage


class Spans(Sequence[Span]):
    """All rounds of a run, each computed on access because a run may have very many.

    Args:
        parts: For each stage: the first local step of each of its rounds, the step after its last one, and the stage.
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
    """Return the rounds of a run.

    Args:
        stages: The stages in order; an empty list means one stage for the whole run. Exactly one stage is open: it has
            neither `rounds` nor `share`, and gets the rest of the run.
        local_steps: The local steps of a round, for stages that do not set them.
        rounds: The length of the run in rounds; give this or `total_steps`. Then all rounds of a stage are equally
            long.
        total_steps: The length of the run in local steps; the last round of the open stage may be shorter.

    Raises:
        ConfigError: The other stages leave nothing for the open one, or there are more than `MAX_ROUNDS` rounds.
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
            total, unit = (rounds, "round") if rounds is not None else (total_steps, "local step")
            length = f"{total} {unit}" if total == 1 else f"{total} {unit}s"
            used = f"{fixed} of them" if rounds is not None else f"{taken} of them"
            raise ConfigError(
                f"'recipe.stages': the run has {length}, and the stages with 'rounds' or 'share' take {used}: nothing "
                "is left for the stage without them. Make the run longer, or these stages shorter"
            )
        found.append((range(begin, end, steps), end, stage))
        if sum(len(firsts) for firsts, _, _ in found) > MAX_ROUNDS:
            raise ConfigError(
                f"the run has more than {MAX_ROUNDS:,} rounds ('train.rounds', or 'train.epochs' and "
                "'train.local_steps'): make the run shorter, or its rounds longer"
            )
        begin = end
    return Spans(found)


def _own_rounds(stage: Stage, steps: int, rounds: int | None, total_steps: int | None) -> int:
    """Return the rounds of a stage with `rounds` or `share`; 0 for the open stage."""
    if stage.share is None:
        return stage.rounds or 0
    if rounds is not None:
        return max(1, round(stage.share * rounds))
    assert total_steps is not None
    return max(1, round(stage.share * total_steps / steps))
