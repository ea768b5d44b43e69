"""The memory of a process: its peak since it started, and the peak since a gauge was created."""

import os
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from ist.monitoring.meter import MemoryGauge, process_peak_bytes

MB = 10**6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its own peak")
def test_memory_that_was_freed_before_a_gauge_counts_for_the_process_and_not_for_the_gauge() -> None:
    # Other threads' allocations move a reading by less than 10 MB. The system may take back more, between two readings.
    before = process_peak_bytes()
    for _ in range(5):
        freed = np.ones(before - psutil.Process().memory_info().rss + 30 * MB, dtype=np.uint8)
        del freed
        if process_peak_bytes() > before + 20 * MB:
            break
        time.sleep(0.1)

    for _ in range(5):
        gauge = MemoryGauge(torch.device("cpu"))
        kept = np.ones(40 * MB, dtype=np.uint8)
        found = gauge.peak_bytes()
        fresh = MemoryGauge(torch.device("cpu")).peak_bytes()
        assert kept.nbytes == 40 * MB
        del kept
        if found > 30 * MB:
            break
        time.sleep(0.1)

    assert 30 * MB < found < 50 * MB
    assert fresh < 10 * MB
    assert process_peak_bytes() > before + 20 * MB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_does_not_inherit_the_peak_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    MemoryGauge(torch.device("cpu"))
    parents = process_peak_bytes()
    monkeypatch.setattr("ist.monitoring.meter._before_resets", {os.getpid() + 1: 10 * parents})

    assert process_peak_bytes() <= parents
