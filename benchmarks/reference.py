"""The published code of Internal Guidance, imported from a folder of the user's: nothing of it is in this repository.

The folder holds ``SiT`` and ``LightningDiT``. Packages that only its data, logging and processes need are stood in for
by empty modules; of timm, where it is not installed, the three layers that SiT and LightningDiT are built from are.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

UNUSED = {"accelerate", "diffusers", "transformers", "torchvision", "fairscale", "wandb"}
"""What the parts that are measured import and do not call."""


class Published:
    """Modules of the published code.

    Args:
        folder: that holds it.
        compiled: whether its ``@torch.compile`` are left as they are; of SiT there are none.
    """

    def __init__(self, folder: Path, *, compiled: bool) -> None:
        self.stood_in: list[str] = []
        as_written = mock.patch.object(torch, "compile", _not_compiled) if not compiled else mock.MagicMock()
        with as_written, self._imports(folder / "SiT", forget=True):
            self.sit, self.loss, self.samplers, self.train = map(
                importlib.import_module, ("models.sit", "loss", "samplers", "train")
            )
        with as_written, self._imports(folder / "LightningDiT", forget=False):  # the compiler looks them up by name
            self.lightningdit, self.transport, self.muon = map(
                importlib.import_module, ("models.lightningdit", "transport", "muon_new")
            )

    @contextmanager
    def _imports(self, folder: Path, *, forget: bool) -> Iterator[None]:
        """Imports are of ``folder``; what came in is forgotten if asked: both halves have a package ``models``."""
        switches = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32  # theirs set them
        known, path = set(sys.modules), list(sys.path)
        finder = _StandIns()
        sys.path.insert(0, str(folder))
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            sys.path[:] = path
            for name in set(sys.modules) - known:
                file = getattr(sys.modules[name], "__file__", None) or ""
                theirs = str(folder) in file or name == "models"
                if name.split(".")[0] in finder.names or (theirs and forget):
                    del sys.modules[name]
            self.stood_in = sorted({*self.stood_in, *finder.made})
            torch.set_float32_matmul_precision(switches[0])
            torch.backends.cudnn.allow_tf32 = switches[1]


def _not_compiled(function: Any = None, **_: Any) -> Any:
    return function if function is not None else _not_compiled


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages that are stood in for, and makes modules in which every name is there."""

    def __init__(self) -> None:
        self.names = UNUSED | ({"timm"} if importlib.util.find_spec("timm") is None else set())
        self.made: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See importlib."""
        package = name.split(".")[0]
        if package not in self.names:
            return None
        self.made.add(package)
        return ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        """See importlib."""
        if module.__name__ == "timm.models.vision_transformer":
            vars(module).update(PatchEmbed=_PatchEmbed, Attention=_Attention, Mlp=_Mlp)
        else:
            module.__getattr__ = lambda name: mock.MagicMock(name=name)  # type: ignore[method-assign]


class _PatchEmbed(nn.Module):
    """As timm's of square images: a strided convolution."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size, self.num_patches = (patch_size, patch_size), (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out.flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    """As timm's with fused attention, without its dropouts of probability 0."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.fused_attn = num_heads, True
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(*qkv.unbind(0))
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(rows, tokens, width))
        return out


class _Mlp(nn.Module):
    """As timm's, without its dropouts."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Any, drop: float) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out
