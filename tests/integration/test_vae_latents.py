"""A run on an autoencoder's posterior moments: grids, samples and the reference decode, wherever the autoencoder is."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from ig_dist.autoencoders.tokenizers import get_tokenizer
from ig_dist.data.index import SampleTable, read_index, write_index
from ig_dist.data.shards import pack_shard, scan_shard
from ig_dist.features.images import index_images
from tests.conftest import run_command, succeed
from tests.scoring import all_pictures

SAMPLES = 64


def write_moments(folder: Path, vae: Path) -> np.ndarray:
    """An index of two shards with the moments of random pictures; the moments."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(32, 32), **blocks).save_pretrained(vae)
    tokenizer = get_tokenizer(str(vae))
    images = torch.randint(0, 256, (SAMPLES, 16, 16, 3), dtype=torch.uint8)
    moments = tokenizer.encode(images).numpy().astype(np.float16)
    labels = np.arange(SAMPLES) % 2
    folder.mkdir()
    shards, rows = [], []
    for number, chosen in enumerate(np.split(np.arange(SAMPLES), 2)):
        data = pack_shard([f"{i:08d}" for i in chosen], moments[chosen], labels[chosen])
        name = f"shard-{number:06d}.tar"
        (folder / name).write_bytes(data)
        rows += scan_shard(io.BytesIO(data), moments.dtype, moments.shape[1:])
        digest = hashlib.sha256(data).hexdigest()
        shards.append({"name": name, "bytes": len(data), "samples": len(chosen), "sha256": digest})
    info = {
        "source": "noise",
        "seed": 0,
        "tokenizer": {"name": str(vae), "sha256": tokenizer.sha256, "image_size": 16, "image_channels": 3},
        "latent": {
            "kind": "moments",
            "shape": (4, 8, 8),
            "dtype": "float16",
            "shift": [0.0] * 4,
            "scale": [tokenizer.scale] * 4,
        },
        "classes": ["even", "odd"],
        "statistics": {"mean": [0.0] * 4, "std": [1.0] * 4},
        "shards": shards,
    }
    write_index(str(folder), info, SampleTable.from_rows(rows))
    return moments


def test_a_run_on_moments(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    vae, moved = tmp_path / "vae", tmp_path / "moved"
    moments = write_moments(tmp_path / "data", vae)
    index = read_index(str(tmp_path / "data"))
    means = torch.from_numpy(moments[:, :4]).float()
    decoded = all_pictures(index_images(index)).images
    assert np.array_equal(decoded, get_tokenizer(str(vae)).decode(means).numpy())

    config = tiny_config(
        data={"index": str(tmp_path / "data")}, train={"steps": 4}, log={"every_steps": 1, "sample_every_steps": 2}
    )
    shutil.move(vae, moved)
    refused = run_command(["ig-dist", "train", config])
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "sample.tokenizer=PLACE" in refused.stderr
    assert not (tmp_path / "runs" / "tiny").exists()
    place = f"sample.tokenizer={moved}"
    succeed(["ig-dist", "train", config, place])
    done = run_command(["ig-dist", "train", config, "log.sample_every_steps=0"])  # the key is free to change
    assert done.returncode == 0, done.stderr

    run = tmp_path / "runs" / "tiny"
    refused = run_command(["ig-dist", "sample", run])
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and str(vae) in refused.stderr
    plans = []
    for where in (moved, shutil.copytree(moved, tmp_path / "copy")):
        succeed(["ig-dist", "sample", run, f"sample.tokenizer={where}", "sample.num=20"])
        (plan,) = (file.parent for file in run.glob("samples/*/plan.json"))
        plans.append(plan)
    assert plans[0] == plans[1]
    images = np.load(plan / "samples.npz")["arr_0"]
    assert images.shape == (20, 16, 16, 3) and images.std() > 0

    done = succeed(["ig-dist", "evaluate", plan, "--json"])
    protocol = json.loads(done.stdout)["protocol"]
    assert protocol["uint8_rule"] == "trunc(255 clip((x + 1) / 2, 0, 1))"
    assert protocol["tokenizer_sha256"] == index.info.tokenizer.sha256 and protocol["reference_images"] == SAMPLES
