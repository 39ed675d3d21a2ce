"""What an extractor is, the table of those that there are, and what their networks share."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ig_dist.arithmetic import arithmetic
from ig_dist.errors import ConfigError, listed, unknown
from ig_dist.features.extractors.weights import PUBLISHED, Published, check_hash, find_weights
from ig_dist.storage.tensor_files import read_torch_file

PIXEL_RULE = "pixels / 127.5 - 1, flattened (H, W, C)"
MOST_PIXELS = 4096


@dataclass(frozen=True, eq=False)
class Extractor:
    """Images to features, with all that a score's protocol says of it.

    A row of the result depends on its image only, up to the rounding of the kernels: a batch is always of
    ``batch_size`` images, the last one filled up with black ones. The same images in the same calls give the same bits
    on the same machine; cut otherwise into calls, an image stands elsewhere in its batch, where a kernel may sum in
    another order.
    """

    name: str
    """As in ``EXTRACTORS``; with weights other than the published ones, a hyphen and the hash's beginning follow."""
    sha256: str  # of the file with the weights; of the rule for ``pixel``
    preprocessing: str  # what is done to an image before the network, in words
    dimensions: Mapping[str, int]  # what it returns; 0 stands for as many as an image has values
    batch_size: int
    device: torch.device
    network: Callable[[Tensor], dict[str, Tensor]]
    """One batch, (B, H, W, C) uint8 on the device, to (B, D) float32 for each name in ``dimensions``."""

    def __call__(self, images: Tensor | NDArray[np.uint8]) -> dict[str, Tensor]:
        """Features (N, D) float32, on the device, of uint8 images (N, H, W, 1 or 3).

        While it runs, fp32 is fp32 in the whole process (``exact_fp32``).
        """
        if images.ndim != 4 or images.dtype not in (torch.uint8, np.uint8):
            shape = "x".join(map(str, images.shape))
            raise ConfigError(f"images of type {images.dtype} and shape {shape}: give (N, H, W, C) in uint8")
        batches = []
        with exact_fp32(self.device):
            for start in range(0, max(len(images), 1), self.batch_size):
                cut = images[start : start + self.batch_size]
                batch = cut if isinstance(cut, Tensor) else torch.tensor(cut)  # a copy: it may be read-only
                batch, count = batch.to(self.device), len(batch)
                features = self.network(pad(batch, (0, 0) * 3 + (0, self.batch_size - count)))
                batches.append({name: values[:count] for name, values in features.items()})
        return {name: torch.cat([batch[name] for batch in batches]) for name in self.dimensions}


@contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast of a caller's, no TF32, and cuDNN's deterministic algorithms."""
    cudnn = torch.backends.cudnn
    with torch.inference_mode(), arithmetic("fp32", device):
        kept = cudnn.deterministic, cudnn.benchmark
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = kept


EXTRACTORS: Mapping[str, Published | None] = {"pixel": None, **PUBLISHED}
"""Every extractor, with its published weights; the pixels need none."""


def get_extractor(
    name: str, *, weights: str = "", device: str | torch.device = "cpu", allow_other: bool = False
) -> Extractor:
    """An extractor by name. Equal arguments give the same one, loaded once.

    Args:
        name: one of ``EXTRACTORS``.
        weights: file or folder with its weights; otherwise they are looked for (``weights.find_weights``).
        device: where it runs.
        allow_other: take weights that are not the published ones; the extractor's name then ends in their hash.

    Raises:
        ConfigError: no such extractor, or its weights are not to be had.
    """
    if name not in EXTRACTORS:
        raise unknown("unknown extractor", name, EXTRACTORS)
    known = EXTRACTORS[name]
    if known is None and weights:
        raise ConfigError(f"extractor {name} has no weights: leave out {weights!r}")
    return _load(name, Path() if known is None else find_weights(known, weights), str(device), allow_other)


@lru_cache(maxsize=4)
def _load(name: str, weights: Path, device_name: str, allow_other: bool) -> Extractor:
    device, known = torch.device(device_name), EXTRACTORS[name]
    if known is None:
        sha256 = hashlib.sha256(PIXEL_RULE.encode()).hexdigest()
        return Extractor("pixel", sha256, PIXEL_RULE, {"pool": 0}, 256, device, _pixels)
    if name == "inception":
        from ig_dist.features.extractors.inception import load_inception as load
    elif name == "efficientnet_lite0":
        from ig_dist.features.extractors.efficientnet import load_efficientnet as load
    else:
        from ig_dist.features.extractors.dinov2 import load_dinov2 as load
    sha256 = check_hash(known, weights, allow_other=allow_other)
    extractor = load(weights, sha256, device)
    if known.sha256 and sha256 != known.sha256:
        extractor = replace(extractor, name=f"{name}-{sha256[:8]}")
    return extractor


def _pixels(images: Tensor) -> dict[str, Tensor]:
    """The pixels themselves, in [-1, 1]: for images so small that their covariance is one; of any channels."""
    dimensions = images.shape[1:].numel()
    if dimensions > MOST_PIXELS:
        raise ConfigError(
            f"fd_pixel is for images of at most {MOST_PIXELS} values, these have {dimensions}:"
            " encode them smaller (--image-size) to score them"
        )
    return {"pool": (images.to(torch.float32) / 127.5 - 1.0).flatten(1)}


# --- what the networks share


def channels_first(images: Tensor, name: str) -> Tensor:
    """Images (B, H, W, 1 or 3) as (B, 1 or 3, H, W)."""
    if images.shape[3] not in (1, 3):
        raise ConfigError(
            f"images with {images.shape[3]} channels: extractor {name} takes grey and RGB ones; convert them first"
        )
    return images.permute(0, 3, 1, 2)


def load_network(network: nn.Module, weights: Path, what: str, device: torch.device) -> nn.Module:
    """A network on its device, ready for use, with the weights of a file in the public names."""
    load_tensors(network, read_torch_file(weights), weights, what)
    fold_norms(network.eval().requires_grad_(False))
    return network.to(device)


def fold_norms(network: nn.Module) -> None:
    """Multiply each batch norm's scale into the convolution before it: the same function, less passes over memory.

    The weights are laid out with the channels last, and so is what follows: up to 3 times faster on a CPU.
    """
    for module in list(network.modules()):
        for (conv_name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                fused = fuse_conv_bn_eval(conv, norm)
                fused.weight.data = fused.weight.data.contiguous(memory_format=torch.channels_last)
                setattr(module, conv_name, fused)
                setattr(module, norm_name, nn.Identity())


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
        parts = [f"{how} {listed(list(map(str, keys)), most=4)}" for how, keys in wrong.items() if keys]
        raise ConfigError(
            f"{path} does not hold the weights of {what}: it is {' and '.join(parts)}; give the right file"
        )
    module.load_state_dict(found, strict=False)
