"""Charts, drawn by matplotlib: SVG in the page, PNG beside a sweep.

Names come from files of others: they are plain text here, never mathematics or markup.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: no global state, no display
from numpy.typing import NDArray

from ig_dist.report.text import compact, number

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
Curve = Iterable[tuple[float, float]]  # a step, and what was measured at it


class Line(NamedTuple):
    """One series in the legend."""

    name: str
    color: int
    last: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing and what is written around it."""

    axes: Axes
    title: str
    unit: str
    lines: list[Line] = field(default_factory=list)
    note: str = ""

    @property
    def figure(self) -> Figure:
        """What the axes are in."""
        assert isinstance(self.axes.figure, Figure)
        return self.axes.figure

    @property
    def described(self) -> str:
        """In words, for those who do not see it."""
        ends = ", ".join(f"{line.name} {line.last}" for line in self.lines if line.last)
        return f"{self.title} against {self.axes.get_xlabel()}" + (f"; at the end: {ends}" if ends else "")

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
        self.figure.set_size_inches(5.2, 3.6)
        self.figure.set_layout_engine("constrained")
        self.axes.set_title(f"{self.title}: {self.unit}" if self.unit else self.title, fontsize=9)
        if len(self.lines) > 1:
            self.axes.legend(frameon=False)
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
        curves: what is not finite is passed over.
        from_zero: the axis begins at 0.
        smoothed: the values have noise: a moving mean is drawn over them.
        marked: each point is marked, where they are few.
    """
    if not (measured := _measured(curves)):
        return None
    axes, lines, drawn = new_axes("step"), [], []
    for color, (name, (x, y)) in enumerate(measured.items()):
        line = smooth(y) if smoothed else y
        drawn.append((y, line))
        if smoothed:
            axes.plot(x, y, color=COLORS[color % len(COLORS)], linewidth=0.6, alpha=0.4)
        draw_line(axes, x, line, color, name, marker="" if len(x) > 1 else "o")
        lines.append(Line(name, color % len(COLORS), number(float(line[-1]), 3)))
        if marked and len(x) <= MOST_MARKED:
            for at, value in zip(x.tolist(), y.tolist(), strict=True):
                draw_dot(axes, at, value, color, f"step {number(at)}: {number(value)}")
    steps = np.concatenate([x for x, _ in measured.values()])
    axes.set_xlim(min(0.0, float(steps.min())), float(steps.max()) * 1.02 or 1.0)
    bottom, top = _curve_range(drawn, from_zero)
    axes.set_ylim(bottom, top)
    cut = "Some values lie above the frame." if any(y.max() > top for y, _ in drawn) else ""
    return Chart(axes, title, unit, lines, cut)


def event_chart(title: str, unit: str, events: Mapping[str, Curve]) -> Chart | None:
    """Single events over the steps of a run, each a point on a stem; None where there are none."""
    if not (measured := _measured(events)):
        return None
    axes, lines = new_axes("step"), []
    for color, (name, (x, y)) in enumerate(measured.items()):
        axes.vlines(x, 0, y, COLORS[color], linewidth=0.8, alpha=0.7)
        for at, value in zip(x.tolist(), y.tolist(), strict=True):
            draw_dot(axes, at, value, color, f"{name}, step {number(at)}: {number(value, 3)} s")
        lines.append(Line(name, color, number(float(y[-1]), 3)))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return Chart(axes, title, unit, lines)


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
def new_axes(x_label: str) -> Axes:
    """Of a drawing of its own."""
    axes = Figure(figsize=(4.4, 2.5)).subplots()
    axes.figure.subplots_adjust(0.14, 0.2, 0.98, 0.96)  # a layout engine takes as long as the drawing
    axes.set_xlabel(x_label, loc="right")
    axes.grid(axis="y", linewidth=0.7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: compact(value, 6))
    axes.locator_params(nbins=6, steps=[1, 2, 5, 10])
    return axes


def draw_line(axes: Axes, x: Any, y: Any, color: int, name: str, marker: str = "") -> None:
    """A series with its colour and its dashes."""
    place = color % len(COLORS)
    axes.plot(x, y, color=COLORS[place], linestyle=DASHES[place], marker=marker, label=name)


@rc_context(STYLE)
def draw_dot(axes: Axes, x: float, y: float, color: int, tip: str, name: str = "", ring: int = 0) -> None:
    """A point with its tooltip; ``name`` is written above it, or below where ``ring``, which sets it off, is -1."""
    axes.plot([x], [y], "o", color=COLORS[color % len(COLORS)], gid=f"tip:{tip}", zorder=4)
    if ring:
        axes.plot([x], [y], "o", markersize=9, markerfacecolor="none", markeredgecolor=TEXT, zorder=3)
    if name:
        axes.annotate(name, (x, y), (0, -15 if ring < 0 else 7), textcoords="offset points", ha="center")


def _measured(curves: Mapping[str, Curve]) -> dict[str, Floats]:
    """What can be drawn of each curve, (2, N): steps and values. What has no such points is left out."""
    kept = {name: [(x, y) for x, y in curve if abs(x) < MOST and abs(y) < MOST] for name, curve in curves.items()}
    return {name: np.array(points, np.float64).T for name, points in kept.items() if points}


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
