"""The examples of `ist.join`: each runs as it is, on two ranks."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_forked_ranks, run_group

FOLDER = "examples/own_loop"


@pytest.mark.system
def test_plain_training_and_the_same_script_with_join_learn_alike() -> None:
    said = run_forked_ranks((2, f"{FOLDER}/torchrun_ddp.py"), (2, f"{FOLDER}/torchrun_ist.py"))

    plain, by_subnets = (float(number) for number in re.findall(r"accuracy ([\d.]+)%", said))
    assert plain > 90
    assert by_subnets > 87  # 440 steps of a subnet; plain training makes as many of the full network


@pytest.mark.system
def test_a_model_of_transformers_is_trained_by_the_loss_that_it_computes() -> None:
    said = run_forked_ranks((2, f"{FOLDER}/hugging_face.py"))

    losses = re.search(r"loss ([\d.]+) after 10 rounds, ([\d.]+) after 20", said)
    assert losses, said
    assert 3 > float(losses[1]) > float(losses[2])  # a uniform guess has a loss of log(256) = 5.5


@pytest.mark.system
def test_a_loop_with_accelerates_autocast_accumulation_and_clipping_trains_by_subnets() -> None:
    said = run_forked_ranks((2, f"{FOLDER}/accelerate_loop.py"))

    assert float(re.findall(r"accuracy ([\d.]+)%", said)[0]) > 87


@pytest.mark.system
def test_a_run_that_is_left_in_the_middle_of_an_epoch_is_resumed_with_the_next_batch(tmp_path: Path) -> None:
    program = f"{FOLDER}/resuming.py"

    said = run_forked_ranks(
        (2, program, tmp_path / "run", 5), (2, program, tmp_path / "run"), (2, program, tmp_path / "whole")
    )

    assert said.count("interrupted in round 5") == 2
    resumed, whole = re.findall(r"11 rounds: (.*)", said)
    assert resumed == whole


@pytest.mark.ray
def test_a_torch_trainer_of_ray_train_trains_by_subnets(ray_address: str, tmp_path: Path) -> None:
    command = [sys.executable, f"{FOLDER}/ray_train.py", str(tmp_path)]
    environment = {**os.environ, "RAY_ADDRESS": ray_address, "PYTHONPATH": str(ROOT)}

    done = run_group(command, ROOT, environment, timeout=110)

    assert done.returncode == 0, done.stderr
    assert float(re.findall(r"accuracy ([\d.]+)%", done.stdout)[0]) > 87
    assert list(tmp_path.rglob("model.pt"))
