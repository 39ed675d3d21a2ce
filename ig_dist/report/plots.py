"""The geometry of the report's charts: numbers in, positions and labels out. The template draws them.

A chart's box is 1000 x 1000 and is stretched to the page's width; labels are HTML at percentages, so that they keep
their size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ig_dist.evaluation.catalogue import METRICS, lower_is_better
from ig_dist.report.text import images_text, interval_text, number, score

BOX = 1000
COLORS = 6
SCALE_NAMES = {"ig_scale": "IG", "cfg_scale": "CFG", "auto_scale": "autoguidance"}
MOST_POINTS = 500  # more than a screen shows
MOST_MARKED = 40  # points of a curve that are marked one by one
APART = ("num", "step", "ema")
"""Rows of a sweep that differ in one of these are of other models or other numbers of images."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis, in percent from the left or from the top."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One series: points for an SVG polyline, smoothed and as measured."""

    name: str
    color: int
    points: str
    raw: str = ""
    last: str = ""


@dataclass(frozen=True)
class Dot:
    """One measured point; ``bar`` spans one standard deviation to each side, in box units."""

    x: float
    y: float
    color: int
    label: str
    best: bool = False
    bar: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """All that the template needs to draw a chart."""

    title: str
    unit: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    dots: list[Dot] = field(default_factory=list)
    reference: Tick | None = None
    """A dashed horizontal line."""
    note: str = ""


@dataclass(frozen=True)
class HeatCell:
    """A score in a heat map; ``heat`` is 0 for the worst and 1 for the best."""

    text: str
    std: str
    heat: float
    best: bool


@dataclass(frozen=True)
class HeatMap:
    """Scores over two guidance scales."""

    metric: str
    direction: str
    ig_scales: list[str]
    rows: list[tuple[str, list[HeatCell | None]]]
    """CFG scale, and a cell for each IG scale."""


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


def direction(metric: str, rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """In words, with the number of images of the rows; empty where neither is known."""
    words = {-1: "lower is better", 1: "higher is better", 0: ""}[better(metric)]
    return ", ".join(filter(None, (words, images_text(row.get("num") for row in rows))))


def smooth(values: Floats) -> Floats:
    """A moving mean over about a fifteenth of the curve, twice. It narrows at the start, where a loss falls fast."""
    half = max(1, len(values) // 30) if len(values) >= 8 else 0
    index = np.arange(len(values))
    reach = np.minimum(half, index // 2)
    first, last = index - reach, np.minimum(index + reach, len(values) - 1)
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[last + 1] - sums[first]) / (last - first + 1)
    return values


def curve_chart(
    title: str,
    unit: str,
    steps: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    *,
    from_zero: bool,
    exact: bool = False,
    marked: bool = False,
) -> Chart | None:
    """Curves over the steps of a run.

    Args:
        title: what is shown.
        unit: of the values.
        steps: of the measurements.
        series: measured values by name; what is missing or not finite is passed over.
        from_zero: the axis begins at 0.
        exact: the values have no noise to smooth.
        marked: each point is marked, where they are few.

    Returns:
        The chart; None where nothing finite was measured.
    """
    if not steps:
        return None
    x_range = (min(0.0, *steps), max(steps))
    curves = {}
    for name, values in series.items():
        pairs = [(x, y) for x, y in zip(steps, values, strict=True) if y is not None and math.isfinite(y)]
        if pairs:
            x, y = np.array(pairs, np.float64).T
            curves[name] = (x, y, y if exact else smooth(y))
    if not curves:
        return None
    low, high = _curve_range([(raw, line) for _, raw, line in curves.values()], from_zero)
    above = any(raw.max() > high for _, raw, _ in curves.values())
    lines = [
        Line(
            name,
            color,
            _polyline(x, line, x_range, (low, high)),
            _polyline(x, raw, x_range, (low, high)),
            number(float(line[-1]), 3),
        )
        for color, (name, (x, raw, line)) in enumerate(curves.items())
    ]
    dots = [
        Dot(
            _across(float(at), *x_range),
            _down(float(value), low, high),
            color,
            f"step {number(float(at))}: {number(float(value))}",
        )
        for color, (x, raw, _) in enumerate(curves.values())
        if marked and len(x) <= MOST_MARKED
        for at, value in zip(x, raw, strict=True)
    ]
    return Chart(
        title,
        unit,
        "step",
        _ticks(*x_range),
        _ticks(low, high, upward=True),
        lines,
        dots,
        note="Some values lie above the frame." if above else "",
    )


def scale_chart(rows: Sequence[Mapping[str, Any]], metric: str) -> Chart:
    """A score against the guidance scale that varies, one line per value of the other one."""
    varied = [name for name in ("cfg_scale", "ig_scale", "auto_scale") if len({row[name] for row in rows}) > 1]
    axis = varied[0] if varied else "ig_scale"
    others = [name for name in ("cfg_scale", "ig_scale", "auto_scale") if name != axis]
    values = [row["scores"][metric] for row in rows]
    spread = [_std(row, metric) or 0.0 for row in rows]
    ends = [v - s for v, s in zip(values, spread, strict=True)] + [v + s for v, s in zip(values, spread, strict=True)]
    low, high = _padded(min(ends), max(ends), 0.12)
    scales = sorted({float(row[axis]) for row in rows})
    x_range = _padded(scales[0], scales[-1], 0.04)
    best = best_row(rows, metric)
    lines: list[Line] = []
    dots: list[Dot] = []
    told = [key for key in ("ig_interval", "cfg_interval", *APART) if len({row.get(key) for row in rows}) > 1]

    def line_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[other] for other in others), tuple(row.get(key) for key in told)

    for group, values in sorted({line_of(row) for row in rows}, key=repr):
        mine = [row for row in rows if line_of(row) == (group, values)]
        mine.sort(key=lambda row: float(row[axis]))
        color = len(lines) % COLORS
        x = np.array([row[axis] for row in mine], np.float64)
        y = np.array([row["scores"][metric] for row in mine], np.float64)
        on = [f"{SCALE_NAMES[other]} {number(scale)}" for other, scale in zip(others, group, strict=True) if scale != 1]
        name = ", ".join(on) or f"no {SCALE_NAMES[others[0]]}"
        name = ", ".join([name, *(_told(key, value) for key, value in zip(told, values, strict=True))])
        lines.append(Line(name, color, _polyline(x, y, x_range, (low, high))))
        for row in mine:
            value, std = row["scores"][metric], _std(row, metric)
            label = f"{SCALE_NAMES[axis]} {number(row[axis])}: {number(value)}" + (
                f" ± {number(std, 3)}" if std else ""
            )
            bar = (_down(value + std, low, high), _down(value - std, low, high)) if std else None
            at_x, at_y = _across(row[axis], *x_range), _down(value, low, high)
            dots.append(Dot(at_x, at_y, color, label, row is best, bar))
    plain = unguided(rows, best)
    mark = Tick(_down(plain["scores"][metric], low, high) / BOX * 100, "unguided") if plain else None
    x_ticks = [Tick(_across(scale, *x_range) / BOX * 100, number(scale)) for scale in scales]
    spaced = [tick for i, tick in enumerate(x_ticks) if all(abs(tick.at - t.at) >= 6 for t in x_ticks[:i])]
    x_label = {
        "ig_scale": "Internal Guidance scale",
        "cfg_scale": "classifier-free guidance scale",
        "auto_scale": "autoguidance scale",
    }[axis]
    y_ticks = _ticks(low, high, upward=True)
    return Chart(metric, direction(metric, rows), f"{x_label} (1: off)", spaced, y_ticks, lines, dots, mark)


def heat_map(rows: Sequence[Mapping[str, Any]], metric: str) -> HeatMap:
    """A score over both guidance scales. Where it is not known which way is better, more counts as more heat.

    Rows of fewer images than the most have no heat: their scores cannot be compared.
    """
    most = comparable(rows)
    values = [row["scores"][metric] for row in most]
    low, high = min(values), max(values)
    best = best_row(rows, metric)
    ig_scales = sorted({row["ig_scale"] for row in rows})
    by_scales = {(row["ig_scale"], row["cfg_scale"]): row for row in rows}

    def cell(row: Mapping[str, Any] | None) -> HeatCell | None:
        if row is None:
            return None
        share = (row["scores"][metric] - low) / (high - low or 1.0)
        std = _std(row, metric)
        heat = 1 - share if better(metric) < 0 else share
        few = not any(row is other for other in most)
        small = ([f"± {number(std, 3)}"] if std else []) + ([images_text([row["num"]])] if few else [])
        text = score(row["scores"][metric])
        return HeatCell(text, ", ".join(small), 0.0 if few else round(heat, 3), row is best)

    table: list[tuple[str, list[HeatCell | None]]] = [
        (number(cfg), [cell(by_scales.get((ig, cfg))) for ig in ig_scales])
        for cfg in sorted({row["cfg_scale"] for row in rows})
    ]
    return HeatMap(metric, direction(metric, most), [number(ig) for ig in ig_scales], table)


def unguided(rows: Sequence[Mapping[str, Any]], like: Mapping[str, Any] | None = None) -> Mapping[str, Any] | None:
    """The row without guidance; with ``like`` that of the same model and number of images."""
    plain = [row for row in rows if all(row[axis] == 1 for axis in SCALE_NAMES)]
    return next((row for row in plain if like is None or all(row.get(k) == like.get(k) for k in APART)), None)


def comparable(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows with the most images: a halved search gives the others fewer."""
    most = max((row.get("num") or 0 for row in rows), default=0)
    return [row for row in rows if (row.get("num") or 0) == most]


def best_row(rows: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any] | None:
    """The row with the best score of those with the most images; None where it is not known which way is better."""
    return (
        max(comparable(rows), key=lambda row: better(metric) * float(row["scores"][metric]), default=None)
        if better(metric)
        else None
    )


def _told(key: str, value: Any) -> str:
    """What sets a line apart, in words."""
    if key.endswith("_interval"):
        return f"{SCALE_NAMES[key.replace('interval', 'scale')]} for t in {interval_text(value)}"
    if key == "num":
        return images_text([value])
    return f"{'EMA' if key == 'ema' else key} {'none' if value is None else number(value)}"


def _std(row: Mapping[str, Any], metric: str) -> float | None:
    std: float | None = row.get("std", {}).get(metric)
    return std


def _curve_range(curves: Sequence[tuple[Floats, Floats]], from_zero: bool) -> tuple[float, float]:
    """Bottom and top of the axis: neither outliers nor the first fall of a loss may flatten the rest."""
    low = min(min(float(np.quantile(raw, 0.01)), float(line.min())) for raw, line in curves)
    full = max(max(float(np.quantile(raw, 0.99)), float(line.max())) for raw, line in curves)
    later = max(max(float(np.quantile(raw[len(raw) // 10 :], 0.99)), float(line[-1])) for raw, line in curves)
    cropped = full - low > 3 * (later - low) > 0
    high = low + 3 * (later - low) if cropped else full
    if from_zero:
        return 0.0, high * 1.1 or 1.0
    return _padded(low, high, 0.06)


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    space = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - space, high + space


def _across(value: float, low: float, high: float) -> float:
    return round((value - low) / (high - low or 1.0) * BOX, 1)


def _down(value: float, low: float, high: float) -> float:
    return round(BOX - _across(value, low, high), 1)


def _polyline(x: Floats, y: Floats, x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    chosen = _thinned(y)
    return " ".join(f"{_across(float(x[i]), *x_range):g},{_down(float(y[i]), *y_range):g}" for i in chosen)


def _thinned(y: Floats) -> list[int]:
    """Points to draw: all, or the lowest and the highest of each stretch, so that no spike is lost."""
    if len(y) <= MOST_POINTS:
        return list(range(len(y)))
    chosen = {0, len(y) - 1}
    for part in np.array_split(np.arange(len(y)), MOST_POINTS // 2):
        chosen |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
    return sorted(chosen)


def _ticks(low: float, high: float, *, upward: bool = False) -> list[Tick]:
    """Round numbers within a range."""
    rough = (high - low or 1.0) / (7 if upward else 6)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    values = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    place = _down if upward else _across
    return [Tick(place(value, low, high) / BOX * 100, _tick_label(value, step)) for value in values]


def _tick_label(value: float, step: float) -> str:
    if value == 0:
        return "0"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and step >= size / 2 and size > 1e3):
            return f"{value / size:g}{suffix}"
    if step < 1e-4:
        return number(float(f"{value:.3g}"))
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
