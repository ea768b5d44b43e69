"""Write docs/measurements.md and panels of the dashboard from the table of measured numbers in `ist/measurements.py`.

python docs/measurements.py
"""

import copy
import json
from pathlib import Path
from typing import Any

from ist.measurements import MEASUREMENTS, Measurement
from ist.monitoring.exporters import families

HERE = Path(__file__).parent
PAGE = HERE / "measurements.md"
DASHBOARD = HERE.parent / "docker" / "grafana-dashboard.json"

START = """\
# What a run measures

This page lists every number that a run measures. `python docs/measurements.py` writes it from the table in
`ist/measurements.py`.

## metrics.jsonl

The file has a line for each round. `round` counts from 0. A total is the sum from the start of the run to the end of
the round. Every other number is that of the round, unless its meaning says otherwise.

"""

END = """
A round with an evaluation also has `metric`, the name of the first value that `evaluate.metric` reports, and each value
of that metric under its own name. A round that lost workers has `lost`: for each of them its `worker`, the `kind`
(`lost`, `late` or `rejected`) and the `reason`.

result.json has the numbers that are marked `total`, `peak` (the maximum of all rounds) or `latest`.

## Between processes

A worker sends these numbers with its subnet, in the header of the message: each is a float64 in the given slot of 8
bytes. Ranks that train the full network exchange the same numbers.

"""

WATCHED = """
## TensorBoard and Prometheus

Prometheus also gets metrics of the run itself; they are in `ist/monitoring/exporters.py`.

"""

KINDS = {"total": "total", "peak": "peak", "latest": "latest", None: ""}
WAYS = {
    "sum": "sum", "mean": "mean", "max": "maximum",
    "elapsed": "maximum; the sum if workers take turns", None: "used in formulas",
}  # fmt: skip


def page() -> str:
    """Return docs/measurements.md."""
    recorded = [row for measured in MEASUREMENTS if measured.recorded for row in rows_of(measured)]
    travel = [
        (str(m.slot), f"`{m.name}`", m.unit, WAYS[m.combine], "" if m.recorded else m.meaning)
        for m in sorted((m for m in MEASUREMENTS if m.slot is not None), key=lambda m: m.slot or 0)
    ]
    watched = [
        (f"`{m.name}`", f"`{m.tensorboard}`" if m.tensorboard else "", prometheus(m))
        for m in MEASUREMENTS
        if m.tensorboard or m.prometheus
    ]
    return "".join(
        (
            START,
            table(("key", "unit", "in result.json", "meaning"), recorded),
            END,
            table(("slot", "number", "unit", "in the round", "meaning, if not above"), travel),
            WATCHED,
            table(("number", "TensorBoard", "Prometheus"), watched),
        )
    )


def rows_of(measured: Measurement) -> list[tuple[str, ...]]:
    """Return a row for each key that a number has in metrics.jsonl."""
    unit = f"{measured.unit}, a list" if measured.is_list else measured.unit
    rows: list[tuple[str, ...]] = [(f"`{measured.name}`", unit, KINDS[measured.over_rounds], measured.meaning)]
    if measured.by_worker:
        meaning = f"`{measured.name}` of each worker that was not lost, in the order of workers."
        rows.append((f"`{measured.name}_by_worker`", f"{measured.unit}, a list", "", meaning))
    return rows


def prometheus(measured: Measurement) -> str:
    """Return the name of a number's sample in a query of Prometheus."""
    if measured.prometheus is None:
        return ""
    family, label = measured.prometheus.family, measured.prometheus.label
    name = f"{family.name}_total" if family.kind == "counter" else family.name
    return f'`{name}{{{family.label}="{label}"}}`' if family.label else f"`{name}`"


def table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = (titles, ("---",) * len(titles), *rows)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def dashboard(before: dict[str, Any]) -> dict[str, Any]:
    """Return the dashboard with a new panel for each metric that no panel shows, copied from and below the last one."""
    after = copy.deepcopy(before)
    panels = after["panels"]
    shown = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    for family in families():
        name = f"{family.name}_total" if family.kind == "counter" else family.name
        if name in shown.replace("(", " ").replace(")", " ").replace("[", " ").split():
            continue
        panel = copy.deepcopy(panels[-1])
        value = f"rate({name}[$__rate_interval])" if family.kind == "counter" else name
        joined = f'{value} * on (job, instance) group_left (run, method) ist_run_info{{run=~"$run"}}'
        legend = f"{{{{{family.label}}}}}, " if family.label else ""
        panel |= {"id": max(p["id"] for p in panels) + 1, "title": family.name, "description": family.help}
        panel["gridPos"] |= {"x": 0, "y": max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)}
        panel["fieldConfig"]["defaults"]["unit"] = "short"
        panel["targets"] = [
            panel["targets"][0] | {"expr": joined, "legendFormat": f"{legend}{{{{run}}}} {{{{method}}}}"}
        ]
        panels.append(panel)
    return after


def main() -> None:
    """Write both files."""
    PAGE.write_text(page())
    DASHBOARD.write_text(json.dumps(dashboard(json.loads(DASHBOARD.read_text())), indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
