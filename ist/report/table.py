"""The table that compares finished runs.

Where it sits: `ist/report/page.py` and the command line show it.
Not here: which numbers have a column (`ist/measurements.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ist.measurements import MEASUREMENTS, Measurement
from ist.monitoring.display import format_bytes, format_metric, format_ratio, metric_title
from ist.storage.run_folder import RunFolder

Result = Mapping[str, Any]


def table_columns(results: Sequence[Result]) -> tuple[str, ...]:
    """Return the names of the columns; `on the wire` is included if any run counted the bytes on its links."""
    on_the_wire = ("on the wire",) if _counted(results) else ()
    titles = tuple(metric_title(name) for name in _metrics(results)) or ("loss",)
    others = (measured.column for measured in MEASUREMENTS if measured.column)
    return ("method", *titles, "bytes sent", *on_the_wire, "ratio", *others)


def table_rows(results: Sequence[Result], names: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Return a row of text for every result.

    The ratio says how many times fewer bytes a run sends than the run that sends most.

    Args:
        results: Results of runs.
        names: Names of the runs (`ist/report/names.py`); default: their labels.
    """
    most = max((result["sent_bytes"] for result in results), default=0)
    names = names or [_label(result) for result in results]
    counted, metrics = _counted(results), _metrics(results)
    rows: list[tuple[str, ...]] = []
    for name, result in zip(names, results, strict=True):
        sent = result["sent_bytes"]
        wire = format_bytes(result["wire_bytes"]) if "wire_bytes" in result else "not counted"
        rows.append(
            (
                name,
                *_values(result, metrics),
                format_bytes(sent),
                *((wire,) if counted else ()),
                f"{format_ratio(most / sent)}x fewer" if sent and sent < most else "1x",
                *(_shown(result, measured) for measured in MEASUREMENTS if measured.column),
            )
        )
    return rows


MEMORY_COLUMNS = ("run", "process", "predicted", "measured", "whole process")


def memory_table(results: Sequence[Result], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a row of text for each kind of process of every run: its memory, as predicted and as measured.

    Args:
        results: Results of runs.
        names: Names of the runs.
    """
    rows = []
    for name, result in zip(names, results, strict=True):
        budget = result.get("memory_budget", {})
        for process, prefix in (("worker", ""), ("coordinator", "coordinator_")):
            measured = [result.get(f"{prefix}{key}") for key in ("memory_bytes", "process_memory_bytes")]
            if not any(measured):
                continue
            parts = budget.get(process)
            predicted = format_bytes(sum(parts.values())) if parts else "not predicted"
            shown = (format_bytes(count) if count else "not measured" for count in measured)
            rows.append((name, process, predicted, *shown))
    return rows


def link_text(results: Sequence[Result], names: Sequence[str] = ()) -> str:
    """Return the links of the runs: '100mbit' for all, or 'ist 100mbit, ddp none'; '' if no run had a link."""
    links = {result.get("link") for result in results}
    if len(links) == 1:
        return links.pop() or ""
    names = names or [_label(result) for result in results]
    return ", ".join(f"{name} {result.get('link', 'none')}" for name, result in zip(names, results, strict=True))


def fault_text(result: Result) -> str:
    """Return how often workers were left out of a round, such as '3 late, 1 rejected'; '' if never."""
    return ", ".join(f"{number} {kind}" for kind, number in result.get("faults", {}).items() if number)


def evaluation_text(result: Result) -> str:
    """Return what it cost to evaluate a network that no process holds; '' for other runs."""
    if not (fetched := result.get("evaluate_bytes", 0)):
        return ""
    return (
        f"rank 0 fetched {format_bytes(fetched)} of the network from other ranks to evaluate it, which are not in the "
        "bytes sent: with pool.evaluation 'layers', all parameters for every batch"
    )


def end_text(result: Result) -> str:
    """Return why a callback has ended the run and after how many rounds; '' if the run has had all its rounds."""
    reason = result.get("stopped_early")
    return f"stopped early after {result['rounds']} rounds: {reason}" if reason is not None else ""


def rich_table(results: Sequence[Result], names: Sequence[str] = ()) -> Table:
    """Return the table for a terminal."""
    links = link_text(results, names)
    columns, rows = table_columns(results), table_rows(results, names)
    table = Table(title=None, caption=f"links: {links}" if links else None)
    for number, (column, *cells) in enumerate(zip(columns, *rows, strict=True)):
        longest = max(len(word) for text in (column, *cells) for word in text.split(" "))  # a narrow terminal cuts none
        table.add_column(column, justify="right" if number else "left", min_width=longest)
    for row in rows:
        table.add_row(*row)
    return table


def _label(result: Result) -> str:
    return str(result.get("label") or result["method"])


def _metrics(results: Sequence[Result]) -> list[str]:
    """Return the metrics that any of the runs reports, without their best values."""
    names = dict.fromkeys(name for result in results for name in _reported(result))
    return [name for name in names if not name.startswith("best_")]


def _reported(result: Result) -> Mapping[str, float]:
    accuracy = {"accuracy": result["accuracy"]} if result.get("accuracy") is not None else {}
    found: Mapping[str, float] = result.get("metrics", accuracy)
    return found


def _values(result: Result, metrics: Sequence[str]) -> list[str]:
    found = _reported(result)
    if not found:
        loss = result["test_loss"] if result.get("test_loss") is not None else result["loss"]
        return [f"loss {loss:.4f}", *[""] * (len(metrics) - 1)]
    return [format_metric(name, found[name]) if name in found else "" for name in metrics]


def _shown(result: Result, measured: Measurement) -> str:
    if measured.name not in result:
        return "not counted"
    value = result[measured.name]
    if measured.unit == "fraction":
        return f"{value:.0%}"
    return format_bytes(value) if measured.unit == "bytes" else f"{value:.1f}"


def _counted(results: Sequence[Result]) -> bool:
    return any("wire_bytes" in result for result in results)


def change_texts(run: RunFolder) -> list[str]:
    """Return a text for each change of a run's configuration, in order.

    Raises:
        RunFolderError: changes.jsonl is damaged.
    """
    return [
        f"from round {change.round + 1} on: "
        + "; ".join(f"{key.key} is {key.new}, before {key.old}" for key in change.changes)
        for change in run.config_changes()
    ]
