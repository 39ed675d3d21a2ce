"""What a shard holds of an image: latents, those of its mirror image, moments, draws; and what cannot be stored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from torch import Tensor

import ig_dist.autoencoders.tokenizers
from ig_dist.autoencoders.tokenizers import Tokenizer
from ig_dist.data.images import decode_image
from ig_dist.data.index import read_index
from ig_dist.data.shards import FLIP_SUFFIX, scan_shard
from ig_dist.rng import Purpose, normal
from tests import imagenet_like
from tests.encoding import SIZE, Encode
from tests.imagenet_like import CORRUPT, TRUNCATED


def test_flips_are_the_latents_of_the_mirrored_images(encode: Encode, tmp_path: Path) -> None:
    assert encode(tmp_path / "out", "--flips")[0] == 0
    index = read_index(str(tmp_path / "out"))
    assert index.info.latent.flips and index.table.flip_offset is not None
    urls = [str(tmp_path / "out" / shard.name) for shard in index.info.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 238
    for sample in samples:
        assert np.array_equal(sample["latent_flip.npy"], sample["latent.npy"][..., ::-1])
    with (tmp_path / "out" / index.info.shards[0].name).open("rb") as file:
        rows = scan_shard(file, np.dtype(np.float16), (3, SIZE, SIZE), flip_suffix=FLIP_SUFFIX)
    count = len(rows)
    assert [row.flip_offset for row in rows] == index.table.flip_offset[:count].tolist()
    # what is not mirrored is the same as without
    assert encode(tmp_path / "plain")[0] == 0
    assert read_index(str(tmp_path / "plain")).table.crc32.tolist() == index.table.crc32.tolist()


def _posterior(images: Tensor) -> Tensor:
    mean = images.float().permute(0, 3, 1, 2)[:, :, ::2, ::2] / 64
    return torch.cat([mean, 0.1 + mean / 8], dim=1)


STOCHASTIC = Tokenizer(
    name="toy-vae",
    sha256="0" * 64,
    downsample=2,
    image_channels=3,
    stochastic=True,
    scale=None,
    uint8_rule="none",
    encode=_posterior,
    decode=lambda latents: latents,
    latent_channels=3,
)


@pytest.fixture
def toy_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ig_dist.autoencoders.tokenizers, "get_tokenizer", lambda name, **_: STOCHASTIC)


def stored(folder: Path, flips: bool = False) -> dict[int, Any]:
    """Latents by image number."""
    urls = [str(folder / shard.name) for shard in read_index(str(folder)).info.shards]
    samples = webdataset.WebDataset(urls, shardshuffle=False).decode()
    field = "latent_flip.npy" if flips else "latent.npy"
    return {int(sample["__key__"]): sample[field] for sample in samples}


@pytest.mark.usefixtures("toy_vae")
def test_moments_and_stored_samples(encode: Encode, tmp_path: Path) -> None:
    code, said, errors = encode(tmp_path / "moments", "--tokenizer toy-vae --flips")
    assert code == 0 and "posterior moments of 3x8x8 latents, and those of the mirrored images" in said, errors
    assert encode(tmp_path / "sample", "--tokenizer toy-vae --flips --store sample --seed 3")[0] == 0
    info = read_index(str(tmp_path / "moments")).info
    assert info.latent.kind == "moments" and info.latent.shape == (3, 8, 8)
    assert read_index(str(tmp_path / "sample")).info.latent.kind == "sample"
    files = imagenet_like.files()
    kept = [i for i, file in enumerate(files) if file.name not in (CORRUPT, TRUNCATED)]
    images = torch.from_numpy(np.stack([decode_image(files[i].data, SIZE) for i in kept]))
    numbers = torch.tensor(kept)
    everything = []
    for step, view in enumerate((images, images.flip(2))):
        moments = _posterior(view)
        everything.append(moments)
        found = stored(tmp_path / "moments", flips=step == 1)
        assert sorted(found) == kept
        assert np.array_equal(np.stack([found[i] for i in kept]), moments.half().numpy())
        mean, std = moments.chunk(2, dim=1)
        draw = mean + std * normal(3, Purpose.ENCODE_POSTERIOR, numbers, (3, 8, 8), step=step)
        found = stored(tmp_path / "sample", flips=step == 1)
        assert np.array_equal(np.stack([found[i] for i in kept]), draw.half().numpy())
    # of a draw: E[x] = E[mean], Var[x] = E[std^2] + Var[mean]; without a scale of its own, the data set gives one
    mean, std = torch.cat(everything).double().chunk(2, dim=1)
    expected = mean.mean((0, 2, 3)), (std.square().mean((0, 2, 3)) + mean.var((0, 2, 3), correction=0)).sqrt()
    assert np.abs(np.array(info.latent.shift) - expected[0].numpy()).max() < 1e-3
    assert np.abs(1 / np.array(info.latent.scale) - expected[1].numpy()).max() < 1e-3
    assert np.abs(info.statistics.mean).max() < 1e-9 and np.abs(np.array(info.statistics.std) - 1).max() < 1e-9


@pytest.mark.usefixtures("toy_vae")
def test_image_sizes_that_a_tokenizer_does_not_take(encode: Encode, tmp_path: Path) -> None:
    code, _, errors = encode(tmp_path / "out", "--tokenizer toy-vae --image-size 17")
    assert code == 2 and "--image-size 17 is not a multiple of 2" in errors and "--image-size 16" in errors
    code, _, errors = encode(tmp_path / "out", "--tokenizer toy-vae", source="digits")
    assert code == 2 and "--image-size" in errors and not (tmp_path / "out").exists()


def test_latents_beyond_float16_are_an_error(encode: Encode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    big = dataclasses.replace(STOCHASTIC, encode=lambda images: _posterior(images) * 1e6)
    monkeypatch.setattr(ig_dist.autoencoders.tokenizers, "get_tokenizer", lambda name, **_: big)
    code, _, errors = encode(tmp_path / "out", "--tokenizer toy-vae")
    assert code == 4 and errors.count("\n") == 1 and "not finite" in errors and "--precision fp32" in errors
