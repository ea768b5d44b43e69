"""What methods of equal ranks share: a round's report, and states that rank 0 saves and hands out.

Where it sits: `ddp.py` and `local.py` hold the methods; `ist/coordinator.py` has the loop that calls them.
Not here: training traffic. Nothing of this module is counted as such.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from ist.coordinator import RoundReport, diverged
from ist.job import Job
from ist.meter import Meter
from ist.pool.group import Membership


@dataclass(frozen=True)
class RankRound:
    """What a rank did in a round.

    Attributes:
        loss_sum: Sum of its samples' losses.
        samples: Their number.
        seconds: Wall clock, exchange included.
        cpu_s: CPU seconds of the thread that trains.
        sent_bytes: What it has sent so far.
        memory_bytes: Its peak memory so far.
        transfers_s: Seconds of each exchange while it did not compute, waiting for slower ranks included.
    """

    loss_sum: float
    samples: int
    seconds: float
    cpu_s: float
    sent_bytes: float
    memory_bytes: int
    transfers_s: Sequence[float]


def report_round(
    job: Job, membership: Membership, meter: Meter, own: RankRound, round_number: int, whole_s: float
) -> RoundReport:
    """Tell all ranks what each did, and return the round's report; every rank must call it.

    Args:
        job: The run.
        membership: This rank.
        meter: Notes what each rank has sent.
        own: What this rank did; all ranks made as many exchanges.
        round_number: The round.
        whole_s: Wall-clock seconds of the round here.

    Raises:
        DivergedError: A rank's loss is not finite.
    """
    numbers = [
        own.loss_sum, own.samples, own.seconds, own.cpu_s, own.sent_bytes, own.memory_bytes, *own.transfers_s,
    ]  # fmt: skip
    losses, counts, seconds, cpu, sent, memory, *transfers = zip(*_gather(membership, numbers), strict=True)
    for rank, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise diverged(rank, f"a loss of {loss}", round_number)
    for rank, count in enumerate(sent):
        meter.sent[rank] = round(count)
    mean = sum(seconds) / len(seconds)
    exchange = sum(own.transfers_s)
    return RoundReport(
        steps=len(job.steps(round_number)),
        samples=int(sum(counts)),
        loss=sum(losses) / sum(counts),
        compute_s=max(0.0, mean - exchange),
        exchange_s=exchange,
        idle_s=max(0.0, whole_s - mean),
        cut_s=0.0,
        merge_s=0.0,
        # Whoever comes last to an exchange waits for nobody: its time is that of the transfer.
        virtual_s=max(cpu) + sum(map(min, transfers)),
        memory_bytes=tuple(int(peak) for peak in memory),
        workers=membership.world_size,
    )


def spread(membership: Membership, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return rank 0's tensors on every rank, on the CPU; other ranks' own do not matter."""
    where = _where(membership)
    data = _packed(tensors).to(where)
    size = torch.tensor([len(data)], device=where)
    dist.broadcast(size, src=0)
    if membership.rank != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=where)
    dist.broadcast(data, src=0)
    return _unpacked(data)


def collect(membership: Membership, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return every rank's tensors on rank 0, in the order of ranks; nothing on the others."""
    where = _where(membership)
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


def _gather(membership: Membership, own: Sequence[float]) -> list[list[float]]:
    """Give every rank's numbers to every rank: 8 bytes each."""
    mine = torch.tensor(own, dtype=torch.float64, device=_where(membership))
    all_ranks = [torch.zeros_like(mine) for _ in range(membership.world_size)]
    dist.all_gather(all_ranks, mine)
    return [numbers.tolist() for numbers in all_ranks]


def _where(membership: Membership) -> torch.device:
    return membership.device if membership.backend == "nccl" else torch.device("cpu")


def _packed(tensors: Mapping[str, Tensor]) -> Tensor:
    """Tensors as the bytes of a safetensors file."""
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    return torch.frombuffer(bytearray(safetensors.torch.save(plain)), dtype=torch.uint8)


def _unpacked(data: Tensor) -> dict[str, Tensor]:
    return safetensors.torch.load(data.cpu().numpy().tobytes())
