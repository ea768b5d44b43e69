"""The full network in shards between rounds: rank 0 asks the owners for rows, the other ranks serve.

Between two rounds only rank 0 acts: it evaluates, saves, and ends the run. What it needs of other shards it requests;
every other rank serves requests from the end of its part of a round until rank 0 starts the next round or ends the run.
Where it sits: `ist/runs/open.py` creates a `ShardedMethod` on rank 0 and a `ShardFollower` on every other rank. Both
contain the `Coordinator` of their own shard, which trains through `shard_pool.py`.
Not here: the exchange in a round (`shard_pool.py`), which rows a rank owns (`ist/subnet/stores/shards.py`).
"""

import json
from collections.abc import Generator, Mapping
from enum import IntEnum

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ist.distributed.process_group import Membership, broadcast_text, peer_errors
from ist.loops.part import Part
from ist.network.copies import copied, like
from ist.subnet.split_model import SplitModel
from ist.subnet.stores.shards import ModelShard, owned_rows, shard_shape
from ist.tensors import TensorSpec, constant_tensors, named_tensors
from ist.training.average import PREFIX as AVERAGE
from ist.training.outer_optimizer import PREFIX as OUTER
from ist.training.rounds import Method, RoundReport


class Request(IntEnum):
    """What rank 0 asks of the other ranks between two rounds."""

    NEXT_ROUND = 0
    GATHER = 1
    END = 2


class ShardStore:
    """The tensors of a method in shards; each rank holds its own.

    Args:
        split: The full split network.
        membership: This rank.
    """

    def __init__(self, split: SplitModel, membership: Membership) -> None:
        self._membership = membership
        self._specs = {**split.specs, **split.frozen_specs}
        first: dict[int, str] = {}
        state = split.template.state_dict(keep_vars=True)
        self._first_names = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}

    def spec(self, name: str) -> TensorSpec | None:
        """Return the full shape and dtype of a tensor in shards; None for a tensor that every rank has as a whole.

        Args:
            name: A tensor of the network, of carried optimizer state, of the outer optimizer or of the average.
        """
        own = name.removeprefix(OUTER).removeprefix(f"{AVERAGE}module.")
        return self._specs.get(self._first_names.get(own, own))

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

    def gather(self, name: str, own: Tensor) -> Tensor:
        """Return a full tensor on rank 0, whose other ranks serve this request.

        Args:
            name: The tensor's name.
            own: This rank's rows.
        """
        full = self.spec(name)
        if full is None:
            return own
        whole = torch.empty(full.shape, dtype=own.dtype)
        rows = [self._rows_of(whole, full, owner) for owner in range(self._membership.world_size)]
        rows[0].copy_(own)
        received = [(owner, torch.empty_like(part)) for owner, part in enumerate(rows) if owner > 0]
        self._transfer(f"gathering '{name}'", receives=received)
        for owner, part in received:
            rows[owner].copy_(part)
        return whole

    def _rows_of(self, whole: Tensor, full: TensorSpec, owner: int) -> Tensor:
        """Return a view of the rows of a full tensor that an owner has."""
        if not full.shape:
            return whole if owner == 0 else whole.new_empty(0)
        owned = owned_rows(full.shape[0], owner, self._membership.world_size)
        return whole[owned.start : owned.stop]

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
            if what != Request.GATHER:
                return bool(what == Request.END)
            state = state or method.checkpoint_state()
            name = list(state)[number]
            if self.spec(name) is not None:
                self._transfer(f"sending '{name}' to rank 0", sends=[(0, state[name])])

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


def shard_network(shard: ModelShard, rows: Mapping[str, Tensor]) -> nn.Module:
    """Return a network whose parameters and buffers have only the rows of a shard; it cannot compute anything.

    Args:
        shard: The shard.
        rows: By name, the shard's rows, and buffers that every rank has as a whole.
    """
    memo = {
        id(tensor): like(tensor, rows[name]) for name, tensor in named_tensors(shard.template).items() if name in rows
    }
    return copied(shard.template, memo)


class ShardedMethod:
    """A method on rank 0 whose full network is stored in shards; a `Method`.

    Args:
        method: The method that trains this rank's shard, perhaps with an average over rounds.
        store: This rank's side of the store.
        split: The full split network.
        prefix: The prefix, in a checkpoint, of the tensors of the method's network.
        device: The device on which the full network is evaluated.
    """

    def __init__(self, method: Method, store: ShardStore, split: SplitModel, prefix: str, device: torch.device) -> None:
        self._method = method
        self._store = store
        self._prefix = prefix
        self._is_started = self._is_ended = False
        self._full = split.module([np.arange(group.size) for group in split.groups], device)
        # Re-estimated statistics, which every rank has as a whole, belong to the network that is saved.
        constants = constant_tensors(split.template)
        for path, child in self._full.named_modules():
            for name, buffer in child._buffers.items():
                full_name = f"{path}.{name}" if path else name
                if buffer is not None and full_name not in constants and store.spec(full_name) is None:
                    child._buffers[name] = method.model.get_buffer(full_name)

    @property
    def model(self) -> nn.Module:
        """The full network with its current values, which are gathered whenever this is read."""
        if self._is_ended:
            return self._full
        state = self._method.checkpoint_state()
        with torch.no_grad():
            for name, tensor in named_tensors(self._full).items():
                if self._store.spec(name) is not None:
                    tensor.copy_(self._gather(state, self._prefix + name))
        return self._full

    def train_round(self, round_number: int) -> Generator[Part, None, RoundReport]:
        """Train for a round, together with all other ranks."""
        if self._is_started:
            self._store.request(Request.NEXT_ROUND)
        self._is_started = True
        return (yield from self._method.train_round(round_number))

    def checkpoint_state(self) -> Mapping[str, Tensor]:
        """Return every tensor that the method needs to resume, as a whole."""
        state = self._method.checkpoint_state()
        return {name: self._gather(state, name) for name in state}

    def _gather(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        if self._is_started and self._store.spec(name) is not None:
            self._store.request(Request.GATHER, list(state).index(name))
        return self._store.gather(name, state[name])

    def bytes_sent(self) -> int:
        """Return the payload bytes that all ranks have sent."""
        return self._method.bytes_sent()

    def end(self) -> None:
        """End the run of all other ranks, which serve requests until then."""
        _ = self.model  # the last values, which nobody can gather later
        if self._is_started:
            self._store.request(Request.END)
        self._is_ended = True

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

    def train_round(self, round_number: int) -> Generator[Part, None, object]:
        """Take part in a round, and serve rank 0 until the next round starts."""
        yield from self._method.train_round(round_number)
        self.is_ended = self._store.serve(self._method)
        return None

    def close(self) -> None:
        """Release this rank's worker."""
        self._method.close()
