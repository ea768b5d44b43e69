"""Whether two configurations are of one run: what may change while it is interrupted, and what may not.

Where it sits: `ist/storage/run_folder.py` asks when a folder is opened again, and when its run goes back to a
checkpoint.
Not here: what a checkpoint holds of the configuration (`ist/storage/checkpoint.py`); comparing ranks
(`ist/runs/open.py`).
"""

from collections.abc import Iterator, Mapping
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
    "data": {"root"},
}
"""Keys that may change while a run is interrupted: where, by whom and under what title it is trained, not what is."""


@dataclass(frozen=True)
class Change:
    """A key that two configurations have different values for, as text without passwords."""

    key: str
    old: str
    new: str


def other_run(old: Config, new: Config) -> list[Change]:
    """Return the keys by which two configurations are of different runs, in the order of the new one."""
    trees = [dict(flat(plain(config.model_dump(exclude=NOT_COMPARED)))) for config in (old, new)]
    return list(_changes(*trees))


def other_settings(old: Config, new: Config) -> list[Change]:
    """Return the keys that differ and may do so: a run is the same, wherever and by whom it is trained."""
    trees = [dict(flat(plain(config.model_dump()))) for config in (old, new)]
    matters = {change.key for change in other_run(old, new)}
    return [change for change in _changes(*trees) if change.key not in matters]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for key in dict.fromkeys([*new, *old]):
        before, now = (redacted(repr(tree[key])) if key in tree else "not set" for tree in (old, new))
        if before != now:
            yield Change(key, before, now)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
