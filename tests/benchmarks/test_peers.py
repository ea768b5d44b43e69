"""The comparison with torchft and hivemind, as far as it runs without them: its settings, errors and checks."""

from typing import Any

import numpy as np
import pytest

from benchmarks import peers


def averaged(*counts: int) -> dict[str, Any]:
    return {"averaged_over": list(counts)}


def test_the_error_for_a_missing_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda _name: None)

    with pytest.raises(SystemExit) as stopped:
        peers.main(["--methods", "torchft,ist"])

    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "torchft" in error
    assert "hivemind" not in error.splitlines()[-1]
    assert "pip install 'ist[peers]'" in error


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--methods", "ist,deepspeed"])

    error = capsys.readouterr().err
    assert "deepspeed" in error
    assert "torchft,hivemind,ddp,ist" in error


def test_there_is_no_result_if_a_worker_averaged_alone() -> None:
    weights = [np.ones((2, 3), np.float32)] * 2

    with pytest.raises(RuntimeError, match=r"hivemind: worker 1 .*\[2, 0\].*\b2\b"):
        peers.check_averaging("hivemind", [averaged(2, 2), averaged(2, 0)], weights)


def test_there_is_no_result_if_weights_differ_after_averaging() -> None:
    ours, theirs = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    theirs[1, 2] = 1.001

    with pytest.raises(RuntimeError, match=r"torchft: .*1\.0e-03.*1e-05"):
        peers.check_averaging("torchft", [averaged(2, 2)] * 2, [ours, theirs])

    assert peers.check_averaging("torchft", [averaged(2, 2)] * 2, [ours, ours]) == 0.0


def test_there_is_no_result_if_workers_made_different_numbers_of_outer_steps() -> None:
    weights = [np.ones((2, 3), np.float32), np.ones((1, 3), np.float32)]

    with pytest.raises(RuntimeError, match=r"hivemind: .*\[2, 1\]"):
        peers.check_averaging("hivemind", [averaged(2, 2), averaged(2)], weights)


def test_all_methods_make_the_same_steps_in_the_short_comparison() -> None:
    configs = {method: peers.configure(method, 2, 2, quick=True) for method in peers.METHODS}

    assert {(config.train.rounds, config.train.local_steps) for config in configs.values()} == {(2, 20)}
    assert {method: config.train.optimizer.args["lr"] for method, config in configs.items()} == {
        "torchft": 0.1, "hivemind": 0.1, "ddp": 0.1, "ist": 0.2,
    }  # fmt: skip
