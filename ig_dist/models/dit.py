"""The diffusion transformer with an auxiliary head on an intermediate block (Internal Guidance, 2512.24176).

The velocity and the time follow the convention of `ig_dist.diffusion.path`: t = 0 is data, t = 1 is noise.
Parameter names are the published ones, except that the published `final_layer_xr` is `aux_layer` here.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ig_dist import rng
from ig_dist.models.layers import (
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    sincos_pos_embed,
)


@dataclass(frozen=True)
class DiTConfig:
    """What a model is built from.

    Attributes:
        depth: number of blocks.
        hidden_size: width D of the tokens.
        num_heads: attention heads per block.
        patch_size: side of a patch, in latent pixels.
        input_size: side of the latents, in latent pixels.
        in_channels: channels of the latents.
        num_classes: number of classes; the label `num_classes` itself is the null label.
        aux_depth: the auxiliary head reads the output of this many blocks; None builds no such head.
        mlp_ratio: width of the MLP over D.
        time_input: what enters the time embedding.
    """

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    input_size: int
    in_channels: int
    num_classes: int
    aux_depth: int | None
    mlp_ratio: float = 4.0
    time_input: Literal["t", "one_minus_t"] = "t"

    def __post_init__(self) -> None:
        for name in (
            "depth",
            "hidden_size",
            "num_heads",
            "patch_size",
            "input_size",
            "in_channels",
            "num_classes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.input_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide input_size {self.input_size}; "
                "choose a preset whose patch divides the latents"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}; "
                "choose a number of heads that does"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 4, as the sine-cosine table needs; change it"
            )
        if self.aux_depth is not None and not 1 <= self.aux_depth < self.depth:
            raise ValueError(
                f"aux_depth {self.aux_depth} is outside 1..{self.depth - 1} for {self.depth} blocks; "
                "choose an intermediate block, or null for no auxiliary head"
            )
        if self.time_input not in ("t", "one_minus_t"):
            raise ValueError(f"time_input is {self.time_input!r}; write 't' or 'one_minus_t'")


class DiTOutput(NamedTuple):
    """Predicted velocities, (B, C, H, W) each; the second is None exactly when there is no auxiliary head."""

    velocity: Tensor
    aux_velocity: Tensor | None


class DiT(nn.Module):
    """A class-conditional diffusion transformer (SiT blocks, arXiv 2401.08740).

    It can be built on the meta device; `initialize` then sets every parameter and buffer.
    """

    pos_embed: Tensor  # (1, T, D), a persistent buffer: engines then never shard it

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.register_buffer("pos_embed", _position_table(config))
        self.blocks = nn.ModuleList(Block(width, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.patch_size, config.in_channels)
        self.aux_layer = None if config.aux_depth is None else FinalLayer(width, config.patch_size, config.in_channels)

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.config.num_classes

    @property
    def has_aux_head(self) -> bool:
        """Whether forward returns an auxiliary velocity."""
        return self.config.aux_depth is not None

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> DiTOutput:
        """Predict the velocity at (x_t, t).

        Args:
            x_t: (B, C, H, W) noised latents.
            t: (B,) times in [0, 1]; kept in float32 up to the embedding's MLP.
            labels: (B,) int64 in 0..num_classes, num_classes being the null label.
        """
        x = self.x_embedder(x_t) + self.pos_embed
        time = t if self.config.time_input == "t" else 1 - t
        condition = self.t_embedder(time) + self.y_embedder(labels)
        aux_velocity = None
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, condition)
            if self.aux_layer is not None and number == self.config.aux_depth:
                aux_velocity = self._unpatchify(self.aux_layer(x, condition))
        return DiTOutput(self._unpatchify(self.final_layer(x, condition)), aux_velocity)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, T, patch * patch * C) to (B, C, H, W)."""
        patch, size = self.config.patch_size, self.config.input_size
        side = size // patch
        grid = patches.reshape(-1, side, side, patch, patch, self.config.in_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.in_channels, size, size)


def count_parameters(model: DiT) -> int:
    """Count the model's numbers as published counts do: all parameters plus the `pos_embed` table."""
    return sum(parameter.numel() for parameter in model.parameters()) + model.pos_embed.numel()


@torch.no_grad()
def initialize(model: DiT, seed: int) -> None:
    """Set every parameter from (seed, its name) and rebuild `pos_embed`, in place, on the model's device.

    SiT's published scheme: Xavier uniform on linear weights and on the flattened patch kernel, normal(0.02)
    on the label table and the time MLP, zero biases, zero adaLN modulations and zero output linears. It also
    completes a model that was built on the meta device and then given memory by `to_empty`.
    """
    model.pos_embed.copy_(_position_table(model.config))
    for name, parameter in model.named_parameters():
        ids = torch.tensor([rng.name_id(name)], device=parameter.device)
        starts_at_zero = "adaLN_modulation" in name or name.startswith(("final_layer.", "aux_layer."))
        if starts_at_zero or name.endswith(".bias"):
            parameter.zero_()
        elif name.startswith(("y_embedder.", "t_embedder.")):
            parameter.copy_(0.02 * rng.normal(seed, rng.Purpose.INIT, ids, parameter.shape)[0])
        else:
            fan_in = parameter[0].numel()
            bound = math.sqrt(6.0 / (fan_in + parameter.shape[0]))
            draw = rng.uniform(seed, rng.Purpose.INIT, ids, parameter.shape)[0]
            parameter.copy_((2.0 * draw - 1.0) * bound)


def _position_table(config: DiTConfig) -> Tensor:
    return sincos_pos_embed(config.hidden_size, config.input_size // config.patch_size)
