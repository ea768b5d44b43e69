"""Run the command line, and write the process's peak memory after the imports and at its end; a program of torchrun.

Arguments: the folder for the numbers, and the arguments of `ist`.
"""

import json
import os
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401 (a library that a run imports late)

import ist.cli.main as command_line
import ist.runs.execute
import ist.runs.preflight  # noqa: F401 (with all that a run imports)


def peak_bytes() -> int:
    """Return the most memory that this process had, as the operating system says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


if __name__ == "__main__":
    folder, libraries = Path(sys.argv[1]), peak_bytes()
    try:
        command_line.app(sys.argv[2:], standalone_mode=False)
    finally:
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([libraries, peak_bytes()]))
