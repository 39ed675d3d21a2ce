"""The charts of a report and of a sweep, drawn by matplotlib: SVG in the page, PNG beside the sweep.

Names come from files of others: they are plain text here, never mathematics or markup.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: no global state, no display
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ig_dist.report.results import (
    OTHER_AXES,
    SCALES,
    Row,
    Sweep,
    best_row,
    better,
    comparable,
    direction,
    models_of,
    point_name,
    scored,
    target_first,
    told,
    told_value,
    unguided,
    varies,
)
from ig_dist.report.text import compact, images_text, number, score

COLORS = ("#1f6feb", "#c2410c", "#0d8a66", "#9333ea", "#a16207", "#be185d")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), "-", (0, (6, 2)))
TEXT, MUTED, RULE = "#1b1f24", "#5c6570", "#e1e5ea"
THEME = {**{color: f"var(--c{i})" for i, color in enumerate(COLORS)}, TEXT: "var(--text)", MUTED: "var(--muted)"}
THEME |= {RULE: "var(--rule)", "#ffffff": "var(--card)"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.linewidth": 0, "text.color": TEXT,
    "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "grid.color": RULE, "axes.axisbelow": True,
    "xtick.major.size": 0, "ytick.major.size": 0, "axes.labelsize": 8.5, "lines.linewidth": 1.4, "lines.markersize": 4,
}  # fmt: skip
MOST = 1e30  # of what is drawn; beyond it the arithmetic of axes overflows
MOST_MARKED = 40  # points of a curve that are marked one by one

Floats = NDArray[np.float64]
Curve = tuple[Sequence[float], Sequence[float | None]]
"""Steps, and the values that were measured at them; None: not at this step."""


class Line(NamedTuple):
    """One series in the legend."""

    name: str
    color: int
    last: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing and what is written around it."""

    title: str
    unit: str
    figure: Figure
    lines: list[Line] = field(default_factory=list)
    note: str = ""

    @property
    def described(self) -> str:
        """In words, for those who do not see it."""
        ends = ", ".join(f"{line.name} {line.last}" for line in self.lines if line.last)
        return f"{self.title} against {self.figure.axes[0].get_xlabel()}" + (f"; at the end: {ends}" if ends else "")

    @property
    def svg(self) -> Markup:
        """For the page: in the page's colours, without ids of its own, and a tooltip for each dot."""
        file = io.StringIO()
        with rc_context({**STYLE, "svg.hashsalt": None}):  # no id comes twice in a page
            self.figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        text = file.getvalue().partition("<svg")[2].partition(">")[2]
        for old, new in ((r"<style.*?</style>", ""), (r'<g id="tip:([^"]*)">', r"<g><title>\1</title>")):
            text = re.sub(old, new, text, flags=re.DOTALL)
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        text = re.sub("|".join(THEME), lambda found: THEME[found[0]], text)
        width, height = 72 * self.figure.get_size_inches()
        return Markup(
            f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(self.described)}">{text}'
        )

    @rc_context(STYLE)
    def save(self, file: Path) -> None:
        """As a PNG that stands alone."""
        axes = self.figure.axes[0]
        self.figure.set_size_inches(5.2, 3.6)
        self.figure.set_layout_engine("constrained")
        axes.set_title(f"{self.title}: {self.unit}" if self.unit else self.title, fontsize=9)
        if len(self.lines) > 1:
            axes.legend(frameon=False)
        self.figure.savefig(file, dpi=130)


def curve_chart(
    title: str,
    unit: str,
    curves: Mapping[str, Curve],
    *,
    from_zero: bool = False,
    smoothed: bool = False,
    marked: bool = False,
) -> Chart | None:
    """Curves over the steps of a run, by name; None where nothing finite was measured.

    Args:
        title: what is shown.
        unit: of the values.
        curves: what is missing or not finite is passed over.
        from_zero: the axis begins at 0.
        smoothed: the values have noise: a moving mean is drawn over them.
        marked: each point is marked, where they are few.
    """
    measured = {name: found for name, curve in curves.items() if len((found := _finite(curve))[0])}
    if not measured:
        return None
    axes, lines = _axes("step"), []
    for color, (name, (x, y)) in enumerate(measured.items()):
        line = smooth(y) if smoothed else y
        if smoothed:
            axes.plot(x, y, color=COLORS[color % len(COLORS)], linewidth=0.6, alpha=0.4)
        _line(axes, x, line, color, name, marker="" if len(x) > 1 else "o")
        lines.append(Line(name, color % len(COLORS), number(float(line[-1]), 3)))
        if marked and len(x) <= MOST_MARKED:
            for at, value in zip(x.tolist(), y.tolist(), strict=True):
                _dot(axes, at, value, color, f"step {number(at)}: {number(value)}")
    steps = np.concatenate([x for x, _ in measured.values()])
    axes.set_xlim(min(0.0, float(steps.min())), float(steps.max()) * 1.02 or 1.0)
    top = _curve_range([(y, smooth(y) if smoothed else y) for _, y in measured.values()], from_zero)
    axes.set_ylim(*top)
    cut = "Some values lie above the frame." if any(y.max() > top[1] for _, y in measured.values()) else ""
    return _chart(axes, title, unit, lines, cut)


def event_chart(title: str, unit: str, events: Mapping[str, Curve]) -> Chart | None:
    """Single events over the steps of a run, each a point on a stem; None where there are none."""
    found = {name: points for name, curve in events.items() if len((points := _finite(curve))[0])}
    if not found:
        return None
    axes, lines = _axes("step"), []
    for color, (name, (x, y)) in enumerate(found.items()):
        axes.vlines(x, 0, y, COLORS[color], linewidth=0.8, alpha=0.7)
        for at, value in zip(x.tolist(), y.tolist(), strict=True):
            _dot(axes, at, value, color, f"{name}, step {number(at)}: {number(value, 3)} s")
        lines.append(Line(name, color, number(float(y[-1]), 3)))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return _chart(axes, title, unit, lines)


def sweep_chart(rows: Sequence[Row], metric: str) -> Chart:
    """A score over what a sweep varied: a heat map over two guidance scales alone, else lines."""
    varied = [key for key in (*SCALES, *OTHER_AXES) if key != "num" and varies(rows, key)]
    return heat_map(rows, metric, *varied) if len(varied) == 2 and set(varied) <= {*SCALES} else _scales(rows, metric)


def save_sweep(sweep: Mapping[str, Any], folder: Path) -> None:
    """The target over the sweep, and where lower is better against a score of which higher is."""
    read = Sweep.model_validate(sweep).model_dump()
    rows, target = read["rows"], read["target"]
    sweep_chart(scored(rows, target), target).save(folder / "sweep.png")
    if better(target) < 0 and (against := tradeoff_chart(rows, target_first(read))):
        against.save(folder / "sweep_tradeoff.png")


@rc_context(STYLE)
def _scales(rows: Sequence[Row], metric: str) -> Chart:
    """A score against the scale that has most values, else against what varies; a line for each value of the rest."""
    varied = [key for key in (*SCALES, *OTHER_AXES) if varies(rows, key)]
    axis = max((key for key in varied if key in SCALES), key=lambda key: len({row[key] for row in rows}), default="")
    axis = axis or next((key for key in ("step", *varied) if key in varied and key != "num"), "ig_scale")
    others = [key for key in varied if key != axis]
    numeric = axis in SCALES or axis == "step"
    values = sorted({row[axis] for row in rows}, key=lambda value: (value is not None, value))
    places = {value: float(value) if numeric and value is not None else float(i) for i, value in enumerate(values)}
    best = best_row(rows, metric)
    axes, lines = _axes(SCALES.get(axis, OTHER_AXES.get(axis, axis))), []
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: places[row[axis]]):
        groups.setdefault(tuple(row[key] for key in others), []).append(row)
    for i, (group, mine) in enumerate(sorted(groups.items(), key=lambda pair: repr(pair[0]))):
        name = ", ".join(told(key, value) for key, value in zip(others, group, strict=True))
        x, y = [places[row[axis]] for row in mine], [row["scores"][metric] for row in mine]
        spread = [row["std"].get(metric, 0.0) for row in mine]
        _line(axes, x, y, i, name)
        axes.errorbar(x, y, spread, fmt="none", ecolor=COLORS[i % len(COLORS)], elinewidth=0.8)
        lines.append(Line(name, i % len(COLORS)))
        for row, at, value, std in zip(mine, x, y, spread, strict=True):
            label = f"{told(axis, row[axis])}: {number(value)}" + (f" ± {number(std, 3)}" if std else "")
            _dot(axes, at, value, i, label, *(("best", better(metric)) if row is best else ()))
    axes.margins(0.08 if numeric else 0.25, 0.15)
    if plain := unguided(rows, best):
        axes.axhline(plain["scores"][metric], color=MUTED, linestyle=":", linewidth=0.8)
        end = (1.0, plain["scores"][metric])
        axes.annotate("unguided", end, (0, 2), axes.get_yaxis_transform(), "offset points", ha="right", color=MUTED)
    span, kept = max(places.values()) - min(places.values()), dict[Any, float]()
    for value, place in places.items():  # a label at each value, but for those too near to one before
        if all(abs(place - other) >= 0.06 * span for other in kept.values()):
            kept[value] = place
    axes.set_xticks([*kept.values()], [number(v) if axis in SCALES else told_value(axis, v) for v in kept])
    return _chart(axes, metric, direction(metric, rows), lines)


def tradeoff_chart(rows: Sequence[Row], metrics: Sequence[str]) -> Chart | None:
    """A score of which lower is better against one of which higher is: a point for each row."""
    lower = next((metric for metric in metrics if better(metric) < 0), None)
    higher = next((metric for metric in metrics if better(metric) > 0), None)
    found = [row for row in scored(rows, lower) if row in scored(rows, higher)] if lower and higher else []
    if not (lower and higher and len(found) > 1):
        return None
    axes, best = _axes(higher), best_row(found, lower)
    xs, ys = ([row["scores"][metric] for row in found] for metric in (higher, lower))
    wide, tall = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    named: list[tuple[float, float]] = []
    for row, x, y in sorted(zip(found, xs, ys, strict=True), key=lambda point: point[0] is not best):
        name = ", ".join([point_name(row), *models_of(row, rows)])
        free = all(abs(x - a) > 0.35 * wide or abs(y - b) > 0.12 * tall for a, b in named)  # none covers another
        named += [(x, y)] if free else []
        _dot(axes, x, y, 0, f"{name}: {number(y)}, {number(x)}", name if free else "", int(row is best))
    axes.margins(0.3, 0.2)
    return _chart(axes, f"{lower} against {higher}", "better: lower, and further to the right", [])


@rc_context(STYLE)
def heat_map(rows: Sequence[Row], metric: str, across: str, down: str) -> Chart:
    """A score over two guidance scales. Where it is not known which way is better, more counts as more heat.

    Rows of fewer images than the most have no heat: their scores cannot be compared.
    """
    most, best = comparable(rows), best_row(rows, metric)
    values = [row["scores"][metric] for row in most]
    low, high = min(values), max(values)
    columns, lines = (sorted({row[key] for row in rows}) for key in (across, down))
    axes = _axes(SCALES[across])
    for row in rows:
        x, y, few = columns.index(row[across]), lines.index(row[down]), not any(row is other for other in most)
        share = (row["scores"][metric] - low) / (high - low or 1.0)
        heat = 0.0 if few else 1 - share if better(metric) < 0 else share
        axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, color=COLORS[0], alpha=0.04 + 0.42 * heat, lw=0))
        if row is best:
            axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, edgecolor=TEXT, lw=1.4))
        std = row["std"].get(metric)
        small = ([f"± {number(std, 3)}"] if std else []) + ([images_text([row["num"]])] if few else [])
        text = "\n".join([score(row["scores"][metric]), *small])
        axes.text(x, y, text, ha="center", va="center", weight="bold" if row is best else "normal")
    axes.figure.subplots_adjust(left=0.22)
    axes.grid(visible=False)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(-0.5, len(lines) - 0.5)
    axes.set_xticks(range(len(columns)), [told(across, value) for value in columns])
    axes.set_yticks(range(len(lines)), [told(down, value) for value in lines])
    return _chart(axes, metric, direction(metric, most), [])


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


@rc_context(STYLE)
def _axes(x_label: str) -> Axes:
    axes = Figure(figsize=(4.4, 2.5)).subplots()
    axes.figure.subplots_adjust(0.14, 0.2, 0.98, 0.96)  # a layout engine takes as long as the drawing
    axes.set_xlabel(x_label, loc="right")
    axes.grid(axis="y", linewidth=0.7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: compact(value, 6))
    axes.locator_params(nbins=6, steps=[1, 2, 5, 10])
    return axes


def _chart(axes: Axes, title: str, unit: str, lines: list[Line], note: str = "") -> Chart:
    figure = axes.figure
    assert isinstance(figure, Figure)
    return Chart(title, unit, figure, lines, note)


def _line(axes: Axes, x: Any, y: Any, color: int, name: str, marker: str = "") -> None:
    place = color % len(COLORS)
    axes.plot(x, y, color=COLORS[place], linestyle=DASHES[place], marker=marker, label=name)


@rc_context(STYLE)
def _dot(axes: Axes, x: float, y: float, color: int, tip: str, name: str = "", ring: int = 0) -> None:
    """A point with its tooltip; ``name`` is written above it, or below where ``ring``, which sets it off, is -1."""
    axes.plot([x], [y], "o", color=COLORS[color % len(COLORS)], gid=f"tip:{tip}", zorder=4)
    if ring:
        axes.plot([x], [y], "o", markersize=9, markerfacecolor="none", markeredgecolor=TEXT, zorder=3)
    if name:
        axes.annotate(name, (x, y), (0, -15 if ring < 0 else 7), textcoords="offset points", ha="center")


def _finite(curve: Curve) -> tuple[Floats, Floats]:
    pairs = [(x, y) for x, y in zip(*curve, strict=True) if y is not None and abs(x) < MOST and abs(y) < MOST]
    x, y = np.array(pairs, np.float64).reshape(-1, 2).T
    return x, y


def _curve_range(curves: Sequence[tuple[Floats, Floats]], from_zero: bool) -> tuple[float, float]:
    """Bottom and top of the axis: neither outliers nor the first fall of a loss may flatten the rest."""
    low = min(min(float(np.quantile(raw, 0.01)), float(line.min())) for raw, line in curves)
    full = max(max(float(np.quantile(raw, 0.99)), float(line.max())) for raw, line in curves)
    later = max(max(float(np.quantile(raw[len(raw) // 10 :], 0.99)), float(line[-1])) for raw, line in curves)
    cropped = full - low > 3 * (later - low) > 0
    high = low + 3 * (later - low) if cropped else full
    if from_zero:
        return 0.0, high * 1.1 or 1.0
    space = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - space, high + space
