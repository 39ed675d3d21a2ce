"""Searching guidance: a grid of scales and intervals with common noise, scored, tabled and drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ig_dist.config import Config
from ig_dist.config_file import with_guidance
from ig_dist.data.index import read_index
from ig_dist.evaluation.generate import make_unit
from ig_dist.evaluation.pictures import save_grid, save_sweep_plot
from ig_dist.evaluation.plan import make_plan
from ig_dist.evaluation.sampling import sample_run, sampling_device
from ig_dist.evaluation.scores import evaluate_samples, index_images, load_reference
from ig_dist.export import export_run, load_export
from ig_dist.latents.tokenizers import index_tokenizer
from ig_dist.run_dir import replace_text
from ig_dist.terminal import is_main_process

Interval = tuple[float, float]
COLUMNS = 20


def sweep_run(
    config: Config,
    ig_scales: Sequence[float],
    cfg_scales: Sequence[float],
    auto_scales: Sequence[float] = (1.0,),
    *,
    ig_intervals: Sequence[Interval | None] = (None,),
    cfg_interval: Interval | None = None,
    auto_interval: Interval | None = None,
    seeds: int = 1,
) -> dict[str, Any]:
    """Score every combination; ``sweep.json``, ``sweep.png`` and ``grid.png`` in the run.

    Every point starts from the same noise; with several seeds (sample.seed and the following ones) a point's scores are
    means, with standard deviations beside them. What exists of an earlier sweep is not made again. Under several
    processes each makes its share of every plan and the first one scores; the others return an empty result.
    """
    main, run = is_main_process(), Path(config.run.dir)
    export = export_run(config)  # once: a run that goes on meanwhile must not change the weights between points
    reference_url = config.evaluate.reference or config.data.index
    reference = load_reference(reference_url, config.evaluate.metrics, config.sample.tokenizer) if main else None
    rows, protocols = [], []
    for auto_scale, cfg_scale, ig_interval, ig_scale in product(auto_scales, cfg_scales, ig_intervals, ig_scales):
        point = with_guidance(
            config,
            ig_scale=ig_scale,
            cfg_scale=cfg_scale,
            auto_scale=auto_scale,
            ig_interval=ig_interval,
            cfg_interval=cfg_interval,
            auto_interval=auto_interval,
        )
        results = []
        for seed in range(config.sample.seed, config.sample.seed + seeds):
            sample = point.sample.model_copy(update={"seed": seed})
            samples = sample_run(point.model_copy(update={"sample": sample}), export)
            if reference is not None:
                out = run / "evaluations" / f"{samples.plan.digest}.json"
                results.append(evaluate_samples(samples, reference, out))
        if results:
            intervals = {term.kind: term.interval for term in point.guidance}
            scales = {"ig_scale": ig_scale, "cfg_scale": cfg_scale, "auto_scale": auto_scale}
            ranges = {f"{kind}_interval": intervals[kind] for kind in ("ig", "cfg", "auto")}
            rows.append({**scales, **ranges, **_over_seeds(results)})
            protocols += [result["protocol"] for result in results]
    if not main:
        return {}
    common = {key: value for key, value in protocols[0].items() if all(p[key] == value for p in protocols)}
    sweep = {"rows": rows, "protocol": {**common, "seeds": seeds}}
    replace_text(run / "sweep.json", json.dumps(sweep, indent=1) + "\n")
    save_sweep_plot(rows, "fd_pixel", run / "sweep.png")
    _save_scale_grid(config, export, ig_scales, run / "grid.png")
    return sweep


def _over_seeds(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values = {name: [result["scores"][name] for result in results] for name in results[0]["scores"]}
    row: dict[str, Any] = {"scores": {name: float(np.mean(v)) for name, v in values.items()}}
    if len(results) > 1:
        row["std"] = {name: float(np.std(v, ddof=1)) for name, v in values.items()}
    return {**row, "plans": [result["protocol"]["plan"] for result in results]}


def _save_scale_grid(config: Config, export: Path, ig_scales: Sequence[float], file: Path) -> None:
    """Real images above generated ones at every scale, the same noise in each column, without CFG and autoguidance."""
    device = sampling_device()
    model, info = load_export(export, device)
    tokenizer = index_tokenizer(info.tokenizer, info.latent, config.sample.tokenizer, device=device)
    sample = config.sample.model_copy(
        update={"num": COLUMNS, "unit_size": COLUMNS, "batch_size": COLUMNS, "labels": "balanced"}
    )
    shown = config.model_copy(update={"sample": sample})
    rows = [("real", _real_by_class(config, len(info.classes)))]
    for scale in ig_scales:
        point = with_guidance(shown, ig_scale=scale, cfg_scale=1.0, auto_scale=1.0)
        plan = make_plan(point, info, info.weights_sha256)
        rows.append((f"IG {scale:g}" if scale != 1 else "unguided", make_unit(model, info, plan, 0, tokenizer).images))
    save_grid(rows, file, "the same noise in every column")


def _real_by_class(config: Config, num_classes: int) -> NDArray[np.uint8]:
    """Real images in the order of balanced labels: 0, 1, 2, ...; a small class begins anew."""
    index = read_index(config.evaluate.reference or config.data.index)
    batches = list(index_images(index, config.sample.tokenizer))
    images, labels = (np.concatenate(column) for column in zip(*batches, strict=True))
    by_class = [np.flatnonzero(labels == label) for label in range(num_classes)]
    chosen = [by_class[i % num_classes][i // num_classes % len(by_class[i % num_classes])] for i in range(COLUMNS)]
    return images[chosen]
