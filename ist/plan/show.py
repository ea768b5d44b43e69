"""Print a plan on the terminal.

Where it sits: `ist plan` calls `print_plan`; the HTML page shares its texts.
Not here: computing the plan (`predict.py`), the HTML page (`ist/plan/page.py`).
"""

import json
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ist.config.runtime import Link
from ist.monitoring.display import format_bytes, memory_tables

COLUMNS = ("method", "sent", "busiest link", "memory", "compute s", "exchange s", "round s", "epoch s")


def plan_rows(found: Mapping[str, Any]) -> dict[int, list[tuple[str, ...]]]:
    """Return a row of text for every prediction, grouped by number of workers, methods in the requested order."""
    rows: dict[int, list[tuple[str, ...]]] = {}
    for row in found["predictions"]:
        texts = (
            row["method"],
            format_bytes(row["sent_bytes"]),
            format_bytes(row["link_bytes"]),
            format_bytes(row["memory_bytes"]),
            format_seconds(row["compute_s"]),
            format_seconds(row["exchange_s"] + row["coordinate_s"]),
            format_seconds(row["round_s"]),
            format_seconds(row["epoch_s"]),
        )
        rows.setdefault(row["workers"], []).append(texts)
    return rows


def memory_by_process(found: Mapping[str, Any]) -> dict[int, dict[str, Mapping[str, int]]]:
    """Return bytes by number of workers, process and part: a worker of each method, and the coordinator of ist."""
    found_in: dict[int, dict[str, Mapping[str, int]]] = {}
    for row in found["predictions"]:
        own = found_in.setdefault(row["workers"], {})
        own[row["method"]] = row["memory"]
        if row["coordinator_memory"] is not None:
            own["coordinator"] = row["coordinator_memory"]
    return found_in


def memory_notes(found: Mapping[str, Any]) -> list[str]:
    """Return sentences about the predicted memory: what a process holds besides, and what is not counted."""
    notes = dict.fromkeys(note for row in found["predictions"] for note in row["memory_notes"])
    held = format_bytes(found["held_bytes"])
    return [f"Interpreter, libraries and data take {held} more in each process, as in this one", *map(_sentence, notes)]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def round_titles(found: Mapping[str, Any]) -> dict[int, str]:
    """Return a title for each number of workers: the steps of a round, and the memory of IST's coordinator."""
    titles = {}
    for workers in plan_rows(found):
        rows = [row for row in found["predictions"] if row["workers"] == workers]
        steps = dict.fromkeys(row["local_steps"] for row in rows)
        words = f"{workers} workers, rounds of {' or '.join(map(str, steps))} steps"
        held = [row["coordinator_memory_bytes"] for row in rows if row["coordinator_memory_bytes"] is not None]
        titles[workers] = f"{words}; the coordinator of ist needs {format_bytes(held[0])}" if held else words
    return titles


def describe_hosts(found: Mapping[str, Any]) -> str:
    """Describe the hosts of a plan in words."""
    cores = "its own core" if found["cores"] is None else f"one of {found['cores']} shared cores"
    return f"every host on a link of {Link(**found['link'])}, every worker on {cores}"


def ending_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the number of workers at which each method's simulation ends, and the reason; equal ends share a line."""
    simulation = found["simulation"]
    together: dict[tuple[int, str], list[str]] = {}
    for method, end in (simulation["ends"] if simulation else {}).items():
        together.setdefault((end["workers"], end["reason"]), []).append(method)
    return [
        f"{', '.join(methods)}: not possible with {n} workers: {reason}" for (n, reason), methods in together.items()
    ]


def print_plan(found: Mapping[str, Any], console: Console, as_json: bool) -> None:
    """Print the result of `make_plan`, as tables or as JSON."""
    if as_json:
        console.file.write(json.dumps(found, indent=2) + "\n")
        return
    console.print(
        f"{found['name']}: {found['parameters']:,} parameters; {describe_hosts(found)}; steps measured on this "
        f"machine ({found['measured_on']['device']})",
        highlight=False,
    )
    titles = round_titles(found)
    for workers, rows in plan_rows(found).items():
        table = Table(
            title=titles[workers], title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False
        )
        for column in COLUMNS:
            table.add_column(column.replace(" ", "\n"), justify="left" if column == "method" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for workers, processes in memory_by_process(found).items():
        for table in memory_tables(f"Memory of a process in MB, with {workers} workers", processes):
            console.print(table)
    for note in memory_notes(found):
        console.print(f"{note}.", highlight=False)
    for line in ending_lines(found):
        console.print(line, highlight=False)


def format_seconds(seconds: float) -> str:
    """Return seconds with three significant digits, or without decimals from 1,000 on."""
    return f"{seconds:.3g}" if seconds < 1000 else f"{seconds:,.0f}"
