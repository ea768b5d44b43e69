"""The process's generators: what user code draws from them depends only on the seed, and they are restored."""

import random
from typing import Any

import numpy as np
import pytest
import torch

import ist
from ist.rng import Purpose, seeded
from tests.augmented import Augmented
from tests.conftest import assert_same, clone, data, generators_left_alone
from tests.networks import NETWORKS
from tests.networks import seeded as built

CPU = torch.device("cpu")


def drawn() -> tuple[Any, ...]:
    """One draw from each of the generators."""
    return torch.rand(2).tolist(), random.random(), np.random.normal(), np.random.rand()


def trained(start: int) -> tuple[dict[str, Any], list[dict[str, Any]], tuple[Any, ...]]:
    """Train on random data in a process whose generators have a given state; also return the draws afterwards."""
    model = built(NETWORKS["two hidden layers, batch norm"])
    torch.manual_seed(start)
    random.seed(start)
    np.random.seed(start)
    result = ist.train(
        model, Augmented(data()), test_data=Augmented(data(40, seed=4)), workers=2, rounds=2, local_steps=3,
        progress=False,
    )  # fmt: skip
    return clone(model.state_dict()), result.history, drawn()


def test_one_seed_gives_one_result_for_every_state_of_the_process_generators() -> None:
    one, history, _ = trained(1)
    other, other_history, _ = trained(2)

    assert_same(one, other)
    for key in ("loss", "accuracy"):
        assert [record[key] for record in history] == [record[key] for record in other_history]


def test_training_leaves_the_process_generators_as_they_were() -> None:
    _, _, after = trained(1)

    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    assert after == drawn()


def test_draws_are_a_function_of_the_key() -> None:
    def within(*key: int) -> tuple[Any, ...]:
        with seeded(CPU, 5, Purpose.TRAINING, *key):
            return drawn()

    assert within(3, 1) == within(3, 1)
    assert all(a != b for a, b in zip(within(3, 1), within(3, 2), strict=True))


def test_a_numpy_generator_of_another_kind_is_restored() -> None:
    before = np.random.mtrand.get_bit_generator()
    state = np.random.get_state(legacy=False)
    try:
        np.random.mtrand.set_bit_generator(np.random.PCG64(3))
        np.random.normal()
        with seeded(CPU, 5, Purpose.TRAINING):
            drawn()
        found = np.random.normal(), np.random.rand()
        np.random.mtrand.set_bit_generator(np.random.PCG64(3))
        np.random.normal()
        expected = np.random.normal(), np.random.rand()
    finally:
        np.random.mtrand.set_bit_generator(before)
        np.random.set_state(state)

    assert found == expected


def test_random_state_survives_an_error() -> None:
    with generators_left_alone(), pytest.raises(ZeroDivisionError), seeded(CPU, 5, Purpose.TRAINING):
        raise ZeroDivisionError
