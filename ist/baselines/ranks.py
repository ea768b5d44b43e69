"""Functions that methods of equal ranks share: the report of a round, and states that rank 0 saves and broadcasts.

Where it sits: `ist/baselines/ddp.py` and `ist/baselines/local_sgd.py` call them.
Not here: the exchange of gradients and weights. The traffic of this module does not count as training traffic.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from ist.distributed.process_group import Membership, broadcast_bytes, peer_errors
from ist.measurements import Numbers, check_worker, combined, worker_slots
from ist.monitoring.meter import Meter
from ist.subnet.job import Job
from ist.training.coordinator import diverged
from ist.training.rounds import RoundReport, logged_means


@dataclass(frozen=True)
class RankRound:
    """The measurements of a rank in a round.

    Attributes:
        numbers: The numbers that every worker measures (`ist/measurements.py`).
        finite: Whether all values of its network are finite.
        sent_bytes: Bytes that it has sent so far in the run.
        transfers_s: For each exchange, the seconds in which it did not compute, including waits for slower ranks.
        logged: The sums over its samples of the numbers that `train.logged` names.
    """

    numbers: Numbers
    finite: bool
    sent_bytes: float
    transfers_s: Sequence[float]
    logged: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_worker(self.numbers)


def wait_for_all_ranks(membership: Membership) -> None:
    """Wait for all ranks, so that no rank trains, unmeasured, while rank 0 still evaluates."""
    with peer_errors("starting a round"):
        dist.barrier(device_ids=[membership.device.index or 0] if membership.backend == "nccl" else None)


def report_round(job: Job, membership: Membership, meter: Meter, own: RankRound, round_number: int) -> RoundReport:
    """Gather the measurements of all ranks, and return the round's report; every rank must call it.

    Args:
        job: The run.
        membership: This rank.
        meter: Receives the bytes that each rank has sent.
        own: The measurements of this rank; all ranks have the same number of exchanges.
        round_number: The round.

    Raises:
        DivergedError: A rank's loss or network is not finite.
    """
    ranks = [_unflattened(row, len(own.logged)) for row in _gather(membership, _flattened(own))]
    for rank, did in enumerate(ranks):
        loss = did.numbers["loss_sum"]
        if not math.isfinite(loss) or not did.finite:
            what = "non-finite weights" if math.isfinite(loss) else f"a loss of {loss}"
            raise diverged(job, len(ranks), rank, what, round_number)
        meter.sent[rank] = round(did.sent_bytes)
    return summarise(ranks, job.config.train.logged)


def summarise(ranks: Sequence[RankRound], names: Sequence[str] = ()) -> RoundReport:
    """Return the report of a round from the measurements of all ranks; `names` are those of `train.logged`."""
    measured = [did.numbers for did in ranks]
    numbers = combined(measured, parallel=True)
    # The last rank to enter an exchange does not wait, so the shortest time is that of the transfer itself.
    transfer = sum(min(waits) for waits in zip(*(did.transfers_s for did in ranks), strict=True))
    waited = sum(sum(did.transfers_s) for did in ranks)
    numbers |= {
        "workers": len(ranks),
        "loss": sum(of_rank["loss_sum"] for of_rank in measured) / numbers["samples"],
        "exchange_s": transfer,
        "idle_s": waited / len(ranks) - transfer,
        "cut_s": 0.0,
        "merge_s": 0.0,
        "virtual_s": max(of_rank["cpu_s"] for of_rank in measured) + transfer,
    }
    logged = logged_means(names, [did.logged for did in ranks], numbers["samples"])
    return RoundReport(numbers, measured, logged=logged, held_fraction=1.0)


def broadcast_tensors(membership: Membership, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return rank 0's tensors on every rank, on the CPU; tensors of other ranks are ignored."""
    return _unpacked(broadcast_bytes(membership, _packed(tensors)))


def gather_tensors(membership: Membership, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the tensors of all ranks on rank 0, in the order of ranks; an empty list on other ranks."""
    where = membership.carrier
    mine = _packed(tensors).to(where)
    sizes = [int(size) for (size,) in _gather(membership, [len(mine)])]
    if membership.rank != 0:
        dist.send(mine, dst=0)
        return []
    found = [_unpacked(mine)]
    for rank in range(1, membership.world_size):
        theirs = torch.empty(sizes[rank], dtype=torch.uint8, device=where)
        dist.recv(theirs, src=rank)
        found.append(_unpacked(theirs))
    return found


def _flattened(own: RankRound) -> list[float]:
    numbers = [own.numbers[measured.name] for _, measured in worker_slots()]
    return [own.finite, own.sent_bytes, *own.logged, *numbers, *own.transfers_s]


def _unflattened(row: Sequence[float], num_logged: int) -> RankRound:
    finite, sent_bytes, *others = row
    logged, others = tuple(others[:num_logged]), others[num_logged:]
    slots = worker_slots()
    numbers = {m.name: m.kind(value) for (_, m), value in zip(slots, others, strict=False)}
    return RankRound(numbers, bool(finite), sent_bytes, others[len(slots) :], logged)


def _gather(membership: Membership, own: Sequence[float]) -> list[list[float]]:
    """Return the numbers of all ranks on every rank; each takes 8 bytes."""
    mine = torch.tensor(own, dtype=torch.float64, device=membership.carrier)
    all_ranks = [torch.zeros_like(mine) for _ in range(membership.world_size)]
    dist.all_gather(all_ranks, mine)
    return [numbers.tolist() for numbers in all_ranks]


def _packed(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return tensors as the bytes of a safetensors file."""
    # Copy each tensor: safetensors refuses tied weights, which are one tensor with two names.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    return torch.frombuffer(bytearray(safetensors.torch.save(plain)), dtype=torch.uint8)


def _unpacked(data: Tensor) -> dict[str, Tensor]:
    return safetensors.torch.load(data.cpu().numpy().tobytes())
