"""The batches of a user's own loader, from round to round and from epoch to epoch.

Where it sits: `ist/loops/part.py` takes batches here; a worker saves the positions with its state
(`ist/training/worker_state.py`).
Law: a loader with `state_dict` and `load_state_dict` (such as torchdata's `StatefulDataLoader`) continues after a
resume where it stopped. Any other loader starts a new epoch: the resumed run then differs from an uninterrupted one.
Not here: the built-in loop's batches, which need no position (`ist/data/batches.py`).
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ist.errors import CheckpointError, LoopError
from ist.loops.nested_state import pack_state, unpack_state

_log = logging.getLogger(__name__)

MAX_LOADERS = 16
"""More loaders than that in one worker are taken for a new loader in every round."""


class BatchSource:
    """The position in one loader.

    Args:
        loader: An iterable of batches.
        saved: The position to continue from, from `state`; None: the start of the first epoch.
    """

    def __init__(self, loader: Iterable[Any], saved: Mapping[str, Any] | None = None) -> None:
        self._loader = loader
        self._iterator: Iterator[Any] | None = None
        self._epoch = 0
        if saved is None:
            return
        self._epoch = saved["epoch"]
        if saved["loader"] is not None and self._is_stateful:
            loader.load_state_dict(saved["loader"])  # type: ignore[attr-defined]
            return
        _log.warning(
            "the run is resumed, but %s has no state_dict: it starts a new epoch, so the order of batches differs from "
            "an uninterrupted run. torchdata's StatefulDataLoader has one", type(loader).__name__,
        )  # fmt: skip

    @property
    def _is_stateful(self) -> bool:
        return all(callable(getattr(self._loader, name, None)) for name in ("state_dict", "load_state_dict"))

    def next_batch(self, where: str) -> Any:
        """Return the next batch; after the last batch of an epoch, the first of the next one.

        Args:
            where: The worker and the round, for messages.

        Raises:
            LoopError: The loader is empty, or is an iterator that has ended.
        """
        if self._iterator is None:
            self._iterator = self._started()
        try:
            return next(self._iterator)
        except StopIteration:
            pass
        name = type(self._loader).__name__
        if iter(self._loader) is self._loader:
            raise LoopError(
                f"{where}: the loader ran dry: {name} is an iterator, which cannot be started again. Give an iterable "
                "such as a DataLoader, or an endless iterator"
            )
        self._epoch += 1
        self._iterator = self._started()
        try:
            return next(self._iterator)
        except StopIteration:
            raise LoopError(f"{where}: the loader ({name}) is empty") from None

    def _started(self) -> Iterator[Any]:
        """Start the loader's next epoch; a `DistributedSampler` shuffles by the number of the epoch."""
        sampler = getattr(self._loader, "sampler", None)
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(self._epoch)
        return iter(self._loader)

    def state(self) -> dict[str, Any]:
        """Return the position: the epoch, and the loader's own state if it has one."""
        return {"epoch": self._epoch, "loader": self._loader.state_dict() if self._is_stateful else None}  # type: ignore[attr-defined]


class BatchSources:
    """The loaders of one process, in the order in which its loop first takes from them."""

    def __init__(self) -> None:
        self._by_loader: dict[int, BatchSource] = {}
        self._saved: list[dict[str, Any]] = []

    def of(self, loader: Iterable[Any]) -> BatchSource:
        """Return the position in a loader.

        Raises:
            LoopError: There are too many loaders.
        """
        found = self._by_loader.get(id(loader))  # a source keeps its loader, so the id stays unique
        if found is None:
            if len(self._by_loader) == MAX_LOADERS:
                raise LoopError(
                    f"part.take has received {MAX_LOADERS} loaders: create a loader once, not in every round "
                    "(part.state is a dictionary that lasts from round to round)"
                )
            number = len(self._by_loader)
            saved = self._saved[number] if number < len(self._saved) else None
            found = self._by_loader[id(loader)] = BatchSource(loader, saved)
        return found

    def state(self) -> dict[str, Tensor]:
        """Return the positions as tensors by name; empty without loaders.

        Raises:
            CheckpointError: A loader's state holds something that cannot be saved.
        """
        try:
            states = [source.state() for source in self._by_loader.values()]
            return pack_state(states) if states else {}
        except TypeError as error:
            raise CheckpointError(f"the loader's state_dict() cannot be saved: {error}") from error

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from positions that `state` returned, when the loop takes from its loaders again."""
        self._saved = unpack_state(tensors) if tensors else []
