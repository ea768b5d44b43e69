"""Compare two configurations of a run: which keys may change when it is resumed, and why the others must not.

Three kinds of keys:

- `NOT_COMPARED` say where and how the run is executed and named. They may change at any time.
- `CHANGEABLE` say how the rest of the run is trained. They change only on request: `ist train --resume RUN --set
  KEY=VALUE`, or other arguments of `ist.train(..., resume=True)`. The change is recorded.
- All other keys never change; `_WHY_NOT` says why. A key that is in no table belongs here.

Where it sits: `ist/storage/run_folder.py` and `ist/storage/reopen.py` compare configurations when a run is resumed.
Not here: the configuration that a checkpoint stores (`ist/storage/checkpoint.py`), comparing ranks
(`ist/runs/open.py`), what depends on the length of the run (`ist/runs/preflight.py`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ist.config.base import plain
from ist.config.schema import Config
from ist.redact import redacted

NOT_COMPARED: dict[str, Any] = {
    "output": True,
    "label": True,
    "checkpoint": True,
    "watch": True,
    "pool": True,
    "compare": True,
    "data": {"root", "loader"},
}
"""Keys that may change when a run is resumed: they say where and how it is run and named, not what is trained."""

CHANGEABLE = (
    "train.workers",
    "train.min_workers",
    "train.epochs",
    "train.rounds",
    "train.accumulate",
    "train.autocast",
    "train.clip_grad_norm",
    "train.optimizer.args",
    "train.optimizer.groups.N.args",
    "train.schedule",
    "train.schedule_unit",
    "partition.keep",
    "partition.rest",
    "partition.capacities",
    "partition.balance",
    "exchange.down",
    "exchange.up",
    "exchange.values",
    "exchange.rest",
    "recipe.stages",
    "recipe.outer",
    "recipe.merge_scale",
    "recipe.average.decay",
    "recipe.average.start",
    "baseline.outer",
    "evaluate.every",
    "evaluate.batch_size",
    "evaluate.statistics_batches",
)
"""Keys, and sections with all their keys, that may change on request; N stands for the index of a list entry."""

_WHY_NOT = {
    "name": "other files of the run have this name",
    "seed": "all random numbers of the run depend on it",
    "method": "the checkpoint has the state of this method",
    "model": "the checkpoint has the weights of this network",
    "data": "the run has trained on these data",
    "train.local_steps": "the finished rounds have this many steps. Give later rounds another number by recipe.stages, "
    "such as [{rounds: 10}, {local_steps: 20}]",
    "train.batch_size": "it decides which samples the finished rounds have used",
    "train.optimizer.name": "the saved optimizer state is of this class",
    "train.optimizer.groups": "the saved settings are of these parameter groups",
    "train.optimizer_state": "it decides which optimizer state is saved",
    "train.running_statistics": "it decides which running statistics are trained",
    "partition": "it decides into which subnets the network is split",
    "exchange.error_feedback": "it decides which residuals are saved",
    "recipe.average.kind": "the checkpoint has the average of this kind",
    "baseline": "the checkpoint has state that depends on it",
    "evaluate.metric": "the records of the finished rounds have this metric",
}
"""Why a key, or a section, must not change."""


@dataclass(frozen=True)
class Change:
    """A key with different values in two configurations; the values are text without passwords."""

    key: str
    old: str
    new: str


def run_changes(old: Config, new: Config) -> list[Change]:
    """Return the changed keys that say what is trained, in the order of the new configuration."""
    trees = [dict(flat(plain(config.model_dump(exclude=NOT_COMPARED)), lists=True)) for config in (old, new)]
    return list(_changes(*trees))


def allowed_changes(old: Config, new: Config) -> list[Change]:
    """Return the changed keys that may change at any time."""
    trees = [dict(flat(plain(config.model_dump()), lists=True)) for config in (old, new)]
    compared = {change.key for change in run_changes(old, new)}
    return [change for change in _changes(*trees) if change.key not in compared]


def refused_changes(old: Config, new: Config) -> list[str]:
    """Return why the run must not be resumed with the new configuration: one text for each reason."""
    changes = run_changes(old, new)
    refused = [
        f"'{change.key}' is {change.old}, and cannot become {change.new}: {_why_not(change.key)}"
        for change in changes
        if not is_in(change.key, CHANGEABLE)
    ]
    return refused or list(_combinations(old, new))


def _combinations(old: Config, new: Config) -> Iterator[str]:
    """Yield why keys that may change by themselves cannot change in this run."""
    before, after = old.train.workers, new.train.workers
    if before != after:
        workers = f"'train.workers' is {before}, and cannot become {after}: "
        if old.method_spec.fixed_workers is not None:
            yield f"{workers}method '{old.method}' needs a fixed number of workers, {old.method_spec.fixed_workers}"
        if old.method_spec.needs_groups and old.partition.strategy == "blocks":
            yield f"{workers}strategy 'blocks' scales each block by the share of blocks that a worker holds"
        if new.train.epochs is not None:
            yield (
                f"{workers}the number of rounds in an epoch depends on it, and 'train.epochs' is {new.train.epochs}: "
                "also give the length of the run in rounds (train.rounds)"
            )
    if old.recipe.has_outer_optimizer != new.recipe.has_outer_optimizer:
        has, must = ("has", "use it in some stage") if old.recipe.has_outer_optimizer else ("has no", "leave it out")
        for change in run_changes(old, new):
            if is_in(change.key, ("recipe.outer", "recipe.stages")):
                yield (
                    f"'{change.key}' is {change.old}, and cannot become {change.new}: the checkpoint {has} momentum of "
                    f"an outer optimizer: {must}, as before"
                )


def is_in(key: str, names: Iterable[str]) -> bool:
    """Return whether a key is one of the names, or in a section that is."""
    key = re.sub(r"\.\d+(?=\.|$)", ".N", key)
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _why_not(key: str) -> str:
    """Return why a key must not change: the reason of its longest prefix."""
    sections = [name for name in _WHY_NOT if is_in(key, [name])]
    return _WHY_NOT[max(sections, key=len)] if sections else "it decides what is trained"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for key in dict.fromkeys([*new, *old]):
        before, now = (redacted(repr(tree[key])) if key in tree else "not set" for tree in (old, new))
        if before != now:
            yield Change(key, before, now)


def flat(tree: Mapping[str, Any], prefix: str = "", lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested mappings; with `lists` also of mappings in a list, by their index."""
    for key, value in tree.items():
        if lists and isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            value = {str(number): entry for number, entry in enumerate(value)}
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.", lists)
        else:
            yield f"{prefix}{key}", value
