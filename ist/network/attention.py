"""Multi-head attention with some of its heads: what a narrow `nn.MultiheadAttention` becomes.

PyTorch's own computes the width of a head as embedding width / number of heads, and so cannot hold fewer
heads of the same width. This one has the same parameters under the same names, narrow.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ist.errors import ModelError


class SomeHeads(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose projections hold `num_heads` heads of `head_dim`, whatever `embed_dim` is."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention's outputs, and its weights if they are wanted; arguments as in the base class."""
        inputs: tuple[Tensor, ...] = (query, key, value)
        if not self.batch_first:
            inputs = tuple(tensor.transpose(0, 1) if tensor.ndim == 3 else tensor for tensor in inputs)
        unbatched = query.ndim == 2
        if unbatched:
            inputs = tuple(tensor.unsqueeze(0) for tensor in inputs)
        q, k, v = (
            F.linear(tensor, weight, bias).view(*tensor.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for tensor, weight, bias in zip(inputs, self._weights(), self._biases(), strict=True)
        )
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        if attn_mask is not None:
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.view(len(q), -1, *attn_mask.shape[1:])
            scores = _masked(scores, attn_mask)
        elif is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = _masked(scores, causal)
        if key_padding_mask is not None:
            padding = key_padding_mask.unsqueeze(0) if key_padding_mask.ndim == 1 else key_padding_mask
            scores = _masked(scores, padding[:, None, None, :])
        weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        outputs: Tensor = self.out_proj((weights @ v).transpose(1, 2).flatten(-2))
        if unbatched:
            outputs, weights = outputs.squeeze(0), weights.squeeze(0)
        elif not self.batch_first:
            outputs = outputs.transpose(0, 1)
        if not need_weights:
            return outputs, None
        return outputs, weights.mean(dim=-3) if average_attn_weights else weights

    def _weights(self) -> tuple[Tensor, ...]:
        if self.in_proj_weight is None:
            return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        return self.in_proj_weight.chunk(3)

    def _biases(self) -> tuple[Tensor | None, ...]:
        return (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)


def with_some_heads(module: nn.MultiheadAttention) -> None:
    """Make an attention whose projections were narrowed hold as many heads as they have room for.

    Fused fast paths, which assume all heads, are switched off for it.

    Raises:
        ModelError: It was made with `add_bias_kv` or `add_zero_attn`.
    """
    if module.bias_k is not None or module.add_zero_attn:
        raise ModelError(
            "an nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot hold some of its heads: share it "
            "(partition.exclude)"
        )
    module.__class__ = SomeHeads
    module.num_heads = module.out_proj.weight.shape[1] // module.head_dim
    module._qkv_same_embed_dim = False


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Add a mask of floats; forbid where a mask of truth values is true."""
    return scores.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
