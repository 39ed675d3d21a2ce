"""Scores of a run as tables: a sweep's, and single ones; and the lines that say how to read them.

Seeds of one and the same plan are one row, their mean and deviation. Balanced labels stand above random ones.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

from ig_dist.data.classes import class_words, imagenet_classes
from ig_dist.report.facts import read_index
from ig_dist.report.plots import (
    SCALE_NAMES,
    Chart,
    best_row,
    comparable,
    curve_chart,
    direction,
    heat_map,
    is_distance,
    scale_chart,
    unguided,
)
from ig_dist.report.text import Facts, images_text, interval_text, number, plain, score

PAPER_IMAGES = 50_000
REAL_IMAGENET_FID = 1.68  # of the validation images, measured with ADM's evaluator
FOLLOWS_SEED = frozenset({"seed", "plan", "evaluations", "forwards", "weak_forwards", "features_made_again"})
"""Values of a protocol that differ between two seeds of what is otherwise the same."""
COLUMN_CHARACTERS = 36  # a longer value does not fit into a column
HASH = re.compile(r"[0-9a-f]{16,}(, [0-9a-f]{16,})*")
Row = Mapping[str, Any]


class Result(BaseModel):
    """Scores of one plan; what else stands beside them is not needed here."""

    scores: dict[str, float]
    std: dict[str, float] = {}
    """Over seeds, for the metrics that have it."""
    spread: dict[str, float] = {}
    """Over subsets of the images, of scores that are means over such."""
    protocol: dict[str, Any] = {}


class SweepRow(Result):
    """Scores of one point of a sweep. Old files lack what has a default."""

    ig_scale: float
    cfg_scale: float
    auto_scale: float = 1.0
    ig_interval: tuple[float, float] = (0.0, 1.0)
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    ema: float | None = None
    step: int | None = None
    num: int | None = None
    plans: list[str] = []


class Sweep(BaseModel):
    """What ``sweep.json`` holds."""

    rows: list[SweepRow] = Field(min_length=1)
    protocol: dict[str, Any] = {}
    target: str | None = None
    flat: list[int] | None = None
    """Rows that are as good as the best within the noise."""

    @model_validator(mode="after")
    def _number_of_images(self) -> Self:
        """Old files say it once for all rows."""
        for row in self.rows:
            row.num = row.num or self.protocol.get("num")
        return self


class Cell(NamedTuple):
    """Of a table: its text, and a remark below."""

    text: str
    small: str = ""


def training_charts(lines: Sequence[Row]) -> list[Chart]:
    """A chart for each score that was taken while training, with a line for each number of images."""
    names = dict.fromkeys(key for line in lines for key in line if key.startswith("score_") and key != "score_num")
    charts = []
    for key in names:
        measured = [line for line in lines if isinstance(line.get(key), (int, float))]
        counts = sorted({line.get("score_num") for line in measured}, key=lambda count: count or 0)
        series = {
            images_text([count]) or "score": [
                line[key] if line.get("score_num") == count else None for line in measured
            ]
            for count in counts
        }
        metric, steps = key.removeprefix("score_"), [line["step"] for line in measured]
        told = [{"num": count} for count in counts]
        charts.append(
            curve_chart(
                f"{metric} while training",
                direction(metric, told),
                steps,
                series,
                from_zero=False,
                exact=True,
                marked=True,
            )
        )
    return [chart for chart in charts if chart is not None]


def tiles(sweep: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The best of each metric, the target first: name, value, remark."""
    found = []
    for metric in _target_first(sweep)[:4]:
        rows = _scored(sweep["rows"], metric)
        top = best_row(rows, metric)
        if top is None:
            continue
        base, where = unguided(rows, top), [_where(top)]
        if base is not None and top is not base and base["scores"][metric]:
            where.append(f"× {top['scores'][metric] / base['scores'][metric]:.2f} of unguided")
        where.append(images_text([top["num"]]))
        found.append((f"Best {metric}", score(top["scores"][metric]), ", ".join(filter(None, where))))
    return found


def sweep_section(sweep: Mapping[str, Any], step: int | None, command: str) -> dict[str, Any]:
    """Charts or heat maps, one for each metric, the table, and the protocol that all rows share."""
    rows = sweep["rows"]
    scored = [(metric, found) for metric in _target_first(sweep) if (found := _scored(rows, metric))]
    varied = {key for key in (*SCALE_NAMES, *OTHER_AXES) if key != "num" and len({row[key] for row in rows}) > 1}
    two_axes = varied == {"ig_scale", "cfg_scale"}
    made_at = sweep["protocol"].get("step")
    return {
        "charts": [] if two_axes else [scale_chart(found, metric) for metric, found in scored],
        "heat_maps": [heat_map(found, metric) for metric, found in scored] if two_axes else [],
        "old": f"{made_at:,}" if isinstance(made_at, int) and made_at != step else None,
        "protocol": items(sweep["protocol"]),
        "notes": [*_about_flatness(sweep, command), *_about_sweep(sweep), *reading_notes(rows, [sweep["protocol"]])],
        **_sweep_table(sweep),
    }


def _target_first(sweep: Mapping[str, Any]) -> list[str]:
    return sorted(metric_names(sweep["rows"]), key=lambda name: name != sweep["target"])


OTHER_AXES = {
    "ig_interval": ("IG for t in", interval_text),
    "cfg_interval": ("CFG for t in", interval_text),
    "ema": ("EMA", plain),
    "step": ("step", plain),
    "num": ("N", plain),
}


def _sweep_table(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """Scores, and each over the unguided one; ``best`` holds (row, column) of the cells to set off."""
    rows, flat = sweep["rows"], sweep["flat"] or []
    heads = ["IG scale", "CFG scale"]
    table = [[Cell(_scale(row["ig_scale"])), Cell(_scale(row["cfg_scale"]))] for row in rows]

    def column(head: str, cells: Iterable[Cell]) -> None:
        heads.append(head)
        for line, cell in zip(table, cells, strict=True):
            line.append(cell)

    if any(row["auto_scale"] != 1 for row in rows):
        column("autoguidance scale", (Cell(_scale(row["auto_scale"])) for row in rows))
    for key, (head, text) in OTHER_AXES.items():
        if len({row[key] for row in rows}) > 1 or (key == "num" and rows[0]["num"]):
            column(head, [Cell("" if row[key] is None else text(row[key])) for row in rows])
    best, metrics = [], metric_names(rows)
    ratios = metrics if len(metrics) <= 2 else [sweep["target"] or metrics[0]]
    for metric in metrics:
        found = _scored(rows, metric)
        top = best_row(found, metric)
        best += [(i, len(heads)) for i, row in enumerate(rows) if row is top]
        alike = flat if metric == sweep["target"] and len(flat) > 1 else []
        marks = ["as good as the best" if i in alike and row is not top else "" for i, row in enumerate(rows)]
        column(metric, [Cell(_score_text(row, metric), mark) for row, mark in zip(rows, marks, strict=True)])
        bases = [unguided(found, row) for row in rows]
        if metric in ratios and len(rows) > 1 and any(base and base["scores"][metric] for base in bases):
            column(
                "of unguided",
                [
                    Cell(f"× {row['scores'][metric] / base['scores'][metric]:.2f}")
                    if row in found and base and base["scores"][metric]
                    else Cell("")
                    for row, base in zip(rows, bases, strict=True)
                ],
            )
    return {"heads": heads, "table": table, "best": best}


def _about_flatness(sweep: Mapping[str, Any], command: str) -> list[str]:
    """Whether the best is one, as far as the noise over seeds tells."""
    target, flat = sweep["target"], sweep["flat"]
    if target is None or len(sweep["rows"]) == 1:
        return []
    if flat is None:
        return [f"One seed: it does not say which differences are noise. {command} --seeds 3 would."]
    if len(flat) <= 1:
        return [f"{target}: the best is better than all others by more than the noise over seeds."]
    where = "; ".join(_where(sweep["rows"][i]).removeprefix("at ") for i in flat if i < len(sweep["rows"]))
    return [f"{target} is flat within its noise over {len(flat)} rows ({where}): any of them is as good as the best."]


def _about_sweep(sweep: Mapping[str, Any]) -> list[str]:
    rows, seeds = sweep["rows"], sweep["protocol"].get("seeds")
    notes = []
    if isinstance(seeds, int) and seeds > 1:
        notes.append(f"Each score is the mean over {seeds} seeds, ± their standard deviation.")
    if len(most := comparable(rows)) < len(rows):
        told = images_text([most[0]["num"]])
        notes.append(f"Points that fell behind have fewer images: only those with {told} compete for the best.")
    return notes


def reading_notes(rows: Sequence[Row], protocols: Sequence[Row]) -> list[str]:
    """What numbers of images and the reference mean for these scores.

    Args:
        rows: scores, with ``num``.
        protocols: of the scores, for their references.
    """
    names = metric_names(rows)
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
    if "fid" in names and any(is_imagenet(reference) for reference in references):
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


class _Group(NamedTuple):
    """Seeds of one and the same plan."""

    row: dict[str, Any]
    """Mean scores, their deviations, and the protocol that they share."""
    seeds: int
    alike: str
    """Equal where nothing but the labels differs."""
    swept: bool
    """All of them stand in the sweep."""


def evaluation_section(results: Sequence[Row]) -> dict[str, Any] | None:
    """Scores of plans: what their protocols share, and in the table what differs.

    Args:
        results: scores with protocols. Two of the same plan under the same protocol count once; those that the sweep
            shows (``swept``) are shown beside other seeds or other labels only.

    Returns:
        What the template needs; None where the sweep shows all.
    """
    found = _paired(_by_seed(results))
    told = {group.alike for group in found if not group.swept}
    groups = [group for group in found if group.alike in told]
    if not groups:
        return None
    rows, protocols = [group.row for group in groups], [group.row["protocol"] for group in groups]
    keys = list(dict.fromkeys(key for protocol in protocols for key in protocol))
    common = {key: protocols[0].get(key) for key in keys if all(p.get(key) == protocols[0].get(key) for p in protocols)}
    differing = [key for key in keys if key not in common]
    shown = [key for key in differing if all(_fits(key, p.get(key)) for p in protocols)]
    if "seed" in common and any(group.seeds > 1 for group in groups):
        shown.append("seed")
    shown = ["num", *(key for key in shown if key != "num")] if "num" in keys else shown
    metrics, numbered = metric_names(rows), len(shown) < len(differing) + ("num" in common)
    table = []
    for i, group in enumerate(groups):
        above = groups[i - 1] if i and groups[i - 1].alike == group.alike else None
        cells = [Cell(str(i + 1))] * numbered
        cells += [_protocol_cell(key, group) for key in shown]
        table.append(cells + [_mean_cell(group, metric, above) for metric in metrics])
    hidden = [key for key in differing if key not in shown]
    return {
        "heads": [""] * numbered + ["N" if key == "num" else key for key in shown] + metrics,
        "table": table,
        "protocol": items(common),
        "rows": [items({key: p[key] for key in hidden if key in p}) for p in protocols] if hidden else [],
        "notes": reading_notes(rows, protocols),
    }


def _by_seed(results: Sequence[Row]) -> list[_Group]:
    """One group for all results whose protocols differ in the seed and in what follows from it."""
    found: dict[tuple[str, ...], dict[Any, Row]] = {}
    for number_, result in enumerate(results):
        protocol = result["protocol"]
        kept = {key: value for key, value in protocol.items() if key not in FOLLOWS_SEED}
        key = (json.dumps(kept, sort_keys=True), *sorted(result["scores"]))
        found.setdefault(key, {}).setdefault(protocol.get("plan", number_), result)
    return [_group(list(seeds.values())) for seeds in found.values()]


def _group(seeds: Sequence[Row]) -> _Group:
    first, swept = seeds[0], all(seed.get("swept") for seed in seeds)
    protocol = dict(first["protocol"])
    alike = {k: v for k, v in protocol.items() if k not in FOLLOWS_SEED | {"labels"}}
    row = {**first, "protocol": protocol, "num": protocol.get("num")}
    if len(seeds) > 1:
        values = {name: [seed["scores"][name] for seed in seeds] for name in first["scores"]}
        row["scores"] = {name: float(np.mean(v)) for name, v in values.items()}
        row["std"] = {name: float(np.std(v, ddof=1)) for name, v in values.items()}
        for key in FOLLOWS_SEED & protocol.keys():
            told = [seed["protocol"].get(key) for seed in seeds]
            if any(value != told[0] for value in told):
                protocol[key] = ", ".join(map(plain, sorted(set(told), key=str)))
    return _Group(row, len(seeds), json.dumps([alike, sorted(first["scores"])], sort_keys=True), swept)


def _paired(groups: Sequence[_Group]) -> list[_Group]:
    """By guidance, and of two that differ in the labels alone the balanced ones above the random ones."""

    def place(group: _Group) -> tuple[Any, ...]:
        terms = [term for term in group.row["protocol"].get("guidance") or [] if isinstance(term, dict)]
        return len(terms), [float(term.get("scale", 1)) for term in terms]

    ordered = sorted(groups, key=place)
    first = {alike: i for i, alike in reversed(list(enumerate(group.alike for group in ordered)))}
    return sorted(ordered, key=lambda group: (first[group.alike], group.row["protocol"].get("labels", "")))


def _fits(key: str, value: Any) -> bool:
    """Whether a value of a protocol is fit for a column."""
    text = plain(value)
    return not key.endswith("sha256") and not HASH.fullmatch(text) and len(text) <= COLUMN_CHARACTERS and key != "plan"


def _protocol_cell(key: str, group: _Group) -> Cell:
    value = plain(group.row["protocol"].get(key))
    return Cell(value, f"mean of {group.seeds}") if key == "seed" and group.seeds > 1 else Cell(value)


def _mean_cell(group: _Group, metric: str, balanced: _Group | None) -> Cell:
    """A score; below it what its deviation is over, and how far it is from that with balanced labels."""
    row, remarks = group.row, []
    if group.seeds > 1:
        remarks.append(f"over {group.seeds} seeds")
    elif metric in row["spread"] and metric in row["scores"]:
        remarks.append("over subsets")
    if balanced is not None and metric in row["scores"] and metric in balanced.row["scores"]:
        difference = row["scores"][metric] - balanced.row["scores"][metric]
        remarks.append(f"{'+' if difference >= 0 else '−'}{number(abs(difference))} against balanced")
    return Cell(_score_text(row, metric), ", ".join(remarks))


def metric_names(rows: Iterable[Row]) -> list[str]:
    """Of all rows, each once."""
    return list(dict.fromkeys(metric for row in rows for metric in row["scores"]))


def items(mapping: Mapping[str, Any]) -> Facts:
    """Values of a protocol as text."""
    return [(key, plain(value)) for key, value in mapping.items()]


def _scored(rows: Sequence[Row], metric: str) -> list[Row]:
    """The rows that have a finite score."""
    return [row for row in rows if row["scores"].get(metric) is not None and math.isfinite(row["scores"][metric])]


def _score_text(row: Row, metric: str) -> str:
    value, std = row["scores"].get(metric), row["std"].get(metric, row["spread"].get(metric))
    return "" if value is None else score(value) + ("" if std is None else f" ± {number(std, 3)}")


def _where(row: Row) -> str:
    names = [f"{name} {number(row[key])}" for key, name in SCALE_NAMES.items() if row[key] != 1]
    return "at " + ", ".join(names) if names else "unguided"


def _scale(value: float) -> str:
    return "off" if value == 1 else number(value)
