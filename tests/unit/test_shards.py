"""Shards are plain WebDataset tars: the stock library reads them, and the same arguments give the same bytes."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from sklearn.datasets import load_digits

from ig_dist.data.index import read_index
from ig_dist.data.shards import pack_shard, scan_shard
from ig_dist.errors import ConfigError
from ig_dist.features.images import index_images
from tests.scoring import all_pictures


def test_stock_webdataset_reads_the_shards_with_its_own_decoders(digits_index: Path) -> None:
    index = read_index(str(digits_index))
    urls = [str(digits_index / shard.name) for shard in index.info.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 1797
    digits = load_digits()
    for sample in samples[::97]:
        number = int(sample["__key__"])
        assert sample["latent.npy"].dtype == np.float16 and sample["latent.npy"].shape == (1, 8, 8)
        assert sample["cls"] == digits.target[number]
        assert np.abs(sample["latent.npy"][0] - (digits.images[number] / 8 - 1)).max() < 0.005
    # the index tells the same as the tars
    assert [s["cls"] for s in samples] == index.table.label.tolist()


@pytest.mark.parametrize("count", [1, 7])
def test_shards_are_what_the_stock_writer_makes_of_them(count: int) -> None:
    latents = np.random.default_rng(0).standard_normal((count, 4, 5, 5)).astype(np.float16)
    packed = io.BytesIO()
    with webdataset.TarWriter(packed, mtime=0, user="ig-dist", group="ig-dist") as writer:
        for i, latent in enumerate(latents):
            writer.write({"__key__": f"{i:08d}", "cls": 100 * i, "latent.npy": latent, "latent_flip.npy": -latent})
    keys = [f"{i:08d}" for i in range(count)]
    assert pack_shard(keys, latents, 100 * np.arange(count), -latents) == packed.getvalue()


def test_pixels_come_back_exactly(digits_index: Path) -> None:
    index = read_index(str(digits_index))
    images = all_pictures(index_images(index)).images
    truth = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in truth)


def test_samples_are_shuffled_globally(digits_index: Path) -> None:
    with tarfile.open(digits_index / "shard-000000.tar") as tar:
        numbers = [int(name[:8]) for name in tar.getnames() if name.endswith(".cls")]
    assert min(numbers) < 200 and max(numbers) > 1500 and numbers != sorted(numbers)


def test_a_shard_is_a_function_of_its_arguments() -> None:
    latents = np.arange(24, dtype=np.float16).reshape(2, 3, 2, 2)
    arguments = (["a", "b"], latents, np.array([3, 4]))
    assert pack_shard(*arguments) == pack_shard(*arguments)
    with tarfile.open(fileobj=io.BytesIO(pack_shard(*arguments))) as tar:
        assert {(m.mtime, m.uname, m.gname) for m in tar} == {(0, "ig-dist", "ig-dist")}


def test_the_scan_refuses_what_is_not_as_described() -> None:
    latents = np.zeros((1, 3, 2, 2), np.float16)
    data = pack_shard(["a"], latents, np.array([0]))
    with pytest.raises(ConfigError, match="a.latent.npy holds float16"):
        scan_shard(io.BytesIO(data), np.dtype(np.float16), (3, 4, 4))
    bare = io.BytesIO()
    writer = webdataset.TarWriter(bare)
    writer.write({"__key__": "b", "cls": b"1"})
    writer.close()
    with pytest.raises(ConfigError, match=r"sample b has no \.latent\.npy"):
        scan_shard(io.BytesIO(bare.getvalue()), np.dtype(np.float16), (3, 2, 2))
