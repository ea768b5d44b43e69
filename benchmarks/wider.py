"""Networks that do not fit into a worker's memory in data-parallel training, but do with IST.

    python -m benchmarks.wider [--device cuda] [--limit 250MB] [--widths 128,512]

Claim: with four workers of limited memory, IST trains networks of a width at which data-parallel training runs out of
memory (of the process, or of torch on a GPU), and the wider network is better (Table 2 of the IST paper, at a smaller
scale).

The network of configs/wordnet_hypernyms.yaml at growing widths, by data-parallel training and by IST, in separate
processes. `pool.memory_limit` is the memory that a worker's process may allocate beyond interpreter, libraries and data
(RLIMIT_DATA), or that torch may allocate on the shared GPU. The dedicated coordinator has the full network; it is not a
worker and has no limit.

Reference: Yuan et al., arXiv 1910.02120, Table 2 (Amazon-670k: data-parallel training has no memory above width 512).
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import ROOT, write_result
from ist.config.load import config_for_method, dump_config, load_config
from ist.errors import MemoryLimitError
from ist.launch.start import launch
from ist.monitoring.display import format_bytes
from ist.runs.build import build_job
from ist.storage.run_folder import create_run_folder

METHODS = ("ddp", "ist")
SETTINGS = {"recipe.stages": "[]", "train.local_steps": "512"}
"""The limit rules out full networks on workers, so there is no full-width phase, but more and shorter rounds."""


def run(method: str, width: int, limit: str | None, epochs: dict[str, int], device: str) -> dict[str, Any]:
    """Train once; if the run is out of memory, the result has only the error."""
    path = ROOT / "configs" / "wordnet_hypernyms.yaml"
    base = config_for_method(load_config(path), method)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "config.yaml"
        source.write_text(dump_config(base))
        config = load_config(
            source,
            [
                f"model.args.hidden={width}",
                f"train.epochs={epochs[method]}",
                f"pool.memory_limit={limit or 'null'}",
                f"pool.device={device}",
                "pool.coordinator=dedicated",
                "evaluate.every=100000",
                "checkpoint.every=100000",
                *(f"{key}={value}" for key, value in SETTINGS.items()),
            ],
        )
        build_job(config)
        folder = create_run_folder(config, Path(scratch) / "run")
        try:
            launch(config, folder.path, resume=False)
        except MemoryLimitError as error:
            print(f"{method}, width {width}: {error}", file=sys.stderr, flush=True)
            return {"refused": str(error)}
        result = folder.result()
    print(f"{method}, width {width}: {result['metrics']}", file=sys.stderr, flush=True)
    reported = ("metrics", "memory_bytes", "sent_bytes", "virtual_s", "parameters")
    return {key: result[key] for key in reported}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--limit", default="250MB", help="the memory limit of a worker's process")
    parser.add_argument("--widths", default="128,512")
    parser.add_argument("--ddp-epochs", type=int, default=4)
    parser.add_argument("--ist-epochs", type=int, default=16)
    asked = parser.parse_args()
    name = "wider" if asked.device == "cpu" else "wider_cuda"
    widths = [int(width) for width in asked.widths.split(",")]
    epochs = {"ddp": asked.ddp_epochs, "ist": asked.ist_epochs}
    shown = Table(
        "width",
        "weights",
        "method",
        "P@1",
        "P@3",
        "P@5",
        "memory per worker",
        title=f"{asked.limit} per worker, 4 workers",
    )
    found: dict[str, Any] = {}
    for width in widths:
        for method in METHODS:
            row = run(method, width, asked.limit, epochs, asked.device)
            found[f"{method} {width}"] = row
            if "refused" in row:
                shown.add_row(str(width), "", method, "out of memory", "", "", "")
                continue
            precisions = [f"{row['metrics'][f'precision_at_{top}']:.2%}" for top in (1, 3, 5)]
            memory = format_bytes(row["memory_bytes"])
            shown.add_row(str(width), format_bytes(4 * row["parameters"]), method, *precisions, memory)
            write_result(name, {"limit": asked.limit, "epochs": epochs, "runs": found})
    Console(width=120).print(shown)
    print(write_result(name, {"limit": asked.limit, "epochs": epochs, "runs": found}))


if __name__ == "__main__":
    main()
