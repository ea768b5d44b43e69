"""The networks that the identities are tested on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ist.models.mlp import MLP


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = build()
        with torch.no_grad():  # a fresh batch norm scales by 1 and shifts by 0: give its parameters something to lose
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "two hidden layers, batch norm": lambda: MLP([12, 16, 8, 5]),
    "no batch norm": lambda: MLP([12, 16, 8, 5], batch_norm=False),
    "no bias": lambda: MLP([12, 16, 8, 5], bias=False),
    "uneven widths": lambda: MLP([12, 17, 11, 13, 5], batch_norm=True),
    "one neuron each": lambda: MLP([12, 4, 4, 5], batch_norm=False),
    "one hidden layer": lambda: MLP([12, 9, 5]),
    "the paper's": lambda: MLP([12, 16, 8, 5], bias=False, track_running_stats=False, output_norm=True),
    "nested, per-neuron slopes": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(12, 10), nn.PReLU(10)), nn.Sequential(nn.Linear(10, 6), nn.PReLU(), nn.Linear(6, 5))
    ),
}


def frozen_first() -> nn.Module:
    """Everything but the last layer is frozen; the first is shared, the second is cut."""
    model = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 5))
    for layer in (model[0], model[2]):
        layer.requires_grad_(requires_grad=False)
    return model


class Router(nn.Module):
    """Casts a part of itself to wider numbers in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.first, self.last = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 5)
        self.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        self.router = self.router.float()
        hidden = self.first(x.bfloat16()) * self.router(x).softmax(dim=-1).bfloat16()
        return self.last(hidden).float()
