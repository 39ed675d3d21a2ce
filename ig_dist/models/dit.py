"""The diffusion transformer with an auxiliary head on an intermediate block (Internal Guidance, 2512.24176).

The velocity and the time follow the convention of `ig_dist.diffusion.path`: t = 0 is data, t = 1 is noise.
Parameter names are the published ones, except that the published `final_layer_xr` is `aux_layer` here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args, get_origin

import torch
from torch import Tensor, nn

from ig_dist import rng
from ig_dist.models.layers import (
    Attention,
    LabelEmbedder,
    Mlp,
    MlpKind,
    ModulatedNorm,
    NormKind,
    PatchEmbed,
    Rope,
    RotaryTable,
    SwiGLU,
    TimestepEmbedder,
    mlp_width,
    rotary_table,
    sincos_pos_embed,
)

MOST_BLOCKS = 1000  # the published ones have up to 40; a file may ask for any number


@dataclass(frozen=True)
class DiTConfig:
    """What a model is built from. SiT's and LightningDiT's are in `presets.py`."""

    depth: int  # number of blocks
    hidden_size: int  # width D of the tokens
    num_heads: int
    patch_size: int  # in latent pixels, as is the next
    input_size: int
    in_channels: int
    num_classes: int  # the label `num_classes` itself is the null label
    aux_depth: int | None  # the auxiliary head reads the output of this many blocks; None builds no such head
    mlp_ratio: float = 4.0  # width of the MLP over D
    time_input: Literal["t", "one_minus_t"] = "t"
    norm: NormKind = "layernorm"  # without weights; or RMSNorm with weight
    mlp: MlpKind = "gelu"
    rope: bool = False  # turn queries and keys by their position, beside the sine-cosine table
    qk_norm: bool = False  # norm queries and keys, with weights: `norm` says which
    modulation_shift: bool = True  # blocks shift besides scaling
    learn_sigma: bool = False  # heads predict 2 C channels: the first C are the velocity, the rest is left alone
    aux_init: Literal["zero", "xavier"] = "zero"  # of the auxiliary head: as of the final head, or drawn

    def __post_init__(self) -> None:
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(field.type)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} is {value}; it must be at least 1")
            if get_origin(field.type) is Literal and value not in allowed:
                raise ValueError(f"{field.name} is {value!r}; write {' or '.join(map(repr, allowed))}")
        if self.depth > MOST_BLOCKS:
            raise ValueError(f"depth is {self.depth}; it must be at most {MOST_BLOCKS}")
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
        if self.rope and self.head_width % 4:
            raise ValueError(
                f"rope needs heads whose width is a multiple of 4, and hidden_size {self.hidden_size} over num_heads"
                f" {self.num_heads} is {self.head_width}; choose another num_heads, or no rope"
            )

    @property
    def out_channels(self) -> int:
        """Channels that a head predicts."""
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    @property
    def grid_size(self) -> int:
        """Patches along a side of the latents."""
        return self.input_size // self.patch_size

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads


class Block(nn.Module):
    """A transformer block on tokens (B, T, D), by a condition (B, D): adaLN-zero (DiT, section 3.2)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, norm = config.hidden_size, config.norm
        self.norm1 = ModulatedNorm(norm, width)
        self.attn = Attention(width, config.num_heads, norm if config.qk_norm else None)
        self.norm2 = ModulatedNorm(norm, width)
        mlp = Mlp if config.mlp == "gelu" else SwiGLU
        self.mlp = mlp(width, mlp_width(config.mlp, width, config.mlp_ratio))
        self.num_modulations = 6 if config.modulation_shift else 4
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.num_modulations * width))

    def forward(self, x: Tensor, condition: Tensor, rope: Rope | None) -> Tensor:
        modulation = self.adaLN_modulation(condition).chunk(self.num_modulations, dim=1)
        if self.num_modulations == 6:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        else:
            shift_msa = shift_mlp = None
            scale_msa, gate_msa, scale_mlp, gate_mlp = modulation
        x = x + gate_msa.unsqueeze(1) * self.attn(self.norm1(x, shift_msa, scale_msa), rope)
        return x + gate_mlp.unsqueeze(1) * self.mlp(self.norm2(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """A prediction head: tokens (B, T, D) to patches (B, T, patch_size^2 * out_channels)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_final = ModulatedNorm(config.norm, width)
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(self.norm_final(x, shift, scale))


class DiTOutput(NamedTuple):
    """Predicted velocities, (B, C, H, W) each; the second is None where there is no auxiliary head, or none was run."""

    velocity: Tensor
    aux_velocity: Tensor | None


class DiT(nn.Module):
    """A class-conditional diffusion transformer: SiT (arXiv 2401.08740) or LightningDiT (arXiv 2501.01423).

    It can be built on the meta device; `initialize` then sets every parameter and buffer.
    """

    pos_embed: Tensor  # (1, T, D), a persistent buffer: engines then never shard it
    residual: torch.dtype | None = None
    """Type of the tokens between blocks; None: that of the weights. Norms and sums compute in fp32 on GPUs always."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.register_buffer("pos_embed", _position_table(config))
        self.feat_rope = RotaryTable(config.head_width, config.grid_size) if config.rope else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.aux_layer = None if config.aux_depth is None else FinalLayer(config)

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.config.num_classes

    @property
    def has_aux_head(self) -> bool:
        """Whether forward returns an auxiliary velocity."""
        return self.config.aux_depth is not None

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor, *, with_aux: bool = True) -> DiTOutput:
        """Predict the velocity at x_t (B, C, H, W) and t (B,), kept in float32 up to the embedding's MLP.

        ``labels``, (B,) int64, are 0..num_classes, the last the null label. ``with_aux``: run the auxiliary head too.
        """
        x = self.x_embedder(x_t) + self.pos_embed
        if self.residual is not None:
            x = x.to(self.residual)
        time = t if self.config.time_input == "t" else 1 - t
        condition = self.t_embedder(time) + self.y_embedder(labels)
        rope = None if self.feat_rope is None else self.feat_rope()
        aux_velocity = None
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, condition, rope)
            if with_aux and self.aux_layer is not None and number == self.config.aux_depth:
                aux_velocity = self._unpatchify(self.aux_layer(x, condition))
        return DiTOutput(self._unpatchify(self.final_layer(x, condition)), aux_velocity)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, T, patch * patch * out channels) to the velocity (B, C, H, W)."""
        patch, side, channels = self.config.patch_size, self.config.grid_size, self.config.in_channels
        grid = patches.reshape(-1, side, side, patch, patch, self.config.out_channels)[..., :channels]
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch)


def load_model(config: DiTConfig, weights: Mapping[str, Tensor]) -> DiT:
    """A model that holds these very tensors, in eval mode."""
    with torch.device("meta"):
        model = DiT(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def count_parameters(model: DiT) -> int:
    """Count the model's numbers as published counts do: all parameters plus the `pos_embed` table."""
    return sum(parameter.numel() for parameter in model.parameters()) + model.pos_embed.numel()


@torch.no_grad()
def initialize(model: DiT, seed: int) -> None:
    """Set every parameter from (seed, its name) and rebuild `pos_embed`, in place, on the model's device.

    SiT's published scheme: Xavier uniform on linear weights and on the flattened patch kernel, normal(0.02) on the
    label table and the time MLP, zero biases, zero adaLN modulations and zero output linears; norms start as the
    identity. LightningDiT leaves its auxiliary head as drawn. The model may come from the meta device (by `to_empty`).
    """
    config = model.config
    model.pos_embed.copy_(_position_table(config))
    if model.feat_rope is not None:
        cos, sin = rotary_table(config.head_width, config.grid_size)
        model.feat_rope.freqs_cos.copy_(cos)
        model.feat_rope.freqs_sin.copy_(sin)
    for name, parameter in model.named_parameters():
        ids = torch.tensor([rng.name_id(name)], device=parameter.device)
        drawn_head = name.startswith("aux_layer.") and config.aux_init == "xavier"
        starts_at_zero = "adaLN_modulation" in name or name.startswith(("final_layer.", "aux_layer."))
        if name.endswith(".bias") or (starts_at_zero and parameter.ndim > 1 and not drawn_head):
            parameter.zero_()
        elif parameter.ndim == 1:  # of a norm
            parameter.fill_(1.0)
        elif name.startswith(("y_embedder.", "t_embedder.")):
            parameter.copy_(0.02 * rng.normal(seed, rng.Purpose.INIT, ids, parameter.shape)[0])
        else:
            fan_in = parameter[0].numel()
            bound = math.sqrt(6.0 / (fan_in + parameter.shape[0]))
            draw = rng.uniform(seed, rng.Purpose.INIT, ids, parameter.shape)[0]
            parameter.copy_((2.0 * draw - 1.0) * bound)


def _position_table(config: DiTConfig) -> Tensor:
    return sincos_pos_embed(config.hidden_size, config.grid_size)
