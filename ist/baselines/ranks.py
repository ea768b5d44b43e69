"""What methods of equal ranks share: a round's report, and states that rank 0 saves and hands out.

Where it sits: `ddp.py` and `local_sgd.py` hold the methods; `ist/training/rounds.py` has the loop that calls them.
Not here: training traffic. Nothing of this module is counted as such.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from ist.distributed.process_group import Membership, broadcast_bytes, peer_errors
from ist.monitoring.meter import Meter
from ist.subnet.job import Job
from ist.training.coordinator import diverged
from ist.training.rounds import RoundReport


@dataclass(frozen=True)
class RankRound:
    """What a rank did in a round.

    Attributes:
        loss_sum: Sum of its samples' losses.
        samples: Their number.
        finite: Whether its network is.
        seconds: Wall clock, exchange included.
        cpu_s: CPU seconds of the thread that trains.
        sent_bytes: What it has sent so far.
        memory_bytes: Its peak memory so far.
        transfers_s: Seconds of each exchange while it did not compute, waiting for slower ranks included.
    """

    loss_sum: float
    samples: int
    finite: bool
    seconds: float
    cpu_s: float
    sent_bytes: float
    memory_bytes: int
    transfers_s: Sequence[float]


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
    *numbers, transfers = astuple(own)
    gathered = _gather(membership, [*numbers, *transfers])
    ranks = [
        RankRound(loss, int(samples), bool(finite), seconds, cpu, sent, int(memory), waits)
        for loss, samples, finite, seconds, cpu, sent, memory, *waits in gathered
    ]
    for rank, did in enumerate(ranks):
        if not math.isfinite(did.loss_sum) or not did.finite:
            what = "weights that are not finite" if math.isfinite(did.loss_sum) else f"a loss of {did.loss_sum}"
            raise diverged(job, rank, what, round_number)
        meter.sent[rank] = round(did.sent_bytes)
    return summarise(len(job.steps(round_number)), ranks)


def summarise(steps: int, ranks: Sequence[RankRound]) -> RoundReport:
    """Return the report of a round in which ranks did what is given."""
    size, samples = len(ranks), sum(did.samples for did in ranks)
    # Whoever comes last to an exchange waits for nobody: its time is that of the transfer.
    transfer = sum(min(waits) for waits in zip(*(did.transfers_s for did in ranks), strict=True))
    waited = [sum(did.transfers_s) for did in ranks]
    return RoundReport(
        steps=steps,
        samples=samples,
        loss=sum(did.loss_sum for did in ranks) / samples,
        compute_s=sum(did.seconds - wait for did, wait in zip(ranks, waited, strict=True)) / size,
        exchange_s=transfer,
        idle_s=sum(waited) / size - transfer,
        cut_s=0.0,
        merge_s=0.0,
        virtual_s=max(did.cpu_s for did in ranks) + transfer,
        memory_bytes=tuple(did.memory_bytes for did in ranks),
        workers=size,
    )


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
