"""A plan's folder: the units that workers write into it, what it says of itself, and which there are of a run.

A unit is a piece of a plan that one worker makes and writes whole, one file each. No locks: its bytes are a function of
(plan, unit), so two workers that make the same one write the same file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel

from ig_dist.config import Config
from ig_dist.config.file import load_run
from ig_dist.config.paths import moved_path
from ig_dist.config.sampling import EvaluateConfig
from ig_dist.errors import ConfigError, DataError, IgDistError
from ig_dist.export import INFO_NAME, UNKNOWN_DATA, ExportInfo
from ig_dist.plans.plan import Plan
from ig_dist.storage.files import list_sizes, open_url, read_file, write_whole
from ig_dist.storage.urls import LOCAL, full_url
from ig_dist.terminal import console

PLAN_NAME = "plan.json"


class Pictures(NamedTuple):
    """Images, and what is known of each; of a plan's unit it is all known."""

    images: NDArray[np.uint8]  # (N, H, W, channels)
    labels: NDArray[np.int64] | None = None  # (N,)
    work: NDArray[np.int64] | None = None
    """(N, 3): velocity evaluations, and forward passes of the model and of the second one."""


@dataclass(frozen=True)
class Samples:
    """Where the images of a plan are, and all that a score's protocol needs."""

    plan: Plan
    info: ExportInfo
    url: str
    uint8_rule: str  # how decoded values became uint8
    tokenizer: str = ""  # where the tokenizer was found; empty: under its name in the index
    weak: ExportInfo | None = None  # of the second model, where guidance has an auto term


def unit_name(number: int) -> str:
    """Name of the file with a unit's images."""
    return f"unit_{number:05d}.safetensors"


def write_unit(url: str, number: int, unit: Pictures) -> None:
    """Write a unit, see ``write_file``."""
    fs, path = open_url(url, "sample.url")
    write_file(fs, f"{path}/{unit_name(number)}", safetensors.numpy.save(unit._asdict()))


def write_file(fs: Any, path: str, data: bytes) -> None:
    """Write a file, whole or not at all, into a folder that need not exist."""
    try:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        write_whole(fs, path, data)
    except OSError as error:
        raise DataError(
            f"{full_url(fs, path)} cannot be written ({error.strerror or error}): make room or choose another place,"
            " then run the same command again; what is there is kept"
        ) from None


def read_unit(plan: Plan, url: str, number: int) -> Pictures:
    """One unit."""
    fs, path = open_url(url, "sample.url")
    file, num = f"{path}/{unit_name(number)}", len(plan.unit(number))
    try:
        found = safetensors.numpy.load(read_file(fs, file))
        images, labels, work = found["images"], found["labels"], found["work"]
    except FileNotFoundError:
        raise DataError(
            f"{url}: the images of unit {number} of {plan.num_units} are not there: run the same sampling again (with"
            " sample.keep_images=true, where they were dropped)"
        ) from None
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError):
        raise DataError(f"{full_url(fs, file)} is damaged: delete it and run the same sampling again") from None
    kinds = [(values.dtype.name, values.shape[:1], values.ndim) for values in (images, labels, work)]
    expected = [("uint8", (num,), 4), ("int64", (num,), 1), ("int64", (num,), 2)]
    if kinds != expected or ((labels < 0) | (labels >= plan.num_classes)).any():
        raise DataError(f"{full_url(fs, file)} is of another plan: delete it and run the same sampling again")
    return Pictures(images, labels, work)


def existing(fs: Any, path: str) -> Collection[str]:
    """Names of the files in a plan's folder, whoever wrote them."""
    fs.invalidate_cache()
    return list_sizes(fs, path).keys()


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

    def with_places(self, place: Callable[[str], str]) -> _PlanFile:
        """The same with its paths as a function gives them."""
        weights = {name: place(where) for name, where in self.evaluate.weights.items()}
        evaluate = self.evaluate.model_copy(update={"reference": place(self.evaluate.reference), "weights": weights})
        return self.model_copy(update={"tokenizer": place(self.tokenizer), "evaluate": evaluate})


def write_plan(samples: Samples, config: Config) -> None:
    """Write ``plan.json``; the samples are finished."""
    fs, path = open_url(samples.url, "sample.url")
    told = _PlanFile(
        plan=samples.plan,
        export=samples.info,
        run=str(Path(config.run.dir).absolute()),
        weak=samples.weak,
        uint8_rule=samples.uint8_rule,
        tokenizer=samples.tokenizer,
        evaluate=config.evaluate.model_copy(update={"reference": reference_of(config)}),
    ).with_places(_absolute)
    write_file(fs, f"{path}/{PLAN_NAME}", json.dumps(told.model_dump(mode="json"), indent=1).encode())


def _absolute(place: str) -> str:
    """A path that holds from any folder; a URL or a name as it is."""
    return str(Path(place).absolute()) if place and "://" not in place and Path(place).exists() else place


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
    if told.run:
        told = told.with_places(lambda place: moved_path(place, told.run, run))
    return Samples(told.plan, told.export, url, told.uint8_rule, told.tokenizer, told.weak), run, told.evaluate


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
    if any(fs.exists(f"{path}/{name}") for name in (PLAN_NAME, unit_name(0))):
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
    found = [(url, plan) for url, plan, *_ in _listed(place, run) if plan]
    if not found:
        raise ConfigError(f"{src} holds no finished samples (no {PLAN_NAME}): make them with `ig-dist sample {run}`")
    if len(found) > 1:
        for url, plan in found:
            console.print(f"{url}: {plan.num} images, {plan.describe()}")
        raise ConfigError(f"{src} holds the samples of {len(found)} plans: name the folder of one, see above")
    return found[0][0]


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
