"""A residual network with pre-activation blocks, for small images.

Its modules are `stem`, `sections.<section>.<block>`, `norm` and `output`. The blocks `sections.*.0` of the second and
third section change the shape of their input. All other blocks add to their input, so they can be skipped.

Not here: its split (`ist/neurons/` finds the channels inside a block; the strategy `blocks` assigns whole blocks).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice, added to the input.

    If the shape changes, the shortcut is a 1x1 convolution of the input after its norm and ReLU.

    Args:
        in_channels: The number of channels of the input.
        channels: The number of channels of the output, and between the two convolutions.
        stride: The stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.norm_1 = nn.BatchNorm2d(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm_2 = nn.BatchNorm2d(channels)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        changes = stride != 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output: (batch, channels, height / stride, width / stride).

        Args:
            x: (batch, in_channels, height, width).
        """
        active = F.relu(self.norm_1(x))
        added: Tensor = self.conv_2(F.relu(self.norm_2(self.conv_1(active))))
        return added + (x if self.shortcut is None else self.shortcut(active))


class PreActResNet(nn.Module):
    """A 3x3 convolution, three sections of pre-activation blocks, norm, ReLU, global mean, and a linear output.

    Inputs are (batch, in_channels, height, width); outputs are (batch, num_classes).

    Args:
        depths: The number of blocks of each of the three sections, at least one.
        width: The number of channels of the first section; the second and third have two and four times as many, at
            half and a quarter of the resolution.
        in_channels: The number of channels of the images.
        num_classes: The number of classes.
        stem_stride: The stride of the first convolution; 2 makes the network four times cheaper.

    Raises:
        ValueError: There are not three depths, or a number is below 1.

    Reference: He et al., arXiv 1603.05027 (pre-activation).
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 2),
        width: int = 16,
        in_channels: int = 1,
        num_classes: int = 10,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if len(depths) != 3 or min(depths) < 1:
            raise ValueError(f"depths {list(depths)}: expected three numbers of blocks, all >= 1")
        if min(width, in_channels, num_classes, stem_stride) < 1:
            raise ValueError("width, in_channels, num_classes and stem_stride: expected to be >= 1")
        self.stem = nn.Conv2d(in_channels, width, 3, stride=stem_stride, padding=1, bias=False)
        sections, channels = [], width
        for number, depth in enumerate(depths):
            wanted, stride = width * 2**number, 1 if number == 0 else 2
            blocks = [PreActBlock(channels, wanted, stride), *(PreActBlock(wanted, wanted) for _ in range(depth - 1))]
            sections.append(nn.Sequential(*blocks))
            channels = wanted
        self.sections = nn.Sequential(*sections)
        self.norm = nn.BatchNorm2d(channels)
        self.output = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of each class: (batch, num_classes).

        Args:
            images: (batch, in_channels, height, width).
        """
        features = F.relu(self.norm(self.sections(self.stem(images)))).mean((2, 3))
        scores: Tensor = self.output(features)
        return scores
