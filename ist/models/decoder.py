"""A decoder-only transformer like GPT-2, for sequences of tokens.

Its modules are `tokens`, `positions`, `blocks.<block>.attention`, `blocks.<block>.feed_forward`, `norm` and `output`.

Not here: its split (`ist/neurons/` finds the heads and the feed-forward units), its loss (`next_token` in
`ist/evaluation/losses.py`).
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

_STD = 0.02
"""The standard deviation of initial weights; weights whose outputs are added to the residual stream have less."""


class CausalAttention(nn.Module):
    """Self-attention of each position to itself and the positions before it.

    Args:
        width: The width of the residual stream; a multiple of `heads`.
        heads: The number of attention heads, each of width `width` / `heads`.
        dropout: The probability of dropping an attention weight.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of attention: (batch, length, width).

        Args:
            x: (batch, length, width).
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return cast(Tensor, self.projection(mixed.transpose(1, 2).flatten(2)))


class DecoderBlock(nn.Module):
    """Attention and a feed-forward network, each with a layer norm on its input and added to the residual stream.

    Args:
        width: The width of the residual stream.
        heads: The number of attention heads.
        ffn: The number of hidden units of the feed-forward network.
        dropout: The probability of dropping an output that is added, and of dropping an attention weight.
    """

    def __init__(self, width: int, heads: int, ffn: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads, dropout)
        self.feed_forward = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after the block: (batch, length, width).

        Args:
            x: The residual stream before the block, of the same shape.
        """
        x = x + self.drop(self.attention(self.norm_1(x)))
        return cast(Tensor, x + self.drop(self.feed_forward(self.norm_2(x))))


class Decoder(nn.Module):
    """Token and position embeddings, blocks, a layer norm, and a linear output to the scores of the next token.

    Args:
        vocabulary: The number of tokens.
        length: The length of the longest sequence.
        width: The width of the residual stream; a multiple of `heads`.
        layers: The number of blocks.
        heads: The number of attention heads of each block.
        ffn: The number of hidden units of each block's feed-forward network.
        dropout: The probability of dropping an embedding, an attention weight, or an output of a block, in [0, 1).
        tied: Whether the output layer uses the weight of the token embedding.

    Raises:
        ValueError: A number is below 1, or `width` is not a multiple of `heads`.

    Reference: Radford et al., Language Models are Unsupervised Multitask Learners, 2019 (GPT-2).
    """

    def __init__(
        self,
        vocabulary: int = 256,
        length: int = 64,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        ffn: int = 512,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        if min(vocabulary, length, width, layers, heads, ffn) < 1:
            raise ValueError("vocabulary, length, width, layers, heads and ffn: expected to be >= 1")
        if width % heads:
            raise ValueError(f"width {width}: expected a multiple of the {heads} heads")
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(DecoderBlock(width, heads, ffn, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                adds = name.endswith(("attention.projection.weight", "feed_forward.2.weight"))
                nn.init.normal_(parameter, std=_STD / (2 * layers) ** 0.5 if adds else _STD)
        if tied:
            self.output.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return at each token the scores of the next one: (batch, length, vocabulary).

        Args:
            tokens: int64, (batch, length), with at most the network's `length`.

        Raises:
            ValueError: The sequences are too long.
        """
        if tokens.shape[1] > self.positions.num_embeddings:
            raise ValueError(f"sequences of {tokens.shape[1]} tokens: expected <= {self.positions.num_embeddings}")
        x = self.drop(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        return cast(Tensor, self.output(self.norm(self.blocks(x))))
