"""Step functions, which configurations of the tests name."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset


def of_pairs(net: nn.Module, batch: Any) -> Tensor:
    """The usual loss of (inputs, targets)."""
    inputs, targets = batch
    return nn.functional.cross_entropy(net(inputs), targets)


def of_mappings(net: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A loss of mappings with a weight for each sample."""
    losses = nn.functional.cross_entropy(net(batch["input"]), batch["classes"], reduction="none")
    return {"loss": (batch["weight"] * losses).mean()}


class Named(Dataset[Any]):
    """Items as mappings: the input, the class, and a weight."""

    def __init__(self, pairs: TensorDataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs, classes = self.pairs[index]
        return {"input": inputs, "classes": classes, "weight": 1.0 + index % 3}
