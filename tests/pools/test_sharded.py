"""A sharded store in real processes: early ends, interruptions, invalid results and the user's own loop."""

from pathlib import Path

import pytest

from tests.conftest import run_forked_ranks

PROGRAM = "tests/pools/sharded_program.py"


@pytest.mark.procs
def test_a_sharded_store_does_what_a_coordinator_does(tmp_path: Path) -> None:
    run_forked_ranks((2, PROGRAM, tmp_path, "own_loop", "rejected", "state_refused"))


@pytest.mark.system
def test_ranks_with_shards_learn_of_each_others_ends(tmp_path: Path) -> None:
    run_forked_ranks((2, PROGRAM, tmp_path, "interrupted"), (2, PROGRAM, tmp_path, "resumed", "diverged"))
    run_forked_ranks((2, PROGRAM, tmp_path, "goes_on"))


@pytest.mark.system
def test_an_evaluation_that_needs_the_values_in_memory_is_refused_by_name(tmp_path: Path) -> None:
    run_forked_ranks((2, PROGRAM, tmp_path, "refused"))
