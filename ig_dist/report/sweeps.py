"""A sweep in the report: its charts, the table, and what the noise over seeds tells of the best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ig_dist.config.describe import KINDS, interval_text
from ig_dist.report.plots import sweep_chart, tradeoff_chart
from ig_dist.report.results import (
    OTHER_AXES,
    Cell,
    Row,
    best_row,
    comparable,
    metric_names,
    models_of,
    point_name,
    reading_notes,
    score_text,
    scored,
    target_first,
    told_value,
    unguided,
    varies,
)
from ig_dist.report.text import images_text, protocol_parts, score


def sweep_section(sweep: Row, newest: int | None, seeds: Sequence[int]) -> dict[str, Any]:
    """What the template needs of one sweep; ``newest``: step of the newest checkpoint; ``seeds``: of its points."""
    rows, made_at = sweep["rows"], sweep["protocol"].get("step")
    shown = [(metric, found) for metric in target_first(sweep) if (found := scored(rows, metric))]
    charts = [sweep_chart(found, metric) for metric, found in shown]
    charts += filter(None, [tradeoff_chart(rows, target_first(sweep))])
    protocol = dict(sweep["protocol"])
    if len(seeds) > 1:
        protocol["seeds"] = f"{len(seeds)}: {', '.join(map(str, seeds))}"
    return {
        "name": sweep["name"],
        "written": f"{sweep['written']:%Y-%m-%d %H:%M}",
        "charts": charts,
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
            column(f"{name} scale", (Cell(told_value(f"{kind}_scale", row[f"{kind}_scale"])) for row in rows))
    for key, head in OTHER_AXES.items():
        if varies(rows, key) or (key == "num" and rows[0]["num"]):
            column(head, (Cell(told_value(key, row[key])) for row in rows))
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
    where = "; ".join(", ".join([point_name(rows[i]), *models_of(rows[i], rows)]) for i in flat if i < len(rows))
    return [f"{target} is flat within its noise over {len(flat)} rows ({where}): any of them is as good as the best."]


def _about_rows(sweep: Row) -> list[str]:
    rows, seeds = sweep["rows"], sweep["protocol"].get("seeds")
    notes = []
    for kind, name in KINDS.items():
        interval = tuple(rows[0][f"{kind}_interval"])
        on = any(row[f"{kind}_scale"] != 1 for row in rows) and not varies(rows, f"{kind}_interval")
        if on and interval != (0, 1):
            notes.append(f"{name} is on for t in {interval_text(interval)} in all rows.")
    if isinstance(seeds, int) and seeds > 1:
        notes.append(f"Each score is the mean over {seeds} seeds, ± their standard deviation.")
    if len(most := comparable(rows)) < len(rows):
        told = images_text([most[0]["num"]])
        notes.append(f"Points that fell behind have fewer images: only those with {told} compete for the best.")
    return notes
