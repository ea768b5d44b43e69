"""Step functions, which configurations of the tests name."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset


def of_pairs(net: nn.Module, batch: Any) -> Tensor:
    """The usual loss of (inputs, targets)."""
    inputs, targets = batch
    return nn.functional.cross_entropy(net(inputs), targets)


def counting(net: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor | float]]:
    """The usual loss, the number of samples, and the fraction of right classes."""
    inputs, targets = batch
    scores = net(inputs)
    right = (scores.argmax(dim=1) == targets).float().mean()
    return nn.functional.cross_entropy(scores, targets), {"samples": len(inputs), "right": right}


def of_mappings(net: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A loss of mappings with a weight for each sample."""
    scores, classes = net(batch["input"]), batch["classes"]
    losses = nn.functional.cross_entropy(scores, classes, reduction="none")
    return {"loss": (batch["weight"] * losses).mean(), "scores": scores}


def with_numbers(net: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
    """The loss of mappings, the fraction of right classes, and the mean weight of a sample."""
    found = of_mappings(net, batch)
    right = (found["scores"].argmax(dim=1) == batch["classes"]).float().mean()
    return found["loss"], {"right": right, "weight": float(batch["weight"].double().mean())}


class Named(Dataset[Any]):
    """Items as mappings: the input, the class, and a weight."""

    def __init__(self, pairs: TensorDataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs, classes = self.pairs[index]
        return {"input": inputs, "classes": classes, "weight": 1.0 + index % 3}
