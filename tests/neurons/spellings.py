"""Attention as users write it, with the expected groups.

Each network keeps the code of the best-known program that spells it so, shortened where that does not matter.
"""

# ruff: noqa: N806 (the letters that these programs give to sizes)

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from tests.neurons.networks import Case, rand

TOKENS, STATES = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(3)), rand(2, 6, 32)


class GPTAttention(nn.Module):
    """nanoGPT: a fused projection; the width of its input is the total width of its heads."""

    def __init__(self, n_embd: int = 32, n_head: int = 4, dropout: float = 0.1, flash: bool = True) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.n_head, self.n_embd, self.dropout, self.flash = n_head, n_embd, dropout, flash
        if not flash:
            self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            dropout = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class GPTBlock(nn.Module):
    def __init__(self, attention: nn.Module, n_embd: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd), attention
        self.mlp = nn.Sequential(nn.Linear(n_embd, 24), nn.GELU(), nn.Linear(24, n_embd), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """nanoGPT: tied embeddings."""

    def __init__(self, n_embd: int = 32, layers: int = 2, flash: bool = True) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(50, n_embd), nn.Embedding(16, n_embd), nn.Dropout(0.1)
        self.h = nn.ModuleList([GPTBlock(GPTAttention(n_embd, flash=flash), n_embd) for _ in range(layers)])
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, 50, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Separate(nn.Module):
    """minGPT: three projections, a causal mask in a buffer."""

    def __init__(self, n_embd: int = 32, n_head: int = 4) -> None:
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(n_embd, n_embd) for _ in range(4))
        self.attn_drop, self.n_head = nn.Dropout(0.1), n_head
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        k = self.key(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = self.query(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = self.value(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        y = self.attn_drop(F.softmax(att, dim=-1)) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(B, T, C))


class ViTAttention(nn.Module):
    """DINO and timm: everything in one reshape; the scale may be computed in the forward."""

    def __init__(self, dim: int = 32, num_heads: int = 4, scale: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * (self.scale or (C // self.num_heads) ** -0.5)
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class HeadDim(ViTAttention):
    """Newer timm: the width of one head is an attribute, the total width is not."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.q_norm = 8, nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class GroupedQueries(nn.Module):
    def __init__(self, width: int = 32, n_head: int = 8, n_kv: int = 4) -> None:
        super().__init__()
        self.n_head, self.n_kv = n_head, n_kv
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, n_kv * width // n_head) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        k = self.k(x).view(B, T, self.n_kv, C // self.n_head).transpose(1, 2)
        v = self.v(x).view(B, T, self.n_kv, C // self.n_head).transpose(1, 2)
        rep = self.n_head // self.n_kv
        k = k[:, :, None].expand(B, self.n_kv, rep, T, C // self.n_head).reshape(B, self.n_head, T, C // self.n_head)
        v = v.repeat_interleave(rep, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).contiguous().view(B, T, C))


class SharedKeys(nn.Module):
    """Multi-query attention in one projection: one attribute is the width of two things."""

    def __init__(self, width: int = 32, n_head: int = 4) -> None:
        super().__init__()
        self.n_head, self.hd = n_head, width // n_head
        self.c_attn, self.o = nn.Linear(width, width + 2 * self.hd), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split((C, self.hd, self.hd), dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        k, v = k.unsqueeze(1), v.unsqueeze(1)
        y = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(self.hd), dim=-1) @ v
        return self.o(y.transpose(1, 2).contiguous().view(B, T, C))


class Asserting(nn.Module):
    """fairseq: heads are part of the batch dim, and shapes are compared with attributes."""

    def __init__(self, width: int = 32, n_head: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = n_head, width // n_head
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query = x.transpose(0, 1)
        tgt_len, bsz, embed_dim = query.size()
        q = self.q_proj(query) * self.head_dim**-0.5
        q = q.contiguous().view(tgt_len, bsz * self.num_heads, self.head_dim).transpose(0, 1)
        k = self.k_proj(query).contiguous().view(-1, bsz * self.num_heads, self.head_dim).transpose(0, 1)
        v = self.v_proj(query).contiguous().view(-1, bsz * self.num_heads, self.head_dim).transpose(0, 1)
        src_len = k.size(1)
        weights = torch.bmm(q, k.transpose(1, 2))
        assert list(weights.size()) == [bsz * self.num_heads, tgt_len, src_len]
        weights = weights.view(bsz, self.num_heads, tgt_len, src_len).softmax(-1)
        attn = torch.bmm(weights.view(bsz * self.num_heads, tgt_len, src_len), v)
        attn = attn.transpose(0, 1).contiguous().view(tgt_len, bsz, embed_dim)
        return self.out_proj(attn).transpose(0, 1)


class CountedHeads(nn.Module):
    """The number of heads is computed from a width."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.hd, self.qkv, self.o = 8, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (t.reshape(B, T, C // self.hd, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C))


class OwnWidth(nn.Module):
    """All sizes follow from shapes of split tensors: changing attributes is enough."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.h = 4
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def heads(self, t: Tensor) -> Tensor:
        b, n, w = t.shape
        return t.view(b, n, self.h, w // self.h).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)))
        y = y.transpose(1, 2)
        return self.o(y.reshape(*x.shape[:2], y.shape[2] * y.shape[3]))


class Unrolled(nn.Module):
    """Layers with different numbers of heads in one forward: one line of code has other sizes at each visit."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.heads = [4, 2]
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width) for _ in self.heads])
        self.o = nn.ModuleList([nn.Linear(width, width) for _ in self.heads])

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        for h, qkv, o in zip(self.heads, self.qkv, self.o, strict=True):
            q, k, v = qkv(x).view(B, T, 3, h, C // h).permute(2, 0, 3, 1, 4)
            x = x + o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C))
        return x


class Windows(ViTAttention):
    """Swin: windows are part of the batch dim, with a relative bias for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))
        rows, columns = torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
        where = torch.stack([rows.flatten(), columns.flatten()])
        self.register_buffer(
            "index", ((where[:, :, None] - where[:, None, :] + 1) * torch.tensor([3, 1])[:, None, None]).sum(0)
        )
        self.register_buffer("mask", torch.zeros(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        B0, L, C = x.shape
        x = x.view(-1, 4, C)
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = q * (C // self.num_heads) ** -0.5 @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        attn = attn.view(B // 2, 2, self.num_heads, N, N) + self.mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, self.num_heads, N, N).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C)).view(B0, L, C)


class Lucid(nn.Module):
    """vit-pytorch: heads are an axis of an einops pattern; the submodel's number of heads need not be a divisor."""

    def __init__(self, dim: int = 32, heads: int = 5, dim_head: int = 6) -> None:
        super().__init__()
        self.heads, self.scale, self.norm = heads, dim_head**-0.5, nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in qkv)
        attn = (torch.matmul(q, k.transpose(-1, -2)) * self.scale).softmax(dim=-1)
        return self.to_out(rearrange(torch.matmul(attn, v), "b h n d -> b n (h d)"))


class ViT(nn.Module):
    """vit-pytorch: patches by a layer of einops, a class token by `repeat`; both layers have the same shapes."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        patches = Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=4, p2=4)
        self.patch = nn.Sequential(patches, nn.LayerNorm(48), nn.Linear(48, dim), nn.LayerNorm(dim))
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 5, dim))
        self.layers = nn.ModuleList([nn.ModuleList([Lucid(), feed_forward(dim)]) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, img: Tensor) -> Tensor:
        x = self.patch(img)
        x = torch.cat((repeat(self.cls, "1 1 d -> b 1 d", b=len(img)), x), dim=1)
        x += self.pos[:, : x.shape[1]]
        for attn, feed in self.layers:
            x = attn(x) + x
            x = feed(x) + x
        return self.head(self.norm(x)[:, 0])


def feed_forward(dim: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 24), nn.GELU(), nn.Linear(24, dim))


class FusedPattern(nn.Module):
    """Queries, keys and values are an axis of the pattern, and the products are einops' too."""

    def __init__(self, dim: int = 30, heads: int = 5) -> None:
        super().__init__()
        self.heads, self.qkv, self.o = heads, nn.Linear(32, dim * 3), nn.Linear(dim, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        attn = einsum(q, k, "b h i d, b h j d -> b h i j").softmax(-1)
        return self.o(rearrange(einsum(attn, v, "b h i j, b h j d -> b h i d"), "b h n d -> b n (h d)"))


class Layered(nn.Module):
    """Rearrangements are einops layers, which hold the axes in a tuple."""

    def __init__(self, dim: int = 30, heads: int = 5) -> None:
        super().__init__()
        split = Rearrange("b n (h d) -> b h n d", h=heads)
        self.q, self.k, self.v = (nn.Sequential(nn.Linear(32, dim), split) for _ in range(3))
        self.o = nn.Sequential(Rearrange("b h n d -> b n (h d)"), nn.Linear(dim, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Perceiver(nn.Module):
    """Heads are part of the batch dim."""

    def __init__(self, dim: int = 30, heads: int = 5) -> None:
        super().__init__()
        self.heads, self.to_q, self.to_kv = heads, nn.Linear(32, dim, bias=False), nn.Linear(32, 2 * dim, bias=False)
        self.latents, self.to_out = nn.Parameter(torch.randn(3, 32)), nn.Linear(dim, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.heads
        q, (k, v) = self.to_q(repeat(self.latents, "n d -> b n d", b=len(x))), self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=h) for t in (q, k, v))
        attn = torch.einsum("b i d, b j d -> b i j", q, k).softmax(dim=-1)
        out = torch.einsum("b i j, b j d -> b i d", attn, v)
        return self.to_out(rearrange(out, "(b h) n d -> b n (h d)", h=h)).mean(1, keepdim=True).expand_as(x)


class LinearAttention(nn.Module):
    """Diffusion models: attention between channels of an image."""

    def __init__(self, dim: int = 32, heads: int = 5, dim_head: int = 6) -> None:
        super().__init__()
        self.heads, hidden = heads, heads * dim_head
        self.to_qkv, self.to_out = nn.Conv2d(dim, hidden * 3, 1, bias=False), nn.Conv2d(hidden, dim, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = rearrange(tokens, "b (h w) c -> b c h w", h=2)
        h, w = x.shape[2:]
        qkv = self.to_qkv(x).chunk(3, dim=1)
        q, k, v = (rearrange(t, "b (h c) x y -> b h c (x y)", h=self.heads) for t in qkv)
        context = torch.einsum("b h d n, b h e n -> b h d e", k.softmax(dim=-1), v)
        out = torch.einsum("b h d e, b h d n -> b h e n", context, q.softmax(dim=-2))
        out = rearrange(out, "b h c (x y) -> b (h c) x y", h=self.heads, x=h, y=w)
        return rearrange(self.to_out(out), "b c h w -> b (h w) c")


@dataclass
class Settings:
    heads: int = 4
    widths: dict[str, int] = field(default_factory=lambda: {"key": 8})


class Configured(nn.Module):
    """Sizes in a dataclass and a dictionary, under names of the user's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.args, self.lengths = Settings(), {"counts": [4, 4]}
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], self.args.heads, -1).transpose(1, 2)
        k, v = (p(x).view(*x.shape[:2], self.lengths["counts"][1], -1).transpose(1, 2) for p in (self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Inside(nn.Module):
    """A transformer's layer around an attention, with a feed-forward part of 24 units."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.block, self.head = GPTBlock(attention, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


def layer(attention: Callable[[], nn.Module], heads: int, example: Any = STATES) -> Case:
    return Case(lambda: Inside(attention()), example, {"block.attn": heads, "block.mlp": 24})


SPELLINGS: dict[str, Case] = {
    "nanoGPT": Case(GPT, TOKENS, {"h.0.attn": 4, "h.0.mlp": 24, "h.1.attn": 4, "h.1.mlp": 24}),
    "nanoGPT without flash attention": Case(lambda: GPT(layers=1, flash=False), TOKENS, {"h.0.attn": 4, "h.0.mlp": 24}),
    "minGPT": layer(Separate, 4),
    "DINO": layer(lambda: ViTAttention(scale=8**-0.5), 4),
    "scale computed in the forward": layer(ViTAttention, 4),
    "timm": layer(HeadDim, 4),
    "grouped queries": layer(GroupedQueries, 4),
    "shared keys": layer(SharedKeys, 8),
    "fairseq": layer(Asserting, 4),
    "counted heads": layer(CountedHeads, 4),
    "own width": layer(OwnWidth, 4),
    "unrolled": Case(
        lambda: Inside(Unrolled()), STATES, {"block.attn.qkv.0": 4, "block.attn.qkv.1": 2, "block.mlp": 24}
    ),
    "Swin": layer(Windows, 4, rand(2, 8, 32)),
    "vit-pytorch": Case(ViT, rand(2, 3, 8, 8), {"layers.0.0": 5, "layers.0.1": 24, "layers.1.0": 5, "layers.1.1": 24}),
    "fused pattern": layer(FusedPattern, 5),
    "layers of einops": layer(Layered, 5),
    "perceiver": Case(lambda: Inside(Perceiver()), STATES, {"block.attn": 32, "block.attn.to_q": 5, "block.mlp": 24}),
    "linear attention": layer(LinearAttention, 5),
    "configured": layer(Configured, 4),
}
