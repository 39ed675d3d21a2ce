"""Inception v3 as TensorFlow published it on 2015-12-05: the network that FID, sFID and the Inception score mean.

Szegedy et al. 2015, with what the frozen graph does otherwise: TensorFlow 1's bilinear resize, (x - 128) / 128, batch
norms with epsilon 0.001, average pools that do not count their padding, and a max pool in the last block. Modules have
the names of the public torch weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu_

from ig_dist.features.extractors.extractor import Extractor, channels_first, load_network

SIDE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7
DIMENSIONS = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": CLASSES}
PREPROCESSING = (
    "grey repeated to RGB; uint8 to fp32; 299 x 299 by TensorFlow 1's bilinear rule"
    " (position i * in / out, no antialiasing); (x - 128) / 128"
)


@dataclass(frozen=True)
class Conv:
    """A convolution in a block: name, output channels, height and width of its kernel."""

    name: str
    channels: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padded: bool = True  # to the size of its input; those with stride 2 are not


Step = Conv | tuple[Conv, ...] | Callable[[Tensor], Tensor]  # a tuple: side by side on the same input


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, spec: Conv) -> None:
        super().__init__()
        padding = (spec.height // 2, spec.width // 2) if spec.padded and spec.stride == 1 else 0
        kernel = (spec.height, spec.width)
        self.conv = nn.Conv2d(channels, spec.channels, kernel, spec.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(spec.channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same with other C, H, W."""
        return relu_(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches on one input, their outputs laid end to end along the channels."""

    def __init__(self, channels: int, *branches: Sequence[Step]) -> None:
        super().__init__()
        self.branches = [list(self._built(channels, branch)) for branch in branches]

    def _built(self, channels: int, steps: Sequence[Step]) -> Iterator[Callable[[Tensor], Tensor]]:
        for step in steps:
            if not isinstance(step, Conv | tuple):
                yield step
                continue
            convs = step if isinstance(step, tuple) else (step,)
            modules = [ConvNorm(channels, conv) for conv in convs]
            for conv, module in zip(convs, modules, strict=True):
                self.add_module(conv.name, module)
            yield modules[0] if len(modules) == 1 else partial(_side_by_side, modules)
            channels = sum(conv.channels for conv in convs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same with other C, H, W."""
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                y = step(y)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def _side_by_side(forks: Sequence[ConvNorm], x: Tensor) -> Tensor:
    return torch.cat([fork(x) for fork in forks], dim=1)


average_pool = partial(avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(max_pool2d, kernel_size=3, stride=1, padding=1)
halving_pool = partial(max_pool2d, kernel_size=3, stride=2)


def _chain(name: str, *sizes: tuple[int, int, int], stride: int = 1) -> list[Step]:
    """``name``_1, ``name``_2, ...: channels, height and width of each kernel; the stride is the last one's."""
    last = len(sizes)
    return [Conv(f"{name}_{i}", *size, stride=stride if i == last else 1) for i, size in enumerate(sizes, start=1)]


def _block_35(channels: int, pooled: int) -> Mixed:
    """At 35 x 35: Mixed_5b to 5d."""
    return Mixed(
        channels,
        [Conv("branch1x1", 64)],
        _chain("branch5x5", (48, 1, 1), (64, 5, 5)),
        _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        [average_pool, Conv("branch_pool", pooled)],
    )


def _block_17(inner: int) -> Mixed:
    """At 17 x 17: Mixed_6b to 6e."""
    return Mixed(
        768,
        [Conv("branch1x1", 192)],
        _chain("branch7x7", (inner, 1, 1), (inner, 1, 7), (192, 7, 1)),
        _chain("branch7x7dbl", (inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7)),
        [average_pool, Conv("branch_pool", 192)],
    )


def _block_8(channels: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    """At 8 x 8: Mixed_7b and 7c."""
    ends = [(Conv(f"branch3x3{name}a", 384, 1, 3), Conv(f"branch3x3{name}b", 384, 3, 1)) for name in ("_2", "dbl_3")]
    return Mixed(
        channels,
        [Conv("branch1x1", 320)],
        [Conv("branch3x3_1", 384), ends[0]],
        [*_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), ends[1]],
        [pool, Conv("branch_pool", 192)],
    )


class Inception(nn.Module):
    """The network from normalised pixels to its features."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, Conv("", 32, 3, 3, stride=2))
        self.Conv2d_2a_3x3 = ConvNorm(32, Conv("", 32, 3, 3, padded=False))
        self.Conv2d_2b_3x3 = ConvNorm(32, Conv("", 64, 3, 3))
        self.Conv2d_3b_1x1 = ConvNorm(64, Conv("", 80))
        self.Conv2d_4a_3x3 = ConvNorm(80, Conv("", 192, 3, 3, padded=False))
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        self.Mixed_6a = Mixed(
            288,
            [Conv("branch3x3", 384, 3, 3, stride=2)],
            _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3), stride=2),
            [halving_pool],
        )
        self.Mixed_6b = _block_17(128)
        self.Mixed_6c = _block_17(160)
        self.Mixed_6d = _block_17(160)
        self.Mixed_6e = _block_17(192)
        self.Mixed_7a = Mixed(
            768,
            _chain("branch3x3", (192, 1, 1), (320, 3, 3), stride=2),
            _chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), stride=2),
            [halving_pool],
        )
        self.Mixed_7b = _block_8(1280, average_pool)
        self.Mixed_7c = _block_8(2048, max_pool)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Features of normalised pixels (B, 3, 299, 299).

        Returns:
            ``pool`` (B, 2048), the graph's ``pool_3:0``: the mean of Mixed_7c over its 8 x 8 places.
            ``spatial`` (B, 2023), from its ``mixed_6/conv:0``: the first 7 channels of the 1 x 1 branch of Mixed_6d
            after batch norm and ReLU, flattened in the order (H, W, C), in which ADM's reference files hold it.
            ``logits`` (B, 1008): ``pool`` times the last layer's weights WITHOUT its bias, for the Inception score.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halving_pool(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halving_pool(x))))
        at_17 = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        at_8 = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(at_17))))
        pool = at_8.mean(dim=(2, 3))
        return {
            "pool": pool,
            "spatial": at_17[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1),  # the 1 x 1 branch comes first
            "logits": pool @ self.fc.weight.T,
        }


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


def preprocess(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images (B, H, W, 1 or 3) to normalised pixels (B, 3, 299, 299)."""
    pixels = tf1_bilinear(channels_first(images, "inception").to(dtype), SIDE)
    return ((pixels - 128) / 128).expand(-1, 3, -1, -1)


def load_inception(weights: Path, sha256: str, device: torch.device) -> Extractor:
    """The extractor with the weights of a file in the public names."""
    model = load_network(Inception(), weights, "Inception v3 of 2015-12-05", device)
    batch_size = 8 if device.type == "cpu" else 128
    return Extractor(
        "inception", sha256, PREPROCESSING, DIMENSIONS, batch_size, device, lambda images: model(preprocess(images))
    )
