"""Single scores in the report: tables of plans and of other images, and each score over the steps of the run.

Seeds of one and the same plan are one row, their mean and deviation. Balanced labels stand above random ones.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from ig_dist.config.catalogue import Row
from ig_dist.report.plots import Chart, curve_chart
from ig_dist.report.results import Cell, direction, metric_names, reading_notes, score_text
from ig_dist.report.text import fits_a_column, images_text, items, number, plain, protocol_parts

FOLLOWS_SEED = frozenset({"seed", "plan", "evaluations", "forwards", "weak_forwards", "features_made_again"})
"""Values of a protocol that differ between two seeds of what is otherwise the same."""
FOLLOWS_STEP = frozenset({"step", "images_seen", "checkpoint_sha256", "weights_sha256", "seed"}) | FOLLOWS_SEED
"""Values that differ between two checkpoints of what is otherwise the same."""
NAMES = ("guidance", "images")  # values that name a row
LESSER = re.compile("weak_|reference_|images_|.*forwards")
"""Values that take no column: they follow from others, or are of the second model."""


def evaluation_sections(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Tables of scores that are of the same kind: of plans or of other images, by the same extractors."""
    kinds = defaultdict[tuple[bool, str], list[Row]](list)
    for result in results:
        kinds["images" in result["protocol"], str(result["protocol"].get("extractor"))].append(result)
    sections = []
    for (other_images, extractor), rows in sorted(kinds.items(), key=lambda pair: pair[0]):
        if (section := evaluation_section(rows)) is not None:
            title = "Other images" if other_images else "Samples"
            sections.append({**section, "title": title, "extractor": extractor})
    return sections


def evaluation_section(results: Sequence[Row]) -> dict[str, Any] | None:
    """Scores of plans: what their protocols share, and in the table what differs; None where the sweeps show all.

    Two of the same plan under the same protocol count once; those that a sweep shows (``swept``) are shown beside other
    seeds or other labels only.
    """
    found = _by_seed(results)
    told = {row["alike"] for row in found if not row["swept"]}
    rows = _paired(row for row in found if row["alike"] in told)
    if not rows:
        return None
    protocols, metrics = [row["protocol"] for row in rows], metric_names(rows)
    keys = list(dict.fromkeys(key for protocol in protocols for key in protocol))
    common = {key: protocols[0].get(key) for key in keys if all(p.get(key) == protocols[0].get(key) for p in protocols)}
    differing = [key for key in keys if key not in common]
    shown = [
        key
        for key in differing
        if key in NAMES or (not LESSER.match(key) and all(fits_a_column(key, p.get(key)) for p in protocols))
    ]
    shown += [key for key in NAMES if key in common]
    if "seed" in common and any(row["seeds"] > 1 for row in rows):
        shown.append("seed")
    shown = ["num", *(key for key in shown if key != "num")] if "num" in keys else shown
    hidden = [key for key in differing if key not in shown]
    table = []
    for i, row in enumerate(rows):
        cells = [Cell(str(i + 1))] if hidden else []
        for key in shown:
            mean = f"mean of {row['seeds']}" if key == "seed" and row["seeds"] > 1 else ""
            cells.append(Cell(plain(row["protocol"].get(key)), mean))
        balanced = rows[i - 1] if i and rows[i - 1]["alike"] == row["alike"] else None
        table.append(cells + [Cell(score_text(row, metric), _remarks(row, metric, balanced)) for metric in metrics])
    return {
        "heads": [""] * bool(hidden) + ["N" if key == "num" else key for key in shown] + metrics,
        "table": table,
        "protocol": protocol_parts(common),
        "rows": [items({key: p[key] for key in hidden if key in p}) for p in protocols] if hidden else [],
        "notes": reading_notes(rows, protocols),
    }


def _remarks(row: Row, metric: str, balanced: Row | None) -> str:
    """What a score's deviation is over, and how far it is from that with balanced labels."""
    over = f"over {row['seeds']} seeds" if row["seeds"] > 1 else "over subsets" if metric in row["spread"] else ""
    remarks = [over] if over else []
    if balanced is not None and metric in row["scores"] and metric in balanced["scores"]:
        difference = row["scores"][metric] - balanced["scores"][metric]
        remarks.append(f"{'+' if difference >= 0 else '−'}{number(abs(difference))} against balanced")
    return ", ".join(remarks)


def _by_seed(results: Sequence[Row]) -> list[Row]:
    """One row for all results whose protocols differ in the seed and in what follows from it.

    Beside mean scores, deviations and what the protocols share a row has the number of its ``seeds``, ``alike``, which
    is equal where nothing but the labels differs, and ``swept``: all of them stand in a sweep.
    """
    found = defaultdict[tuple[str, ...], dict[Any, Row]](dict)
    for number_, result in enumerate(results):
        key = (_without(FOLLOWS_SEED, result["protocol"]), *sorted(result["scores"]))
        found[key].setdefault(result["protocol"].get("plan", number_), result)
    rows: list[Row] = []
    for plans in found.values():
        seeds = list(plans.values())
        first, protocol = seeds[0], dict(seeds[0]["protocol"])
        row = {**first, "protocol": protocol, "num": protocol.get("num"), "seeds": len(seeds)}
        row["swept"] = all(seed.get("swept") for seed in seeds)
        row["alike"] = (_without({*FOLLOWS_SEED, "labels"}, protocol), *sorted(first["scores"]))
        if len(seeds) > 1:
            values = {name: [seed["scores"][name] for seed in seeds] for name in first["scores"]}
            row["scores"] = {name: float(np.mean(v)) for name, v in values.items()}
            row["std"] = {name: float(np.std(v, ddof=1)) for name, v in values.items()}
            for name in FOLLOWS_SEED & protocol.keys():
                if len(told := {plain(seed["protocol"].get(name)) for seed in seeds}) > 1:
                    protocol[name] = ", ".join(sorted(told))
        rows.append(row)
    return rows


def _without(keys: Collection[str], protocol: Row) -> str:
    """The rest of a protocol, to be compared."""
    return json.dumps({key: value for key, value in protocol.items() if key not in keys}, sort_keys=True)


def _paired(rows: Iterable[Row]) -> list[Row]:
    """By guidance, and of two that differ in the labels alone the balanced ones above the random ones."""

    def place(row: Row) -> tuple[Any, ...]:
        terms = [term for term in row["protocol"].get("guidance") or [] if isinstance(term, dict)]
        return len(terms), [float(term.get("scale", 1)) for term in terms]

    groups = defaultdict[Any, list[Row]](list)
    for row in sorted(rows, key=place):
        groups[row["alike"]].append(row)
    return [
        row for group in groups.values() for row in sorted(group, key=lambda row: row["protocol"].get("labels", ""))
    ]


def step_charts(lines: Sequence[Row], results: Sequence[Row]) -> list[Chart]:
    """Each score over the steps of the run: those taken while training, and those of plans.

    Results that differ in the checkpoint alone are a line.
    """
    found = defaultdict[str, dict[tuple[str, int | None], list[tuple[int, float]]]](lambda: defaultdict(list))
    for line in lines:
        for key, value in line.items():
            if key.startswith("score_") and key != "score_num" and value is not None:
                found[key.removeprefix("score_")]["while training", line.get("score_num")].append((line["step"], value))
    for name, row in _over_steps(_by_seed(results)):
        for metric, value in row["scores"].items():
            found[metric][name, row["num"]].append((row["protocol"]["step"], value))
    charts = []
    for metric, series in sorted(found.items()):
        counts = {num for _, num in series}
        curves = {
            name if len(counts) == 1 else f"{name}, {images_text([num])}": sorted(points)
            for (name, num), points in series.items()
        }
        unit = direction(metric, [{"num": num} for num in counts])
        charts.append(curve_chart(f"{metric} over steps", unit, curves, marked=True))
    return [chart for chart in charts if chart is not None]


def _over_steps(rows: Iterable[Row]) -> list[tuple[str, Row]]:
    """Rows of which others differ in the checkpoint alone, with what sets these apart from the rest."""
    lines = defaultdict[str, list[Row]](list)
    for row in rows:
        if isinstance(row["protocol"].get("step"), int):
            lines[_without(FOLLOWS_STEP, row["protocol"])].append(row)
    told = [line for line in lines.values() if len({row["protocol"]["step"] for row in line}) > 1]
    kept = [{k: plain(v) for k, v in line[0]["protocol"].items() if k not in FOLLOWS_STEP} for line in told]
    keys = [key for key in dict.fromkeys(key for told in kept for key in told) if key not in ("num", "guidance")]
    apart = [key for key in keys if len({told.get(key) for told in kept}) > 1]
    names = [
        ", ".join(filter(None, (told.get("guidance"), *(f"{key} {told[key][:12]}" for key in apart if key in told))))
        for told in kept
    ]
    return [(name, row) for name, line in zip(names, told, strict=True) for row in line]
