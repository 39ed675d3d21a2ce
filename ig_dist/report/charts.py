"""The geometry of the report's charts: numbers in, positions and labels out. The template draws them.

A chart's box is 1000 x 1000 and is stretched to the page's width; labels are HTML at percentages, so that they keep
their size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ig_dist.report.text import number

BOX = 1000
COLORS = 6
MOST_POINTS = 500  # more than a screen shows
MOST_MARKED = 40  # points of a curve that are marked one by one
TICKS_APART = 6  # percent of the width

Floats = NDArray[np.float64]
Range = tuple[float, float]
Curve = tuple[Sequence[float], Sequence[float | None]]
"""Steps, and the values that were measured at them; None: not at this step."""


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis, in percent from the left or from the top."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One series: points for an SVG polyline, smoothed and as measured; empty where points stand alone."""

    name: str
    color: int
    points: str = ""
    raw: str = ""
    last: str = ""


@dataclass(frozen=True)
class Dot:
    """One measured point; ``bar`` spans from and to heights of the box: a deviation, or down to zero."""

    x: float
    y: float
    color: int
    label: str
    best: bool = False
    bar: Range | None = None
    name: str = ""
    """Written beside it, where there is no line to name."""


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

    @property
    def described(self) -> str:
        """In words, for those who do not see it."""
        ends = ", ".join(f"{line.name} {line.last}" for line in self.lines if line.last)
        return f"{self.title} against {self.x_label}" + (f"; at the end: {ends}" if ends else "")


def curve_chart(
    title: str,
    unit: str,
    curves: Mapping[str, Curve],
    *,
    from_zero: bool = False,
    smoothed: bool = False,
    marked: bool = False,
) -> Chart | None:
    """Curves over the steps of a run.

    Args:
        title: what is shown.
        unit: of the values.
        curves: measured values by name; what is missing or not finite is passed over.
        from_zero: the axis begins at 0.
        smoothed: the values have noise: a moving mean is drawn over them.
        marked: each point is marked, where they are few.

    Returns:
        The chart; None where nothing finite was measured.
    """
    measured = {name: found for name, curve in curves.items() if len((found := _finite(curve))[0])}
    if not measured:
        return None
    drawn = {name: smooth(y) if smoothed else y for name, (_, y) in measured.items()}
    steps = np.concatenate([x for x, _ in measured.values()])
    x_range = (min(0.0, float(steps.min())), float(steps.max()) * (1.02 if marked else 1))  # room for the last mark
    y_range = _curve_range([(y, drawn[name]) for name, (_, y) in measured.items()], from_zero)
    lines, dots = [], []
    for color, (name, (x, y)) in enumerate(measured.items()):
        smooth_line, raw = (polyline(x, values, x_range, y_range) for values in (drawn[name], y))
        lines.append(
            Line(name, color % COLORS, smooth_line, raw if smoothed else "", number(float(drawn[name][-1]), 3))
        )
        if marked and len(x) <= MOST_MARKED:
            dots += [
                Dot(across(at, *x_range), down(value, *y_range), color % COLORS, f"step {number(at)}: {number(value)}")
                for at, value in zip(x.tolist(), y.tolist(), strict=True)
            ]
    cut = "Some values lie above the frame." if any(y.max() > y_range[1] for _, y in measured.values()) else ""
    return Chart(title, unit, "step", ticks(*x_range), ticks(*y_range, upward=True), lines, dots, note=cut)


def event_chart(title: str, unit: str, events: Mapping[str, Curve]) -> Chart | None:
    """Single events over the steps of a run, each a point on a stem; None where there are none."""
    found = {name: points for name, curve in events.items() if len((points := _finite(curve))[0])}
    if not found:
        return None
    x_range = (0.0, 1.02 * max(float(x.max()) for x, _ in found.values()))
    y_range = (0.0, 1.1 * max(float(y.max()) for _, y in found.values()) or 1.0)
    dots = [
        Dot(x, y, color, f"{name}, step {number(at)}: {number(value, 3)} s", bar=(y, float(BOX)))
        for color, (name, points) in enumerate(found.items())
        for at, value in zip(*(part.tolist() for part in points), strict=True)
        for x, y in [(across(at, *x_range), down(value, *y_range))]
    ]
    lines = [Line(name, color, last=number(float(y[-1]), 3)) for color, (name, (_, y)) in enumerate(found.items())]
    return Chart(title, unit, "step", ticks(*x_range), ticks(*y_range, upward=True), lines, dots)


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


def padded(low: float, high: float, share: float) -> Range:
    """A range with room at both ends."""
    space = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - space, high + space


def across(value: float, low: float, high: float) -> float:
    """A value's position from the left of the box."""
    return round((value - low) / (high - low or 1.0) * BOX, 1)


def down(value: float, low: float, high: float) -> float:
    """A value's position from the top of the box."""
    return round(BOX - across(value, low, high), 1)


def polyline(x: Sequence[float] | Floats, y: Sequence[float] | Floats, x_range: Range, y_range: Range) -> str:
    """Points of an SVG polyline."""
    chosen = thinned(np.asarray(y, np.float64))
    return " ".join(f"{across(float(x[i]), *x_range):g},{down(float(y[i]), *y_range):g}" for i in chosen)


def thinned(y: Floats) -> list[int]:
    """Points to draw: all, or the lowest and the highest of each stretch, so that no spike is lost."""
    if len(y) <= MOST_POINTS:
        return list(range(len(y)))
    chosen = {0, len(y) - 1}
    for part in np.array_split(np.arange(len(y)), MOST_POINTS // 2):
        chosen |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
    return sorted(chosen)


def ticks(low: float, high: float, *, upward: bool = False) -> list[Tick]:
    """Round numbers within a range."""
    rough = (high - low or 1.0) / (7 if upward else 6)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    values = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    place = down if upward else across
    return [Tick(place(value, low, high) / BOX * 100, _tick_label(value, step)) for value in values]


def own_ticks(values: Sequence[float], labels: Sequence[str], x_range: Range) -> list[Tick]:
    """A tick at each value, but for those too near to one before."""
    found: list[Tick] = []
    for value, label in zip(values, labels, strict=True):
        at = across(value, *x_range) / BOX * 100
        if all(abs(at - other.at) >= TICKS_APART for other in found):
            found.append(Tick(at, label))
    return found


def _finite(curve: Curve) -> tuple[Floats, Floats]:
    pairs = [(x, y) for x, y in zip(*curve, strict=True) if y is not None and math.isfinite(y)]
    x, y = np.array(pairs, np.float64).reshape(-1, 2).T
    return x, y


def _curve_range(curves: Sequence[tuple[Floats, Floats]], from_zero: bool) -> Range:
    """Bottom and top of the axis: neither outliers nor the first fall of a loss may flatten the rest."""
    low = min(min(float(np.quantile(raw, 0.01)), float(line.min())) for raw, line in curves)
    full = max(max(float(np.quantile(raw, 0.99)), float(line.max())) for raw, line in curves)
    later = max(max(float(np.quantile(raw[len(raw) // 10 :], 0.99)), float(line[-1])) for raw, line in curves)
    cropped = full - low > 3 * (later - low) > 0
    high = low + 3 * (later - low) if cropped else full
    if from_zero:
        return 0.0, high * 1.1 or 1.0
    return padded(low, high, 0.06)


def _tick_label(value: float, step: float) -> str:
    if value == 0:
        return "0"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and step >= size / 2 and size > 1e3):
            return f"{value / size:g}{suffix}"
    if step < 1e-4:
        return number(float(f"{value:.3g}"))
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
