"""The full network in shards between rounds: rank 0 asks the owners for rows, the other ranks serve.

Between two rounds only rank 0 acts: it evaluates, saves, and ends the run. What it needs of other shards it requests;
every other rank serves requests until rank 0 starts the next round or ends the run.
Where it sits: `ist/runs/opening/in_shards.py` creates a `ShardedMethod` on rank 0 and a `ShardFollower` on every other
rank. Both contain the `Coordinator` of their own shard, which trains through `shard_pool.py`.
Not here: the exchange in a round (`shard_pool.py`), which rows a rank owns (`ist/subnet/stores/shards.py`), the files
of a checkpoint (`ist/storage/shards/`), networks as modules (`shard_network.py`).
"""

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import IntEnum
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ist.distributed.process_group import (
    Membership,
    broadcast_flag,
    broadcast_text,
    gather_texts,
    peer_errors,
)
from ist.errors import ConfigError
from ist.loops.part import Part
from ist.monitoring.meter import Meter
from ist.pools.shard_network import MethodInShards, StoredSpecs
from ist.storage.backend import Storage
from ist.storage.checkpoint import shards_folder
from ist.storage.shards.plan import ShardFile, plan_shards
from ist.storage.shards.read import SavedTensors
from ist.storage.shards.write import ShardedTensors, Written, write_shards
from ist.subnet.split_model import SplitModel
from ist.subnet.stores.shards import owned_rows, shard_shape
from ist.tensors import TensorSpec
from ist.training.rounds import Method, RoundReport


class Request(IntEnum):
    """What rank 0 asks of the other ranks between two rounds."""

    NEXT_ROUND = 0
    GATHER = 1
    SAVE = 2
    END = 3


class ShardStore:
    """The tensors of a method in shards; each rank holds its own.

    Args:
        split: The full split network.
        membership: This rank.
        storage: Where checkpoints are saved, which all ranks share; None: nowhere.
    """

    def __init__(self, split: SplitModel, membership: Membership, storage: Storage | None = None) -> None:
        self._membership = membership
        self._storage = storage
        self.spec = StoredSpecs(split)

    def scatter(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return this rank's rows of rank 0's tensors; tensors without shards are returned as a whole.

        Args:
            tensors: Full tensors by name, on rank 0; None on other ranks.
        """
        names = ",".join(json.dumps([n, tuple(t.shape), str(t.dtype)]) for n, t in (tensors or {}).items())
        listed = json.loads(f"[{broadcast_text(self._membership, names)}]")
        return {
            name: self._own_rows(
                name, TensorSpec(tuple(shape), getattr(torch, dtype.removeprefix("torch."))), (tensors or {}).get(name)
            )
            for name, shape, dtype in listed
        }

    def read(self, saved: SavedTensors) -> dict[str, Tensor]:
        """Return this rank's rows of a checkpoint's tensors; tensors without shards are returned as a whole.

        Raises:
            CheckpointError: A file is truncated.
            RunFolderError: A file cannot be read.
        """
        found = {}
        for name, spec in saved.specs().items():
            if self.spec(name) is None:
                found[name] = saved[name]
                continue
            owned = owned_rows(spec.shape[0] if spec.shape else 1, self._membership.rank, self._membership.world_size)
            found[name] = saved.rows(name, owned.start, owned.stop)
        return found

    def _own_rows(self, name: str, full: TensorSpec, values: Tensor | None) -> Tensor:
        me, ranks = self._membership.rank, self._membership.world_size
        if self.spec(name) is None:
            tensor = torch.empty(full.shape, dtype=full.dtype) if values is None else values.detach().cpu().contiguous()
            with peer_errors(f"receiving '{name}'"):
                dist.broadcast(flat := self._as_bytes(tensor), src=0)
            return flat.cpu().view(full.dtype).view(full.shape)
        if me > 0:
            mine = torch.empty(shard_shape(full.shape, me, ranks), dtype=full.dtype)
            self._transfer(f"receiving '{name}'", receives=[(0, mine)])
            return mine
        assert values is not None
        rows = [self._rows_of(values.detach(), full, owner) for owner in range(ranks)]
        self._transfer(f"sending '{name}'", sends=list(enumerate(rows))[1:])
        return rows[0].clone()

    def gather(self, name: str, own: Tensor, to: int = 0) -> Tensor | None:
        """Return a full tensor on one rank, None on the others; all ranks call this together.

        Args:
            name: The tensor's name.
            own: This rank's rows. Of a tensor that every rank has as a whole, rank 0's values are returned.
            to: The rank that gets the full tensor.
        """
        me, full = self._membership.rank, self.spec(name)
        holders: Sequence[int] = range(self._membership.world_size) if full else [0]
        if me != to:
            self._transfer(f"sending '{name}' to rank {to}", sends=[(to, own)] if me in holders else [])
            return None
        if holders == [to]:
            return own
        whole = torch.empty(full.shape if full else own.shape, dtype=own.dtype)
        rows = {owner: self._rows_of(whole, full, owner) if full else whole for owner in holders}
        if to in rows:
            rows[to].copy_(own)
        self._transfer(f"gathering '{name}'", receives=[(owner, part) for owner, part in rows.items() if owner != to])
        return whole

    def _rows_of(self, whole: Tensor, full: TensorSpec, owner: int) -> Tensor:
        """Return a view of the rows of a full tensor that an owner has."""
        if not full.shape:
            return whole if owner == 0 else whole.new_empty(0)
        owned = owned_rows(full.shape[0], owner, self._membership.world_size)
        return whole[owned.start : owned.stop]

    def save(
        self, state: Mapping[str, Tensor], network: Mapping[str, Tensor], rounds_done: int
    ) -> tuple[Sequence[ShardFile], Mapping[str, Written]]:
        """Write this rank's files of a checkpoint; all ranks call this together.

        Args:
            state: This rank's rows of every tensor of the checkpoint.
            network: The names of the network's tensors.
            rounds_done: The number of completed rounds.

        Returns:
            The files, and what all ranks have written.

        Raises:
            RunFolderError: A file cannot be written.
        """
        assert self._storage is not None
        me, ranks = self._membership.rank, self._membership.world_size
        specs = {}
        for name, own in state.items():
            full = self.spec(name)
            specs[name] = TensorSpec(full.shape if full else tuple(own.shape), own.dtype)
        of_network = {name: spec for name, spec in specs.items() if name in network}
        others = {name: spec for name, spec in specs.items() if name not in network}
        files = plan_shards(of_network, others, ranks)

        def gathered(name: str, to: int) -> Tensor | None:
            return self.gather(name, state[name], to)

        mine = write_shards(self._storage, shards_folder(rounds_done), files, gathered, me)
        texts = gather_texts(self._membership, json.dumps({name: asdict(entry) for name, entry in mine.items()}))
        return files, {name: Written(**entry) for text in texts for name, entry in json.loads(text).items()}

    def request(self, what: Request, number: int = 0) -> None:
        """Ask all other ranks for something, on rank 0."""
        with peer_errors("asking the other ranks"):
            dist.broadcast(torch.tensor([what, number], device=self._membership.carrier), src=0)

    def serve(self, method: Method) -> bool:
        """Serve rank 0's requests until it starts the next round, or ends the run; return whether it ends the run."""
        state: Mapping[str, Tensor] = {}
        while True:
            message = torch.empty(2, dtype=torch.int64, device=self._membership.carrier)
            with peer_errors("waiting for rank 0"):
                dist.broadcast(message, src=0)
            what, number = message.tolist()
            if what in (Request.NEXT_ROUND, Request.END):
                return bool(what == Request.END)
            state = state or method.checkpoint_state()
            if what == Request.SAVE:
                self.save(state, method.model.state_dict(), number)
            else:
                name = list(state)[number]
                self.gather(name, state[name])

    def _transfer(
        self, what: str, sends: list[tuple[int, Tensor]] | None = None, receives: list[tuple[int, Tensor]] | None = None
    ) -> None:
        """Send tensors to ranks, or receive them; tensors without entries are left out."""
        operations, arriving = [], []
        for rank, tensor in sends or []:
            if tensor.numel():
                operations.append(dist.P2POp(dist.isend, self._as_bytes(tensor), rank))
        for rank, tensor in receives or []:
            if tensor.numel():
                arriving.append((tensor, self._as_bytes(tensor)))
                operations.append(dist.P2POp(dist.irecv, arriving[-1][1], rank))
        with peer_errors(what):
            for work in dist.batch_isend_irecv(operations) if operations else []:
                work.wait()
        for tensor, flat in arriving:
            tensor.copy_(flat.to(tensor.device).view(tensor.dtype).view(tensor.shape))

    def _as_bytes(self, tensor: Tensor) -> Tensor:
        """Return the bytes of a tensor on the device of the backend, without a copy where that is possible."""
        return tensor.detach().contiguous().view(-1).view(torch.uint8).to(self._membership.carrier)


def check_shared(storage: Storage, membership: Membership, run_id: str) -> None:
    """Check that all ranks save checkpoints in the same place; all ranks call this together.

    Raises:
        ConfigError: A rank does not see a file of rank 0. Every rank raises it.
    """
    name = f".shared-{run_id}"
    if membership.rank == 0:
        storage.write(name, b"")
    broadcast_flag(membership, True)  # the file is there
    seen = gather_texts(membership, "" if storage.size(name) is None else "seen")
    if membership.rank == 0:
        storage.delete(name)
    if "" in seen:
        raise ConfigError(
            f"'pool.store' is 'sharded', but rank {seen.index('')} does not see the folder of rank 0's checkpoints, "
            f"{storage.where()}: set checkpoint.storage to a folder or URL that all nodes share"
        )


class StoredState(ShardedTensors):
    """Every tensor of a checkpoint on rank 0: one that is asked for is gathered.

    Args:
        store: This rank's side of the store; the other ranks serve.
        method: The method that trains this rank's shard.
        meter: Counts the bytes that are gathered.
    """

    def __init__(self, store: ShardStore, method: Method, meter: Meter) -> None:
        self._store = store
        self._own = method.checkpoint_state()
        self._network = method.model.state_dict()
        self._meter = meter

    def __getitem__(self, name: str) -> Tensor:
        """Gather a tensor."""
        own = self._own[name]
        if self._store.spec(name) is None:
            return own
        self._store.request(Request.GATHER, list(self._own).index(name))
        found = self._store.gather(name, own)
        assert found is not None
        self._meter.gathered += found.nbytes - own.nbytes
        return found

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._own)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._own)

    def write(self, rounds_done: int) -> tuple[Sequence[ShardFile], Mapping[str, Written]]:
        """Let every rank write its files of a checkpoint."""
        self._store.request(Request.SAVE, rounds_done)
        return self._store.save(self._own, self._network, rounds_done)


class ShardedMethod(MethodInShards):
    """A method on rank 0 whose full network is stored in shards; a `Method`.

    Args:
        method: The method that trains this rank's shard, perhaps with an average over rounds.
        store: This rank's side of the store.
        split: The full split network.
        prefix: The prefix, in a checkpoint, of the tensors of the method's network.
        device: The device on which the full network is evaluated.
        meter: Counts the bytes that are gathered.
        evaluation: Whether rank 0 evaluates the network in `layers`, or gathers it as a `whole` (`pool.evaluation`).
    """

    def __init__(
        self,
        method: Method,
        store: ShardStore,
        split: SplitModel,
        prefix: str,
        device: torch.device,
        meter: Meter,
        evaluation: Literal["layers", "whole"] = "layers",
    ) -> None:
        super().__init__(split, store.spec, prefix, device, evaluation)
        self._method = method
        self._store = store
        self._meter = meter

    def own_buffer(self, name: str) -> Tensor:
        """Return a buffer that every rank has as a whole."""
        return self._method.model.get_buffer(name)

    def train_round(self, round_number: int) -> Generator[Part, None, RoundReport]:
        """Train for a round, together with all other ranks."""
        self._store.request(Request.NEXT_ROUND)
        return (yield from self._method.train_round(round_number))

    def checkpoint_state(self) -> StoredState:
        """Return every tensor that the method needs to resume; one that is asked for is gathered."""
        return StoredState(self._store, self._method, self._meter)

    def bytes_sent(self) -> int:
        """Return the payload bytes that all ranks have sent."""
        return self._method.bytes_sent()

    def end(self, saved: Callable[[str], Tensor] | None) -> None:
        """Keep the trained network, and end the run of all other ranks, which serve requests until then."""
        super().end(saved)
        self._store.request(Request.END)

    def close(self) -> None:
        """Release this rank's worker."""
        self._method.close()


class ShardFollower:
    """A rank that owns a shard and does not coordinate; a `Follower`.

    Args:
        method: The method that trains this rank's shard.
        store: This rank's side of the store.

    Attributes:
        is_ended: Whether rank 0 has ended the run.
    """

    def __init__(self, method: Method, store: ShardStore) -> None:
        self._method = method
        self._store = store
        self.is_ended = False

    def train_round(self, round_number: int) -> Generator[Part]:
        """Serve rank 0 until it starts the round, and take part in it; rank 0 may end the run instead."""
        self.is_ended = self._store.serve(self._method)
        if not self.is_ended:
            yield from self._method.train_round(round_number)

    def finish(self) -> None:
        """Serve rank 0 after the last round, until it ends the run."""
        if not self.is_ended:
            self.is_ended = self._store.serve(self._method)
            assert self.is_ended, "rank 0 starts a round after the last one"

    def close(self) -> None:
        """Release this rank's worker."""
        self._method.close()
