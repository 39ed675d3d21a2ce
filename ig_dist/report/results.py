"""Scores as they lie in a run: what the files hold, and how to read them."""

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from ig_dist.config.catalogue import METRICS, Row, better
from ig_dist.errors import ConfigError
from ig_dist.report.text import images_text, number, score
from ig_dist.storage.files import read_file
from ig_dist.storage.urls import LOCAL

PAPER_IMAGES = 50_000
REAL_IMAGENET_FID = 1.68  # of the validation images, measured with ADM's evaluator


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


def read_scores(kind: type[BaseModel], file: Path, command: str) -> dict[str, Any]:
    """What a file holds, or a ConfigError: it is damaged, and ``command`` makes it again."""
    try:
        return kind.model_validate_json(read_file(LOCAL, str(file))).model_dump()
    except (OSError, ValidationError):
        raise ConfigError(f"{file} is damaged: delete it, and make it again with `{command}`") from None


def read_sweeps(run: Path, command: str) -> list[tuple[Path, Row]]:
    """Folder and content of each sweep, the newest first; ``command`` makes a damaged one again."""
    found: dict[tuple[str, str], tuple[Path, Row]] = {}
    for file in (*run.glob("sweeps/*/sweep.json"), *run.glob("sweep.json")):
        sweep = read_scores(Sweep, file, command)
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
        result = read_scores(Result, file, command)
        if plan not in swept or not tag or tag != str(result["protocol"].get("num")):
            results.append({**result, "swept": plan in swept and not tag})
    return results


def direction(metric: str, rows: Iterable[Row]) -> str:
    """Which way is better in words, and the number of images of the rows; empty where neither is known."""
    words = {-1: "lower is better", 1: "higher is better", 0: ""}[better(metric)]
    return ", ".join(filter(None, (words, images_text(row.get("num") for row in rows))))


def metric_names(rows: Iterable[Row]) -> list[str]:
    """Of all rows, each once."""
    return list(dict.fromkeys(metric for row in rows for metric in row["scores"]))


def scored(rows: Iterable[Row], metric: str) -> list[Row]:
    """The rows that have a finite score."""
    return [row for row in rows if math.isfinite(row["scores"].get(metric, math.nan))]


def score_text(row: Row, metric: str) -> str:
    """A score with its deviation; empty where the row lacks it."""
    value, std = row["scores"].get(metric), row["std"].get(metric, row["spread"].get(metric))
    if value is None or not math.isfinite(value):
        return "" if value is None else "not finite"
    return score(value) + ("" if std is None else f" ± {number(std, 3)}")


def reading_notes(rows: Sequence[Row], protocols: Sequence[Row]) -> list[str]:
    """What numbers of images (of the rows) and the references (of the protocols) mean for these scores."""
    small = [row for row in rows if row.get("num") and row["num"] < PAPER_IMAGES]
    names = [(name, METRICS.get(name.partition("@")[0])) for name in metric_names(small)]
    distances = ", ".join(name for name, metric in names if metric is not None and metric.kind == "frechet")
    notes = []
    if distances:
        images = images_text(row["num"] for row in small).removeprefix("N = ")
        notes.append(
            f"{distances} of {images} images is biased upwards: compare equal N only (papers: {PAPER_IMAGES:,})."
        )
    references = [PurePosixPath(str(told.get("reference"))) for told in protocols]
    if "fid" in metric_names(rows) and any(reference.match("VIRTUAL_imagenet*.npz") for reference in references):
        notes.append(
            f"fid: 50,000 real validation images score {REAL_IMAGENET_FID}: lower is closer to the statistics than real"
            " pictures are."
        )
    return notes
