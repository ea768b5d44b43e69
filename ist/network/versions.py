"""Notice that an evaluation writes to parameters, where that would be lost.

With one coordinator the evaluated network is the trained one, so that a forward which normalizes its weights in place
changes what is trained. With a sharded store rank 0 evaluates a copy, and such a change would be lost in silence.
Where it sits: the rehearsal checks one evaluation (`ist/runs/rehearsal.py`), a sharded store checks its copy.
Not here: parameters without values (`lazy_tensor.py`).
"""

from collections.abc import Mapping

from torch import nn

from ist.errors import ModelError


def versions(network: nn.Module) -> dict[str, int]:
    """Return, by parameter, how often torch has written to it in place."""
    return {name: parameter._version for name, parameter in network.named_parameters()}


def check_unchanged(network: nn.Module, before: Mapping[str, int], where: str) -> None:
    """Check that no parameter has been written to.

    Args:
        network: The network.
        before: The `versions` of then.
        where: The reason why a change would be lost.

    Raises:
        ModelError: A parameter has been written to.
    """
    now = versions(network)
    if changed := next((name for name in before if now[name] != before[name]), None):
        raise ModelError(
            f"an evaluation writes to the parameter '{changed}', and 'pool.store' is 'sharded': {where}, so that the "
            "change would be lost. Set pool.store to 'coordinator', or do not change parameters in evaluation mode"
        )
