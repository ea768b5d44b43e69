"""Networks in plain torch: networks written by hand, and torch's own recurrent and attention modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.entry import Entry, Inputs, drawn, images, seeded, tokens, values


class Residual(nn.Module):
    """Add the output of a module to its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Return x + inner(x)."""
        out: Tensor = x + self.inner(x)
        return out


class UNet(nn.Module):
    """A U-Net: two levels down and two up; each level up also reads the channels of the level down."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), norm(outputs), nn.ReLU())

        self.down1, self.down2, self.middle = block(3, 12), block(12, 20), block(20, 36)
        self.up2 = nn.ConvTranspose2d(36, 16, 2, stride=2)
        self.join2 = block(16 + 20, 24)
        self.up1 = nn.ConvTranspose2d(24, 8, 2, stride=2)
        self.join1 = block(8 + 12, 28)
        self.head = nn.Conv2d(28, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of 5 classes as large as the image."""
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        middle = self.middle(F.max_pool2d(second, 2))
        up = self.join2(torch.cat([self.up2(middle), second], 1))
        up = self.join1(torch.cat([self.up1(up), first], 1))
        out: Tensor = self.head(up)
        return out


class EncoderClassifier(nn.Module):
    """torch's transformer encoder over an embedding."""

    def __init__(self, **layer: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(53, 40)
        block = nn.TransformerEncoderLayer(40, 5, dim_feedforward=72, dropout=0.0, batch_first=True, **layer)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(40, 7)

    def forward(self, numbers: Tensor) -> Tensor:
        """Return the classes of the sequences."""
        out: Tensor = self.head(self.encoder(self.embedding(numbers)).mean(1))
        return out


class Translator(nn.Module):
    """torch's encoder-decoder transformer with a causal mask, over one embedding for both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(53, 40)
        self.transformer = nn.Transformer(40, 5, 2, 3, dim_feedforward=72, dropout=0.0, batch_first=True)
        self.head = nn.Linear(40, 53)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the next token's scores."""
        mask = torch.full((target.shape[1], target.shape[1]), float("-inf"), device=source.device).triu(1)
        hidden = self.transformer(
            self.embedding(source), self.embedding(target), tgt_mask=mask.to(self.embedding.weight.dtype)
        )
        out: Tensor = self.head(hidden)
        return out


class Recurrent(nn.Module):
    """A recurrent network over an embedding, and a classifier on its last step."""

    def __init__(self, kind: type[nn.RNNBase], layers: int, bidirectional: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(53, 20)
        arguments: dict[str, Any] = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": True}
        self.recurrent = kind(20, 28, **arguments)  # type: ignore[arg-type]
        self.head = nn.Linear(28 * (2 if bidirectional else 1), 7)

    def forward(self, numbers: Tensor) -> Tensor:
        """Return the classes of the sequences."""
        states, _ = self.recurrent(self.embedding(numbers))
        out: Tensor = self.head(states[:, -1])
        return out


class WaveNet(nn.Module):
    """Gated causal convolutions with growing dilation, residual and skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, 20, 1)
        self.gated = nn.ModuleList([nn.Conv1d(20, 2 * 24, 2, dilation=2**level) for level in range(4)])
        self.residual = nn.ModuleList([nn.Conv1d(24, 20, 1) for _ in range(4)])
        self.skip = nn.ModuleList([nn.Conv1d(24, 28, 1) for _ in range(4)])
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(28, 32, 1), nn.ReLU(), nn.Conv1d(32, 11, 1))

    def forward(self, wave: Tensor) -> Tensor:
        """Return scores of 11 levels for every step."""
        hidden = self.start(wave)
        skips = torch.zeros((), dtype=wave.dtype, device=wave.device)
        for level, (gated, residual, skip) in enumerate(zip(self.gated, self.residual, self.skip, strict=True)):
            value, gate = gated(F.pad(hidden, (2**level, 0))).chunk(2, dim=1)
            made = torch.tanh(value) * torch.sigmoid(gate)
            hidden = hidden + residual(made)
            skips = skips + skip(made)
        out: Tensor = self.end(skips)
        return out


class MixerBlock(nn.Module):
    """Mix over positions, then over channels."""

    def __init__(self, positions: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.over_positions = nn.Sequential(nn.Linear(positions, 20), nn.GELU(), nn.Linear(20, positions))
        self.over_channels = nn.Sequential(nn.Linear(channels, 72), nn.GELU(), nn.Linear(72, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        x = x + self.over_positions(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.over_channels(self.norm2(x))
        return out


class HandMixer(nn.Module):
    """An MLP-mixer on 4 x 4 patches of a 16 x 16 image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 40, 4, stride=4)
        self.blocks = nn.Sequential(MixerBlock(16, 40), MixerBlock(16, 40))
        self.head = nn.Linear(40, 7)

    def forward(self, x: Tensor) -> Tensor:
        """Return the classes of the images."""
        out: Tensor = self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        return out


class NeRF(nn.Module):
    """A radiance field: sines and cosines of the position, read again in the middle; the view direction enters late."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(24 if level == 0 else 40, 40) for level in range(3)])
        self.second = nn.ModuleList([nn.Linear(40 + 24 if level == 0 else 36, 36) for level in range(2)])
        self.density = nn.Linear(36, 1)
        self.feature = nn.Linear(36, 28)
        self.color = nn.Sequential(nn.Linear(28 + 3, 20), nn.ReLU(), nn.Linear(20, 3))

    def forward(self, position: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Return the density and the color at every point."""
        scaled = torch.cat([position * 2.0**power for power in range(4)], -1)
        encoded = torch.cat([scaled.sin(), scaled.cos()], -1)
        hidden = encoded
        for layer in self.first:
            hidden = F.relu(layer(hidden))
        hidden = torch.cat([hidden, encoded], -1)
        for layer in self.second:
            hidden = F.relu(layer(hidden))
        color = self.color(torch.cat([self.feature(hidden), direction], -1))
        return self.density(hidden), torch.sigmoid(color)


class Siamese(nn.Module):
    """Two images through one trunk, and a head that compares the results."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(12, 20, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(80, 28)),
        )
        self.head = nn.Sequential(nn.Linear(28, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the similarity of the images."""
        out: Tensor = self.head((self.trunk(left) - self.trunk(right)).abs())
        return out


class TiedAutoencoder(nn.Module):
    """An autoencoder whose decoder uses the transposed weights of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(30, 20), nn.Linear(20, 12)
        self.inner_bias, self.outer_bias = nn.Parameter(torch.zeros(20)), nn.Parameter(torch.zeros(30))

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction of x from 12 values."""
        code = F.relu(self.inner(F.relu(self.outer(x))))
        hidden = F.relu(F.linear(code, self.inner.weight.t(), self.inner_bias))
        return F.linear(hidden, self.outer.weight.t(), self.outer_bias)


class DLRM(nn.Module):
    """A recommender: embeddings of the categories and an MLP of the numbers, multiplied pairwise."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.EmbeddingBag(size, 12, mode="sum") for size in (30, 40, 50)])
        self.bottom = nn.Sequential(nn.Linear(9, 32), nn.ReLU(), nn.Linear(32, 12), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(12 + 6, 36), nn.ReLU(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 1))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """Return a score for every row."""
        dense = self.bottom(numbers)
        parts = [dense, *(table(categories[:, i : i + 1]) for i, table in enumerate(self.tables))]
        stacked = torch.stack(parts, 1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        rows, columns = [1, 2, 2, 3, 3, 3], [0, 0, 1, 0, 1, 2]
        out: Tensor = self.top(torch.cat([dense, products[:, rows, columns]], 1))
        return out


def _mlp() -> nn.Module:
    layers = [
        *(nn.Linear(30, 44), nn.BatchNorm1d(44), nn.ReLU()),
        *(nn.Linear(44, 36), nn.BatchNorm1d(36), nn.ReLU(), nn.Linear(36, 7)),
    ]
    return nn.Sequential(*layers)


def _residual_mlp() -> nn.Module:
    def block() -> nn.Module:
        return Residual(nn.Sequential(nn.LayerNorm(36), nn.Linear(36, 52), nn.GELU(), nn.Linear(52, 36)))

    return nn.Sequential(nn.Linear(30, 36), block(), block(), nn.LayerNorm(36), nn.Linear(36, 7))


def _lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


def _vgg() -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in (12, 20, 28):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(28 * 16, 48), nn.ReLU(), nn.Linear(48, 7))


def _convolutional_autoencoder() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 20, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.ConvTranspose2d(20, 16, 4, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
    )


def _super_resolution() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5, padding=2), nn.PReLU(20), nn.Conv2d(20, 24, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(24, 8 * 4, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)),
        nn.PixelShuffle(2),
    )


def _entry(family: str, build: Callable[[], nn.Module], inputs: Callable[[], Inputs]) -> Entry:
    return Entry(seeded(build), inputs, "torch", family)


def _numbers(*lengths: int) -> Callable[[], Inputs]:
    return drawn(lambda: (tuple(tokens(53, length) for length in lengths), {}))


def _pair(*shapes: tuple[int, ...]) -> Callable[[], Inputs]:
    return drawn(lambda: (tuple(torch.randn(2, *shape) for shape in shapes), {}))


ENTRIES = {
    "mlp_bn": _entry("mlp", _mlp, values(30)),
    "residual_mlp": _entry("mlp", _residual_mlp, values(30)),
    "lenet": _entry("cnn", _lenet, images(32, 1)),
    "vgg_hand": _entry("cnn", _vgg, images(32)),
    "unet_bn": _entry("unet", lambda: UNet(nn.BatchNorm2d), images(16)),
    "unet_gn": _entry("unet", lambda: UNet(lambda channels: nn.GroupNorm(4, channels)), images(16)),
    "transformer_encoder": _entry("transformer", EncoderClassifier, _numbers(9)),
    "transformer_encoder_prenorm": _entry("transformer", lambda: EncoderClassifier(norm_first=True), _numbers(9)),
    "transformer_seq2seq": _entry("transformer", Translator, _numbers(9, 6)),
    "lstm": _entry("recurrent", lambda: Recurrent(nn.LSTM, 2, False), _numbers(9)),
    "lstm_bidirectional": _entry("recurrent", lambda: Recurrent(nn.LSTM, 1, True), _numbers(9)),
    "gru": _entry("recurrent", lambda: Recurrent(nn.GRU, 1, False), _numbers(9)),
    "autoencoder_conv": _entry("autoencoder", _convolutional_autoencoder, images(16, 1)),
    "autoencoder_tied": _entry("autoencoder", TiedAutoencoder, values(30)),
    "super_resolution": _entry("cnn", _super_resolution, images(12, 1)),
    "wavenet": _entry("cnn", WaveNet, values(1, 40)),
    "mixer_hand": _entry("mlp", HandMixer, images(16)),
    "nerf": _entry("mlp", NeRF, _pair((3,), (3,))),
    "siamese": _entry("cnn", Siamese, _pair((3, 16, 16), (3, 16, 16))),
    "dlrm": _entry("recommender", DLRM, drawn(lambda: ((torch.randn(2, 9), torch.randint(0, 30, (2, 3))), {}))),
}
