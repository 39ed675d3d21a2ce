"""One static HTML file of a run: what ran, curves, pictures, scores with their protocol, config.

It is read from the run directory alone, needs no network and no JavaScript, and leaves out what is not there with a
line that says which command makes it. The template escapes everything that it is given.
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from pydantic import ValidationError

from ig_dist import __version__
from ig_dist.config import Config
from ig_dist.config_file import load_run
from ig_dist.errors import ConfigError
from ig_dist.report.facts import read_conversion, run_facts
from ig_dist.report.plots import Chart, better, curve_chart
from ig_dist.report.scores import Result, Sweep, evaluation_section, metric_names, sweep_section, tiles, training_charts
from ig_dist.report.text import compact, duration, folded, guidance_name, number
from ig_dist.run_dir import CONFIG_NAME, replace_text
from ig_dist.training.goodput import KINDS, read_goodput

TEMPLATES = Path(__file__).parent / "templates"
MOST_SAMPLE_GRIDS = 8  # each is about 100 kB
NEAREST = "_nearest"


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
    validation, scored = _read_metrics(run, {"step", "val_loss"}), _read_metrics(run, {"step", "score_num"})
    sweep = None
    if (run / "sweep.json").exists():
        sweep = _read_result(Sweep, run / "sweep.json", f"ig-dist sweep {_quoted(run)}")
    context = {
        "run": str(run),
        "command_run": _quoted(run),
        "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "version": __version__,
        "headline": _headline(config, metrics, sweep),
        "facts": run_facts(run, config, metrics, conversion),
        "curves": _curves(metrics, validation, scored) if metrics else [],
        "goodput": _goodput(run),
        "grid": _embedded(run / "grid.png") if (run / "grid.png").exists() else None,
        "samples": _sample_grids(run),
        "nearest": [(_plan_name(run, plan), picture) for plan, picture in _nearest(run)],
        "sweep": None if sweep is None else _sweep(run, sweep, int(metrics[-1]["step"]) if metrics else None),
        "evaluations": _evaluations(run, sweep),
        "config": (run / CONFIG_NAME).read_text(encoding="utf-8"),
    }
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["folded"] = folded
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


def _read_result(kind: type[Result] | type[Sweep], file: Path, command: str) -> dict[str, Any]:
    try:
        return kind.model_validate_json(file.read_bytes()).model_dump()
    except (OSError, ValidationError):
        raise ConfigError(f"{file} is damaged: delete it, and make it again with `{command}`") from None


def _headline(
    config: Config, metrics: Sequence[Mapping[str, Any]], sweep: Mapping[str, Any] | None
) -> list[tuple[str, str, str]]:
    """The few numbers that say how the run went: name, value, remark."""
    shown = []
    if metrics:
        last = metrics[-1]
        middle = sorted(line["images_per_s"] for line in metrics)[len(metrics) // 2]
        shown = [
            ("Steps", number(last["step"]), f"of {config.train.steps:,}" if config.train.steps else ""),
            ("Images seen", compact(last["images_seen"]), f"in batches of {config.train.global_batch_size:,}"),
            ("Throughput", f"{middle:,.0f}", "images/s, median"),
        ]
    return shown + (tiles(sweep) if sweep else [])


def _curves(
    metrics: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]]
) -> list[Chart]:
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
        *training_charts(scored),
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
    pictures = [file for file in (run / "samples").glob("*.png") if not file.stem.endswith(NEAREST)]
    files = sorted(pictures, key=lambda file: (-file.stat().st_mtime, file.name))
    shown = sorted((*_plan_order(run, file.stem), _embedded(file)) for file in files[:MOST_SAMPLE_GRIDS])
    return {"shown": [part[1:] for part in shown], "left_out": len(files) - len(shown)}


def _nearest(run: Path) -> list[tuple[str, str]]:
    """Plans, and pictures of their samples above the nearest real ones; the newest first."""
    files = sorted((run / "samples").glob(f"*{NEAREST}.png"), key=lambda file: (-file.stat().st_mtime, file.name))
    return [(file.stem.removesuffix(NEAREST), _embedded(file)) for file in files[:MOST_SAMPLE_GRIDS]]


def _plan_name(run: Path, plan: str) -> str:
    return _plan_order(run, plan)[1]


def _plan_order(run: Path, plan: str) -> tuple[tuple[int, list[float]], str]:
    """Where a plan stands among others, and its guidance in words."""
    try:
        told = json.loads((run / "samples" / plan / "plan.json").read_text(encoding="utf-8"))["plan"]
        name = f"{guidance_name(told['guidance'])}: {told['solver']}, {told['steps']} steps"
        if "seed" in told:
            name += f", {told['labels']} labels, seed {told['seed']}"
        return (len(told["guidance"]), [float(term["scale"]) for term in told["guidance"]]), name
    except (OSError, ValueError, KeyError, TypeError):
        return (0, []), plan


def _sweep(run: Path, sweep: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    tradeoff = run / "sweep_tradeoff.png"
    two = len({better(metric) for metric in metric_names(sweep["rows"])} - {0}) == 2  # a file may be an older sweep's
    return {
        **sweep_section(sweep, step, f"ig-dist sweep {_quoted(run)}"),
        "tradeoff": _embedded(tradeoff) if two and len(sweep["rows"]) > 1 and tradeoff.exists() else None,
    }


def _evaluations(run: Path, sweep: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Scores of plans, but of those that the sweep shows already."""
    swept = {plan for row in sweep["rows"] for plan in row["plans"]} if sweep else set()
    results = []
    for file in sorted((run / "evaluations").glob("*.json")):
        plan, _, tag = file.stem.partition("_")
        result = _read_result(Result, file, f"ig-dist evaluate {_quoted(run / 'samples' / plan)}")
        of_a_round = tag and tag == str(result["protocol"].get("num"))  # a halved sweep begins on few images
        if plan not in swept or not of_a_round:
            results.append({**result, "swept": plan in swept and not tag})
    return evaluation_section(results) if results else None


def _embedded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
