"""Qwen2-VL for training: transformers' parameter names, pictures of one size in a batch, explicit attention.

transformers' own forward costs several times more on a CPU (one sequence at a time in the tower, float32
detours); tests compare both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.data import CELL, CHARACTERS, MAX_TEXT
from demo.labels import LABELS
from demo.vocabulary import TOKEN_ID, VOCAB_SIZE

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
PATCH = CELL // 2


@dataclass(frozen=True)
class Sizes:
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rope_theta: float = 100.0
    mrope_section: tuple[int, int, int] = (8, 12, 12)
    embed_dim: int = 256
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., n, head_dim], cos and sin [..., n, head_dim]: rotate-half."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """[B, heads, n, head_dim] -> [B, n, heads * head_dim]"""
    if q.is_cuda:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:  # scaled_dot_product_attention in bf16 is 3-4 times slower than this on a CPU
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
        if bias is not None:
            scores = scores + bias
        out = torch.matmul(torch.softmax(scores, -1), v)
    return out.transpose(1, 2).flatten(2)


class PatchEmbed(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, sizes.embed_dim, (2, PATCH, PATCH), bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """[N, P, 588] of still pictures: both temporal slices see the frame. [N, 2, P, 588]: each its own."""
        weight = self.proj.weight.to(rows.dtype)
        if rows.dim() == 3:
            return F.linear(rows, weight.sum(2).flatten(1))
        first, second = (weight[:, :, k].flatten(1) for k in range(2))
        return F.linear(rows[:, 0], first) + F.linear(rows[:, 1], second)


class VisionAttention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.qkv = nn.Linear(sizes.embed_dim, 3 * sizes.embed_dim)
        self.proj = nn.Linear(sizes.embed_dim, sizes.embed_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, None))
        return out


class VisionMlp(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.embed_dim, sizes.embed_dim * sizes.mlp_ratio)
        self.fc2 = nn.Linear(sizes.embed_dim * sizes.mlp_ratio, sizes.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        out: Tensor = self.fc2(x * torch.sigmoid(1.702 * x))
        return out


class VisionBlock(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.embed_dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(sizes.embed_dim, eps=1e-6)
        self.attn = VisionAttention(sizes)
        self.mlp = VisionMlp(sizes)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchMerger(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = 4 * sizes.embed_dim
        self.ln_q = nn.LayerNorm(sizes.embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, sizes.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.ln_q(x).unflatten(1, (-1, 4)).flatten(2))
        return out


class VisionTower(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.patch_embed = PatchEmbed(sizes)
        self.blocks = nn.ModuleList(VisionBlock(sizes) for _ in range(sizes.depth))
        self.merger = PatchMerger(sizes)

    def rows(self, pixels: Tensor) -> Tensor:
        """[N, h, w, 3] uint8 -> [N, patches in merge order, 588]; as the image processor, one frame."""
        n, h, w, _ = pixels.shape
        mean, std = (torch.tensor(v, device=pixels.device) for v in (IMAGE_MEAN, IMAGE_STD))
        x = (pixels.float() / 255 - mean) / std
        x = x.view(n, h // CELL, 2, PATCH, w // CELL, 2, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
        return x.reshape(n, -1, 3 * PATCH * PATCH)

    def rotation(self, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [patches, head_dim] for a grid of merged cells h, w."""
        quarter = self.sizes.embed_dim // self.sizes.num_heads // 4
        frequencies = 10000.0 ** -(torch.arange(quarter, device=device) / quarter)
        grid = torch.stack(
            torch.meshgrid(*(torch.arange(2 * s, device=device) for s in (h, w)), indexing="ij"), -1
        )
        order = grid.view(h, 2, w, 2, 2).transpose(1, 2).reshape(-1, 2)
        angles = (order[:, :, None] * frequencies).flatten(1).repeat(1, 2)
        return angles.cos(), angles.sin()

    def forward(self, pixels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Pictures [N, h, w, 3], or clips [N / steps, 2 * steps, h, w, 3].
        -> patches [N, P, embed_dim] before the merger, merged [N, P / 4, hidden_size]"""
        rotation = self.rotation(pixels.shape[-3] // CELL, pixels.shape[-2] // CELL, pixels.device)
        cos, sin = (r.to(dtype) for r in rotation)
        if pixels.dim() == 5:
            rows = self.rows(pixels.flatten(0, 1)).unflatten(0, (-1, 2))
        else:
            rows = self.rows(pixels)
        x = self.patch_embed(rows.to(dtype))
        for block in self.blocks:
            x = block(x, cos, sin)
        return x, self.merger(x)


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-6)


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.groups = sizes.num_attention_heads // sizes.num_key_value_heads
        kv = sizes.num_key_value_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.k_proj = nn.Linear(sizes.hidden_size, kv)
        self.v_proj = nn.Linear(sizes.hidden_size, kv)
        self.o_proj = nn.Linear(sizes.hidden_size, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
        out: Tensor = self.o_proj(attend(q, k, v, bias))
        return out


class Mlp(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.up_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(sizes.hidden_size)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size)
        self.mlp = Mlp(sizes)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class LanguageModel(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, sizes.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(sizes) for _ in range(sizes.num_hidden_layers))
        self.norm = RMSNorm(sizes.hidden_size)

    def rotation(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[3, B, L] -> cos and sin [B, 1, L, head_dim]"""
        half = self.sizes.head_dim // 2
        frequencies = self.sizes.rope_theta ** -(torch.arange(half, device=position_ids.device) / half)
        parts = (position_ids[..., None] * frequencies).split(self.sizes.mrope_section, -1)
        angles = torch.cat([part[k] for k, part in enumerate(parts)], -1).repeat(1, 1, 2)[:, None]
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, position_ids: Tensor, bias: Tensor) -> Tensor:
        cos, sin = (r.to(x.dtype) for r in self.rotation(position_ids))
        for layer in self.layers:
            x = layer(x, cos, sin, bias)
        out: Tensor = self.norm(x)
        return out


class DenseHeads(nn.Module):
    """Linear readers of one cell, for training only: what covers it, where that is, where the cell is."""

    BINS = 21  # a coordinate 0..1 is a weight on two neighbouring bins

    def __init__(self, width: int, slots: bool) -> None:
        super().__init__()
        self.labels = nn.ModuleDict({name: nn.Linear(width, size) for name, size in LABELS.items()})
        self.places = nn.Linear(width, 6 * self.BINS)
        self.slots = nn.Linear(width, MAX_TEXT * (1 + len(CHARACTERS))) if slots else None


class DemoModel(nn.Module):
    """`visual` and `model` carry the checkpoint's names; the heads are dropped at export."""

    def __init__(self, sizes: Sizes | None = None) -> None:
        super().__init__()
        self.sizes = sizes or Sizes()
        self.visual = VisionTower(self.sizes)
        self.model = LanguageModel(self.sizes)
        self.patch_heads = DenseHeads(self.sizes.embed_dim, slots=False)
        self.merged_heads = DenseHeads(self.sizes.hidden_size, slots=True)
        self.initialize()

    def initialize(self) -> None:
        layers = 2 * max(self.sizes.num_hidden_layers, self.sizes.depth)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight")):
                nn.init.normal_(p, std=0.03 / layers**0.5)
            else:
                nn.init.normal_(p, std=0.03)

    def exported(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if k.startswith(("visual.", "model."))}

    def hidden(
        self,
        input_ids: Tensor,
        merged: list[Tensor],
        position_ids: Tensor,
        segments: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """-> [B, L, hidden_size]; `merged` are the pictures' or clips' cells in order of their appearance."""
        embeds = self.model.embed_tokens(input_ids).to(dtype)
        if merged:
            pads = [TOKEN_ID["<|image_pad|>"], TOKEN_ID["<|video_pad|>"]]
            places = torch.isin(input_ids, torch.tensor(pads, device=input_ids.device)).unsqueeze(-1)
            embeds = embeds.masked_scatter(places, torch.cat(merged, 1).to(dtype))
        order = torch.arange(input_ids.shape[1], device=input_ids.device)
        same = segments[:, None, :] == segments[:, :, None]
        seen = (order[None, :] <= order[:, None]) & (same | (segments[:, None, :] == 0))
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -1e4)[:, None]
        out: Tensor = self.model(embeds, position_ids, bias)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype))
