"""What methods of equal ranks share: a round's report, and states that rank 0 saves and hands out.

Where it sits: `ddp.py` and `local_sgd.py` hold the methods; `ist/training/rounds.py` has the loop that calls them.
Not here: training traffic. Nothing of this module is counted as such.
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
from ist.training.rounds import RoundReport


@dataclass(frozen=True)
class RankRound:
    """What a rank did in a round.

    Attributes:
        numbers: What it measured, as any worker does (`ist/measurements.py`).
        finite: Whether its network is.
        sent_bytes: What it has sent so far.
        transfers_s: Seconds of each exchange while it did not compute, waiting for slower ranks included.
    """

    numbers: Numbers
    finite: bool
    sent_bytes: float
    transfers_s: Sequence[float]

    def __post_init__(self) -> None:
        check_worker(self.numbers)


def begin_together(membership: Membership) -> None:
    """Wait for all ranks: none may train while rank 0 evaluates, in time that no clock of the run counts."""
    with peer_errors("beginning a round"):
        dist.barrier(device_ids=[membership.device.index or 0] if membership.backend == "nccl" else None)


def report_round(job: Job, membership: Membership, meter: Meter, own: RankRound, round_number: int) -> RoundReport:
    """Tell all ranks what each did, and return the round's report; every rank must call it.

    Args:
        job: The run.
        membership: This rank.
        meter: Notes what each rank has sent.
        own: What this rank did; all ranks made as many exchanges.
        round_number: The round.

    Raises:
        DivergedError: A rank's loss or network is not finite.
    """
    ranks = [_unflattened(row) for row in _gather(membership, _flattened(own))]
    for rank, did in enumerate(ranks):
        loss = did.numbers["loss_sum"]
        if not math.isfinite(loss) or not did.finite:
            what = "weights that are not finite" if math.isfinite(loss) else f"a loss of {loss}"
            raise diverged(job, len(ranks), rank, what, round_number)
        meter.sent[rank] = round(did.sent_bytes)
    return summarise(ranks)


def summarise(ranks: Sequence[RankRound]) -> RoundReport:
    """Return the report of a round in which ranks did what is given."""
    measured = [did.numbers for did in ranks]
    numbers = combined(measured, parallel=True)
    # Whoever comes last to an exchange waits for nobody: its time is that of the transfer.
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
    return RoundReport(numbers, measured)


def spread(membership: Membership, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return rank 0's tensors on every rank, on the CPU; other ranks' own do not matter."""
    return _unpacked(broadcast_bytes(membership, _packed(tensors)))


def collect(membership: Membership, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return every rank's tensors on rank 0, in the order of ranks; nothing on the others."""
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
    return [own.finite, own.sent_bytes, *numbers, *own.transfers_s]


def _unflattened(row: Sequence[float]) -> RankRound:
    finite, sent_bytes, *others = row
    slots = worker_slots()
    numbers = {m.name: m.kind(value) for (_, m), value in zip(slots, others, strict=False)}
    return RankRound(numbers, bool(finite), sent_bytes, others[len(slots) :])


def _gather(membership: Membership, own: Sequence[float]) -> list[list[float]]:
    """Give every rank's numbers to every rank: 8 bytes each."""
    mine = torch.tensor(own, dtype=torch.float64, device=membership.carrier)
    all_ranks = [torch.zeros_like(mine) for _ in range(membership.world_size)]
    dist.all_gather(all_ranks, mine)
    return [numbers.tolist() for numbers in all_ranks]


def _packed(tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors as the bytes of a safetensors file."""
    # A copy of each: tied weights are one tensor with two names, which safetensors refuses.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    return torch.frombuffer(bytearray(safetensors.torch.save(plain)), dtype=torch.uint8)


def _unpacked(data: Tensor) -> dict[str, Tensor]:
    return safetensors.torch.load(data.cpu().numpy().tobytes())
