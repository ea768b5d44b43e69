"""Code shared by the benchmarks: writing results, with the machine and the version that produced them."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def write_result(name: str, values: Mapping[str, Any]) -> Path:
    """Write a benchmark's numbers to `results/NAME.json`, with the commit and the hardware."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"commit": commit(), "hardware": hardware(), **values}, indent=2) + "\n")
    return path


def finished_runs(path: Path) -> dict[str, Any]:
    """Return the results in a file of finished runs (one per line) by the key of the run."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["key"]: line["result"] for line in map(json.loads, lines)}


def add_run(path: Path, key: str, result: Any) -> None:
    """Append a finished run to a file; several processes may append to it."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"key": key, "commit": commit(), "result": result}) + "\n")


def hardware() -> dict[str, Any]:
    """Describe this machine."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    """Return the commit of the running code."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
