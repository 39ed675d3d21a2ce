"""What the networks share: channels, TensorFlow's resize, folded batch norms, tensors by their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ig_dist.errors import ConfigError

LISTED = 4  # names in a message


def channels_first(images: Tensor, name: str) -> Tensor:
    """Images (B, H, W, 1 or 3) as (B, 1 or 3, H, W)."""
    if images.shape[3] not in (1, 3):
        raise ConfigError(
            f"images with {images.shape[3]} channels: extractor {name} takes grey and RGB ones; convert them first"
        )
    return images.permute(0, 3, 1, 2)


def tf1_bilinear(pixels: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) to (B, C, size, size) by TensorFlow 1's rule.

    Output i takes from position i * in / size, between the pixels floor and floor + 1, the latter clamped to the edge:
    no half-pixel offset, corners not aligned, and no filter where pictures shrink. As in ``tf.image.resize_bilinear``,
    in / size is rounded to float32 and columns are taken before rows.
    """
    for axis in (3, 2):
        length = pixels.shape[axis]
        scale = torch.tensor(length / size, dtype=torch.float32).item()
        position = torch.arange(size, dtype=pixels.dtype, device=pixels.device) * scale
        low = position.long()
        fraction = position - low
        before = pixels.index_select(axis, low)
        after = pixels.index_select(axis, (low + 1).clamp(max=length - 1))
        pixels = before + (after - before) * (fraction if axis == 3 else fraction[:, None])
    return pixels


def fold_norm(module: nn.Module, conv: str, norm: str) -> None:
    """Multiply a batch norm's scale into the convolution before it: the same function, one pass over memory less.

    The weights are laid out with the channels last, and so is what follows: up to 3 times faster on a CPU.
    """
    convolution, batch_norm = module.get_submodule(conv), module.get_submodule(norm)
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(batch_norm, nn.BatchNorm2d)
    fused = fuse_conv_bn_eval(convolution, batch_norm)
    fused.weight.data = fused.weight.data.contiguous(memory_format=torch.channels_last)
    setattr(module, conv, fused)
    setattr(module, norm, nn.Identity())


def load_tensors(module: nn.Module, tensors: object, path: Path, what: str) -> None:
    """Give a network the tensors of a file. Counters of training batches may lack."""
    expected = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    found = tensors if isinstance(tensors, Mapping) else {}
    found = {k: v for k, v in found.items() if isinstance(v, Tensor) and not str(k).endswith("num_batches_tracked")}
    wrong = {
        "without": [k for k in expected if k not in found],
        "with the unknown": [k for k in found if k not in expected],
        "with other shapes of": [k for k in expected if k in found and found[k].shape != expected[k].shape],
    }
    if any(wrong.values()):
        parts = [f"{how} {', '.join(map(str, keys[:LISTED]))}{_more(keys)}" for how, keys in wrong.items() if keys]
        raise ConfigError(
            f"{path} does not hold the weights of {what}: it is {' and '.join(parts)}; give the right file"
        )
    module.load_state_dict(found, strict=False)


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
