"""The ten jobs of `examples/ten_jobs/`: both versions of each train on two ranks, and their lines are those shown."""

import re
from pathlib import Path

import pytest

from examples.ten_jobs.count_lines import GOAL, JOBS, count, table
from tests.conftest import ROOT, run_forked_ranks

FOLDER = ROOT / "examples" / "ten_jobs"


def test_the_page_shows_the_lines_of_every_job() -> None:
    assert table() in (ROOT / "examples" / "README.md").read_text()
    assert {path.stem for path in FOLDER.glob("*.py")} == JOBS.keys() | {"count_lines"}


def test_no_job_needs_more_lines_than_the_goal_allows() -> None:
    sources = {name: (FOLDER / f"{name}.py").read_text() for name in JOBS}

    longer = {name: count(source, "by_subnets") - count(source, "ddp") for name, source in sources.items()}

    assert {name: lines for name, lines in longer.items() if lines > GOAL} == {}


COUNTED = '''"""A header."""

import os
import sys

import torch  # for both

torch.manual_seed(0)
SIZE, DEPTH = 3, 2


@torch.no_grad()
def helper(number: int) -> int:
    """Return it.

    Args: one.
    """
    text = """two
    lines"""
    return number  # the same


def ddp() -> None:
    """Train."""
    helper(
        SIZE,
    )


def by_subnets() -> None:
    os.getpid()
'''


def test_lines_of_code_are_those_that_a_function_needs() -> None:
    assert count(COUNTED, "ddp") == 1 + 1 + 1 + 5 + 4  # import, seed, sizes, helper, function
    assert count(COUNTED, "by_subnets") == 1 + 1 + 2


@pytest.mark.system
@pytest.mark.parametrize("name", JOBS)
def test_both_versions_of_a_job_train_on_two_ranks(name: str, tmp_path: Path) -> None:
    program = FOLDER / f"{name}.py"

    said = run_forked_ranks((2, program, "ddp", tmp_path), (2, program, "ist", tmp_path))

    losses = [(float(before), float(after)) for before, after in re.findall(r"([\d.]+) to ([\d.]+)", said)]
    assert len(losses) == 2
    assert losses[0][0] == losses[1][0]
    assert all(after < 0.8 * before for before, after in losses), losses
