"""Every published run starts: reduced on latents of its true shape, under DDP and FSDP2, and dry at full size."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from ig_dist.config.file import load_config
from ig_dist.data.index import SampleTable, write_index
from ig_dist.data.shards import FLIP_SUFFIX, pack_shard, scan_shard
from ig_dist.errors import ConfigError
from ig_dist.plans.asking import recipe
from ig_dist.training.dry_run import dry_run, print_dry_run
from tests.conftest import ROOT, run_command
from tests.distributed.test_engines import ENGINES, launch
from tests.runs import metrics

WHOLE = {"digits", "fashion_mnist_ig"}  # trained on their own pixels elsewhere
PUBLISHED = sorted({p.stem for p in (ROOT / "configs").glob("*.yaml")} - WHOLE)
SAMPLES, STEPS = 32, 12
REDUCED = [
    *("model.depth=3", "model.hidden_size=32", "model.num_heads=2", "train.epochs=null", f"train.steps={STEPS}"),
    *("train.global_batch_size=4", "data.streams=4", "data.workers=0", "train.compile=false", "log.every_steps=1"),
    "optimizer.lr=0.01",  # so that 12 steps show
]


def write_latents(folder: Path, shape: tuple[int, int, int], *, moments: bool) -> Path:
    """Latents of noise around 1 in one shard: mean and std, or a stored draw with that of the mirrored image."""
    draws = 1 + np.random.default_rng(0).standard_normal((2, SAMPLES, *shape)).astype(np.float16)
    stored = np.concatenate([draws[0], np.abs(draws[1])], axis=1) if moments else draws[0]
    labels = np.arange(SAMPLES) * 31 % 1000
    data = pack_shard([f"{i:04d}" for i in range(SAMPLES)], stored, labels, None if moments else draws[1])
    rows = scan_shard(io.BytesIO(data), stored.dtype, stored.shape[1:], flip_suffix=None if moments else FLIP_SUFFIX)
    folder.mkdir()
    (folder / "shard-000000.tar").write_bytes(data)
    shard = {"name": "shard-000000.tar", "bytes": len(data), "samples": SAMPLES}
    ones = [1.0] * shape[0]
    info = {
        "source": "noise",
        "seed": 0,
        "tokenizer": {"name": "none", "sha256": "0", "image_size": 256, "image_channels": 3},
        "latent": {
            "kind": "moments" if moments else "sample",
            "shape": shape,
            "dtype": "float16",
            "flips": not moments,
            "shift": [0.0] * shape[0],
            "scale": ones,
        },
        "classes": [str(i) for i in range(1000)],
        "statistics": {"mean": ones, "std": ones},
        "shards": [{**shard, "sha256": hashlib.sha256(data).hexdigest()}],
    }
    write_index(str(folder), info, SampleTable.from_rows(rows))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps of every config under both engines, all of one launch."""
    folder = tmp_path_factory.mktemp("configs")
    sit = write_latents(folder / "sd-vae", (4, 32, 32), moments=True)
    lightning = write_latents(folder / "va-vae", (32, 16, 16), moments=False)
    jobs = []
    for name in PUBLISHED:
        file = ROOT / "configs" / f"{name}.yaml"
        head = [] if load_config(file).model.aux_depth is None else ["model.aux_depth=1"]
        index = lightning if name.startswith("lightning") else sit
        for engine in ("ddp", "fsdp2"):
            overrides = [f"run.dir={folder / name}-{engine}", f"data.index={index}", *REDUCED, *head, *ENGINES[engine]]
            jobs.append({"config": str(file), "overrides": overrides})
    launch(jobs, 2, folder)
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_run_trains_under_ddp_and_fsdp2(trained: Path, name: str) -> None:
    ddp, fsdp2 = (metrics(trained / f"{name}-{engine}") for engine in ("ddp", "fsdp2"))
    assert len(ddp) == len(fsdp2) == STEPS
    for mine, theirs in zip(ddp, fsdp2, strict=True):
        assert mine["batch_fingerprint"] == theirs["batch_fingerprint"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)  # bf16
        assert mine["nonfinite_steps"] == 0
    assert ddp[0]["loss_final"] > 2.8  # |noise - data|^2 of a head that starts at zero
    assert max(line["loss"] for line in ddp[-3:]) < 0.9 * ddp[0]["loss"]
    model = yaml.safe_load((trained / f"{name}-ddp" / "config.yaml").read_text())["model"]
    published = load_config(ROOT / "configs" / f"{name}.yaml").model
    assert all(model[key] == getattr(published, key) for key in ("patch_size", "norm", "mlp", "rope", "time_input"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_run_is_told_at_full_size(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = ROOT / "configs" / f"{name}.yaml"
    print_dry_run(dry_run(load_config(file), gpus=8, mfu=0.4, peak_tflops=989.0))
    text = capsys.readouterr().out
    assert f"1,281,167 samples of {'32x16x16' if name.startswith('lightning') else '4x32x32'}, 1000 classes" in text
    header = " ".join(file.read_text().split("\nmodel:")[0].replace("\n#", "").split())
    told = re.search(r"([\d.]+) GFLOP a training image", text)
    claimed = re.search(r"([\d.]+) GFLOP a training image", header)
    assert told and (claimed is None or float(claimed[1]) == float(told[1]))
    epochs = load_config(file).train.epochs
    assert f"({epochs:.1f} epochs)" in text and f"{epochs:,.0f} epochs" in header


@pytest.mark.parametrize("name", ["sit_b2_ig", "sit_xl2_ig", "sit_xl2", "lightningdit_xl1_ig"])
def test_the_preset_is_what_the_config_says(name: str) -> None:
    file = ROOT / "configs" / f"{name}.yaml"
    written = load_config(file)
    other = ["guidance=[]", "sample.solver=heun", "sample.steps=3", "sample.labels=balanced", "sample.num=7"]
    other += ["sample.correct_last_step=false"]
    asked = load_config(file, [*other, *recipe("paper", written.model)])
    assert asked.guidance == written.guidance
    keys = ("num", "labels", "solver", "steps", "time_shift", "correct_last_step", "precision", "state", "compile")
    keys += ("decode_precision",)
    assert all(getattr(asked.sample, key) == getattr(written.sample, key) for key in keys)
    fast = load_config(file, [*other, *recipe("fast", written.model)])
    in_bf16 = asked.sample.model_copy(update={"precision": "bf16"})
    assert fast.sample == in_bf16 and fast.guidance == asked.guidance


def test_internal_guidance_alone_and_what_has_no_recipe() -> None:
    model = load_config(ROOT / "configs/lightningdit_xl1_ig.yaml").model
    config = load_config(ROOT / "configs/lightningdit_xl1_ig.yaml", recipe("paper-ig", model))
    assert [(term.kind, term.scale) for term in config.guidance] == [("ig", 1.7)]
    bare = load_config(ROOT / "configs/sit_xl2.yaml").model
    for name, of, message in (
        ("papre", model, "--preset 'papre': did you mean 'paper'?"),
        ("paper-ig", bare, "no published recipe for SiT-XL/2 without an auxiliary head, only for SiT-B/2, SiT-XL/2"),
        ("paper", load_config(ROOT / "configs/digits.yaml").model, "no published recipe for 6 blocks of width 128"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            recipe(name, of)


def test_an_auxiliary_head_beyond_half_of_the_depth_is_warned_of() -> None:
    assert not load_config(ROOT / "configs/sit_b2_ig.yaml", ["model.aux_depth=6"]).warnings()
    done = run_command(["ig-dist", "train", "configs/sit_b2_ig.yaml", "--dry-run", "model.aux_depth=8"])
    assert done.returncode == 0 and done.stderr.startswith("warning: model.aux_depth 8 is beyond half of the 12 blocks")
    assert len(done.stderr.splitlines()) == 1 and "use 4 or so" in done.stderr
