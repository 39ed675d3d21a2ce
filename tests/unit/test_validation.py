"""The validation loss: over which samples, how much of them is held at once, and by whose reader."""

import hashlib
import io
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ig_dist.config import Config
from ig_dist.config.file import load_config
from ig_dist.data.index import SampleTable, ShardIndex, read_index, write_index
from ig_dist.data.reader import ShardReader
from ig_dist.data.shards import pack_shard, scan_shard
from ig_dist.export import ALONE
from ig_dist.models.dit import DiTOutput
from ig_dist.parallel.dist import StopFlag
from ig_dist.rng import Purpose, normal
from ig_dist.training import objective
from ig_dist.training.objective import VALIDATION_SEED, validation_loss

SHAPE = (4, 16, 16)
SIZES = [5, 700, 900]  # the first is trained on


@pytest.fixture
def config() -> Config:
    return load_config("configs/digits.yaml", ["data.validation_shards=2"])


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    shards: list[dict[str, Any]] = []
    rows, first = [], 0
    for number, size in enumerate(SIZES):
        ids = np.arange(first, first + size)
        latents = np.broadcast_to((ids % 97 / 97)[:, None, None, None], (size, *SHAPE)).astype(np.float16)
        data = pack_shard([f"{i:06d}" for i in ids], latents, ids % 10)
        name = f"shard-{number:06d}.tar"
        (tmp_path / name).write_bytes(data)
        rows += scan_shard(io.BytesIO(data), np.dtype(np.float16), SHAPE)
        shards.append({"name": name, "bytes": len(data), "samples": size, "sha256": hashlib.sha256(data).hexdigest()})
        first += size
    info = {
        "source": "test",
        "seed": 0,
        "tokenizer": {"name": "pixel", "sha256": "0", "image_size": 16, "image_channels": 4},
        "latent": {"kind": "sample", "shape": SHAPE, "dtype": "float16", "shift": [0.0] * 4, "scale": [1.0] * 4},
        "classes": [str(i) for i in range(10)],
        "statistics": {"mean": [0.0] * 4, "std": [1.0] * 4},
        "shards": shards,
    }
    write_index(str(tmp_path), info, SampleTable.from_rows(rows))
    return read_index(str(tmp_path))


def guess(x_t: Tensor, t: Tensor, labels: Tensor) -> DiTOutput:
    """Depends on all that a model sees."""
    velocity = x_t * t[:, None, None, None] + labels[:, None, None, None] / 10
    return DiTOutput(velocity, velocity + 1)


def expected(left_out: set[int]) -> list[float]:
    """As written down: linear path, sample i of n at time (i + 0.5) / n, noise keyed by i."""
    count = sum(SIZES[1:])
    losses = []
    for i in set(range(count)) - left_out:
        sample, t = SIZES[0] + i, (i + 0.5) / count
        x = torch.full(SHAPE, sample % 97 / 97, dtype=torch.float16).float()
        noise = normal(VALIDATION_SEED, Purpose.VALIDATION_NOISE, torch.tensor([i]), SHAPE)[0]
        error = ((1 - t) * x + t * noise) * t + sample % 10 / 10 - (noise - x)
        losses.append((error.square().mean().item(), (error + 1).square().mean().item()))
    final, aux = np.mean(losses, axis=0)
    return [float(final), float(aux)]


@pytest.mark.parametrize("batch_size", [7, 64])
def test_damaged_samples_do_not_count_and_all_others_do(index: ShardIndex, config: Config, batch_size: int) -> None:
    for number, sample in ((1, 10), (2, 800), (2, sum(SIZES) - 1)):
        file = Path(index.folder) / index.info.shards[number].name
        data = bytearray(file.read_bytes())
        at = int(index.table.offset[sample])
        data[at : at + 512] = b"\xff\x7f" * 256  # NaN
        file.write_bytes(data)
    reader = ShardReader(index, "skip")
    _, final, aux, cosine = validation_loss(guess, index, config, reader, batch_size, ALONE, StopFlag())
    assert [final, aux] == pytest.approx(expected({5, 795, sum(SIZES[1:]) - 1}), rel=1e-5)
    assert cosine == 0  # the config has no such loss
    assert reader.quarantined == {10, 800, sum(SIZES) - 1}


def test_the_held_out_latents_are_never_all_in_memory(
    index: ShardIndex, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = 2**18
    monkeypatch.setattr(objective, "REQUEST_BYTES", request)
    held_out = sum(SIZES[1:]) * index.info.latent.stored_bytes  # 3 MiB
    reader = ShardReader(index, request_bytes=request)
    validation_loss(guess, index, config, reader, 16, ALONE, StopFlag())  # what is imported or kept at the first time
    tracemalloc.start()
    validation_loss(guess, index, config, reader, 16, ALONE, StopFlag())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # what is used, what is read ahead, and the request that it comes from
    assert request < peak < 5 * request < held_out / 2


def test_a_stop_does_not_end_it_while_its_samples_come(index: ShardIndex, config: Config) -> None:
    stop = StopFlag()
    stop.asked = True
    assert len(validation_loss(guess, index, config, ShardReader(index), 64, ALONE, stop)) == 4
