"""Where the weights of a tokenizer are: a path, the tokenizers' folder, or the Hugging Face cache and hub."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from ig_dist.errors import ConfigError, nearest
from ig_dist.storage.hub import NotOnHubError, hub_files
from ig_dist.terminal.extras import missing

ROOT_VARIABLE = "IG_DIST_TOKENIZERS"
FOLDER_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
"""What diffusers' ``AutoencoderKL.save_pretrained`` writes."""


@dataclass(frozen=True)
class Published:
    """A published autoencoder."""

    name: str  # as it stands in an index
    short: str  # another name for it, and its folder among the tokenizers
    repo: str  # on the Hugging Face hub
    files: tuple[str, ...]
    automatic: bool  # whether the hub is asked for it


PUBLISHED = [
    *(
        Published(f"stabilityai/{short}", short, f"stabilityai/{short}", FOLDER_FILES, automatic=True)
        for short in ("sd-vae-ft-ema", "sd-vae-ft-mse")
    ),
    Published(
        "va-vae-f16d32",
        "va-vae-f16d32",
        "hustvl/vavae-imagenet256-f16d32-dinov2",
        ("vavae-imagenet256-f16d32-dinov2.pt",),
        automatic=False,
    ),
]


def tokenizer_root() -> Path:
    """The folder of the tokenizers: ``$IG_DIST_TOKENIZERS``, or ``~/.cache/ig_dist/tokenizers``."""
    given = os.environ.get(ROOT_VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache/ig_dist/tokenizers"


def canonical_name(name: str) -> str:
    """The name that stands in an index: short names are written out, others stay."""
    known = _published(name)
    return name if known is None else known.name


def find_weights(name: str) -> Path:
    """The folder or file with a tokenizer's weights.

    Looked for in this order: the path ``name``, then ``name`` in the tokenizers' folder, then, for the Stable Diffusion
    autoencoders, the Hugging Face cache and hub (which downloads into it).
    """
    known, root = _published(name), tokenizer_root()
    inside = [name] if known is None else [known.name, known.short]
    for place in [Path(name).expanduser(), *(root / folder for folder in inside)]:
        if name and os.path.exists(place):  # noqa: PTH110  (raises nothing, also of a name too long)
            return place
    if known is None:
        names = ["pixel", *(p.name for p in PUBLISHED), *(p.short for p in PUBLISHED)]
        near = nearest(name, names, n=3)
        raise ConfigError(
            f"unknown tokenizer {name!r}: no such path, nothing of that name in {root};"
            f" the nearest names are {', '.join(map(repr, near))}"
        )
    if not known.automatic:
        raise _not_found(known, f"it is not in {root / known.short}")
    try:
        return hub_files(known.repo, known.files)[0].parent
    except ImportError:
        raise missing("vae", f"tokenizer {known.name} needs") from None
    except NotOnHubError as why:
        raise _not_found(known, str(why)) from None


def _published(name: str) -> Published | None:
    return next((p for p in PUBLISHED if name in (p.name, p.short)), None)


def _not_found(known: Published, why: str) -> ConfigError:
    place = str(tokenizer_root() / known.short)
    command = shlex.join(["hf", "download", known.repo, *known.files, "--local-dir", place])
    return ConfigError(
        f"no weights of tokenizer {known.name}: {why}; where there is a network run `{command}`"
        f" (or put the files into another folder and set {ROOT_VARIABLE} to its parent)"
    )
