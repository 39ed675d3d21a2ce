"""From a run to samples, scores and sweeps: export, plan, units, pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ig_dist.config import Config
from ig_dist.config_file import with_scales
from ig_dist.data.index import read_index
from ig_dist.errors import ConfigError
from ig_dist.evaluation.generate import collect, generate_units, make_unit
from ig_dist.evaluation.pictures import save_grid, save_scale_plot
from ig_dist.evaluation.plan import Plan, make_plan
from ig_dist.evaluation.scores import evaluate_plan, index_images
from ig_dist.export import ExportInfo, export_run, load_export
from ig_dist.run_dir import replace_text
from ig_dist.terminal import console, is_main_process

PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class Samples:
    """Where the images of a plan are, and all that a score's protocol needs."""

    plan: Plan
    info: ExportInfo
    url: str
    reference: str
    """Index of the real images."""


def sample_run(config: Config, *, ema: float | None = None, raw: bool = False) -> Samples:
    """Export the newest checkpoint of a run and make all images of the config's plan.

    Under several processes (RANK, WORLD_SIZE) each is a worker; the first one collects the images into
    ``samples.npz`` and a grid picture.
    """
    device = _device()
    folder = export_run(config, ema=ema, raw=raw)
    model, info = load_export(folder, device)
    plan = make_plan(config, info)
    url = f"{config.sample.url.rstrip('/') or config.run.dir + '/samples'}/{plan.digest}"
    samples = Samples(plan, info, url, config.evaluate.reference or config.data.index)
    if is_main_process() and not console.is_terminal:
        console.print(f"{_describe(plan)}: {plan.num} images")
    with _progress() as progress:
        task = progress.add_task(_describe(plan), total=plan.num)
        generate_units(
            model,
            info,
            plan,
            url,
            worker=int(os.environ.get("RANK", "0")),
            workers=int(os.environ.get("WORLD_SIZE", "1")),
            on_images=lambda count: progress.advance(task, count),
        )
    if is_main_process():
        fs, path = fsspec.core.url_to_fs(url)
        described = {"plan": plan.model_dump(mode="json"), "export": info.model_dump(mode="json")}
        fs.pipe_file(
            f"{path}/{PLAN_NAME}", json.dumps({**described, "reference": samples.reference}, indent=1).encode()
        )
        images, _ = collect(plan, url)
        picture = Path(config.run.dir) / "samples" / f"{plan.digest}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        save_grid([("", row) for row in np.array_split(images[:64], 4)], picture, _describe(plan))
        console.print(f"{plan.num} images: {url}/samples.npz, some of them: {picture}")
    return samples


def read_samples(url: str) -> Samples:
    """The samples in a plan's folder.

    Raises:
        ConfigError: no samples there.
    """
    fs, path = fsspec.core.url_to_fs(url.rstrip("/"))
    try:
        described = json.loads(fs.cat_file(f"{path}/{PLAN_NAME}"))
        plan, info = Plan(**described["plan"]), ExportInfo(**described["export"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        raise ConfigError(
            f"{url} holds no finished samples (no {PLAN_NAME}): make them with `ig-dist sample RUN`"
        ) from None
    return Samples(plan, info, url.rstrip("/"), described["reference"])


def sweep_run(config: Config, ig_scales: Sequence[float], cfg_scales: Sequence[float]) -> dict[str, Any]:
    """Score a grid of guidance scales with common noise; ``sweep.json``, ``sweep.png`` and ``grid.png`` in the run.

    What exists of an earlier sweep is not made again.
    """
    rows: list[dict[str, Any]] = []
    results = []
    run = Path(config.run.dir)
    for cfg_scale in cfg_scales:
        for ig_scale in ig_scales:
            samples = sample_run(with_scales(config, ig_scale=ig_scale, cfg_scale=cfg_scale))
            out = run / "evaluations" / f"{samples.plan.digest}.json"
            results.append(evaluate_plan(samples.plan, samples.info, samples.url, samples.reference, out))
            row = {"ig_scale": ig_scale, "cfg_scale": cfg_scale, "scores": results[-1]["scores"]}
            rows.append({**row, "plan": samples.plan.digest})
    common = {
        key: value for key, value in results[0]["protocol"].items() if all(r["protocol"][key] == value for r in results)
    }
    sweep = {"rows": rows, "protocol": common}
    replace_text(run / "sweep.json", json.dumps(sweep, indent=1) + "\n")
    save_scale_plot(rows, "fd_pixel", run / "sweep.png")
    _save_scale_grid(config, ig_scales, run / "grid.png")
    return sweep


def _save_scale_grid(config: Config, ig_scales: Sequence[float], file: Path, columns: int = 20) -> None:
    """Real images above generated ones at every scale, the same noise in each column."""
    index = read_index(config.evaluate.reference or config.data.index)
    model, info = load_export(export_run(config), _device())
    shown = with_scales(config, cfg_scale=1.0).model_copy(deep=True)
    rows: list[tuple[str, NDArray[np.uint8]]] = [("real", _real_by_class(config, columns, len(index.info.classes)))]
    for scale in ig_scales:
        plan = make_plan(with_scales(shown, ig_scale=scale), info).model_copy(
            update={"num": columns, "unit_size": columns, "batch_size": columns, "labels": "balanced"}
        )
        rows.append((f"IG {scale:g}" if scale != 1 else "unguided", make_unit(model, info, plan, 0)[0]))
    save_grid(rows, file, "the same noise in every column")


def _real_by_class(config: Config, columns: int, num_classes: int) -> NDArray[np.uint8]:
    """Real images in the order of balanced labels: 0, 1, 2, ..."""
    batches = list(index_images(read_index(config.evaluate.reference or config.data.index)))
    images, labels = (np.concatenate(column) for column in zip(*batches, strict=True))
    of_class = [np.flatnonzero(labels == label) for label in range(num_classes)]
    # a class of few images shows them again
    chosen = [np.take(of_class[i % num_classes], i // num_classes, mode="wrap") for i in range(columns)]
    return images[chosen]


def _describe(plan: Plan) -> str:
    guidance = ", ".join(f"{term.kind.upper()} {term.scale:g}" for term in plan.guidance) or "unguided"
    return f"sample ({guidance}, {plan.solver} {plan.steps})"


def _device() -> torch.device:
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (console.is_terminal and is_main_process()))
