"""One `ist.train` or `ist.split` at a time in a process, in any thread."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import Dataset

import ist
from ist.errors import ConfigError
from tests.conftest import assert_same, clone, data, naming
from tests.networks import NETWORKS, seeded


class Waiting(Dataset[Any]):
    """A data set whose reads block until the test releases them."""

    def __init__(self) -> None:
        self.inner = data()
        self.asked, self.released = threading.Event(), threading.Event()

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        self.asked.set()
        assert self.released.wait(30)
        return self.inner[index]


def trained(dataset: Dataset[Any], **options: Any) -> dict[str, Tensor]:
    model = seeded(NETWORKS["no batch norm"])
    ist.train(model, dataset, workers=2, rounds=2, local_steps=2, progress=False, **options)
    return clone(model.state_dict())


def split(dataset: Dataset[Any]) -> None:
    ist.split(seeded(NETWORKS["no batch norm"]), dataset[0][0].expand(2, 12), workers=2)


def test_a_second_run_in_the_same_process_is_refused_and_does_not_change_the_first() -> None:
    dataset = Waiting()
    with ThreadPoolExecutor(1) as executor:
        first = executor.submit(trained, dataset)
        assert dataset.asked.wait(30)
        for other in (trained, split):
            with pytest.raises(ConfigError, match=naming("ist.train", "ist.split", "process of its own")):
                other(data())
        dataset.released.set()
        found = first.result(60)

    dataset = Waiting()
    dataset.released.set()
    assert_same(found, trained(dataset))  # the next run is accepted


def test_a_refused_or_failed_run_does_not_block_the_next() -> None:
    with pytest.raises(ConfigError, match="optimizer"):
        trained(data(), optimizer="NoSuchOptimizer")

    trained(data())


def test_a_run_within_a_run_is_refused() -> None:
    class Nested(Dataset[Any]):
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> Any:
            trained(data())

    with pytest.raises(ConfigError, match=naming("ist.train", "ist.split", "process of its own")):
        trained(Nested())
