"""What the comparison with torchft and hivemind does without them: its settings, its refusals, its check."""

from typing import Any

import numpy as np
import pytest

from benchmarks import peers


def averaged(*counts: int) -> dict[str, Any]:
    return {"averaged_over": list(counts)}


def test_the_comparison_says_how_to_install_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda _name: None)

    with pytest.raises(SystemExit) as stopped:
        peers.main(["--methods", "torchft,ist"])

    assert stopped.value.code == 2
    assert "not installed: torchft. Install with: pip install 'ist[peers]'" in capsys.readouterr().err


def test_the_comparison_refuses_a_method_that_it_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--methods", "ist,deepspeed"])

    assert "unknown deepspeed: expected some of torchft,hivemind,ddp,ist" in capsys.readouterr().err


def test_a_worker_that_averaged_alone_leaves_no_result() -> None:
    weights = [np.ones((2, 3), np.float32)] * 2

    with pytest.raises(
        RuntimeError, match=r"hivemind: worker 1 averaged over \[2, 0\] workers.*expected 2 in every one"
    ):
        peers.check_averaging("hivemind", [averaged(2, 2), averaged(2, 0)], weights)


def test_workers_with_other_weights_after_averaging_leave_no_result() -> None:
    ours, theirs = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    theirs[1, 2] = 1.001

    with pytest.raises(RuntimeError, match="torchft: after an outer step the workers' weights are 1.0e-03"):
        peers.check_averaging("torchft", [averaged(2, 2)] * 2, [ours, theirs])

    assert peers.check_averaging("torchft", [averaged(2, 2)] * 2, [ours, ours]) == 0.0


def test_workers_with_other_numbers_of_outer_steps_leave_no_result() -> None:
    weights = [np.ones((2, 3), np.float32), np.ones((1, 3), np.float32)]

    with pytest.raises(RuntimeError, match=r"workers made \[2, 1\] outer steps"):
        peers.check_averaging("hivemind", [averaged(2, 2), averaged(2)], weights)


def test_the_short_comparison_gives_every_method_the_same_steps() -> None:
    configs = {method: peers.configure(method, 2, 2, quick=True) for method in peers.METHODS}

    assert {(config.train.rounds, config.train.local_steps) for config in configs.values()} == {(2, 20)}
    assert {method: config.train.optimizer.args["lr"] for method, config in configs.items()} == {
        "torchft": 0.1, "hivemind": 0.1, "ddp": 0.1, "ist": 0.2,
    }  # fmt: skip
