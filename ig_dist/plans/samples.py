"""Folders of samples: what one says of itself, and which there are of a run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from ig_dist.config import Config
from ig_dist.config.file import load_run
from ig_dist.config.paths import moved_path
from ig_dist.config.sampling import EvaluateConfig
from ig_dist.errors import ConfigError, IgDistError
from ig_dist.export import INFO_NAME, UNKNOWN_DATA, ExportInfo
from ig_dist.plans.plan import Plan
from ig_dist.plans.units import Samples, existing, unit_name, write_file
from ig_dist.storage.files import open_url, read_file
from ig_dist.storage.urls import LOCAL
from ig_dist.terminal import console

PLAN_NAME = "plan.json"


def samples_url(config: Config) -> str:
    """Folder of the plans of a run."""
    return config.sample.url.rstrip("/") or f"{config.run.dir}/samples"


def reference_of(config: Config) -> str:
    """What samples are held against; empty: an export without its run does not say."""
    return config.evaluate.reference or ("" if config.data.index == UNKNOWN_DATA else config.data.index)


class _PlanFile(BaseModel):
    """``plan.json``: what a plan's folder holds, for whoever evaluates it."""

    plan: Plan
    export: ExportInfo
    run: str
    weak: ExportInfo | None
    uint8_rule: str
    tokenizer: str
    evaluate: EvaluateConfig


def write_plan(samples: Samples, config: Config) -> None:
    """Write ``plan.json``; the samples are finished."""
    fs, path = open_url(samples.url, "sample.url")
    weights = {name: _absolute(place) for name, place in config.evaluate.weights.items()}
    told = _PlanFile(
        plan=samples.plan,
        export=samples.info,
        run=str(Path(config.run.dir).absolute()),
        weak=samples.weak,
        uint8_rule=samples.uint8_rule,
        tokenizer=_absolute(samples.tokenizer),
        evaluate=config.evaluate.model_copy(
            update={"reference": _absolute(reference_of(config)), "weights": weights},
        ),
    )
    write_file(fs, f"{path}/{PLAN_NAME}", json.dumps(told.model_dump(mode="json"), indent=1).encode())


def read_samples(url: str) -> tuple[Samples, Path, EvaluateConfig]:
    """The samples in a plan's folder, their run, and how its config has them scored.

    Samples that lie in RUN/samples are that run's, also where it was moved or copied to.

    Raises:
        ConfigError: no samples there.
    """
    url = url.rstrip("/")
    fs, path = open_url(url, "SAMPLES")
    try:
        told = _PlanFile.model_validate_json(read_file(fs, f"{path}/{PLAN_NAME}"))
    except (OSError, ValueError):
        raise ConfigError(
            f"{url} holds no finished samples (no {PLAN_NAME}): make them with `ig-dist sample RUN`"
        ) from None
    run, above = Path(told.run), Path(url).absolute().parent
    if "://" not in url and above.name == "samples" and (above.parent / "config.yaml").is_file():
        run = above.parent

    def now(place: str) -> str:
        return moved_path(place, told.run, run) if told.run else place

    weights = {name: now(place) for name, place in told.evaluate.weights.items()}
    evaluate = told.evaluate.model_copy(update={"reference": now(told.evaluate.reference), "weights": weights})
    return Samples(told.plan, told.export, url, told.uint8_rule, now(told.tokenizer), told.weak), run, evaluate


def is_run(folder: Path) -> bool:
    """Whether scores may go there: a plan's file may name any folder as its run."""
    return any((folder / name).is_file() for name in ("config.yaml", INFO_NAME))


class Listed(NamedTuple):
    """A plan of a run."""

    url: str
    plan: Plan | None  # None: not finished
    images: int  # that are there; of an unfinished plan, units instead
    scores: Mapping[str, float]  # those that were written into the run
    step: int | None = None  # of the checkpoint


def list_plans(run: str | Path) -> list[Listed]:
    """The plans that a run has samples of, finished or not."""
    return list(_listed(samples_url(load_run(run)), Path(run)))


def find_samples(src: str) -> str | None:
    """The folder of a plan's samples that ``src`` names, itself, by its npz, or by its run; None: it names none.

    Raises:
        ConfigError: it has none, or several, which are listed.
    """
    fs, path = open_url(src, "SAMPLES", web=False)
    if fs.exists(f"{path}/{PLAN_NAME}") or unit_name(0) in existing(fs, path):
        return src
    folder = Path(src)
    if folder.name == "samples.npz" and (folder.parent / PLAN_NAME).is_file():
        return str(folder.parent)
    if (folder / "config.yaml").is_file():
        run, place = folder, samples_url(load_run(folder))
    elif folder.name == "samples" and (folder.parent / "config.yaml").is_file():
        run, place = folder.parent, src
    else:
        return None
    found = [listed for listed in _listed(place, run) if listed.plan]
    if not found:
        raise ConfigError(f"{src} holds no finished samples (no {PLAN_NAME}): make them with `ig-dist sample {run}`")
    if len(found) > 1:
        for listed in found:
            assert listed.plan is not None
            console.print(f"{listed.url}: {listed.images} images, {listed.plan.describe()}")
        raise ConfigError(f"{src} holds the samples of {len(found)} plans: name the folder of one, see above")
    return found[0].url


def _listed(url: str, run: Path) -> Iterator[Listed]:
    fs, path = open_url(url, "sample.url")
    entries = fs.ls(path, detail=True) if fs.exists(path) else []
    for folder in sorted(entry["name"] for entry in entries if entry["type"] == "directory"):
        name, files = folder.rstrip("/").rsplit("/", 1)[-1], existing(fs, folder)
        plan = step = None
        if PLAN_NAME in files:
            with contextlib.suppress(OSError, ValueError, IgDistError):  # a damaged one counts as unfinished
                told = _PlanFile.model_validate_json(read_file(fs, f"{folder}/{PLAN_NAME}"))
                step, plan = told.export.step, told.plan
        if plan is not None:
            yield Listed(f"{url}/{name}", plan, plan.num, _scores(run / "evaluations" / f"{plan.digest}.json"), step)
        elif units := [file for file in files if file.startswith("unit_")]:
            yield Listed(f"{url}/{name}", None, len(units), {})


def _scores(file: Path) -> dict[str, float]:
    try:
        found = json.loads(read_file(LOCAL, str(file)))["scores"]
        return {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _absolute(place: str) -> str:
    """A path that holds from any folder; a URL or a name as it is."""
    return str(Path(place).absolute()) if place and "://" not in place and Path(place).exists() else place
