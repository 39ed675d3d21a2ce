"""The data plane from end to end: class tars, an autoencoder, S3, two encoders of which one is killed, training."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset

from ig_dist.data.index import read_index
from ig_dist.data.order import SampleOrder
from ig_dist.storage.files import open_url
from ig_dist.training.meter import batch_fingerprint
from tests import imagenet_like
from tests.autoencoders import save_vae
from tests.conftest import succeed
from tests.forked import Process
from tests.runs import metrics
from tests.waiting import wait_until

STEPS = 18
GOOD = imagenet_like.CLASSES * imagenet_like.PER_CLASS - 2  # two files hold no picture
Write = Callable[..., Path]


def encode(tar: Path, vae: Path, dest: str, worker: str) -> list[str]:
    options = ["--image-size", "32", "--samples-per-shard", "16", "--batch-size", "4", "--workers", "1"]
    command = ["data_prep/encode_latents.py", "--source", str(tar), "--dest", dest, "--tokenizer", str(vae)]
    return [*command, *options, "--flips", "--max-rejected", "0.02", "--worker", worker]


def finish(process: Process) -> None:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


def contents(url: str) -> dict[str, bytes]:
    fs, path = open_url(url, "test")
    return {name.rsplit("/", 1)[1]: fs.cat_file(name) for name in fs.find(path)}


def test_encode_on_two_workers_to_s3_then_train_stop_and_resume(
    bucket: str, tmp_path: Path, tiny_config: Write
) -> None:
    tar, vae = imagenet_like.class_tars(tmp_path / "imagenet"), tmp_path / "vae"
    save_vae(vae)
    alone, shared = f"s3://{bucket}/alone", f"s3://{bucket}/shared"
    finish(Process(encode(tar, vae, alone, "0/1")))

    first, victim = Process(encode(tar, vae, shared, "0/2")), Process(encode(tar, vae, shared, "1/2"))
    fs, path = open_url(shared, "test")
    wait_until(lambda: fs.exists(path) and len(fs.glob(f"{path}/*.tar")) >= 2, first)  # in the middle
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    for process in (first, Process(encode(tar, vae, shared, "1/2"))):
        finish(process)
    assert contents(shared) == contents(alone)

    index = read_index(shared)
    assert index.num_samples == GOOD and index.info.classes == imagenet_like.SYNSETS and index.info.latent.flips
    assert index.info.rejected == 2
    stock = webdataset.WebDataset(
        [file for file in _downloaded(shared, tmp_path / "copy")], shardshuffle=False
    ).decode()
    samples = list(stock)
    assert len(samples) == GOOD and samples[0]["latent.npy"].shape == (8, 16, 16)
    assert [sample["cls"] for sample in samples] == index.table.label.tolist()

    train(shared, tiny_config, tmp_path)


def train(url: str, tiny_config: Write, tmp_path: Path) -> None:
    """On 2 processes without a stop; stopped, and resumed on 1 and then on 4: the same batches, those of the order."""
    groups: dict[str, dict[str, Any]] = {
        "data": {"index": url, "flip": True, "cache_dir": str(tmp_path / "cache"), "cache_bytes": 200_000},
        "train": {"steps": STEPS},
        "checkpoint": {"every_steps": 6},
    }
    curves = {}
    for name, runs in {"whole": [(2, STEPS)], "stopped": [(2, 6), (1, 12), (4, STEPS)]}.items():
        config = tiny_config(name, **groups)
        run = tmp_path / "runs" / name
        for processes, until in runs:
            command = ["launchers/local.py", "--processes", str(processes), str(config)]
            process = Process(command)
            if until < STEPS:
                wait_until((run / f"checkpoints/step_{until:010d}/manifest.json").exists, process)
                process.send_signal(signal.SIGTERM)
                _, errors = process.communicate(timeout=60)
                assert process.returncode == 75, errors
            else:
                finish(process)
        curves[name] = metrics(run)
    assert [line["step"] for line in curves["stopped"]] == list(range(1, STEPS + 1))
    index = read_index(url)
    order = SampleOrder(index.shard_sizes, streams=8, global_batch_size=32, window_samples=32, seed=0)
    for mine, theirs in zip(curves["whole"], curves["stopped"], strict=True):
        assert mine["batch_fingerprint"] == theirs["batch_fingerprint"] == fingerprint(order, mine["step"] - 1)
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
        assert mine["quarantined"] == theirs["storage_faults"] == 0


def fingerprint(order: SampleOrder, number: int) -> int:
    """What a global batch of the order leaves in the metrics."""
    import torch

    from ig_dist.data.stream import Batch

    ids = torch.from_numpy(order.batch(number)[0])
    positions = torch.arange(number * len(ids), (number + 1) * len(ids))
    return batch_fingerprint(Batch(ids, ids, ids, positions, ids))


def _downloaded(url: str, folder: Path) -> list[str]:
    folder.mkdir()
    files = {name: data for name, data in contents(url).items() if name.endswith(".tar")}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [str(folder / name) for name in sorted(files)]


def test_faults_while_encoding_and_training_cost_time_only(
    fault_proxy: Any, bucket: str, tmp_path: Path, tiny_config: Write
) -> None:
    from tests.fault_proxy import Fault

    dest = f"s3://{bucket}/digits"
    fault_proxy.add(Fault("status503", share=0.05), Fault("reset", share=0.05), Fault("flip", share=0.05, method="PUT"))
    command = ["python", "data_prep/encode_latents.py", "--source", "digits", "--dest", dest]
    succeed(command)
    config = tiny_config(data={"index": dest}, train={"steps": 60})
    done = succeed(["ig-dist", "train", config])
    assert fault_proxy.log and "again in" in done.stdout
    lines = metrics(tmp_path / "runs" / "tiny")
    assert lines[-1]["storage_faults"] > 0 and json.dumps(lines)
    index = read_index(dest)
    order = SampleOrder(index.shard_sizes, streams=8, global_batch_size=32, window_samples=32, seed=0)
    assert [line["batch_fingerprint"] for line in lines] == [fingerprint(order, number) for number in range(60)]
