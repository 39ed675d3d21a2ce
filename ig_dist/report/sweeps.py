"""A sweep in the report: its charts, the table, and what the noise over seeds tells of the best."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.patches import Rectangle

from ig_dist.config.catalogue import Row, best_row, better, comparable
from ig_dist.config.describe import KINDS, guidance_name, interval_text
from ig_dist.report.plots import COLORS, MUTED, STYLE, TEXT, Chart, Line, draw_dot, draw_line, new_axes
from ig_dist.report.results import Cell, Sweep, direction, metric_names, reading_notes, score_text, scored
from ig_dist.report.text import images_text, number, protocol_parts, score

SCALES = {
    "ig_scale": "Internal Guidance scale (1: off)",
    "cfg_scale": "classifier-free guidance scale (1: off)",
    "auto_scale": "autoguidance scale (1: off)",
}
OTHER_AXES = {"ig_interval": "IG for t in", "cfg_interval": "CFG for t in", "ema": "EMA", "step": "step", "num": "N"}
OF_ANOTHER_MODEL = ("num", "step", "ema")
"""Rows of a sweep that differ in one of these are of other models or other numbers of images."""


def sweep_section(sweep: Row, newest: int | None, seeds: Sequence[int]) -> dict[str, Any]:
    """What the template needs of one sweep; ``newest``: step of the newest checkpoint; ``seeds``: of its points."""
    rows, made_at, protocol = sweep["rows"], sweep["protocol"].get("step"), dict(sweep["protocol"])
    metrics = _target_first(sweep)
    charts = [sweep_chart(found, metric) for metric in metrics if (found := scored(rows, metric))]
    if len(seeds) > 1:
        protocol["seeds"] = f"{len(seeds)}: {', '.join(map(str, seeds))}"
    return {
        "name": sweep["name"],
        "written": f"{sweep['written']:%Y-%m-%d %H:%M}",
        "charts": [*charts, *filter(None, [tradeoff_chart(rows, metrics)])],
        "old": f"{made_at:,}" if isinstance(made_at, int) and newest is not None and made_at < newest else None,
        "protocol": protocol_parts(protocol),
        "notes": [*_notes(sweep), *reading_notes(rows, [sweep["protocol"]])],
        **_table(sweep),
    }


def tiles(sweep: Row) -> list[tuple[str, str, str]]:
    """The best of each metric, the target first: name, value, remark."""
    found = []
    for metric in _target_first(sweep)[:4]:
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


def save_sweep(sweep: Mapping[str, Any], folder: Path) -> None:
    """The target over the sweep, and where lower is better against a score of which higher is."""
    read = Sweep.model_validate(sweep).model_dump()
    rows, target = read["rows"], read["target"]
    sweep_chart(scored(rows, target), target).save(folder / "sweep.png")
    if better(target) < 0 and (against := tradeoff_chart(rows, _target_first(read))):
        against.save(folder / "sweep_tradeoff.png")


# --- rows in words


def _target_first(sweep: Row) -> list[str]:
    return sorted(metric_names(sweep["rows"]), key=lambda name: name != sweep["target"])


def _varied(rows: Sequence[Row], axes: Iterable[str] = (*SCALES, *OTHER_AXES)) -> list[str]:
    """The axes in which rows differ."""
    return [key for key in axes if len({row[key] for row in rows}) > 1]


def unguided(rows: Sequence[Row], like: Row) -> Row | None:
    """The row without guidance, of the same model and number of images as ``like``."""
    plain = (row for row in rows if all(row[key] == 1 for key in SCALES))
    return next((row for row in plain if all(row[key] == like[key] for key in OF_ANOTHER_MODEL)), None)


def point_name(row: Row, among: Sequence[Row] = ()) -> str:
    """Guidance of a row in words, and what beside it sets the row apart ``among`` others."""
    terms = [{"kind": kind, "scale": row[f"{kind}_scale"], "interval": row[f"{kind}_interval"]} for kind in KINDS]
    guidance = guidance_name([term for term in terms if term["scale"] != 1])
    return ", ".join([guidance, *(_told(key, row[key]) for key in _varied(among, ("ema", "step")))])


def _value(key: str, value: Any) -> str:
    if value is None:
        return "default" if key in ("ema", "step") else ""
    if key in SCALES:
        return "off" if value == 1 else number(value)
    if key.endswith("_interval"):
        return interval_text(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _told(key: str, value: Any) -> str:
    """A value of what a sweep varies, with its name."""
    if key == "num":
        return images_text([value])
    return f"{KINDS[key.removesuffix('_scale')] if key in SCALES else OTHER_AXES[key]} {_value(key, value)}"


# --- charts


def sweep_chart(rows: Sequence[Row], metric: str) -> Chart:
    """A score over what a sweep varied: a heat map over two guidance scales alone, else lines."""
    varied = [key for key in _varied(rows) if key != "num"]
    return _heat_map(rows, metric, *varied) if len(varied) == 2 and set(varied) <= {*SCALES} else _lines(rows, metric)


@rc_context(STYLE)
def _lines(rows: Sequence[Row], metric: str) -> Chart:
    """A score against the scale that has most values, else against what varies; a line for each value of the rest."""
    varied = _varied(rows)
    axis = max((key for key in varied if key in SCALES), key=lambda key: len({row[key] for row in rows}), default="")
    axis = axis or next((key for key in ("step", *varied) if key in varied and key != "num"), "ig_scale")
    others = [key for key in varied if key != axis]
    numeric = axis in SCALES or axis == "step"
    values = sorted({row[axis] for row in rows}, key=lambda value: (value is not None, value))
    places = {value: float(value) if numeric and value is not None else float(i) for i, value in enumerate(values)}
    best = best_row(rows, metric)
    axes, lines = new_axes(SCALES.get(axis, OTHER_AXES.get(axis, axis))), []
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: places[row[axis]]):
        groups.setdefault(tuple(row[key] for key in others), []).append(row)
    for i, (group, mine) in enumerate(sorted(groups.items(), key=lambda pair: repr(pair[0]))):
        name = ", ".join(_told(key, value) for key, value in zip(others, group, strict=True))
        x, y = [places[row[axis]] for row in mine], [row["scores"][metric] for row in mine]
        spread = [row["std"].get(metric, 0.0) for row in mine]
        draw_line(axes, x, y, i, name)
        axes.errorbar(x, y, spread, fmt="none", ecolor=COLORS[i % len(COLORS)], elinewidth=0.8)
        lines.append(Line(name, i % len(COLORS)))
        for row, at, value, std in zip(mine, x, y, spread, strict=True):
            label = f"{_told(axis, row[axis])}: {number(value)}" + (f" ± {number(std, 3)}" if std else "")
            draw_dot(axes, at, value, i, label, *(("best", better(metric)) if row is best else ()))
    axes.margins(0.08 if numeric else 0.25, 0.15)
    if plain := unguided(rows, best or rows[0]):
        axes.axhline(plain["scores"][metric], color=MUTED, linestyle=":", linewidth=0.8)
        end = (1.0, plain["scores"][metric])
        axes.annotate("unguided", end, (0, 2), axes.get_yaxis_transform(), "offset points", ha="right", color=MUTED)
    span, kept = max(places.values()) - min(places.values()), dict[Any, float]()
    for value, place in places.items():  # a label at each value, but for those too near to one before
        if all(abs(place - other) >= 0.06 * span for other in kept.values()):
            kept[value] = place
    axes.set_xticks([*kept.values()], [number(v) if axis in SCALES else _value(axis, v) for v in kept])
    return Chart(axes, metric, direction(metric, rows), lines)


def tradeoff_chart(rows: Sequence[Row], metrics: Sequence[str]) -> Chart | None:
    """A score of which lower is better against one of which higher is: a point for each row."""
    lower = next((metric for metric in metrics if better(metric) < 0), None)
    higher = next((metric for metric in metrics if better(metric) > 0), None)
    found = scored(scored(rows, lower), higher) if lower and higher else []
    if not (lower and higher and len(found) > 1):
        return None
    axes, best = new_axes(higher), best_row(found, lower)
    xs, ys = ([row["scores"][metric] for row in found] for metric in (higher, lower))
    wide, tall = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    named: list[tuple[float, float]] = []
    for row, x, y in sorted(zip(found, xs, ys, strict=True), key=lambda point: point[0] is not best):
        name = point_name(row, rows)
        free = all(abs(x - a) > 0.35 * wide or abs(y - b) > 0.12 * tall for a, b in named)  # none covers another
        named += [(x, y)] if free else []
        draw_dot(axes, x, y, 0, f"{name}: {number(y)}, {number(x)}", name if free else "", int(row is best))
    axes.margins(0.3, 0.2)
    return Chart(axes, f"{lower} against {higher}", "better: lower, and further to the right")


@rc_context(STYLE)
def _heat_map(rows: Sequence[Row], metric: str, across: str, down: str) -> Chart:
    """A score over two guidance scales. Where it is not known which way is better, more counts as more heat.

    Rows of fewer images than the most have no heat: their scores cannot be compared.
    """
    most, best = comparable(rows), best_row(rows, metric)
    values = [row["scores"][metric] for row in most]
    low, high = min(values), max(values)
    columns, lines = (sorted({row[key] for row in rows}) for key in (across, down))
    axes = new_axes(SCALES[across])
    for row in rows:
        x, y, few = columns.index(row[across]), lines.index(row[down]), row["num"] != most[0]["num"]
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
    axes.set_xticks(range(len(columns)), [_told(across, value) for value in columns])
    axes.set_yticks(range(len(lines)), [_told(down, value) for value in lines])
    return Chart(axes, metric, direction(metric, most))


# --- the table and its notes


def _table(sweep: Row) -> dict[str, Any]:
    """Scores, and each over the unguided one; ``best`` holds (row, column) of the cells to set off."""
    rows, target, metrics = sweep["rows"], sweep["target"], metric_names(sweep["rows"])
    flat = sweep["flat"] if sweep["flat"] and len(sweep["flat"]) > 1 else []
    ratios = metrics if len(metrics) <= 2 else [target or metrics[0]]
    scales = [key for key in SCALES if key == "ig_scale" or any(row[key] != 1 for row in rows)]
    others = [key for key in OTHER_AXES if key in _varied(rows) or (key == "num" and rows[0]["num"])]
    heads = [*(f"{KINDS[key.removesuffix('_scale')]} scale" for key in scales), *(OTHER_AXES[key] for key in others)]
    table, best = [[Cell(_value(key, row[key])) for key in (*scales, *others)] for row in rows], list[tuple[int, int]]()
    for metric in metrics:
        found = scored(rows, metric)
        top = best_row(found, metric)
        for i, (row, line) in enumerate(zip(rows, table, strict=True)):
            best += [(i, len(line))] if row is top else []
            alike = metric == target and i in flat and row is not top
            line.append(Cell(score_text(row, metric), "as good as the best" if alike else ""))
        heads.append(metric)
        bases = [base["scores"][metric] if (base := unguided(found, row)) else None for row in rows]
        if metric in ratios and len(rows) > 1 and any(bases):
            heads.append("of unguided")
            for row, line, base in zip(rows, table, bases, strict=True):
                line.append(Cell(f"× {row['scores'][metric] / base:.2f}" if base and row in found else ""))
    return {"heads": heads, "table": table, "best": best}


def _notes(sweep: Row) -> list[str]:
    """Whether the best is one, as far as the noise over seeds tells; and what holds for all rows."""
    rows, target, flat, seeds = sweep["rows"], sweep["target"], sweep["flat"], sweep["protocol"].get("seeds")
    notes = []
    if target is not None and len(rows) > 1:
        if flat is None:
            notes.append("One seed: it does not say which differences are noise. A sweep with --seeds 3 would.")
        elif len(flat) <= 1:
            notes.append(f"{target}: the best is better than all others by more than the noise over seeds.")
        else:
            where = "; ".join(point_name(rows[i], rows) for i in flat if i < len(rows))
            told = f"over {len(flat)} rows ({where}): any of them is as good as the best."
            notes.append(f"{target} is flat within its noise {told}")
    for kind, name in KINDS.items():
        interval, on = tuple(rows[0][f"{kind}_interval"]), any(row[f"{kind}_scale"] != 1 for row in rows)
        if on and interval != (0, 1) and not _varied(rows, [f"{kind}_interval"]):
            notes.append(f"{name} is on for t in {interval_text(interval)} in all rows.")
    if isinstance(seeds, int) and seeds > 1:
        notes.append(f"Each score is the mean over {seeds} seeds, ± their standard deviation.")
    if len(most := comparable(rows)) < len(rows):
        told = images_text([most[0]["num"]])
        notes.append(f"Points that fell behind have fewer images: only those with {told} compete for the best.")
    return notes
