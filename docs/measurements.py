"""Write docs/measurements.md, and dashboard panels, from the table of measured numbers in `ist/measurements.py`.

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

Every number of a run, from the table in `ist/measurements.py`; `python docs/measurements.py` writes this page.

## metrics.jsonl

A line for each round. `round` counts from 0. A total is the sum from the beginning of the run to the end of the round;
every other number is of the round alone, or of what its meaning says.

"""

END = """
A round that was evaluated also has `metric`, the name of what `evaluate.metric` reports first, and each value of that
metric under its own name. A round that left workers out has `lost`: for each of them its `worker`, the `kind` (`lost`,
`late` or `rejected`) and the `reason`.

result.json has the totals, the peaks (the greatest of all rounds) and the latest of what is marked so.

## Between processes

A worker sends these numbers with its subnet, in the header of the message: each is a float64, in the slot of 8 bytes
that is named here. Ranks that train the whole network tell each other the same numbers.

"""

WATCHED = """
## TensorBoard and Prometheus

What else Prometheus is told, about the run itself, is in `ist/monitoring/exporters.py`.

"""

KINDS = {"total": "total", "peak": "peak", "latest": "latest", None: ""}
WAYS = {
    "sum": "their sum", "mean": "their mean", "max": "the greatest",
    "elapsed": "the greatest; their sum where workers take turns", None: "enters formulas",
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
            table(("key", "unit", "over the run", "meaning"), recorded),
            END,
            table(("slot", "number", "unit", "the round's number", "meaning, if not above"), travel),
            WATCHED,
            table(("number", "TensorBoard", "Prometheus"), watched),
        )
    )


def rows_of(measured: Measurement) -> list[tuple[str, ...]]:
    """Return the rows of a number's keys in metrics.jsonl."""
    unit = f"{measured.unit}, a list" if measured.is_list else measured.unit
    rows: list[tuple[str, ...]] = [(f"`{measured.name}`", unit, KINDS[measured.over_rounds], measured.meaning)]
    if measured.by_worker:
        meaning = f"`{measured.name}` of each worker that came back, in the order of workers."
        rows.append((f"`{measured.name}_by_worker`", f"{measured.unit}, a list", "", meaning))
    return rows


def prometheus(measured: Measurement) -> str:
    """Return a number's sample in Prometheus as a query names it."""
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
    """Return the dashboard with a panel for each metric that none shows, made like the last panel and below it."""
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
