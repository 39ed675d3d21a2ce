"""Scores as they lie in a run: what the files hold, which score is the better one, and how to read them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from ig_dist.config.catalogue import METRICS, lower_is_better
from ig_dist.config.describe import KINDS, guidance_name, interval_text
from ig_dist.data.classes import class_words, imagenet_classes
from ig_dist.errors import ConfigError
from ig_dist.report.facts import read_index
from ig_dist.report.text import images_text, number, score
from ig_dist.storage.files import read_file
from ig_dist.storage.urls import LOCAL

PAPER_IMAGES = 50_000
REAL_IMAGENET_FID = 1.68  # of the validation images, measured with ADM's evaluator
SCALES = {
    "ig_scale": "Internal Guidance scale (1: off)",
    "cfg_scale": "classifier-free guidance scale (1: off)",
    "auto_scale": "autoguidance scale (1: off)",
}
OTHER_AXES = {"ig_interval": "IG for t in", "cfg_interval": "CFG for t in", "ema": "EMA", "step": "step", "num": "N"}
OF_ANOTHER_MODEL = ("num", "step", "ema")
"""Rows of a sweep that differ in one of these are of other models or other numbers of images."""
Row = Mapping[str, Any]


class _Known(BaseModel):
    """What the report reckons with, of a protocol."""

    num: Annotated[int, Field(strict=True)] | None = None
    seed: int | str | None = None
    plan: str | None = None
    guidance: str | list[Any] | None = None


def _of_its_kinds(protocol: dict[str, Any]) -> dict[str, Any]:
    _Known.model_validate(protocol)
    return protocol


Protocol = Annotated[dict[str, Any], AfterValidator(_of_its_kinds)]


class Result(BaseModel):
    """Scores of one plan or of other images; what else stands beside them is not needed here."""

    scores: dict[str, float]
    std: dict[str, float] = {}  # over seeds, for the metrics that have it
    spread: dict[str, float] = {}  # over subsets of the images, of scores that are means over such
    protocol: Protocol = {}


class SweepRow(Result):
    """Scores of one point of a sweep. Old files lack what has a default."""

    ig_scale: float
    cfg_scale: float
    auto_scale: float = 1.0
    ig_interval: tuple[float, float] = (0.0, 1.0)
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    auto_interval: tuple[float, float] = (0.0, 1.0)
    ema: float | None = None
    step: int | None = None
    num: int | None = None
    plans: list[str] = []


class Sweep(BaseModel):
    """What ``sweep.json`` holds. Old files have neither a name nor a time."""

    name: str = "sweep"
    written: datetime | None = None
    rows: list[SweepRow] = Field(min_length=1, max_length=10_000)
    protocol: Protocol = {}
    target: str | None = None
    flat: list[int] | None = None  # rows that are as good as the best within the noise

    @model_validator(mode="after")
    def _number_of_images(self) -> Self:
        """Old files say it once for all rows."""
        if self.written is not None and self.written.year < 1970:
            raise ValueError("written before there were clocks")
        for row in self.rows:
            row.num = row.num or self.protocol.get("num")
            if self.target in METRICS and self.target not in row.scores:
                raise ValueError("a row lacks the score that was searched for")
        return self


class Cell(NamedTuple):
    """Of a table: its text, and a remark below."""

    text: str
    small: str = ""


def read_sweeps(run: Path, command: str) -> list[tuple[Path, Row]]:
    """Folder and content of each sweep, the newest first; ``command`` makes a damaged one again."""
    files = [*run.glob("sweeps/*/sweep.json"), *run.glob("sweep.json")]
    found: dict[tuple[str, str], tuple[Path, Row]] = {}
    for file in files:
        sweep = _read(Sweep, file, command)
        sweep["written"] = (sweep["written"] or datetime.fromtimestamp(file.stat().st_mtime)).astimezone()
        found.setdefault((sweep["name"], repr(sweep["rows"])), (file.parent, sweep))  # a copy of it counts once
    return sorted(found.values(), key=lambda pair: pair[1]["written"], reverse=True)


def read_results(run: Path, swept: set[str], command: str) -> list[Row]:
    """Scores of single plans and of other images; those of a sweep's plans are marked ``swept``.

    What a halved sweep scored on few images in its first rounds is left out.
    """
    results: list[Row] = []
    for file in sorted((run / "evaluations").glob("*.json")):
        plan, _, tag = file.stem.partition("_")
        result = read_result(file, command)
        if plan not in swept or not tag or tag != str(result["protocol"].get("num")):
            results.append({**result, "swept": plan in swept and not tag})
    return results


def read_result(file: Path, command: str) -> Row:
    """Scores with their protocol, or a ConfigError: the file is damaged, and ``command`` makes them again."""
    return _read(Result, file, command)


def _read(kind: type[BaseModel], file: Path, command: str) -> dict[str, Any]:
    try:
        return kind.model_validate_json(read_file(LOCAL, str(file))).model_dump()
    except (OSError, ValidationError):
        raise ConfigError(f"{file} is damaged: delete it, and make it again with `{command}`") from None


def published_name(metric: str) -> str:
    """The name of a score without what tells that it was made with other weights (``fid@inception-0123abcd``)."""
    return metric.partition("@")[0]


def is_distance(metric: str) -> bool:
    """Whether it is a Frechet distance, which few images make larger."""
    name = published_name(metric)
    return name in METRICS and METRICS[name].kind == "frechet"


def better(metric: str) -> int:
    """-1: lower is better, 1: higher is, 0: not known."""
    name = published_name(metric)
    return 0 if name not in METRICS else -1 if lower_is_better(name) else 1


def direction(metric: str, rows: Iterable[Row] = ()) -> str:
    """In words, with the number of images of the rows; empty where neither is known."""
    words = {-1: "lower is better", 1: "higher is better", 0: ""}[better(metric)]
    return ", ".join(filter(None, (words, images_text(row.get("num") for row in rows))))


def metric_names(rows: Iterable[Row]) -> list[str]:
    """Of all rows, each once."""
    return list(dict.fromkeys(metric for row in rows for metric in row["scores"]))


def scored(rows: Iterable[Row], metric: str) -> list[Row]:
    """The rows that have a finite score."""
    return [row for row in rows if row["scores"].get(metric) is not None and math.isfinite(row["scores"][metric])]


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The rows with the most images: a halved search gives the others fewer."""
    most = max((row.get("num") or 0 for row in rows), default=0)
    return [row for row in rows if (row.get("num") or 0) == most]


def best_row(rows: Sequence[Row], metric: str) -> Row | None:
    """The row with the best score of those with the most images; None where it is not known which way is better."""
    if not better(metric):
        return None
    return max(comparable(rows), key=lambda row: better(metric) * float(row["scores"][metric]), default=None)


def unguided(rows: Sequence[Row], like: Row | None = None) -> Row | None:
    """The row of a sweep without guidance; with ``like`` that of the same model and number of images."""
    plain = [row for row in rows if all(row[f"{kind}_scale"] == 1 for kind in KINDS)]
    return next(
        (row for row in plain if like is None or all(row.get(k) == like.get(k) for k in OF_ANOTHER_MODEL)), None
    )


def point_name(row: Row) -> str:
    """Guidance of a sweep's row in words."""
    terms = [{"kind": kind, "scale": row[f"{kind}_scale"], "interval": row[f"{kind}_interval"]} for kind in KINDS]
    return guidance_name([term for term in terms if term["scale"] != 1])


def target_first(sweep: Row) -> list[str]:
    """Names of its scores."""
    return sorted(metric_names(sweep["rows"]), key=lambda name: name != sweep["target"])


def varies(rows: Sequence[Row], key: str) -> bool:
    """Whether rows of a sweep differ in this."""
    return len({row[key] for row in rows}) > 1


def models_of(row: Row, rows: Sequence[Row]) -> list[str]:
    """What beside its guidance sets a row apart from the others, in words."""
    return [told(key, row[key]) for key in ("ema", "step") if varies(rows, key)]


def told_value(key: str, value: Any) -> str:
    """A value of what a sweep varies, as text."""
    if value is None:
        return "default" if key in ("ema", "step") else ""
    if key in SCALES:
        return "off" if value == 1 else number(value)
    return (
        interval_text(value) if key.endswith("_interval") else f"{value:,}" if isinstance(value, int) else f"{value:g}"
    )


def told(key: str, value: Any) -> str:
    """A value of what a sweep varies, in words."""
    if key == "num":
        return images_text([value])
    name = KINDS[key.removesuffix("_scale")] if key in SCALES else OTHER_AXES[key]
    return f"{name} {told_value(key, value)}"


def score_text(row: Row, metric: str) -> str:
    """A score with its deviation; empty where the row lacks it."""
    value, std = row["scores"].get(metric), row["std"].get(metric, row["spread"].get(metric))
    if value is None or not math.isfinite(value):
        return "" if value is None else "not finite"
    return score(value) + ("" if std is None else f" ± {number(std, 3)}")


def reading_notes(rows: Sequence[Row], protocols: Sequence[Row]) -> list[str]:
    """What numbers of images (of the rows) and the references (of the protocols) mean for these scores."""
    small = [row for row in rows if row.get("num") and row["num"] < PAPER_IMAGES]
    few = sorted({row["num"] for row in small})
    distances = ", ".join(name for name in metric_names(small) if is_distance(name))
    notes = []
    if few and distances:
        images = f"{few[0]:,}" if len(few) == 1 else f"{few[0]:,} to {few[-1]:,}"
        notes.append(
            f"{distances} of {images} images is biased upwards: compare equal N only (papers: {PAPER_IMAGES:,})."
        )
    references = dict.fromkeys(str(p["reference"]) for p in protocols if p.get("reference"))
    if "fid" in metric_names(rows) and any(is_imagenet(reference) for reference in references):
        notes.append(
            f"fid: 50,000 real validation images score {REAL_IMAGENET_FID}: lower is closer to the statistics than real"
            " pictures are."
        )
    return notes


def is_imagenet(reference: str) -> bool:
    """Whether a reference is ADM's file of ImageNet's statistics, or the index of its 1,000 classes."""
    if reference.endswith(".npz"):
        return re.fullmatch(r"VIRTUAL_imagenet.*\.npz", PurePosixPath(reference).name) is not None
    index = read_index(reference)
    return (
        index is not None and len(index.classes) == len(imagenet_classes()) and class_words(index.classes) is not None
    )
