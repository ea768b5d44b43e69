"""The line of the network's own code that is running, for messages.

Where it sits: `ist/neurons/trace.py`, `ist/neurons/trial.py`, `ist/neurons/tracing/shared_draws.py` and
`ist/subnet/call_sizes.py` call it while a network runs.
"""

import os
import sys
import sysconfig
from pathlib import Path
from types import FrameType

import torch

_OURS = Path(__file__).parents[2]
_PASSED_OVER = (
    f"{_OURS / 'neurons'}{os.sep}",
    f"{Path(torch.__file__).parent}{os.sep}",
    str(_OURS / "subnet" / "call_sizes.py"),
)
_LIBRARY = sysconfig.get_paths()["stdlib"]
_CALLER = str(_OURS / "data" / "nested.py")


def users_line() -> str:
    """Return 'file:line' of the innermost code of a running network; '' if only torch's own modules run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _CALLER:
        file = frame.f_code.co_filename
        of_python = file.startswith("<") or (file.startswith(_LIBRARY) and "-packages" not in file)
        if not of_python and not file.startswith(_PASSED_OVER):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
