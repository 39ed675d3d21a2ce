"""What the bytes of the shards depend on, and which image goes into which shard."""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ig_dist.autoencoders.tokenizers import Precision
from ig_dist.data.index import IndexFile

SHARD_BYTES = 256 * 2**20
_MIN_SHARD = 256  # samples; small sets are cut into at least _MIN_SHARDS of these, so that some can be held out
_MIN_SHARDS = 8

Store = Literal["moments", "sample"]


class Settings(BaseModel):
    """Equal settings are equal shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str  # name of the source with the images' size
    tokenizer: str
    tokenizer_sha256: str
    precision: Precision
    image_size: int
    image_channels: int
    store: Store
    flips: bool
    seed: int
    samples_per_shard: int  # places of a shard in the shuffle

    def differences(self, other: Settings) -> list[str]:
        """What differs, as "seed: 0 there, 5 here"; ``other`` is here.

        Tokenizer and source are known by their hashes: weights may lie elsewhere on another machine, a folder may be
        renamed or named by a glob.
        """
        names = [name for name, mine in self if mine != getattr(other, name)]
        if self.tokenizer_sha256 == other.tokenizer_sha256:
            names = [name for name in names if name != "tokenizer"]
        if _without_place(self.source) == _without_place(other.source):
            names = [name for name in names if name != "source"]
        return [f"{name}: {_short(getattr(self, name))} there, {_short(getattr(other, name))} here" for name in names]


def settings_of(index: IndexFile) -> Settings:
    """The settings that made the shards of an index."""
    return Settings(
        source=index.source,
        tokenizer=index.tokenizer.name,
        tokenizer_sha256=index.tokenizer.sha256,
        precision=index.tokenizer.precision,
        image_size=index.tokenizer.image_size,
        image_channels=index.tokenizer.image_channels,
        store=index.latent.kind,
        flips=index.latent.flips,
        seed=index.seed,
        samples_per_shard=index.samples_per_shard or index.shards[0].samples,
    )


def default_samples_per_shard(images: int, sample_bytes: int) -> int:
    """Samples for shards of about 256 MB, or an eighth of a small set; a multiple of 256."""
    size_limit, eighth = SHARD_BYTES // sample_bytes, -(-images // _MIN_SHARDS)
    wanted = min(size_limit // _MIN_SHARD, -(-eighth // _MIN_SHARD))
    return max(1, wanted) * _MIN_SHARD


def sample_tar_bytes(shape: tuple[int, int, int], settings: Settings) -> int:
    """Bytes of a sample in its tar, by the model's (C, h, w): a header and blocks of 512 for each array and label."""
    array = 2 * math.prod(shape) * (2 if settings.store == "moments" else 1)
    npy = 512 + -(-(array + 128) // 512) * 512
    return (2 if settings.flips else 1) * npy + 1024


def shard_count(images: int, samples_per_shard: int) -> int:
    """Shards of a source of ``images`` files."""
    return -(-images // samples_per_shard)


def shard_places(number: int, images: int, samples_per_shard: int) -> range:
    """The places of a shard in the global shuffle."""
    return range(number * samples_per_shard, min((number + 1) * samples_per_shard, images))


def shard_name(number: int, sha256: str = "") -> str:
    """The file of a shard; with its hash: that of one whose usual name is taken by another."""
    return f"shard-{number:06d}.{sha256[:16]}.tar" if sha256 else f"shard-{number:06d}.tar"


def _without_place(source: str) -> str:
    found = re.search(r"\d+ files, sha256 [0-9a-f]{64}", source)  # the size behind it is a setting of its own
    return found[0] if found else source


def _short(value: object) -> str:
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", str(value))
