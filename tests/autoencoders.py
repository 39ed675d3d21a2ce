"""Autoencoders for the tests: small ones of diffusers', and latent diffusion's own network in plain torch."""

import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from ig_dist.autoencoders.tokenizers import get_tokenizer
from ig_dist.errors import ConfigError

SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}
HUB_NAME = "stabilityai/sd-vae-ft-ema"


def save_vae(folder: Path, seed: int = 0, **settings: object) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoencoderKL(**{**SMALL, **settings}).eval().requires_grad_(False)
    model.save_pretrained(folder)
    return model


def images(number: int, side: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, side, side, 3), dtype=torch.uint8, generator=generator)


def error_of(name: str) -> str:
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        get_tokenizer(name)
    assert time.monotonic() - began < 20, "an error must not take long"
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


# Latent diffusion's autoencoder, written from its description, with its names.


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inputs, eps=1e-6), nn.GroupNorm(32, outputs, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))  # (B, C, positions)
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5, dim=2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


class Convolution(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=0 if stride == 2 else 1)


def middle(width: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1, mid.attn_1, mid.block_2 = Block(width, width), Attention(width), Block(width, width)
    return mid


def level(inputs: int, width: int, blocks: int, attention: bool) -> nn.Module:
    part = nn.Module()
    part.block = nn.ModuleList(Block(inputs if i == 0 else width, width) for i in range(blocks))
    part.attn = nn.ModuleList(Attention(width) for _ in range(blocks if attention else 0))
    return part


def run_level(part: nn.Module, x: Tensor) -> Tensor:
    for i, block in enumerate(part.block):
        x = block(x)
        x = part.attn[i](x) if len(part.attn) else x
    return x


class LDM(nn.Module):
    """Levels of ``widths``, from the image to the latent; those in ``attention`` attend after every block."""

    def __init__(self, widths: list[int], blocks: int, attention: list[int], latent: int) -> None:
        super().__init__()
        last, levels = widths[-1], range(len(widths))
        encoder, decoder = nn.Module(), nn.Module()
        encoder.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        encoder.down = nn.ModuleList(level(widths[max(i - 1, 0)], widths[i], blocks, i in attention) for i in levels)
        for part in encoder.down[:-1]:
            part.downsample = Convolution(part.block[-1].conv2.out_channels, 2)
        encoder.mid, encoder.norm_out = middle(last), nn.GroupNorm(32, last, eps=1e-6)
        encoder.conv_out = nn.Conv2d(last, 2 * latent, 3, padding=1)
        decoder.conv_in = nn.Conv2d(latent, last, 3, padding=1)
        decoder.mid, decoder.norm_out = middle(last), nn.GroupNorm(32, widths[0], eps=1e-6)
        decoder.up = nn.ModuleList(
            level(widths[min(i + 1, levels[-1])], widths[i], blocks + 1, i in attention) for i in levels
        )
        for i in levels[1:]:
            decoder.up[i].upsample = Convolution(widths[i], 1)
        decoder.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        self.encoder, self.decoder = encoder, decoder
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1), nn.Conv2d(latent, latent, 1)

    def moments(self, x: Tensor) -> Tensor:
        x = self.encoder.conv_in(x)
        for part in self.encoder.down:
            x = run_level(part, x)
            if hasattr(part, "downsample"):
                x = part.downsample.conv(pad(x, (0, 1, 0, 1)))
        x = self.encoder.mid.block_2(self.encoder.mid.attn_1(self.encoder.mid.block_1(x)))
        mean, log_variance = self.quant_conv(self.encoder.conv_out(silu(self.encoder.norm_out(x)))).chunk(2, dim=1)
        return torch.cat([mean, (log_variance.clamp(-30, 20) / 2).exp()], dim=1)

    def images(self, z: Tensor) -> Tensor:
        x = self.decoder.conv_in(self.post_quant_conv(z))
        x = self.decoder.mid.block_2(self.decoder.mid.attn_1(self.decoder.mid.block_1(x)))
        for part in reversed(self.decoder.up):
            x = run_level(part, x)
            if hasattr(part, "upsample"):
                x = part.upsample.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        return self.decoder.conv_out(silu(self.decoder.norm_out(x)))
