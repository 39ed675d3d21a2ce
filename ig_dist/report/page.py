"""One static HTML file of a run: what ran, curves, pictures, scores with their protocol, config.

It is read from the run directory alone, needs no network and no JavaScript, and leaves out what is not there with a
line that says which command makes it. The template escapes everything that it is given.
"""

from __future__ import annotations

import base64
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from pydantic import BaseModel, Field, ValidationError

from ig_dist import __version__
from ig_dist.config import Config
from ig_dist.config_file import load_run
from ig_dist.errors import ConfigError
from ig_dist.report.facts import read_conversion, run_facts
from ig_dist.report.plots import SCALE_NAMES, Chart, best_row, curve_chart, heat_map, scale_chart, unguided
from ig_dist.report.text import Facts, compact, duration, guidance_name, number, plain, score
from ig_dist.run_dir import CONFIG_NAME, replace_text
from ig_dist.training.goodput import KINDS, read_goodput

TEMPLATES = Path(__file__).parent / "templates"
MOST_SAMPLE_GRIDS = 8  # each is about 100 kB


class _Result(BaseModel):
    """Scores of one plan; what else stands beside them is not needed here."""

    scores: dict[str, float]
    std: dict[str, float] = {}
    """Over seeds, for the metrics that have it."""
    protocol: dict[str, Any] = {}


class _Row(_Result):
    ig_scale: float
    cfg_scale: float
    auto_scale: float = 1.0
    ig_interval: tuple[float, float] = (0.0, 1.0)
    plans: list[str] = []


class _Sweep(BaseModel):
    rows: list[_Row] = Field(min_length=1)
    protocol: dict[str, Any] = {}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        run: run directory.
        out: the HTML file; None: ``report.html`` in the run directory.

    Returns:
        The file.

    Raises:
        ConfigError: not a run directory, nothing trained or converted yet, a damaged result, or ``out`` cannot be
            written.
    """
    out = out or run / "report.html"
    config = load_run(run)
    metrics = _read_metrics(run, {"step", "images_seen", "loss", "images_per_s"})
    conversion = read_conversion(run)
    if not metrics and conversion is None:
        command = f"ig-dist train {_quoted(run / CONFIG_NAME)}"
        raise ConfigError(f"{run} has no metrics in metrics.jsonl: train it first with `{command}`")
    validation = _read_metrics(run, {"step", "val_loss"})
    sweep = None
    if (run / "sweep.json").exists():
        sweep = _read_result(_Sweep, run / "sweep.json", f"ig-dist sweep {_quoted(run)}")
    context = {
        "run": str(run),
        "command_run": _quoted(run),
        "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "version": __version__,
        "headline": _headline(config, metrics, sweep),
        "facts": run_facts(run, config, metrics, conversion),
        "curves": _curves(metrics, validation) if metrics else [],
        "goodput": _goodput(run),
        "grid": _embedded(run / "grid.png") if (run / "grid.png").exists() else None,
        "samples": _sample_grids(run),
        "sweep": None if sweep is None else _sweep(sweep, int(metrics[-1]["step"]) if metrics else None),
        "evaluations": _evaluations(run, sweep),
        "config": (run / CONFIG_NAME).read_text(encoding="utf-8"),
    }
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("report.html.jinja").render(context)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, html)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}: give a file in a folder that can be written") from None
    return out


def _read_metrics(run: Path, keys: set[str]) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that have all of the keys; one that is being written is passed over."""
    file, lines = run / "metrics.jsonl", []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and keys <= line.keys():
            lines.append(line)
    return lines


def _read_result(kind: type[_Result] | type[_Sweep], file: Path, command: str) -> dict[str, Any]:
    try:
        return kind.model_validate_json(file.read_bytes()).model_dump()
    except (OSError, ValidationError):
        raise ConfigError(f"{file} is damaged: delete it, and make it again with `{command}`") from None


def _headline(
    config: Config, metrics: Sequence[Mapping[str, Any]], sweep: Mapping[str, Any] | None
) -> list[tuple[str, str, str]]:
    """The few numbers that say how the run went: name, value, remark."""
    tiles = []
    if metrics:
        last = metrics[-1]
        middle = sorted(line["images_per_s"] for line in metrics)[len(metrics) // 2]
        tiles = [
            ("Steps", number(last["step"]), f"of {config.train.steps:,}" if config.train.steps else ""),
            ("Images seen", compact(last["images_seen"]), f"in batches of {config.train.global_batch_size:,}"),
            ("Throughput", f"{middle:,.0f}", "images/s, median"),
        ]
    for metric in _metric_names(sweep["rows"]) if sweep else []:
        rows = _scored(sweep["rows"], metric) if sweep else []
        top, base = best_row(rows, metric), unguided(rows)
        if top is None:
            continue
        where = _scales(top)
        if base is not None and top is not base and base["scores"][metric]:
            where += f", × {top['scores'][metric] / base['scores'][metric]:.2f} of unguided"
        tiles.append((f"Best {metric}", score(top["scores"][metric]), where))
    return tiles


def _curves(metrics: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> list[Chart]:
    steps = [line["step"] for line in metrics]

    def column(key: str, lines: Sequence[Mapping[str, Any]] = metrics) -> list[float | None]:
        return [line.get(key) for line in lines]

    batch = metrics[-1]["images_seen"] / metrics[-1]["step"]
    waits = [
        None if line.get("data_wait_s") is None else 100 * line["data_wait_s"] * line["images_per_s"] / batch
        for line in metrics
    ]
    mfu = [None if line.get("mfu") is None else 100 * line["mfu"] for line in metrics]
    losses = {"total": column("loss"), "final head": column("loss_final"), "auxiliary head": column("loss_aux")}
    held_out = {"total": column("val_loss", validation), "final head": column("val_loss_final", validation)}
    validated = [line["step"] for line in validation]
    memory = {"GiB": [None if m is None else m / 2**30 for m in column("peak_memory_bytes")]}
    saving = {"the loop stands still": column("checkpoint_stall_s"), "written": column("checkpoint_write_s")}
    charts = [
        curve_chart("Loss", "of the logged step's batch", steps, losses, from_zero=False),
        curve_chart(
            "Validation loss", "of the average, held-out shards", validated, held_out, from_zero=False, exact=True
        ),
        curve_chart("Learning rate", "", steps, {"rate": column("lr")}, from_zero=True, exact=True),
        curve_chart("Gradient norm", "before clipping", steps, {"norm": column("grad_norm")}, from_zero=True),
        curve_chart("Throughput", "images/s", steps, {"images/s": column("images_per_s")}, from_zero=True),
        curve_chart("Waiting for data", "% of the time", steps, {"%": waits}, from_zero=True),
        curve_chart("Model FLOPs utilisation", "% of the peak", steps, {"%": mfu}, from_zero=True),
        curve_chart("Peak memory", "GiB, of the rank that took most", steps, memory, from_zero=True, exact=True),
        curve_chart("Saving a checkpoint", "s, the last save", steps, saving, from_zero=True, exact=True),
    ]
    return [chart for chart in charts if chart is not None]


def _goodput(run: Path) -> dict[str, Any] | None:
    """Where the time went: (name, time, percent) of what took any, and what lies outside of it."""
    found = read_goodput(run)
    if found is None:
        return None
    return {
        "shares": [
            (name, duration(found.seconds[kind]), round(found.percent(kind), 1))
            for kind, name in KINDS.items()
            if found.seconds[kind] > 0
        ],
        "unit": f"{duration(found.running_s)} in {found.starts} start{'s' if found.starts > 1 else ''}",
        "note": f"{number(found.lost_steps)} steps were done again; {duration(found.between_s)} lie between the starts",
    }


def _sample_grids(run: Path) -> dict[str, Any]:
    """The newest pictures of samples, ordered by what they show."""
    files = sorted((run / "samples").glob("*.png"), key=lambda file: (-file.stat().st_mtime, file.name))
    shown = []
    for file in files[:MOST_SAMPLE_GRIDS]:
        try:
            plan = json.loads((file.with_suffix("") / "plan.json").read_text(encoding="utf-8"))["plan"]
            name = f"{guidance_name(plan['guidance'])}: {plan['solver']}, {plan['steps']} steps"
            order = (len(plan["guidance"]), [float(term["scale"]) for term in plan["guidance"]])
        except (OSError, ValueError, KeyError, TypeError):
            name, order = file.stem, (0, [])
        shown.append((order, name, _embedded(file)))
    return {"shown": [part[1:] for part in sorted(shown)], "left_out": len(files) - len(shown)}


def _sweep(sweep: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    """Charts or heat maps, one for each metric, the table, and the protocol that all rows share."""
    rows = sweep["rows"]
    scored = [(metric, found) for metric in _metric_names(rows) if (found := _scored(rows, metric))]
    varied = {axis for axis in (*SCALE_NAMES, "ig_interval") if len({row[axis] for row in rows}) > 1}
    two_axes = varied == {"ig_scale", "cfg_scale"}
    made_at = sweep["protocol"].get("step")
    return {
        "charts": [] if two_axes else [scale_chart(found, metric) for metric, found in scored],
        "heat_maps": [heat_map(found, metric) for metric, found in scored] if two_axes else [],
        "old": f"{made_at:,}" if isinstance(made_at, int) and made_at != step else None,
        "protocol": _plain_items(sweep["protocol"]),
        **_sweep_table(rows),
    }


def _sweep_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores, and each over the unguided one; ``best`` holds (row, column) of the cells to set off."""
    heads, table = ["IG scale", "CFG scale"], [[_scale(row["ig_scale"]), _scale(row["cfg_scale"])] for row in rows]
    if any(row["auto_scale"] != 1 for row in rows):
        heads.append("autoguidance scale")
        for row, cells in zip(rows, table, strict=True):
            cells.append(_scale(row["auto_scale"]))
    if len({row["ig_interval"] for row in rows}) > 1:
        heads.append("IG for t in")
        for row, cells in zip(rows, table, strict=True):
            cells.append("{:g} to {:g}".format(*row["ig_interval"]))
    best = []
    for metric in _metric_names(rows):
        found = _scored(rows, metric)
        base, top = unguided(found), best_row(found, metric)
        best += [(i, len(heads)) for i, row in enumerate(rows) if row is top]
        heads.append(metric)
        for row, cells in zip(rows, table, strict=True):
            cells.append(_score_text(row, metric))
        if base and base["scores"][metric] and len(rows) > 1:
            heads.append("of unguided")
            for row, cells in zip(rows, table, strict=True):
                cells.append(f"× {row['scores'][metric] / base['scores'][metric]:.2f}" if row in found else "")
    return {"heads": heads, "table": table, "best": best}


def _evaluations(run: Path, sweep: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Scores of plans that are not in the sweep: what their protocols share, and in the table what differs."""
    swept = {plan for row in sweep["rows"] for plan in row["plans"]} if sweep else set()
    files = [file for file in sorted((run / "evaluations").glob("*.json")) if file.stem not in swept]
    results = [
        _read_result(_Result, file, f"ig-dist evaluate {_quoted(run / 'samples' / file.stem)}") for file in files
    ]
    if not results:
        return None
    protocols = [result["protocol"] for result in results]
    keys = list(dict.fromkeys(key for protocol in protocols for key in protocol))
    common = {key: protocols[0].get(key) for key in keys if all(p.get(key) == protocols[0].get(key) for p in protocols)}
    differing = [key for key in keys if key not in common]
    metrics = _metric_names(results)
    return {
        "heads": [*differing, *metrics],
        "table": [
            [*(plain(p.get(key)) for key in differing), *(_score_text(result, metric) for metric in metrics)]
            for p, result in zip(protocols, results, strict=True)
        ],
        "protocol": _plain_items(common),
    }


def _metric_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(metric for row in rows for metric in row["scores"]))


def _scored(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    """The rows that have a finite score."""
    return [row for row in rows if row["scores"].get(metric) is not None and math.isfinite(row["scores"][metric])]


def _score_text(row: Mapping[str, Any], metric: str) -> str:
    value, std = row["scores"].get(metric), row["std"].get(metric)
    return "" if value is None else score(value) + ("" if std is None else f" ± {number(std)}")


def _scales(row: Mapping[str, Any]) -> str:
    names = [f"{name} {number(row[key])}" for key, name in SCALE_NAMES.items() if row[key] != 1]
    return "at " + ", ".join(names) if names else "unguided"


def _scale(value: float) -> str:
    return "off" if value == 1 else number(value)


def _plain_items(mapping: Mapping[str, Any]) -> Facts:
    return [(key, plain(value)) for key, value in mapping.items()]


def _embedded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
