"""From a run to samples: export, plan, units with their features, one npz and a picture."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ig_dist.config import Config
from ig_dist.config.sampling import EvaluateConfig
from ig_dist.errors import ConfigError
from ig_dist.evaluation.catalogue import extractors_of
from ig_dist.evaluation.collecting import write_pngs, write_samples_npz
from ig_dist.evaluation.extractors.extractor import Extractor, get_extractor
from ig_dist.evaluation.features import FeatureFiles, feature_name
from ig_dist.evaluation.generate import Models, generate_units
from ig_dist.evaluation.pictures import save_grid
from ig_dist.evaluation.plan import Plan, make_plan
from ig_dist.evaluation.units import Samples, existing, read_unit, unit_name, write_file
from ig_dist.export import ExportInfo, find_weights, load_export
from ig_dist.latents.tokenizers import index_tokenizer
from ig_dist.storage.files import open_url
from ig_dist.terminal import console, is_first_process, is_main_process

PLAN_NAME = "plan.json"
REPORT_EVERY_S = 10.0  # between lines of progress where there is no terminal


class Made(NamedTuple):
    """What sampling ends with."""

    samples: Samples
    files: FeatureFiles
    """Features of the samples."""


def sample_run(
    config: Config, export: Path, metrics: Sequence[str] = (), *, num: int | None = None, collected: bool = True
) -> Made:
    """Make all images of the config's plan with exported weights, and the features that scores need of them.

    Under several processes (RANK, WORLD_SIZE) each is a worker; the first one collects the images into
    ``samples.npz`` and a grid picture. Workers need not start together, and may die and be started again.

    Args:
        config: the run's.
        export: folder of the weights.
        metrics: scores whose features are made beside the images.
        num: only the units of the first so many images; None: all.
        collected: write the npz and the picture.
    """
    device = sampling_device()
    extractors = [config_extractor(config, name, device) for name in extractors_of(metrics)]
    model, info = load_export(export, device)
    tokenizer = index_tokenizer(info.tokenizer, info.latent, config.sample.tokenizer, device=device)
    weak_model, weak = None, None
    if any(term.kind == "auto" and term.scale != 1 for term in config.guidance):
        weak_model, weak = load_export(_weak_export(config.sample.weak_model), device)
    plan = make_plan(config, info, info.weights_sha256, weak)
    keep_images = config.sample.keep_images
    if not keep_images and not extractors:
        raise ConfigError(
            "sample.keep_images=false keeps the features alone, and none are asked for: sample with --evaluate, or keep"
            " the images"
        )
    url = f"{config.sample.url.rstrip('/') or config.run.dir + '/samples'}/{plan.digest}"
    samples = Samples(plan, info, url, tokenizer.uint8_rule, config.sample.tokenizer, weak)
    counted_by = unit_name if keep_images else lambda number: feature_name(number, extractors[-1].name)
    with _PlanProgress(plan, url, counted_by, num) as progress:
        files = generate_units(
            Models(model, info, tokenizer, weak_model),
            samples,
            extractors,
            num=num,
            keep_images=keep_images,
            worker=int(os.environ.get("RANK", "0")),
            workers=int(os.environ.get("WORLD_SIZE", "1")),
            on_progress=progress.update,
        )
    _describe(samples, config)  # every worker: all units are there, and who scores now may be faster than the first
    if collected and is_main_process():
        _collect(samples, config)
    return Made(samples, files)


def _weak_export(source: str) -> Path:
    try:
        return find_weights(source).export
    except ConfigError as error:
        raise ConfigError(f"sample.weak_model {error}") from None


def config_extractor(config: Config, name: str, device: torch.device) -> Extractor:
    """An extractor with the weights that the config says."""
    return get_extractor(name, weights=config.evaluate.weights.get(name, ""), device=device)


def _describe(samples: Samples, config: Config) -> None:
    """Write what the plan's folder holds, for whoever evaluates it."""
    fs, path = open_url(samples.url, "sample.url")
    described: dict[str, Any] = {
        "plan": samples.plan.model_dump(mode="json"),
        "export": samples.info.model_dump(mode="json"),
        "run": config.run.dir,
        "weak": None if samples.weak is None else samples.weak.model_dump(mode="json"),
        "uint8_rule": samples.uint8_rule,
        "tokenizer": samples.tokenizer,
        "evaluate": {
            **config.evaluate.model_dump(mode="json"),
            "reference": config.evaluate.reference or config.data.index,
        },
    }
    write_file(fs, f"{path}/{PLAN_NAME}", json.dumps(described, indent=1).encode())


def _collect(samples: Samples, config: Config) -> None:
    """The npz, single pictures where they are asked for, and a picture of some."""
    plan, url = samples.plan, samples.url
    picture = Path(config.run.dir) / "samples" / f"{plan.digest}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    first = read_unit(plan, url, 0).images[:64]
    save_grid([("", row) for row in np.array_split(first, 4) if len(row)], picture, plan.describe())
    if config.sample.png:
        write_pngs(samples, config.sample.png, samples.info.classes)
    made = f"{plan.num} images: {url}"
    if config.sample.keep_images:
        write_samples_npz(samples)
        made += "/samples.npz"
    console.print(f"{made}, some of them: {picture}", markup=False)


def read_samples(url: str) -> tuple[Samples, Path, EvaluateConfig]:
    """The samples in a plan's folder, their run, and how its config has them scored.

    Raises:
        ConfigError: no samples there.
    """
    fs, path = open_url(url, "SAMPLES")
    try:
        described = json.loads(fs.cat_file(f"{path}/{PLAN_NAME}"))
        plan, info = Plan(**described["plan"]), ExportInfo(**described["export"])
        evaluate = EvaluateConfig(**described["evaluate"])
        weak = None if described["weak"] is None else ExportInfo(**described["weak"])
        samples = Samples(plan, info, url.rstrip("/"), str(described["uint8_rule"]), str(described["tokenizer"]), weak)
        return samples, Path(described["run"]), evaluate
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        raise ConfigError(
            f"{url} holds no finished samples (no {PLAN_NAME}): make them with `ig-dist sample RUN`"
        ) from None


def sampling_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


class _PlanProgress:
    """Progress of a plan over all of its workers, shown by the first one: finished units count, whoever made them."""

    def __init__(self, plan: Plan, url: str, file_name: Callable[[int], str], num: int | None) -> None:
        self._plan, self._url, self._name, self._num = plan, url, file_name, min(num or plan.num, plan.num)
        self._shown = is_first_process()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        bar = self._shown and console.is_terminal
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not bar)
        self._first = self._finished()
        self._task = self._progress.add_task(plan.describe(), total=self._num, completed=self._first, rate="")
        self._began = self._listed = self._reported = time.monotonic()

    def _finished(self) -> int:
        names = existing(*open_url(self._url, "sample.url"))
        units = -(-self._num // self._plan.unit_size)
        return sum(len(self._plan.unit(number)) for number in range(units) if self._name(number) in names)

    def __enter__(self) -> _PlanProgress:
        if self._shown and not console.is_terminal:
            console.print(f"{self._plan.describe()}: {self._num} images, {self._first} of them are there")
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
        done = min(self._finished() + in_hand, self._num)  # another worker may have made the unit in hand
        rate = (done - self._first) / (now - self._began)
        self._progress.update(self._task, completed=done, rate=f"{rate:.1f} images/s")
        if not console.is_terminal and now - self._reported > REPORT_EVERY_S:
            self._reported = now
            left = (self._num - done) / rate if rate else float("inf")
            console.print(f"  {done}/{self._num} images, {rate:.1f} images/s, {left:.0f} s left")
