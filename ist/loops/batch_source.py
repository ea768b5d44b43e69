"""The batches of a user's own loader, from round to round and from epoch to epoch.

Where it sits: `ist/loops/part.py` takes batches here; a worker saves the positions with its state
(`ist/training/worker_state.py`).
Law: a loader with `state_dict` and `load_state_dict` (such as torchdata's `StatefulDataLoader`) continues after a
resume where it stopped. Any other loader starts its next epoch: the resumed run then differs from an uninterrupted one.
Not here: the built-in loop's batches, which need no position (`ist/data/batches.py`).
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from ist.errors import CheckpointError, LoopError, error_with_line
from ist.loops.nested_state import pack_state, unpack_state
from ist.rng import preserved_generators

_log = logging.getLogger(__name__)

MAX_LOADERS = 16
"""The most loaders of one worker."""


class BatchSource:
    """The position in one loader.

    Args:
        loader: An iterable of batches.
        saved: The position to continue from, from `state`; None: the start of the first epoch.

    Raises:
        LoopError: The position is of another loader, or the loader rejects its own state.
    """

    def __init__(self, loader: Iterable[Any], saved: Mapping[str, Any] | None = None) -> None:
        self._loader = loader
        self._name = type(loader).__name__
        self._iterator: Iterator[Any] | None = None
        self._epoch = 0
        self._is_restored = False
        if saved is None:
            return
        if saved["of"] != self._identity():
            raise LoopError(
                f"the run is resumed with a {self._name} where it had another loader ({saved['of']['type']}): a "
                "loop must take from its loaders in the same order as before, in which their positions are saved"
            )
        if saved["loader"] is None:
            self._epoch = saved["epoch"] + 1
            _log.warning(
                "the run is resumed, but %s has no state_dict: it starts its next epoch, so the batches differ from an "
                "uninterrupted run. torchdata's StatefulDataLoader has one", self._name,
            )  # fmt: skip
            return
        self._epoch, self._is_restored = saved["epoch"], True
        try:
            loader.load_state_dict(saved["loader"])  # type: ignore[attr-defined]
        except Exception as error:  # a user's loader may raise anything
            raise LoopError(f"{self._name}.load_state_dict raises {error_with_line(error)}") from error

    @property
    def is_stateful(self) -> bool:
        """Whether the loader can save its own position."""
        return all(callable(getattr(self._loader, name, None)) for name in ("state_dict", "load_state_dict"))

    def _identity(self) -> dict[str, Any]:
        """Return what tells this loader from others of the loop when the run is resumed."""
        try:
            length = len(self._loader)  # type: ignore[arg-type]
        except TypeError:
            length = None
        return {"type": self._name, "length": length, "is_stateful": self.is_stateful}

    def next_batch(self, where: str) -> Any:
        """Return the next batch; after the last batch of an epoch, the first of the next one.

        Args:
            where: The worker and the round, for messages.

        Raises:
            LoopError: The loader is empty, or is an iterator that has ended.
        """
        if self._iterator is None:
            # An uninterrupted run does not start the loader here, so its random numbers must not be drawn.
            with preserved_generators() if self._is_restored else nullcontext():
                self._iterator = self._started()
        try:
            return next(self._iterator)
        except StopIteration:
            pass
        if self._iterator is self._loader:
            raise LoopError(
                f"{where}: the loader ran dry: {self._name} is an iterator, which cannot be started again. Give an "
                "iterable such as a DataLoader, or an endless iterator"
            )
        self._epoch += 1
        self._iterator = self._started()
        try:
            return next(self._iterator)
        except StopIteration:
            raise LoopError(f"{where}: the loader ({self._name}) is empty") from None

    def _started(self) -> Iterator[Any]:
        """Start the loader's next epoch; a `DistributedSampler` and others shuffle by the number of the epoch."""
        loader = self._loader
        parts = (loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset")))
        for part in {id(part): part for part in parts}.values():
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(self._epoch)
        return iter(loader)

    def state(self) -> dict[str, Any]:
        """Return the position: the epoch, and the loader's own state if it has one."""
        own = self._loader.state_dict() if self.is_stateful else None  # type: ignore[attr-defined]
        return {"of": self._identity(), "epoch": self._epoch, "loader": own}


class BatchSources:
    """The loaders of one worker, in the order in which its loop first takes from them.

    Args:
        owners: By the id of a loader that saves its position, the worker that takes from it; shared by the workers of a
            process.
    """

    def __init__(self, owners: "dict[int, BatchSources] | None" = None) -> None:
        self._owners = owners if owners is not None else {}
        self._by_loader: dict[int, BatchSource] = {}
        self._new_in: list[int] = []
        self._saved: list[dict[str, Any]] = []

    def of(self, loader: Iterable[Any], round_number: int) -> BatchSource:
        """Return the position in a loader.

        Raises:
            LoopError: There are too many loaders, every round has a new one, or two workers share one.
        """
        found = self._by_loader.get(id(loader))  # a source keeps its loader, so the id stays unique
        if found is not None:
            return found
        self._new_in.append(round_number)
        in_a_row = {round_number, round_number - 1, round_number - 2} <= set(self._new_in)
        if len(self._by_loader) == MAX_LOADERS or in_a_row:
            often = "a new loader in each of three rounds" if in_a_row else f"more than {MAX_LOADERS} loaders"
            raise LoopError(
                f"part.take has received {often}, and a new loader starts with its first batch: create a loader "
                "once, not in every round (part.state is a dictionary that lasts from round to round)"
            )
        number = len(self._by_loader)
        saved = self._saved[number] if number < len(self._saved) else None
        found = BatchSource(loader, saved)
        if found.is_stateful and self._owners.setdefault(id(loader), self) is not self:
            raise LoopError(
                f"two workers of this process take from one {type(loader).__name__}, which has one position: create a "
                "loader for each worker, and keep it in part.state"
            )
        self._by_loader[id(loader)] = found
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
