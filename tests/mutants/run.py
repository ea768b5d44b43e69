"""Apply faults to copies of the code, one at a time, and see that the quick tests notice each.

    python -m tests.mutants.run            # all of them
    python -m tests.mutants.run message.py # those whose file or words hold this text

The working tree is never changed. A fault that no test notices, or whose line is not there any more, is an error; so is
a test that fails without the fault. The faults are in `tests/mutants/faults.py`. Each is tried in a fork of this
process, which has imported the large libraries, and neither the package nor its tests.
"""

import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import pydantic  # noqa: F401
import pytest
import torch
import torch.distributed.launcher

from tests.mutants.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()  # the first optimizer imports half of torch
COPIED = ("ist", "tests", "configs", "pyproject.toml", "README.md", "CONTRIBUTING.md")


def main(words: Sequence[str]) -> int:
    """Run the faults that `words` choose, print a line for each, and return an exit code."""
    chosen = [fault for fault in FAULTS if all(word in f"{fault.file} {fault.what}" for word in words)]
    started = time.monotonic()
    noticed: set[str] = set()
    problems = [] if chosen else ["no such fault"]
    with tempfile.TemporaryDirectory(prefix="ist-mutants-") as folder:
        left, running = list(chosen), dict[int, tuple[Fault, Path]]()
        while left or running:
            while left and len(running) < (os.cpu_count() or 1):
                fault, place = left.pop(0), Path(folder) / str(len(left))
                _copy(place)
                if problem := _apply(fault, place):
                    problems.append(_told(fault, "ERROR  ", problem))
                else:
                    running[_start(place, fault.tests)] = fault, place
            if running:
                pid, status = os.wait()
                fault, place = running.pop(pid)
                test, problem = _outcome(place, os.waitstatus_to_exitcode(status), fault)
                noticed |= {test} if test else set()
                _told(fault, "ERROR  " if problem else "noticed", problem or test)
                problems += [problem] if problem else []
                shutil.rmtree(place)
        if noticed:
            place = Path(folder) / "sound"
            _copy(place)
            _, status = os.waitpid(_start(place, sorted(noticed)), 0)
            if os.waitstatus_to_exitcode(status) != 0:
                problems.append(f"tests that noticed a fault fail without any:\n{_said(place)[-3000:]}")
                print(f"ERROR   {problems[-1]}")
    print(f"{len(chosen)} faults, {len(problems)} problems, {time.monotonic() - started:.0f} s")
    return 1 if problems else 0


def _told(fault: Fault, how: str, what: str) -> str:
    print(f"{how} {fault.file}: {fault.what}\n        {what}", flush=True)
    return what


def _copy(place: Path) -> None:
    place.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name)  # with what is compiled, for the files that stay as they are
        else:
            shutil.copy2(ROOT / name, place / name)


def _apply(fault: Fault, place: Path) -> str:
    """Apply a fault to a copy; return what is wrong with it, if anything is."""
    path = place / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        return f"its line stands there {text.count(fault.old)} times: {fault.old.strip()}"
    path.write_text(text.replace(fault.old, fault.new))
    return ""


def _start(place: Path, tests: Sequence[str]) -> int:
    """Run quick tests of a copy in a fork, whose process id is returned."""
    sys.stdout.flush()
    if (pid := os.fork()) != 0:
        return pid
    code = 3
    try:
        output = os.open(place / "output.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(place)
        (place / "tmp").mkdir()
        os.environ |= {"TMPDIR": str(place / "tmp"), "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
        tempfile.tempdir = None
        sys.dont_write_bytecode = True
        sys.path[:] = [str(place), *(path for path in sys.path if path not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("ist", "tests")]:
            del sys.modules[name]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not ray and not system and not gpu"]
        code = int(pytest.main([*options, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _said(place: Path) -> str:
    return (place / "output.txt").read_text(errors="replace")


def _outcome(place: Path, code: int, fault: Fault) -> tuple[str, str]:
    """Return the test that noticed a fault, or what is wrong."""
    failed = re.search(r"^FAILED ([^\s\[]+)", _said(place), flags=re.MULTILINE)
    if code == 1 and failed:
        return failed[1], ""
    if code == 0:
        return "", f"not noticed by {', '.join(fault.tests)}"
    return "", f"its tests did not run (exit code {code}): {_said(place)[-500:]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
