"""The digits figures of docs/internal-guidance.md: guidance, the auxiliary head's depth, training acceleration.

python docs/figures/guidance_digits.py runs/guidance-figures docs/pictures 1

Trains small SiTs on the 1,797 real digits, three seeds of each kind, and scores them at several guidance scales; the
last argument is the number of processes. Runs and scores are kept in the first folder: what is there is not made again.
Prints the tables of the page.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from ig_dist.config import Config
from ig_dist.config.file import load_config, with_guidance
from ig_dist.evaluation.metrics import frechet_distance
from ig_dist.evaluation.references import Reference, open_reference
from ig_dist.evaluation.scores import Scores, score_plan
from ig_dist.export import find_weights
from ig_dist.features.extractors.extractor import get_extractor
from ig_dist.features.features import streamed_moments
from ig_dist.sampling.run import sample_run
from ig_dist.terminal import console
from ig_dist.training.trainer import train

ROOT = Path(__file__).resolve().parents[2]
SEEDS, STEPS, EARLY = (0, 1, 2), 600, 150
METRICS = ("fd_pixel", "label_agreement")
SMALL = [
    *("model.hidden_size=64", "train.global_batch_size=64", f"train.steps={STEPS}", "ema.decays=[0.98]"),
    *("optimizer.lr=4e-3", "optimizer.schedule=cosine"),
    *(f"checkpoint.every_steps={EARLY}", "checkpoint.keep_last=9", "log.sample_every_steps=0"),
    *("sample.num=1000", "sample.steps=8", "sample.batch_size=250", "sample.unit_size=1000"),
]
DEPTHS = {"no head": "null", **{f"block {depth}": str(depth) for depth in range(1, 5)}}
USUAL = "block 2"
ACCELERATED = {
    f"{source}, w = {weight}": f"loss.acceleration={{weight: {weight}, source: {key}, start_step: {STEPS // 6}}}"
    for source, key in (("same forward", "same_forward"), ("EMA", "ema"))
    for weight in (0.5,)
}
KINDS = {name: [f"model.aux_depth={depth}"] for name, depth in DEPTHS.items()}
KINDS |= {name: ["model.aux_depth=2", override] for name, override in ACCELERATED.items()}

Point = tuple[float, float, float]  # scales of IG, CFG and autoguidance by the checkpoint of step EARLY
FEW: list[Point] = [(1.0, 1.0, 1.0), (1.3, 1.0, 1.0), (1.6, 1.0, 1.0), (2.0, 1.0, 1.0)]
SCALES = (1.0, 1.2, 1.4, 1.6, 2.0, 2.5, 3.0)
LINES: dict[str, list[Point]] = {
    "IG": [(scale, 1.0, 1.0) for scale in SCALES],
    "CFG": [(1.0, scale, 1.0) for scale in SCALES],
    "IG, with CFG at 1.2": [(scale, 1.2, 1.0) for scale in SCALES],
    "autoguidance": [(1.0, 1.0, scale) for scale in SCALES],
}
ALL = sorted({point for line in LINES.values() for point in line} | set(FEW))


@lru_cache
def reference(url: str) -> Reference:
    """The real digits."""
    return open_reference(url, METRICS, get_extractor)


def redrawn_distances(url: str) -> list[float]:
    """Distances of real images, drawn with replacement as many as a score has."""
    pixels = ("pixel", "pool")
    rows = reference(url).rows(pixels, 10_000)
    drawn = [rows[np.random.default_rng(seed).choice(len(rows), 1000)] for seed in range(4)]
    return [frechet_distance(reference(url).moments(pixels), streamed_moments([these])) for these in drawn]


def points_of(kind: str) -> list[Point]:
    """Where a run is scored: everywhere, at IG scales, or unguided where there is no head."""
    return {USUAL: ALL, "no head": FEW[:1]}.get(kind, FEW)


def scored(kind: str, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Scores of a run at each of its points, trained and made as far as they are missing."""
    torch.set_num_threads(1)
    console.quiet = True
    run = folder / f"{kind.replace(' ', '-').replace(',', '').replace('=', '')}-{seed}"
    data = f"data.index={folder / 'data'}"
    config = load_config(
        ROOT / "configs/digits.yaml", [*SMALL, *KINDS[kind], data, f"run.dir={run}", f"run.seed={seed}"]
    )
    train(config)
    export = find_weights(config.run.dir, config=config).export
    return {json.dumps(point): score(config, export, point) for point in points_of(kind)}


def score(config: Config, export: Path, point: Point) -> dict[str, float]:
    """Scores at one point, kept in the run."""
    ig, cfg, auto = point
    out = Path(config.run.dir) / "evaluations" / f"ig{ig}_cfg{cfg}_auto{auto}.json"
    if not out.exists():
        sample = config.sample.model_copy(update={"weak_model": f"{config.run.dir}@{EARLY}"})
        config = config.model_copy(update={"sample": sample})
        scales = {"ig_scale": ig, "cfg_scale": cfg, "auto_scale": auto}
        asked = with_guidance(config, **{name: scale for name, scale in scales.items() if scale != 1})
        samples, files = sample_run(asked, export, METRICS)
        score_plan(samples, Scores(files, reference(config.data.index)), METRICS, out)
    return dict(json.loads(out.read_text())["scores"])


Results = dict[tuple[str, int], dict[str, dict[str, float]]]


def values(results: Results, kind: str, point: Point, metric: str = "fd_pixel") -> np.ndarray:
    """A score of every seed."""
    return np.array([results[kind, seed][json.dumps(point)][metric] for seed in SEEDS])


def told(scores: np.ndarray) -> str:
    """Mean and deviation over seeds."""
    return f"{scores.mean():.3f} ± {scores.std(ddof=1):.3f}"


def draw_guidance(results: Results, pictures: Path) -> None:
    """Both scores against the scale, one line per kind of guidance."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, metric in zip(axes, ("fd_pixel", "label_agreement"), strict=True):
        for name, points in LINES.items():
            scores = [values(results, USUAL, point, metric) for point in points]
            means, spread = [s.mean() for s in scores], [s.std(ddof=1) for s in scores]
            axis.errorbar(SCALES, means, spread, fmt="o-", markersize=4, capsize=2, label=name)
        axis.set(xlabel="scale (1: off)", ylabel=metric)
        axis.grid(alpha=0.3)
    axes[0].set(yscale="log", title="Frechet distance on pixels (lower is better)")
    axes[0].set_yticks([1, 1.5, 2, 3, 4, 5], ["1", "1.5", "2", "3", "4", "5"])
    axes[0].set_yticks([], minor=True)
    axes[1].set_title("labels that a classifier agrees with")
    axes[0].legend()
    figure.savefig(pictures / "guidance-digits.png", dpi=110)


def draw_training(results: Results, pictures: Path) -> None:
    """The distance over the kinds of training, unguided and at IG scales."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", width_ratios=[1.2, 1])
    for axis, kinds in zip(axes, (list(DEPTHS), [USUAL, *ACCELERATED]), strict=True):
        for offset, point in zip((-0.15, -0.05, 0.05, 0.15), FEW, strict=True):
            at = [i for i, kind in enumerate(kinds) if point in points_of(kind)]
            scores = [values(results, kinds[i], point) for i in at]
            means, spread = [s.mean() for s in scores], [s.std(ddof=1) for s in scores]
            name = f"IG {point[0]:g}" if point[0] != 1 else "unguided"
            axis.errorbar([i + offset for i in at], means, spread, fmt="o", markersize=4, capsize=2, label=name)
        labels = [kind.replace(", ", "\n").replace("block", "after\nblock").replace("no ", "no\n") for kind in kinds]
        axis.set_xticks(range(len(kinds)), labels, fontsize=8)
        axis.set_ylabel("fd_pixel (lower is better)")
        axis.grid(alpha=0.3)
    axes[1].set_xticks(range(1 + len(ACCELERATED)), ["off", *[k.replace(", ", "\n") for k in ACCELERATED]], fontsize=8)
    axes[0].set_title("where the auxiliary head is, of 6 blocks")
    axes[1].set_title(f"training acceleration, head after {USUAL}")
    axes[1].legend(fontsize=8, loc="upper left")
    figure.savefig(pictures / "guidance-training.png", dpi=110)


def main() -> None:
    """Make what is missing, print the tables, draw."""
    folder, pictures, processes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    began = time.time()
    if not (folder / "data/index.json").exists():
        encode = [sys.executable, "-m", "ig_dist.cli", "encode", "--source", "digits", "--tokenizer", "pixel"]
        subprocess.run([*encode, "--dest", folder / "data"], check=True)
    tasks = [(kind, seed) for seed in SEEDS for kind in KINDS]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {task: pool.submit(scored, *task, folder) for task in tasks}
        results = {}
        for number, (task, future) in enumerate(futures.items(), start=1):
            results[task] = future.result()
            print(f"{number}/{len(tasks)} {task[0]}, seed {task[1]}: {time.time() - began:.0f} s", flush=True)

    print("\n| scale | " + " | ".join(LINES) + " |\n|" + "---|" * (1 + len(LINES)))
    for i, scale in enumerate(SCALES):
        cells = [told(values(results, USUAL, points[i])) for points in LINES.values()]
        print(f"| {scale:g} | " + " | ".join(cells) + " |")
    for metric in ("fd_pixel", "label_agreement"):
        print(f"\n| {metric} | unguided | IG 1.3 | IG 1.6 | IG 2 |\n|---|---|---|---|---|")
        for kind in KINDS:
            cells = [told(values(results, kind, p, metric)) if p in points_of(kind) else "" for p in FEW]
            print(f"| {kind} | " + " | ".join(cells) + " |")
    print("\nfd_pixel of each seed:")
    for name, points in {**LINES, **{kind: [p for p in FEW if p in points_of(kind)] for kind in KINDS}}.items():
        of_kind = [values(results, name if name in KINDS else USUAL, point) for point in points]
        print(f"{name}: " + "; ".join(" ".join(f"{score:.3f}" for score in scores) for scores in of_kind))
    redrawn = " ".join(f"{distance:.3f}" for distance in redrawn_distances(f"{folder / 'data'}"))
    print(f"fd_pixel of 1,000 real images drawn with replacement, four times: {redrawn}")
    draw_guidance(results, pictures)
    draw_training(results, pictures)


if __name__ == "__main__":
    main()
