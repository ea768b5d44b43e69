"""The HTML page about finished runs: one self-contained file, readable without a network.

Where it sits: `ist report` and `ist compare` call `write_report`.
Not here: the table (`ist/report/table.py`), plots (`ist/report/plots.py`), names of runs (`ist/report/names.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from ist._version import VERSION
from ist.config.load import dump_config
from ist.errors import RunFolderError
from ist.redact import redacted
from ist.report.names import run_names
from ist.report.plots import axes_of_curves, curve_plot, phase_plot
from ist.report.table import (
    MEMORY_COLUMNS,
    change_texts,
    end_text,
    evaluation_text,
    fault_text,
    link_text,
    memory_table,
    table_columns,
    table_rows,
)
from ist.storage.backend import write_atomically
from ist.storage.run_folder import RunFolder


def find_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Return the run folders among `paths` and directly under them, in order.

    Raises:
        RunFolderError: A path is not a run folder and contains none.
    """
    found: list[RunFolder] = []
    for path in paths:
        inside = [path] if (path / "config.yaml").is_file() else sorted(p.parent for p in path.glob("*/config.yaml"))
        if not inside:
            raise RunFolderError(f"{path}: is not a run folder and contains none (no config.yaml)")
        found += [RunFolder(folder) for folder in inside]
    return found


def write_report(runs: Sequence[RunFolder], path: Path) -> Path:
    """Write the page.

    Args:
        runs: Finished runs.
        path: The file to write.

    Returns:
        `path`.

    Raises:
        RunFolderError: A run has not finished, one of its files is damaged, or the page cannot be written.
    """
    results = [run.result() for run in runs]
    labels = run_names(runs)
    rows = table_rows(results, labels)
    curves = {label: run.finished_records() for label, run in zip(labels, runs, strict=True)}
    configs = [run.load_config() for run in runs]
    page = render(
        "page.html",
        title=configs[0].name,
        version=VERSION,
        columns=table_columns(results),
        rows=rows,
        results=results,
        memory_columns=MEMORY_COLUMNS,
        memory=memory_table(results, labels),
        links=link_text(results, labels),
        ends=[(label, text) for label, text in zip(labels, map(end_text, results), strict=True) if text],
        evaluations=[(label, text) for label, text in zip(labels, map(evaluation_text, results), strict=True) if text],
        faults=[(label, text) for label, text in zip(labels, map(fault_text, results), strict=True) if text],
        changes=[(label, text) for label, run in zip(labels, runs, strict=True) for text in change_texts(run)],
        model=redacted(yaml.safe_dump(configs[0].model.model_dump(), default_flow_style=True, width=1000).strip()),
        data=configs[0].data.name,
        plots=[Markup(curve_plot(curves, *axis)) for axis in axes_of_curves()],
        phases=Markup(phase_plot(curves)),
        configs=[(label, redacted(dump_config(config))) for label, config in zip(labels, configs, strict=True)],
    )
    return write_page(path, page)


def render(template: str, **values: Any) -> str:
    """Render a template of this folder; text is escaped unless it is `Markup`."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.PackageLoader("ist.report", "")
    )
    return environment.get_template(template).render(**values)


def write_page(path: Path, page: str) -> Path:
    """Write a page, and return `path`.

    Raises:
        RunFolderError: It cannot be written.
    """
    write_bytes(path, page.encode())
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file.

    Raises:
        RunFolderError: It cannot be written.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error
