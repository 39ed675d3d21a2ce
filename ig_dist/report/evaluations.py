"""Single scores in the report: tables of plans and of other images, and each score over the steps of the run.

Seeds of one and the same plan are one row, their mean and deviation. Balanced labels stand above random ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ig_dist.report.plots import Chart, Curve, curve_chart
from ig_dist.report.results import Cell, Row, direction, metric_names, reading_notes, score_text
from ig_dist.report.text import fits_a_column, images_text, items, number, plain, protocol_parts

FOLLOWS_SEED = frozenset({"seed", "plan", "evaluations", "forwards", "weak_forwards", "features_made_again"})
"""Values of a protocol that differ between two seeds of what is otherwise the same."""
NAMES = ("guidance", "images")  # values that name a row
LESSER = re.compile("weak_|reference_|images_|.*forwards")
"""Values that take no column: they follow from others, or are of the second model."""
FOLLOWS_STEP = frozenset({"step", "images_seen", "checkpoint_sha256", "weights_sha256", "seed"}) | FOLLOWS_SEED
"""Values that differ between two checkpoints of what is otherwise the same."""


class _Group(NamedTuple):
    """Seeds of one and the same plan."""

    row: dict[str, Any]  # mean scores, their deviations, and the protocol that they share
    seeds: int
    alike: str  # equal where nothing but the labels differs
    swept: bool  # all of them stand in a sweep


def evaluation_sections(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Tables of scores that are of the same kind: of plans or of other images, by the same extractors."""
    kinds: dict[tuple[bool, str], list[Row]] = {}
    for result in results:
        protocol = result["protocol"]
        kinds.setdefault(("images" in protocol, str(protocol.get("extractor"))), []).append(result)
    sections = []
    for other_images, extractor in sorted(kinds):
        if (section := evaluation_section(kinds[other_images, extractor])) is not None:
            title = "Other images" if other_images else "Samples"
            sections.append({**section, "title": title, "extractor": extractor})
    return sections


def evaluation_section(results: Sequence[Row]) -> dict[str, Any] | None:
    """Scores of plans: what their protocols share, and in the table what differs; None where the sweeps show all.

    Two of the same plan under the same protocol count once; those that a sweep shows (``swept``) are shown beside other
    seeds or other labels only.
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
    shown = [
        key
        for key in differing
        if key in NAMES or (not LESSER.match(key) and all(fits_a_column(key, p.get(key)) for p in protocols))
    ]
    shown += [key for key in NAMES if key in common]
    if "seed" in common and any(group.seeds > 1 for group in groups):
        shown.append("seed")
    shown = ["num", *(key for key in shown if key != "num")] if "num" in keys else shown
    hidden = [key for key in differing if key not in shown]
    metrics = metric_names(rows)
    table = []
    for i, group in enumerate(groups):
        above = groups[i - 1] if i and groups[i - 1].alike == group.alike else None
        cells = [Cell(str(i + 1))] if hidden else []
        cells += [_protocol_cell(key, group) for key in shown]
        table.append(cells + [_mean_cell(group, metric, above) for metric in metrics])
    return {
        "heads": [""] * bool(hidden) + ["N" if key == "num" else key for key in shown] + metrics,
        "table": table,
        "protocol": protocol_parts(common),
        "rows": [items({key: p[key] for key in hidden if key in p}) for p in protocols] if hidden else [],
        "notes": reading_notes(rows, protocols),
    }


def step_charts(lines: Sequence[Row], results: Sequence[Row]) -> list[Chart]:
    """Each score over the steps of the run: those taken while training, and those of plans.

    Results that differ in the checkpoint alone are a line.
    """
    found: dict[str, dict[tuple[str, int | None], list[tuple[int, float]]]] = {}

    def add(metric: str, name: str, num: int | None, step: int, value: Any) -> None:
        if isinstance(value, (int, float)):
            found.setdefault(metric, {}).setdefault((name, num), []).append((step, float(value)))

    for line in lines:
        num = line.get("score_num")
        for key in line.keys() - {"score_num"}:
            if key.startswith("score_"):
                add(key.removeprefix("score_"), "while training", num, line["step"], line[key])
    for name, rows in _by_step(_by_seed(results)).items():
        for row in rows:
            for metric, value in row["scores"].items():
                add(metric, name, row.get("num"), row["protocol"]["step"], value)
    charts = []
    for metric, lines_ in sorted(found.items()):
        counts = {num for _, num in lines_}
        curves: dict[str, Curve] = {}
        for (name, num), points in lines_.items():
            steps, values = zip(*sorted(points), strict=True)
            curves[name if len(counts) == 1 else f"{name}, {images_text([num])}"] = (steps, values)
        charts.append(
            curve_chart(f"{metric} over steps", direction(metric, [{"num": n} for n in counts]), curves, marked=True)
        )
    return [chart for chart in charts if chart is not None]


def _by_step(groups: Iterable[_Group]) -> dict[str, list[Row]]:
    """Rows that differ in the checkpoint alone, by what sets them apart from the others; two steps at least."""
    lines: dict[str, list[Row]] = {}
    for group in groups:
        protocol = group.row["protocol"]
        if isinstance(protocol.get("step"), int):
            same = {key: value for key, value in protocol.items() if key not in FOLLOWS_STEP}
            lines.setdefault(json.dumps(same, sort_keys=True), []).append(group.row)
    told = [rows for rows in lines.values() if len({row["protocol"]["step"] for row in rows}) > 1]
    kept = [{k: plain(v) for k, v in rows[0]["protocol"].items() if k not in FOLLOWS_STEP} for rows in told]
    apart = [
        key
        for key in dict.fromkeys(key for protocol in kept for key in protocol)
        if key not in ("num", "guidance") and len({protocol.get(key) for protocol in kept}) > 1
    ]
    named: dict[str, list[Row]] = {}
    for rows, protocol in zip(told, kept, strict=True):
        others = [f"{key} {protocol[key][:12]}" for key in apart if key in protocol]
        named.setdefault(", ".join(filter(None, (protocol.get("guidance"), *others))), []).extend(rows)
    return named


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
    return Cell(score_text(row, metric), ", ".join(remarks))
