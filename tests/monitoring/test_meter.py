"""The memory of a process: its peak since it started, and the peak since a gauge was created."""

import os
import subprocess
import sys

import pytest
import torch

from ist.monitoring.meter import MemoryGauge, process_peak_bytes
from tests.conftest import ROOT

MB = 10**6


ALONE = """
import numpy as np, psutil, torch
from ist.monitoring.meter import MemoryGauge, process_peak_bytes
from tests.conftest import ROOT

MB = 10**6
before = process_peak_bytes()
freed = np.ones(before - psutil.Process().memory_info().rss + 30 * MB, dtype=np.uint8)
del freed

gauge = MemoryGauge(torch.device("cpu"))
kept = np.ones(40 * MB, dtype=np.uint8)

# Another thread's allocations, and pages that the system takes back, move each reading by less than 10 MB.
assert process_peak_bytes() > before + 20 * MB
assert 30 * MB < gauge.peak_bytes() < 50 * MB
assert MemoryGauge(torch.device("cpu")).peak_bytes() < 10 * MB
assert process_peak_bytes() > before + 20 * MB
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its own peak")
def test_memory_that_was_freed_before_a_gauge_counts_for_the_process_and_not_for_the_gauge() -> None:
    # In a process of its own: what other tests of this one have left would move the readings.
    subprocess.run([sys.executable, "-c", ALONE], check=True, cwd=ROOT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_does_not_inherit_the_peak_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    MemoryGauge(torch.device("cpu"))
    parents = process_peak_bytes()
    monkeypatch.setattr("ist.monitoring.meter._before_resets", {os.getpid() + 1: 10 * parents})

    assert process_peak_bytes() <= parents
