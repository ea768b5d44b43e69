"""Distinct names of runs for tables and plots.

Where it sits: `ist/report/page.py` and the command line call `run_names` with all runs of a report.
Not here: the table itself (`ist/report/table.py`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ist.config.schema import Config
from ist.redact import redacted
from ist.storage.run_folder import RunFolder
from ist.storage.same_run import flat

_MOST_KEYS = 3
_LONGEST_VALUE = 24
_IGNORED_KEYS: dict[str, Any] = {
    "name": True,
    "label": True,
    "output": True,
    "checkpoint": True,
    "watch": True,
    "compare": True,
}
"""Keys that do not affect training."""


def run_names(runs: Sequence[RunFolder]) -> list[str]:
    """Return a name for each run: its label; runs with the same label also show the keys in which they differ.

    For example 'ist (lr 0.1)' and 'ist (lr 0.2)'. If that is too long or not enough, the folder: 'ist: run-2'.

    Raises:
        ConfigError: A run's configuration is damaged.
        RunFolderError: A run has not finished, or its result is damaged.
    """
    results = [run.result() for run in runs]
    labels = [str(result.get("label") or result["method"]) for result in results]
    configs = [run.load_config() for run in runs]
    names = []
    for run, label, config in zip(runs, labels, configs, strict=True):
        alike = [other for other, theirs in zip(configs, labels, strict=True) if theirs == label]
        names.append(
            label if len(alike) == 1 else _with_differences(label, config, alike) or f"{label}: {run.path.name}"
        )
    return _made_distinct(names, labels, [run.path for run in runs])


def _with_differences(label: str, config: Config, alike: Sequence[Config]) -> str:
    """Return a label with the keys in which runs differ; '' if there are none, or if the name would be long."""
    trees = [_tree(other) for other in alike]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    differing = [key for key in keys if len({repr(tree.get(key)) for tree in trees}) > 1]
    own = _tree(config)
    values = ["none" if own.get(key) is None else redacted(str(own[key])) for key in differing]
    if not 0 < len(differing) <= _MOST_KEYS or max(map(len, values)) > _LONGEST_VALUE:
        return ""
    last = Counter(key.rpartition(".")[2] for key in differing)
    short = [key if last[key.rpartition(".")[2]] > 1 else key.rpartition(".")[2] for key in differing]
    return f"{label} ({', '.join(f'{key} {value}' for key, value in zip(short, values, strict=True))})"


def _tree(config: Config) -> Mapping[str, Any]:
    return dict(flat(config.model_dump(mode="json", exclude=_IGNORED_KEYS)))


def _made_distinct(names: Sequence[str], labels: Sequence[str], paths: Sequence[Any]) -> list[str]:
    """Add the folder to names that are still equal: its last part, or the full path."""
    for candidates in (
        names,
        [f"{label}: {path.name}" for label, path in zip(labels, paths, strict=True)],
        [f"{label}: {path}" for label, path in zip(labels, paths, strict=True)],
    ):
        counts = Counter(names)
        names = [new if counts[old] > 1 else old for old, new in zip(names, candidates, strict=True)]
    return list(names)
