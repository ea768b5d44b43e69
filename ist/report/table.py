"""The table that sets finished runs beside each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ist.display import format_bytes, format_ratio

Result = Mapping[str, Any]


def table_columns(results: Sequence[Result]) -> tuple[str, ...]:
    """Return the names of the columns; `on the wire` where any run counted what crossed its links."""
    on_the_wire = ("on the wire",) if _counted(results) else ()
    return ("method", "accuracy", "bytes sent", *on_the_wire, "ratio", "seconds", "on own cores", "memory a worker")


def table_rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Return a row of text for every result.

    The ratio is the bytes of the costliest run over a run's own: how many times fewer it sends. A run's
    label carries the seed where a method stands more than once.
    """
    most = max((result["sent_bytes"] for result in results), default=0)
    labels = [_label(result) for result in results]
    counted = _counted(results)
    rows: list[tuple[str, ...]] = []
    for result in results:
        several = labels.count(_label(result)) > 1
        accuracy, sent = result["accuracy"], result["sent_bytes"]
        wire = format_bytes(result["wire_bytes"]) if "wire_bytes" in result else "not counted"
        rows.append(
            (
                f"{_label(result)} (seed {result['seed']})" if several else _label(result),
                f"{accuracy:.2%}" if accuracy is not None else f"loss {result['test_loss'] or result['loss']:.4f}",
                format_bytes(sent),
                *((wire,) if counted else ()),
                f"{format_ratio(most / sent)}x fewer" if sent and sent < most else "1x",
                f"{result['train_s']:.1f}",
                f"{result['virtual_s']:.1f}" if "virtual_s" in result else "not counted",
                format_bytes(result["memory_bytes"]),
            )
        )
    return rows


def link_text(results: Sequence[Result]) -> str:
    """Return on what links the runs were: '100mbit' all, or 'ist 100mbit, ddp none'; nothing where there were none."""
    links = {result.get("link") for result in results}
    if len(links) == 1:
        return links.pop() or ""
    labels = [row[0] for row in table_rows(results)]
    return ", ".join(f"{label} {result.get('link', 'none')}" for label, result in zip(labels, results, strict=True))


def fault_text(result: Result) -> str:
    """Return how often workers were left out of a round, such as '3 late, 1 rejected'; nothing where none was."""
    return ", ".join(f"{number} {kind}" for kind, number in result.get("faults", {}).items() if number)


def rich_table(results: Sequence[Result]) -> Table:
    """Return the table for a terminal."""
    links = link_text(results)
    first, *others = table_columns(results)
    table = Table(first, title=None, caption=f"links: {links}" if links else None)
    for column in others:
        table.add_column(column, justify="right")
    for row in table_rows(results):
        table.add_row(*row)
    return table


def _label(result: Result) -> str:
    return str(result.get("label", result["method"]))


def _counted(results: Sequence[Result]) -> bool:
    return any("wire_bytes" in result for result in results)
