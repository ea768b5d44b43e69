"""Save what PowerSGD remembers of earlier steps, and go on with it: its errors are another on every rank.

Where it sits: `ddp.py` keeps it in checkpoints, so that a resumed run is the same run.
Not here: PowerSGD (PyTorch's hook).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

from ist.baselines.ranks import collect
from ist.distributed.process_group import Membership
from ist.errors import CheckpointError

_PREFIX = "powersgd/"


def saved_powersgd(state: PowerSGDState, membership: Membership) -> dict[str, Tensor]:
    """Return the state of all ranks, by name, on rank 0; every rank must call it.

    The hook sees one bucket. It draws random numbers before its first compressed step only: its generator is not saved.
    """
    own = {"error": state.error_dict.get(0), "p": state.p_memory_dict.get(0), "q": state.q_memory_dict.get(0)}
    found = {"iter": torch.tensor(state.iter)} | {name: tensor for name, tensor in own.items() if tensor is not None}
    ranks = collect(membership, found)
    return {f"{_PREFIX}{rank}/{name}": tensor for rank, theirs in enumerate(ranks) for name, tensor in theirs.items()}


def restore_powersgd(state: PowerSGDState, saved: Mapping[str, Tensor], membership: Membership) -> dict[str, Tensor]:
    """Go on with this rank's part of what `saved_powersgd` returned; return the rest of `saved`.

    Raises:
        CheckpointError: It holds something that `saved_powersgd` does not return.
    """
    prefix = f"{_PREFIX}{membership.rank}/"
    own = {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
    if own:
        if wrong := {"iter"} - set(own) or set(own) - {"iter", "error", "p", "q"}:
            raise CheckpointError(
                f"the checkpoint's state of PowerSGD, of rank {membership.rank}, is wrong in '{min(wrong)}'"
            )
        state.iter = int(own.pop("iter"))
        places = {"error": state.error_dict, "p": state.p_memory_dict, "q": state.q_memory_dict}
        for name, tensor in own.items():
            places[name][0] = tensor.to(membership.device)
    return {name: tensor for name, tensor in saved.items() if not name.startswith(_PREFIX)}
