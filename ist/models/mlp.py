"""A multi-layer perceptron, in the shapes that the IST paper uses.

Not here: its split (`ist/neurons/` finds the neurons of any network).
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
}


class MLP(nn.Sequential):
    """Linear, optional batch norm, activation, optional dropout, for each hidden layer; then a linear output.

    Inputs of any shape (batch, ...) are flattened to (batch, widths[0]); outputs are (batch, widths[-1]).

    Args:
        widths: The number of input features, the hidden widths, and the number of output features; at least one
            hidden layer.
        batch_norm: Whether each hidden linear layer is followed by batch norm.
        bias: Whether the linear layers have biases.
        activation: 'relu', 'gelu', 'tanh' or 'silu'.
        dropout: The probability of dropping a hidden activation, in [0, 1).
        track_running_stats: Whether batch norm tracks running statistics. The IST paper does not: it uses batch
            statistics at evaluation too.
        output_norm: Whether the output layer is followed by batch norm without scale and shift, as in the paper.

    Raises:
        ValueError: Fewer than three widths, a width below 1, or an unknown activation.

    Reference: Yuan et al., arXiv 1910.02120, section 4 (the architecture).
    """

    def __init__(
        self,
        widths: Sequence[int],
        batch_norm: bool = True,
        bias: bool = True,
        activation: Literal["relu", "gelu", "tanh", "silu"] = "relu",
        dropout: float = 0.0,
        track_running_stats: bool = True,
        output_norm: bool = False,
    ) -> None:
        if len(widths) < 3 or any(width < 1 for width in widths):
            raise ValueError(f"widths {list(widths)}: expected input, at least one hidden, and output width, all >= 1")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation '{activation}': expected one of {', '.join(_ACTIVATIONS)}")
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for number, (fan_in, width) in enumerate(pairwise(widths[:-1]), start=1):
            layers[f"linear_{number}"] = nn.Linear(fan_in, width, bias=bias)
            if batch_norm:
                layers[f"norm_{number}"] = nn.BatchNorm1d(width, track_running_stats=track_running_stats)
            layers[f"activation_{number}"] = _ACTIVATIONS[activation]()
            if dropout:
                layers[f"dropout_{number}"] = nn.Dropout(dropout)
        layers["output"] = nn.Linear(widths[-2], widths[-1], bias=bias)
        if output_norm:
            layers["output_norm"] = nn.BatchNorm1d(widths[-1], affine=False, track_running_stats=track_running_stats)
        super().__init__(layers)
