"""From a run to samples: export, plan, units, one npz and a picture."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ig_dist.config import Config
from ig_dist.errors import ConfigError
from ig_dist.evaluation.generate import Samples, collect, finished_images, generate_units
from ig_dist.evaluation.pictures import save_grid
from ig_dist.evaluation.plan import Plan, make_plan
from ig_dist.export import ExportInfo, find_export, load_export
from ig_dist.latents.tokenizers import index_tokenizer
from ig_dist.storage.files import open_url, write_whole
from ig_dist.terminal import console, is_main_process

PLAN_NAME = "plan.json"
REPORT_EVERY_S = 10.0  # between lines of progress where there is no terminal


def sample_run(config: Config, export: Path) -> Samples:
    """Make all images of the config's plan with exported weights.

    Under several processes (RANK, WORLD_SIZE) each is a worker; the first one collects the images into
    ``samples.npz`` and a grid picture. Workers need not start together, and may die and be started again.
    """
    device = sampling_device()
    model, info = load_export(export, device)
    tokenizer = index_tokenizer(info.tokenizer, info.latent, config.sample.tokenizer, device=device)
    weak_model, weak = None, None
    if any(term.kind == "auto" and term.scale != 1 for term in config.guidance):
        weak_model, weak = load_export(find_export(config.sample.weak_model), device)
    plan = make_plan(config, info, info.weights_sha256, weak)
    url = f"{config.sample.url.rstrip('/') or config.run.dir + '/samples'}/{plan.digest}"
    with _PlanProgress(plan, url) as progress:
        generate_units(
            model,
            info,
            plan,
            url,
            tokenizer,
            weak_model=weak_model,
            worker=int(os.environ.get("RANK", "0")),
            workers=int(os.environ.get("WORLD_SIZE", "1")),
            on_progress=progress.update,
        )
    samples = Samples(plan, info, url, tokenizer.uint8_rule, config.sample.tokenizer, weak)
    if is_main_process():
        fs, path = open_url(url, "sample.url")
        described: dict[str, object] = {"plan": plan.model_dump(mode="json"), "export": info.model_dump(mode="json")}
        described["run"] = config.run.dir
        described["weak"] = None if weak is None else weak.model_dump(mode="json")
        described["uint8_rule"], described["tokenizer"] = samples.uint8_rule, samples.tokenizer
        described["evaluate"] = {
            "reference": config.evaluate.reference or config.data.index,
            "metrics": config.evaluate.metrics,
        }
        write_whole(fs, f"{path}/{PLAN_NAME}", json.dumps(described, indent=1).encode())
        images, _ = collect(plan, url)
        picture = Path(config.run.dir) / "samples" / f"{plan.digest}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        save_grid([("", row) for row in np.array_split(images[:64], 4) if len(row)], picture, describe(plan))
        console.print(f"{plan.num} images: {url}/samples.npz, some of them: {picture}")
    return samples


def read_samples(url: str) -> tuple[Samples, Path, str, list[str]]:
    """The samples in a plan's folder, their run, the index of the real images, and the metrics of the run's config.

    Raises:
        ConfigError: no samples there.
    """
    fs, path = open_url(url, "SAMPLES")
    try:
        described = json.loads(fs.cat_file(f"{path}/{PLAN_NAME}"))
        plan, info = Plan(**described["plan"]), ExportInfo(**described["export"])
        evaluate = described["evaluate"]
        weak = None if described["weak"] is None else ExportInfo(**described["weak"])
        samples = Samples(plan, info, url.rstrip("/"), str(described["uint8_rule"]), str(described["tokenizer"]), weak)
        return samples, Path(described["run"]), str(evaluate["reference"]), list(evaluate["metrics"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        raise ConfigError(
            f"{url} holds no finished samples (no {PLAN_NAME}): make them with `ig-dist sample RUN`"
        ) from None


def describe(plan: Plan) -> str:
    """The plan in a few words."""
    names = {"ig": "IG", "cfg": "CFG", "auto": "autoguidance"}
    guidance = ", ".join(f"{names[term.kind]} {term.scale:g}" for term in plan.guidance) or "unguided"
    solver = plan.solver if plan.solver == "dopri5" else f"{plan.solver} {plan.steps}"
    return f"sample ({guidance}, {solver}, seed {plan.seed})"


def sampling_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


class _PlanProgress:
    """Progress of a plan over all of its workers, shown by the first one: finished units count, whoever made them."""

    def __init__(self, plan: Plan, url: str) -> None:
        self._plan, self._url = plan, url
        self._shown = is_main_process()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        bar = self._shown and console.is_terminal
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not bar)
        self._first = finished_images(plan, url)
        self._task = self._progress.add_task(describe(plan), total=plan.num, completed=self._first, rate="")
        self._began = self._listed = self._reported = time.monotonic()

    def __enter__(self) -> _PlanProgress:
        if self._shown and not console.is_terminal:
            console.print(f"{describe(self._plan)}: {self._plan.num} images, {self._first} of them are there")
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, in_hand: int) -> None:
        """Show the images of finished units and those of the unit in hand; lists the folder once a second at most."""
        now = time.monotonic()
        if not self._shown or now - self._listed < 1.0:
            return
        self._listed = now
        done = finished_images(self._plan, self._url) + in_hand
        rate = (done - self._first) / (now - self._began)
        self._progress.update(self._task, completed=done, rate=f"{rate:.1f} images/s")
        if not console.is_terminal and now - self._reported > REPORT_EVERY_S:
            self._reported = now
            left = (self._plan.num - done) / rate if rate else float("inf")
            console.print(f"  {done}/{self._plan.num} images, {rate:.1f} images/s, {left:.0f} s left")
