"""Where in the network's own code something happens: the file and line of a message.

Where it sits: `ist/groups/trace.py` and `ist/groups/draws.py` ask while a network runs.
"""

import sys
import sysconfig
from pathlib import Path

import torch

_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"])


def users_line() -> str:
    """Return 'file:line' of the innermost frame outside torch, Python's library and this package."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((*_OURS, "<")) or ("site-packages" in file and not file.startswith(_OURS[:2])):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
