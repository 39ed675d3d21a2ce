"""The model's group."""

from typing import Any, Literal, Self

from pydantic import PositiveInt, model_validator

from ig_dist.config.types import Group
from ig_dist.errors import nearest
from ig_dist.models.dit import DiTConfig
from ig_dist.models.presets import PRESETS, Preset


class ModelConfig(Group):
    """The diffusion transformer. What is null comes from the preset; without one, layers are SiT's."""

    preset: str | None = None
    """One of the published sizes: SiT-S, -B, -L or -XL with patch /2, /4 or /8 (``SiT-XL/2``); LightningDiT-B, -L, -XL,
    -1p0B or -1p6B with /1 or /2."""
    depth: PositiveInt | None = None
    """Number of transformer blocks."""
    hidden_size: PositiveInt | None = None
    """Width of the residual stream."""
    num_heads: PositiveInt | None = None
    """Attention heads per block."""
    patch_size: PositiveInt | None = None
    """Side of a patch, in latent pixels."""
    aux_depth: PositiveInt | None = None
    """The auxiliary head reads the output of this many blocks; null: no auxiliary head, no Internal Guidance."""
    time_input: Literal["t", "one_minus_t"] = "t"
    """What enters the time embedding: our t (0 = data), or 1 - t for weights trained the other way round."""
    norm: Literal["layernorm", "rmsnorm"] | None = None
    """LayerNorm without weights (SiT), or RMSNorm with weight (LightningDiT)."""
    mlp: Literal["gelu", "swiglu"] | None = None
    """Two matrices with GELU (SiT), or SwiGLU (LightningDiT)."""
    rope: bool | None = None
    """Queries and keys are turned by their position, beside the sine-cosine table (LightningDiT)."""
    qk_norm: bool = False
    """Norm queries and keys."""
    modulation_shift: bool = True
    """Blocks shift besides scaling (LightningDiT's ``wo_shift`` is false)."""
    learn_sigma: bool = False
    """Heads predict twice the channels, of which the first half is the velocity (the original SiT)."""
    aux_init: Literal["zero", "xavier"] | None = None
    """Initial weights of the auxiliary head: zero (SiT), or drawn (LightningDiT)."""
    input_size: PositiveInt | None = None
    """Side of the latent. Taken from the data index when null."""
    in_channels: PositiveInt | None = None
    """Channels of the latent. Taken from the data index when null."""
    num_classes: PositiveInt | None = None
    """Number of classes. Taken from the data index when null."""

    @model_validator(mode="after")
    def _fill_from_preset(self) -> Self:
        preset: dict[str, Any] = Preset._field_defaults
        if self.preset is not None:
            if self.preset not in PRESETS:
                near = nearest(self.preset, PRESETS, n=3)
                raise ValueError(f"unknown preset {self.preset!r}; the nearest are {', '.join(near)}")
            preset = PRESETS[self.preset]._asdict()
        for name, value in preset.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        missing = [name for name in Preset._fields if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} not given: set model.preset (e.g. SiT-B/2) or each of them")
        self.to_dit(input_size=self.patch_size, in_channels=1, num_classes=1)  # its checks, before data is known
        return self

    def to_dit(self, **missing: int | None) -> DiTConfig:
        """What the model is built from; ``missing`` stands in for shapes that only the data index knows."""
        values = self.model_dump(exclude={"preset"})
        return DiTConfig(**{**values, **{k: v for k, v in missing.items() if values[k] is None}})
