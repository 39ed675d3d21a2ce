"""One static HTML file of a run: scores, pictures and curves first, then what ran, where and under which config.

It is read from the run directory alone, needs no network and no JavaScript. What is not there yet stands among the next
steps, with the command that makes it. The template escapes everything that it is given.
"""

import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from ig_dist import __version__
from ig_dist.config import Config
from ig_dist.config.catalogue import Row, best_row
from ig_dist.config.file import load_run
from ig_dist.config.provenance import FILE_NAME
from ig_dist.convert.published import read_conversion
from ig_dist.errors import ConfigError
from ig_dist.report.evaluations import evaluation_sections, step_charts
from ig_dist.report.pictures import embedded, nearest_pictures, plan_pictures, training_grids
from ig_dist.report.results import PAPER_IMAGES, Result, read_results, read_scores, read_sweeps, scored
from ig_dist.report.sweeps import sweep_section, tiles
from ig_dist.report.text import compact, folded, images_text, number, protocol_parts, score
from ig_dist.report.training import (
    goodput_section,
    newest_manifest,
    provenance_facts,
    read_index,
    run_facts,
    training_charts,
)
from ig_dist.run_dir import CONFIG_NAME, replace_text
from ig_dist.storage.json_lines import read_lines

TEMPLATES = Path(__file__).parent / "templates"


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write one HTML file of a run, as `ig-dist report` does; ``report.html`` in the run, if not said otherwise.

    Raises:
        ConfigError: not a run directory, nothing trained or converted yet, a damaged result, or ``out`` cannot be
            written.
    """
    run, quoted = Path(run), shlex.quote(str(run))
    out = Path(out or run / "report.html")
    config, conversion = load_run(run), read_conversion(run)
    lines = [line for line in map(_numbers, read_lines(run / "metrics.jsonl")) if isinstance(line.get("step"), int)]
    metrics = [line for line in lines if {"images_seen", "loss", "images_per_s"} <= line.keys()]
    if not metrics and conversion is None:
        command = f"ig-dist train {shlex.quote(str(run / CONFIG_NAME))}"
        raise ConfigError(f"{run} has no metrics in metrics.jsonl: train it first with `{command}`")
    sweeps = read_sweeps(run, f"ig-dist sweep {quoted}")
    swept = {plan for _, sweep in sweeps for row in sweep["rows"] for plan in row["plans"]}
    results = read_results(run, swept, f"ig-dist sample {quoted} --evaluate")
    index, manifest = read_index(config.data.index), newest_manifest(config, run)
    newest = int(manifest["step"]) if manifest else int(metrics[-1]["step"]) if metrics else None
    samples, older = plan_pictures(run)
    grids, grids_note = training_grids(run, config, index)
    files = sorted((run / "evaluations" / "training").glob("step_*.json"))
    newest_scores = read_scores(Result, files[-1], "log.score_every_steps") if files else None
    context: dict[str, Any] = {
        "run": str(run),
        "name": run.resolve().name or str(run),
        "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "version": __version__,
        "headline": _headline(config, metrics, [line for line in lines if "score_num" in line], sweeps, newest),
        "sweeps": [_sweep(folder, sweep, results, newest) for folder, sweep in sweeps],
        "evaluations": evaluation_sections(results),
        "over_steps": step_charts(lines, results),
        "training_protocol": protocol_parts(newest_scores["protocol"]) if newest_scores else None,
        "samples": samples,
        "older_samples": older,
        "grids": grids,
        "grids_note": grids_note,
        "nearest": nearest_pictures(run),
        "curves": training_charts(run, lines),
        "goodput": goodput_section(run),
        "facts": run_facts(run, config, metrics, index, manifest, conversion),
        "provenance": provenance_facts(list(read_lines(run / FILE_NAME))),
        "config": (run / CONFIG_NAME).read_text(encoding="utf-8"),
    }
    context["next_steps"] = _next_steps(quoted, config, newest if metrics else None, context, results)
    options: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    options |= {"trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), **options)
    environment.filters["folded"] = folded
    html = environment.get_template("report.html.jinja").render(context)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(out, html)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}: give a file in a folder that can be written") from None
    return out


def _numbers(line: Row) -> Row:
    """A line of metrics without what is no number that can be drawn: there is none in a line that we wrote."""
    return {k: v for k, v in line.items() if isinstance(v, float | None) or (isinstance(v, int) and abs(v) < 2**63)}


def _headline(
    config: Config,
    metrics: Sequence[Row],
    scores: Sequence[Row],
    sweeps: Sequence[tuple[Path, Row]],
    newest: int | None,
) -> list[tuple[str, str, str]]:
    """The few numbers that say how the run went: name, value, remark. Scores come first."""
    shown = tiles(sweeps[0][1]) if sweeps else []
    if not shown and scores:
        last, remark = scores[-1], f"at step {number(scores[-1]['step'])}, {images_text([scores[-1]['score_num']])}"
        names = [key for key in last if key.startswith("score_") and key != "score_num"]
        shown = [(key.removeprefix("score_"), score(last[key]), remark) for key in names]
    if metrics:
        last = metrics[-1]
        step = max(int(last["step"]), newest or 0)  # a run that was stopped has saved more than it has logged
        middle = sorted(line["images_per_s"] for line in metrics)[len(metrics) // 2]
        batch = config.train.global_batch_size
        shown += [
            ("Steps", number(step), f"of {config.train.steps:,}" if config.train.steps else ""),
            ("Images seen", compact(step * batch), f"in batches of {batch:,}"),
            ("Throughput", f"{middle:,.0f}", "images/s, median"),
        ]
    return shown


def _sweep(folder: Path, sweep: Row, results: Sequence[Row], newest: int | None) -> dict[str, Any]:
    """A sweep with its grid of pictures; the seeds of its first point are those of all."""
    first = sweep["rows"][0]
    found = [result["protocol"] for result in results if result["protocol"].get("plan") in first["plans"]]
    seeds = sorted({protocol["seed"] for protocol in found if isinstance(protocol.get("seed"), int)})
    alt = "rows of pictures: real ones, then generated ones at each scale of Internal Guidance"
    grid = embedded(folder / "grid.png", "Real, and generated at several guidance scales", alt)
    target = sweep["target"]
    best = best_row(scored(sweep["rows"], target), target) if target else None
    return {**sweep_section(sweep, newest, seeds), "grid": grid, "plans": (best or first)["plans"]}


def _next_steps(
    run: str, config: Config, step: int | None, shown: dict[str, Any], results: Sequence[Row]
) -> list[tuple[str, str]]:
    """What is missing, and the command that makes it. ``run`` is quoted for a shell; ``step`` is of its training."""
    steps, total, sweeps = [], config.train.steps, shown["sweeps"]
    if step is not None and total and step < total:
        more = "" if config.log.sample_every_steps else f" log.sample_every_steps={max(1, total // 10)}"
        text = f"Go on from step {step:,} of {total:,}" + (", with a grid of samples now and then" if more else "")
        steps.append((text, f"ig-dist train {run}/{CONFIG_NAME} run.dir={run}{more}"))
    if not shown["samples"]:
        steps.append(("Samples of one plan, with a picture of some", f"ig-dist sample {run}"))
    if not sweeps:
        steps.append(("Scores and pictures over the guidance scale", f"ig-dist sweep {run}"))
    elif sweeps[0]["old"]:
        text = f"The newest sweep is of step {sweeps[0]['old']}, the newest checkpoint of step {step or 0:,}"
        steps.append((text, f"ig-dist sweep {run}"))
    plans = [plan for sweep in sweeps for plan in sweep["plans"]]
    plans += [str(result["protocol"]["plan"]) for result in results if "plan" in result["protocol"]]
    if plans and not shown["nearest"]:
        text = "A check against memorisation: samples above the nearest training pictures"
        steps.append((text, f"ig-dist evaluate {run}/samples/{plans[0]} --nearest 10"))
    most = max((result["protocol"].get("num") or 0 for result in results), default=0)
    if results and most < PAPER_IMAGES:
        text = f"Scores of {PAPER_IMAGES:,} images, as papers have them"
        steps.append((text, f"ig-dist sample {run} --num {PAPER_IMAGES} --evaluate"))
    return steps
