"""Multi-head attention with some of the heads: it replaces `nn.MultiheadAttention` in a submodel.

PyTorch's class computes the width of a head as embedding width / number of heads, so it cannot have fewer heads of the
same width. The class here has the same parameters under the same names, with smaller shapes.

Where it sits: `ist/subnet/module.py` calls it for submodels.
Not here: which heads a worker holds (`ist/subnet/partition.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ist.errors import ModelError


class SomeHeads(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with `num_heads` heads of width `head_dim`, independent of `embed_dim`."""

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
        """Return the outputs of attention, and its weights on request; arguments as in the base class."""
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
    """Set the class and the number of heads of an attention to match its cut projections, in place.

    Fused fast paths, which assume all heads, are switched off.

    Raises:
        ModelError: The attention has `add_bias_kv` or `add_zero_attn`.
    """
    if module.bias_k is not None or module.add_zero_attn:
        raise ModelError(
            "the heads of an nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot be split: share them "
            "(partition.exclude)"
        )
    module.__class__ = SomeHeads
    module.num_heads = module.out_proj.weight.shape[1] // module.head_dim
    module._qkv_same_embed_dim = False


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Add a float mask to the scores; where a bool mask is true, set them to -inf."""
    return scores.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
