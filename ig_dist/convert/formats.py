"""Published weights and ours: names, the direction of time, and what a model is, read from its weights.

Our names are the published ones but for the auxiliary head. The original SiT and LightningDiT run from noise (t' = 0)
to data: t' = 1 - t, velocity' = -velocity. Their weights get `time_input: one_minus_t` and negated output layers, which
changes no bit but signs and is undone exactly.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Literal, get_args

from torch import Tensor

from ig_dist.errors import unknown
from ig_dist.models.dit import DiTConfig
from ig_dist.models.presets import PRESETS

Format = Literal["sit", "repa", "ig-sit", "lightningdit", "ig-lightningdit"]
FORMATS: tuple[Format, ...] = get_args(Format)
FROM_NOISE = ("sit", "lightningdit", "ig-lightningdit")
"""Formats whose time runs from noise to data."""
_AUX, _THEIR_AUX = "aux_layer.", "final_layer_xr."
_PROJECTORS = "projectors."  # REPA's, of training only


def known_format(text: str) -> Format:
    """A format by its name; ConfigError with the nearest where there is none."""
    for name in FORMATS:
        if name == text:
            return name
    raise unknown("--format", text, FORMATS)


def read_format(weights: Mapping[str, Tensor], given: Format | None) -> Format:
    """The format of published weights: the one given, or read from their names.

    LightningDiT shows by RMSNorm, SwiGLU or RoPE, IG by its head, REPA by its projectors, the original SiT by its
    learned sigma. Without any of them only who trained the model knows which way its time runs.

    Raises:
        ValueError: the weights are not of that format, or can be of several.
    """
    lightning = any(
        name in weights for name in ("blocks.0.norm1.weight", "blocks.0.mlp.w12.weight", "feat_rope.freqs_cos")
    )
    aux, projectors = (any(name.startswith(part) for name in weights) for part in (_THEIR_AUX, _PROJECTORS))
    sigma = read_config(weights, "sit", aux_depth=1, num_heads=1).learn_sigma
    fitting: list[Format] = []
    for name in FORMATS:
        fits = name.startswith("ig-") == aux and (name == "repa" or not projectors)
        if fits and ("lightningdit" in name or not lightning) and not (sigma and name in ("repa", "ig-sit")):
            fitting.append(name)
    if given is not None:
        if given not in fitting:
            raise ValueError(f"--format {given}: the weights are of {' or '.join(fitting) or 'none'}")
        return given
    likely = [name for name in fitting if lightning or "lightningdit" not in name]
    if len(likely) != 1:
        raise ValueError(
            f"the weights can be of {' or '.join(likely or FORMATS)}, in which time runs in opposite directions:"
            " say which with --format"
        )
    return likely[0]


def read_config(
    weights: Mapping[str, Tensor], published: Format, *, aux_depth: int | None, num_heads: int | None
) -> DiTConfig:
    """What a published model is built from, read from its weights.

    No weight tells which block the auxiliary head reads; without ``aux_depth`` it is 8, of the released XL models.
    Without ``num_heads`` it is read from weights of heads, or that of the published size.

    Raises:
        ValueError: a weight that says it is missing or has an impossible shape, or what no weight tells is not given.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in weights:
            raise ValueError(f"{name} is missing: this is no SiT or LightningDiT")
        if weights[name].ndim != dimensions:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, it should have {dimensions} dimensions")
        return tuple(weights[name].shape)

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    grid = isqrt(shape("pos_embed", 3)[1])
    depth = 1 + max((int(n.split(".")[1]) for n in weights if n.startswith("blocks.")), default=-1)
    if depth > len(weights):
        raise ValueError(f"it names block {depth - 1} and has {len(weights)} weights: blocks are missing")
    outputs = shape("final_layer.linear.weight", 2)[0]
    sizes = [p for p in PRESETS.values() if (p.depth, p.hidden_size) == (depth, width)]
    for name in ("feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight"):
        if num_heads is None and name in weights:
            num_heads = width // weights[name].shape[-1]
    if num_heads is None and not sizes:
        raise ValueError(f"{depth} blocks of width {width} are no published size: give --num-heads")
    if any(name.startswith(_THEIR_AUX) for name in weights) and aux_depth is None:
        if (depth, width) != PRESETS["SiT-XL/2"][:2]:
            raise ValueError("no weight tells which block the auxiliary head reads: give --aux-depth")
        aux_depth = 8
    rms = "blocks.0.norm1.weight" in weights
    return DiTConfig(
        depth=depth,
        hidden_size=width,
        num_heads=num_heads or sizes[0].num_heads,
        patch_size=patch,
        input_size=grid * patch,
        in_channels=channels,
        num_classes=shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        aux_depth=aux_depth,
        time_input="one_minus_t" if published in FROM_NOISE else "t",
        norm="rmsnorm" if rms else "layernorm",
        mlp="swiglu" if "blocks.0.mlp.w12.weight" in weights else "gelu",
        rope="feat_rope.freqs_cos" in weights,
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        modulation_shift=shape("blocks.0.adaLN_modulation.1.weight", 2)[0] == 6 * width,
        learn_sigma=outputs == 2 * channels * patch**2,
        aux_init="xavier" if published == "ig-lightningdit" else "zero",
    )


def to_ours(weights: Mapping[str, Tensor], published: Format) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our weights from published ones, and those that belong to their training only (REPA's projectors)."""
    ours, others = {}, {}
    for name, tensor in weights.items():
        if published == "repa" and name.startswith(_PROJECTORS):
            others[name] = tensor
        else:
            name = _AUX + name.removeprefix(_THEIR_AUX) if name.startswith(_THEIR_AUX) else name
            ours[name] = _turned(name, tensor, published)
    return ours, others


def to_published(weights: Mapping[str, Tensor], published: Format) -> dict[str, Tensor]:
    """Published weights from ours."""
    theirs = {}
    for name, tensor in weights.items():
        renamed = _THEIR_AUX + name.removeprefix(_AUX) if name.startswith(_AUX) else name
        theirs[renamed] = _turned(name, tensor, published)
    return theirs


def _turned(name: str, tensor: Tensor, published: Format) -> Tensor:
    """Output layers change their sign where the velocity does."""
    output = name.startswith(("final_layer.linear.", "aux_layer.linear."))
    return -tensor if output and published in FROM_NOISE else tensor
