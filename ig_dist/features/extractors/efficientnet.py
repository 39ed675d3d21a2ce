"""EfficientNet-lite0, trained on ImageNet: features for whoever has no Inception at hand. Never called FID.

Tan and Le 2019; the lite variants leave out squeeze-and-excitation and use ReLU6. Modules have the names of the public
torch weights, which were converted from TensorFlow: convolutions pad as its SAME does.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, relu6

from ig_dist.features.extractors.extractor import Extractor, channels_first, load_network

SIDE = 224
DIMENSIONS = {"pool": 1280, "logits": 1000}
PREPROCESSING = (
    "grey repeated to RGB; uint8 to fp32; 224 x 224 by bilinear interpolation with half-pixel centres,"
    " antialiased where pictures shrink (torch's interpolate, antialias=True); (x - 127) / 128"
)


STEM_CHANNELS, HEAD_CHANNELS = 32, 1280
STAGES = (  # blocks, kernel, stride of the first one, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Without bias. With stride 2 its padding is not symmetric: see ``same_padded``."""
    padding = kernel // 2 if stride == 1 else 0
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def same_padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Zeros around x, so that ceil(size / stride) places come out: the odd one at the end, as TensorFlow has it."""
    if conv.stride[0] == 1:
        return x  # symmetric: the convolution does it
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    height, width = (max(0, (-(-size // stride) - 1) * stride + kernel - size) for size in x.shape[2:])
    return pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


class Block(nn.Module):
    """Inverted bottleneck: expand, filter each channel, project; the input is added where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner, self.expands, self.adds = inputs * expansion, expansion != 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = _conv(inputs, inner), _norm(inner)
        self._depthwise_conv, self._bn1 = _conv(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = _conv(inner, outputs), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same with other C, H, W."""
        y = relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        y = relu6(self._bn1(self._depthwise_conv(same_padded(y, self._depthwise_conv))), inplace=True)
        projected: Tensor = self._bn2(self._project_conv(y))
        return projected + x if self.adds else projected


class EfficientNetLite0(nn.Module):
    """The network from normalised pixels to its features."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, STEM_CHANNELS, 3, 2), _norm(STEM_CHANNELS)
        blocks, channels = [], STEM_CHANNELS
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for i in range(repeats):
                blocks.append(Block(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(channels, HEAD_CHANNELS), _norm(HEAD_CHANNELS)
        self._fc = nn.Linear(HEAD_CHANNELS, DIMENSIONS["logits"])

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Features of normalised pixels (B, 3, 224, 224).

        Returns:
            ``pool`` (B, 1280), the mean of the last layer over its 7 x 7 places, and ``logits`` (B, 1000), ImageNet's
            classes in their usual order, with the bias.
        """
        x = relu6(self._bn0(self._conv_stem(same_padded(pixels, self._conv_stem))), inplace=True)
        for block in self._blocks:
            x = block(x)
        pool = relu6(self._bn1(self._conv_head(x)), inplace=True).mean(dim=(2, 3))
        return {"pool": pool, "logits": self._fc(pool)}


def preprocess(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images (B, H, W, 1 or 3) to normalised pixels (B, 3, 224, 224)."""
    pixels = channels_first(images, "efficientnet_lite0").to(dtype)
    pixels = interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    return ((pixels - 127) / 128).expand(-1, 3, -1, -1)


def load_efficientnet(weights: Path, sha256: str, device: torch.device) -> Extractor:
    """The extractor with the weights of a file in the public names."""
    model = load_network(EfficientNetLite0(), weights, "EfficientNet-lite0", device)
    name, batch_size = "efficientnet_lite0", 4 if device.type == "cpu" else 256
    return Extractor(
        name, sha256, PREPROCESSING, DIMENSIONS, batch_size, device, lambda images: model(preprocess(images))
    )
