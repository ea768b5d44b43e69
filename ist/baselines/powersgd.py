"""Save and restore the state of PowerSGD, whose error-feedback buffer differs on every rank.

Where it sits: `ist/baselines/ddp.py` stores it in checkpoints, so that a resumed run continues exactly.
Not here: PowerSGD itself (PyTorch's hook).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

from ist.baselines.ranks import gather_tensors
from ist.distributed.process_group import Membership
from ist.errors import CheckpointError

_PREFIX = "powersgd/"


def saved_powersgd(state: PowerSGDState, membership: Membership) -> dict[str, Tensor]:
    """Return the state of all ranks, by name, on rank 0; every rank must call it.

    The hook has one bucket. It draws random numbers only before its first compressed step, so the state of its
    generator is not saved.
    """
    own = {"error": state.error_dict.get(0), "p": state.p_memory_dict.get(0), "q": state.q_memory_dict.get(0)}
    found = {"iter": torch.tensor(state.iter)} | {name: tensor for name, tensor in own.items() if tensor is not None}
    ranks = gather_tensors(membership, found)
    return {f"{_PREFIX}{rank}/{name}": tensor for rank, theirs in enumerate(ranks) for name, tensor in theirs.items()}


def restore_powersgd(state: PowerSGDState, saved: Mapping[str, Tensor], membership: Membership) -> dict[str, Tensor]:
    """Restore this rank's part of the result of `saved_powersgd`; return the other tensors of `saved`.

    Raises:
        CheckpointError: A tensor is missing, or is not one of `saved_powersgd`.
    """
    prefix = f"{_PREFIX}{membership.rank}/"
    own = {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
    if own:
        if wrong := {"iter"} - set(own) or set(own) - {"iter", "error", "p", "q"}:
            raise CheckpointError(
                f"the checkpoint's PowerSGD state of rank {membership.rank} is invalid: '{min(wrong)}' is missing or "
                "unknown"
            )
        state.iter = int(own.pop("iter"))
        places = {"error": state.error_dict, "p": state.p_memory_dict, "q": state.q_memory_dict}
        for name, tensor in own.items():
            places[name][0] = tensor.to(membership.device)
    return {name: tensor for name, tensor in saved.items() if not name.startswith(_PREFIX)}
