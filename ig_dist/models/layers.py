"""The layers of SiT (arXiv 2401.08740) and LightningDiT (arXiv 2501.01423), with the published parameter names."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, scaled_dot_product_attention, silu

NormKind = Literal["layernorm", "rmsnorm"]
MlpKind = Literal["gelu", "swiglu"]
Rope = tuple[Tensor, Tensor]  # cosines, and sines of which every other one is negative, (T, head width) each


def sincos_pos_embed(width: int, grid_size: int) -> Tensor:
    """Return the 2-D sine-cosine position table (1, grid_size^2, width), rows first (MAE, arXiv 2111.06377).

    The first half of the width encodes the column and the second the row; each half is sines, then cosines.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid_size, width / 2)
    columns = axis[None, :, :].expand(grid_size, -1, -1)
    rows = axis[:, None, :].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, grid_size**2, width).to(torch.float32)


class RotaryTable(nn.Module):
    """Angles of the 2-D rotary embedding (RoFormer, arXiv 2104.09864; in two dimensions as in EVA-02, 2303.11331).

    The first half of a head's width turns by the row and the second by the column, neighbours in pairs. Like the
    sine-cosine table it is a persistent buffer: stored and loaded with the weights. It is called once for all blocks.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_width: int, grid_size: int) -> None:
        super().__init__()
        cos, sin = rotary_table(head_width, grid_size)
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)

    def forward(self) -> Rope:
        even, odd = self.freqs_sin[:, ::2], self.freqs_sin[:, 1::2]
        return self.freqs_cos, torch.stack([-even, odd], dim=-1).flatten(-2)


def rotary_table(head_width: int, grid_size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (grid_size^2, head_width) of the positions, rows first."""
    pairs = head_width // 4
    frequencies = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    axis = angles.repeat_interleave(2, dim=1)  # (grid_size, head_width / 2)
    rows = axis[:, None, :].expand(-1, grid_size, -1)
    columns = axis[None, :, :].expand(grid_size, -1, -1)
    both = torch.cat([rows, columns], dim=2).reshape(grid_size**2, head_width)
    return both.cos().to(torch.float32), both.sin().to(torch.float32)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair of neighbours of x (B, heads, T, head width) by its position's angle."""
    cos, signed_sin = rope
    swapped = x.reshape(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, signed_sin)


class AffineNorm(nn.Module):
    """LayerNorm with weight and bias, or RMSNorm with weight, along the last dimension.

    Under autocast both are rounded to its type, as the other weights are: FSDP2 gathers them so, and engines agree.
    """

    bias: nn.Parameter | None

    def __init__(self, kind: NormKind, width: int, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if kind == "layernorm" else None)

    def forward(self, x: Tensor) -> Tensor:
        out = _normalised(self.kind, x, self.eps) * _rounded(self.weight)
        return out if self.bias is None else out + _rounded(self.bias)


def _normalised(kind: NormKind, x: Tensor, eps: float) -> Tensor:
    normalise = layer_norm if kind == "layernorm" else rms_norm
    return normalise(x, x.shape[-1:], eps=eps)


def _rounded(weight: Tensor) -> Tensor:
    device = weight.device.type
    if weight.is_meta or not torch.is_autocast_enabled(device):  # there is no autocast for shapes
        return weight
    return weight.to(torch.get_autocast_dtype(device))


class ModulatedNorm(nn.Module):
    """LayerNorm without weights, or RMSNorm with its weight; then scaled (by 1 + scale, (B, D)) and shifted."""

    weight: nn.Parameter | None

    def __init__(self, kind: NormKind, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.register_parameter("weight", nn.Parameter(torch.ones(width)) if kind == "rmsnorm" else None)

    def forward(self, x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
        normalised = _normalised(self.kind, x, 1e-6)
        factor = (1 + scale).unsqueeze(1)
        if self.weight is not None:  # not of the tokens: it costs no pass over them, forward or backward
            factor = (factor.float() * _rounded(self.weight)).to(normalised.dtype)
        return normalised * factor if shift is None else torch.addcmul(shift.unsqueeze(1), normalised, factor)


class PatchConv(nn.Conv2d):
    """A convolution whose stride is its kernel, as one matrix product: (B, C, H, W) to tokens (B, T, D), rows first.

    A convolution's tokens would lie in memory channel by channel, and so would the whole residual stream after them.
    """

    def forward(self, latents: Tensor) -> Tensor:
        batch, channels, height, width = latents.shape
        patch = self.kernel_size[0]
        patches = latents.reshape(batch, channels, height // patch, patch, width // patch, patch).permute(
            0, 2, 4, 1, 3, 5
        )
        return linear(patches.flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Latents (B, C, H, W) to tokens (B, T, D), rows first."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = PatchConv(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents.to(self.proj.weight.dtype))


class TimestepEmbedder(nn.Module):
    """Times (B,) in [0, 1], not scaled, to vectors (B, D): 256 cosines and sines, then a small MLP."""

    frequency_size = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequency_size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_size // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
        frequencies = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(frequencies.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) to vectors (B, D); row `num_classes` of the table is the null label."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, T, D); queries and keys may be normed, then turned by position."""

    def __init__(self, width: int, num_heads: int, qk_norm: NormKind | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (_head_norm(qk_norm, width // num_heads) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        # cut before it is turned: backward then joins the gradients where qkv's lies, without a copy
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, T, D / heads) each
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        attended = scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


def _head_norm(kind: NormKind | None, width: int) -> nn.Module:
    # the epsilons of timm and of LightningDiT
    return nn.Identity() if kind is None else AffineNorm(kind, width, eps=1e-5 if kind == "layernorm" else 1e-6)


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Linear to a gate and values, their gated product, linear (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, values = self.w12(x).chunk(2, dim=-1)
        return self.w3(silu(gate) * values)


def mlp_width(kind: MlpKind, width: int, ratio: float) -> int:
    """Hidden width: two thirds for SwiGLU, which has three matrices instead of two."""
    hidden = int(width * ratio)
    return hidden if kind == "gelu" else int(2 / 3 * hidden)
