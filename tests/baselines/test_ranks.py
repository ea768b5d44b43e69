"""The times that a round of equal ranks reports, and checks of methods before a run."""

import pytest

from ist.baselines.ranks import RankRound, summarise
from ist.config.load import config_for_method
from ist.errors import ConfigError
from ist.runs.open import check_method
from tests.conftest import naming, small_config, worker_numbers


def did(seconds: float, cpu_s: float, *transfers_s: float) -> RankRound:
    numbers = worker_numbers(
        steps=2,
        samples=5,
        loss_sum=10.0,
        compute_s=seconds - sum(transfers_s),
        cpu_s=cpu_s,
        memory_bytes=7,
        process_memory_bytes=70,
    )
    return RankRound(numbers, finite=True, sent_bytes=0.0, transfers_s=transfers_s)


def test_waiting_for_a_slow_rank_counts_as_idle_time_not_as_transfer() -> None:
    quick, slow = did(12.0, 1.0, 6.0, 5.0), did(12.0, 11.0, 0.5, 0.5)

    report = summarise([quick, slow])

    assert report.numbers == {
        "exchange_s": 1.0,  # the last rank does not wait
        "idle_s": (11.0 + 1.0) / 2 - 1.0,
        "compute_s": (1.0 + 11.0) / 2,
        "virtual_s": 11.0 + 1.0,
        "loss": 2.0,
        "samples": 10, "steps": 2, "workers": 2, "memory_bytes": 7, "process_memory_bytes": 70,
        "inside_bytes": 0,
        "cut_s": 0.0, "merge_s": 0.0, "aside_s": 0.0,
    }  # fmt: skip
    assert report.by_worker == [quick.numbers, slow.numbers]


def test_methods_that_cannot_run_are_refused() -> None:
    elastic = small_config(method="powersgd", train__min_workers=2, pool={"kind": "torchrun"})
    with pytest.raises(ConfigError, match=naming("'powersgd'", "fixed number of workers", "'train.min_workers'")):
        check_method(elastic)
    with pytest.raises(ConfigError, match=naming("method 'ddp'", "pool.kind 'torchrun'", "'inline'")):
        check_method(small_config(method="ddp"))


def test_labels_need_a_method() -> None:
    config = small_config(
        pool={"kind": "torchrun"},
        compare={"methods": ["ist", "small"], "overrides": {"small": {"baseline.powersgd_rank": 2}}},
    )
    with pytest.raises(ConfigError, match=naming("compare.methods: 'small'", "compare.overrides")):
        check_method(config_for_method(config, "small"))

    config = small_config(
        pool={"kind": "torchrun"},
        compare={"methods": ["ist", "small"], "overrides": {"small": {"method": "powersgd"}}},
    )
    made = config_for_method(config, "small")
    check_method(made)
    assert (made.method, made.label) == ("powersgd", "small")
