"""A sweep in the report: charts or heat maps, the table, and what the noise over seeds tells of the best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ig_dist.report.charts import (
    BOX,
    COLORS,
    Chart,
    Dot,
    Line,
    Tick,
    across,
    down,
    own_ticks,
    padded,
    polyline,
    ticks,
)
from ig_dist.report.results import (
    KINDS,
    Cell,
    Row,
    best_row,
    better,
    comparable,
    direction,
    metric_names,
    point_name,
    reading_notes,
    score_text,
    scored,
    unguided,
)
from ig_dist.report.text import images_text, interval_text, number, protocol_parts, score

SCALES = {
    "ig_scale": "Internal Guidance scale (1: off)",
    "cfg_scale": "classifier-free guidance scale (1: off)",
    "auto_scale": "autoguidance scale (1: off)",
}
OTHER_AXES = {"ig_interval": "IG for t in", "cfg_interval": "CFG for t in", "ema": "EMA", "step": "step", "num": "N"}


@dataclass(frozen=True)
class HeatCell:
    """A score in a heat map; ``heat`` is 0 for the worst and 1 for the best."""

    text: str
    std: str
    heat: float
    best: bool


@dataclass(frozen=True)
class HeatMap:
    """Scores over two guidance scales; a row has its label, and a cell for each of ``columns``."""

    metric: str
    direction: str
    columns: list[str]
    rows: list[tuple[str, list[HeatCell | None]]]


def sweep_section(sweep: Row, newest: int | None, seeds: Sequence[int]) -> dict[str, Any]:
    """What the template needs of one sweep.

    Args:
        sweep: content of its file.
        newest: step of the newest checkpoint; None: not known.
        seeds: of its points, as far as they are known.
    """
    rows, made_at = sweep["rows"], sweep["protocol"].get("step")
    shown = [(metric, found) for metric in target_first(sweep) if (found := scored(rows, metric))]
    varied = [key for key in (*SCALES, *OTHER_AXES) if key != "num" and _varies(rows, key)]
    two_scales = len(varied) == 2 and set(varied) <= SCALES.keys()
    protocol = dict(sweep["protocol"])
    if len(seeds) > 1:
        protocol["seeds"] = f"{len(seeds)}: {', '.join(map(str, seeds))}"
    return {
        "name": sweep["name"],
        "written": f"{sweep['written']:%Y-%m-%d %H:%M}",
        "charts": [] if two_scales else [scale_chart(found, metric) for metric, found in shown],
        "heat_maps": [heat_map(found, metric, varied[0], varied[1]) for metric, found in shown] if two_scales else [],
        "tradeoff": _tradeoff(rows, target_first(sweep)),
        "old": f"{made_at:,}" if isinstance(made_at, int) and newest is not None and made_at < newest else None,
        "protocol": protocol_parts(protocol),
        "notes": [*_about_flatness(sweep), *_about_rows(sweep), *reading_notes(rows, [sweep["protocol"]])],
        **_table(sweep),
    }


def tiles(sweep: Row) -> list[tuple[str, str, str]]:
    """The best of each metric, the target first: name, value, remark."""
    found = []
    for metric in target_first(sweep)[:4]:
        rows = scored(sweep["rows"], metric)
        top = best_row(rows, metric)
        if top is None:
            continue
        base, name = unguided(rows, top), point_name(top)
        remarks = [name if name == "unguided" else f"at {name}"]
        if base is not None and top is not base and base["scores"][metric]:
            remarks.append(f"× {top['scores'][metric] / base['scores'][metric]:.2f} of unguided")
        remarks.append(images_text([top["num"]]))
        found.append((f"Best {metric}", score(top["scores"][metric]), ", ".join(filter(None, remarks))))
    return found


def target_first(sweep: Row) -> list[str]:
    """Names of its scores."""
    return sorted(metric_names(sweep["rows"]), key=lambda name: name != sweep["target"])


def scale_chart(rows: Sequence[Row], metric: str) -> Chart:
    """A score against the scale that has most values, else against what varies; a line for each value of the rest."""
    varied = [key for key in (*SCALES, *OTHER_AXES) if _varies(rows, key)]
    axis = max((key for key in varied if key in SCALES), key=lambda key: len({row[key] for row in rows}), default="")
    axis = axis or next((key for key in ("step", *varied) if key in varied and key != "num"), "ig_scale")
    told = [key for key in varied if key != axis]
    numeric = axis in SCALES or axis == "step"
    values = sorted({row[axis] for row in rows}, key=lambda value: (value is not None, value))
    places = {value: float(value) if numeric and value is not None else float(i) for i, value in enumerate(values)}
    x_range = padded(min(places.values()), max(places.values()), 0.04 if numeric else 0.2)
    spread = [row["std"].get(metric, 0.0) for row in rows]
    ends = [row["scores"][metric] + sign * s for row, s in zip(rows, spread, strict=True) for sign in (-1, 1)]
    y_range = padded(min(ends), max(ends), 0.12)
    best = best_row(rows, metric)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: places[row[axis]]):
        groups.setdefault(tuple(row[key] for key in told), []).append(row)
    lines: list[Line] = []
    dots: list[Dot] = []
    for i, (group, mine) in enumerate(sorted(groups.items(), key=lambda pair: repr(pair[0]))):
        name = ", ".join(_told(key, value) for key, value in zip(told, group, strict=True))
        x, y = [places[row[axis]] for row in mine], [row["scores"][metric] for row in mine]
        lines.append(Line(name, i % COLORS, polyline(x, y, x_range, y_range)))
        for row, at, value in zip(mine, x, y, strict=True):
            std = row["std"].get(metric)
            bar = (down(value + std, *y_range), down(value - std, *y_range)) if std else None
            label = f"{_told(axis, row[axis])}: {number(value)}" + (f" ± {number(std, 3)}" if std else "")
            dots.append(Dot(across(at, *x_range), down(value, *y_range), i % COLORS, label, row is best, bar))
    plain = unguided(rows, best)
    mark = Tick(down(plain["scores"][metric], *y_range) / BOX * 100, "unguided") if plain else None
    labels = [number(value) if axis in SCALES else _plain(axis, value) for value in values]
    x_ticks = own_ticks(list(places.values()), labels, x_range)
    x_label = SCALES.get(axis, OTHER_AXES.get(axis, axis))
    y_ticks = ticks(*y_range, upward=True)
    return Chart(metric, direction(metric, rows), x_label, x_ticks, y_ticks, lines, dots, mark)


def _tradeoff(rows: Sequence[Row], metrics: Sequence[str]) -> Chart | None:
    """A score of which lower is better against one of which higher is: a point for each row."""
    lower = next((metric for metric in metrics if better(metric) < 0), None)
    higher = next((metric for metric in metrics if better(metric) > 0), None)
    found = [row for row in scored(rows, lower) if row in scored(rows, higher)] if lower and higher else []
    if not (lower and higher and len(found) > 1):
        return None
    xs, ys = ([row["scores"][metric] for row in found] for metric in (higher, lower))
    x_range, y_range = padded(min(xs), max(xs), 0.15), padded(min(ys), max(ys), 0.12)
    names = [", ".join([point_name(row), *_models(row, rows)]) for row in found]
    best = best_row(found, lower)
    dots = [
        Dot(across(x, *x_range), down(y, *y_range), 0, f"{name}: {number(y)}, {number(x)}", row is best, name=name)
        for row, x, y, name in zip(found, xs, ys, names, strict=True)
    ]
    named: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: not dot.best):  # names that would cover one another are left out
        free = all(abs(dot.x - other.x) > 250 or abs(dot.y - other.y) > 80 for other in named if other.name)
        named.append(dot if free else replace(dot, name=""))
    unit = "a point for each row; better: lower, and further to the right"
    return Chart(
        f"{lower} against {higher}", unit, higher, ticks(*x_range), ticks(*y_range, upward=True), [Line("", 0)], named
    )


def heat_map(rows: Sequence[Row], metric: str, across_: str = "ig_scale", down_: str = "cfg_scale") -> HeatMap:
    """A score over two guidance scales. Where it is not known which way is better, more counts as more heat.

    Rows of fewer images than the most have no heat: their scores cannot be compared.
    """
    most = comparable(rows)
    values = [row["scores"][metric] for row in most]
    low, high = min(values), max(values)
    best = best_row(rows, metric)
    columns = sorted({row[across_] for row in rows})
    by_scales = {(row[across_], row[down_]): row for row in rows}

    def cell(row: Row | None) -> HeatCell | None:
        if row is None:
            return None
        share = (row["scores"][metric] - low) / (high - low or 1.0)
        std, few = row["std"].get(metric), not any(row is other for other in most)
        small = ([f"± {number(std, 3)}"] if std else []) + ([images_text([row["num"]])] if few else [])
        heat = 0.0 if few else round(1 - share if better(metric) < 0 else share, 3)
        return HeatCell(score(row["scores"][metric]), ", ".join(small), heat, row is best)

    table = [
        (_told(down_, scale), [cell(by_scales.get((column, scale))) for column in columns])
        for scale in sorted({row[down_] for row in rows})
    ]
    return HeatMap(metric, direction(metric, most), [_told(across_, column) for column in columns], table)


def _table(sweep: Row) -> dict[str, Any]:
    """Scores, and each over the unguided one; ``best`` holds (row, column) of the cells to set off."""
    rows, flat = sweep["rows"], sweep["flat"] or []
    heads: list[str] = []
    table: list[list[Cell]] = [[] for _ in rows]

    def column(head: str, cells: Iterable[Cell]) -> None:
        heads.append(head)
        for line, cell in zip(table, cells, strict=True):
            line.append(cell)

    for kind, name in KINDS.items():
        if kind == "ig" or any(row[f"{kind}_scale"] != 1 for row in rows):
            column(f"{name} scale", (Cell(_plain(f"{kind}_scale", row[f"{kind}_scale"])) for row in rows))
    for key, head in OTHER_AXES.items():
        if _varies(rows, key) or (key == "num" and rows[0]["num"]):
            column(head, (Cell(_plain(key, row[key])) for row in rows))
    best, metrics = [], metric_names(rows)
    ratios = metrics if len(metrics) <= 2 else [sweep["target"] or metrics[0]]
    for metric in metrics:
        found = scored(rows, metric)
        top = best_row(found, metric)
        best += [(i, len(heads)) for i, row in enumerate(rows) if row is top]
        alike = flat if metric == sweep["target"] and len(flat) > 1 else []
        marks = ["as good as the best" if i in alike and row is not top else "" for i, row in enumerate(rows)]
        column(metric, (Cell(score_text(row, metric), mark) for row, mark in zip(rows, marks, strict=True)))
        bases = [base["scores"][metric] if (base := unguided(found, row)) else None for row in rows]
        if metric in ratios and len(rows) > 1 and any(bases):
            pairs = zip(rows, bases, strict=True)
            column(
                "of unguided",
                (Cell(f"× {r['scores'][metric] / base:.2f}" if r in found and base else "") for r, base in pairs),
            )
    return {"heads": heads, "table": table, "best": best}


def _about_flatness(sweep: Row) -> list[str]:
    """Whether the best is one, as far as the noise over seeds tells."""
    rows, target, flat = sweep["rows"], sweep["target"], sweep["flat"]
    if target is None or len(rows) == 1:
        return []
    if flat is None:
        return ["One seed: it does not say which differences are noise. A sweep with --seeds 3 would."]
    if len(flat) <= 1:
        return [f"{target}: the best is better than all others by more than the noise over seeds."]
    where = "; ".join(", ".join([point_name(rows[i]), *_models(rows[i], rows)]) for i in flat if i < len(rows))
    return [f"{target} is flat within its noise over {len(flat)} rows ({where}): any of them is as good as the best."]


def _about_rows(sweep: Row) -> list[str]:
    rows, seeds = sweep["rows"], sweep["protocol"].get("seeds")
    notes = []
    for kind, name in KINDS.items():
        interval = tuple(rows[0][f"{kind}_interval"])
        on = any(row[f"{kind}_scale"] != 1 for row in rows) and not _varies(rows, f"{kind}_interval")
        if on and interval != (0, 1):
            notes.append(f"{name} is on for t in {interval_text(interval)} in all rows.")
    if isinstance(seeds, int) and seeds > 1:
        notes.append(f"Each score is the mean over {seeds} seeds, ± their standard deviation.")
    if len(most := comparable(rows)) < len(rows):
        told = images_text([most[0]["num"]])
        notes.append(f"Points that fell behind have fewer images: only those with {told} compete for the best.")
    return notes


def _varies(rows: Sequence[Row], key: str) -> bool:
    return len({row[key] for row in rows}) > 1


def _models(row: Row, rows: Sequence[Row]) -> list[str]:
    """What beside its guidance sets a row apart from the others, in words."""
    return [_told(key, row[key]) for key in ("ema", "step") if _varies(rows, key)]


def _plain(key: str, value: Any) -> str:
    if value is None:
        return "default" if key in ("ema", "step") else ""
    if key in SCALES:
        return "off" if value == 1 else number(value)
    return (
        interval_text(value) if key.endswith("_interval") else f"{value:,}" if isinstance(value, int) else f"{value:g}"
    )


def _told(key: str, value: Any) -> str:
    """A value of an axis in words."""
    if key == "num":
        return images_text([value])
    name = KINDS[key.removesuffix("_scale")] if key in SCALES else OTHER_AXES[key]
    return f"{name} {_plain(key, value)}"
