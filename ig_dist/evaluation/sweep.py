"""Searching guidance: a grid of points with common noise, scored, tabled and drawn; or halved until one is left."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ig_dist.config import Config
from ig_dist.config.catalogue import best_row, comparable, order
from ig_dist.config.file import with_guidance
from ig_dist.errors import ConfigError
from ig_dist.evaluation.references import Reference, open_reference
from ig_dist.evaluation.scores import Scores, score_plan
from ig_dist.export import find_weights, load_export, read_info
from ig_dist.features.images import ImageSet
from ig_dist.plans.asking import Interval
from ig_dist.plans.plan import class_names, make_plan
from ig_dist.plans.samples import reference_of
from ig_dist.run_dir import replace_text
from ig_dist.sampling.generate import make_unit
from ig_dist.sampling.pictures import pictures_in_rows
from ig_dist.sampling.run import check_places, config_extractor, sample_run
from ig_dist.sampling.solving import Models, decoder
from ig_dist.storage.writable import why_unwritable
from ig_dist.terminal import console, is_first_process, is_main_process
from ig_dist.this_process import this_device

COLUMNS = 20
NOISE = 2.0  # standard deviations within which two scores are called equal


class Point(NamedTuple):
    """One combination of what is swept; None: as the config has it."""

    ig_scale: float
    cfg_scale: float = 1.0
    auto_scale: float = 1.0
    ig_interval: Interval | None = None
    cfg_interval: Interval | None = None
    ema: float | None = None
    step: int | None = None


def grid_points(**axes: Sequence[Any]) -> list[Point]:
    """All combinations of values, by their names in ``Point``; the IG scale changes fastest."""
    slowest_first = ("step", "ema", "cfg_interval", "auto_scale", "cfg_scale", "ig_interval", "ig_scale")
    swept = [name for name in slowest_first if name in axes]
    return [Point(**dict(zip(swept, values, strict=True))) for values in product(*(axes[name] for name in swept))]


def sweep_run(
    config: Config,
    grid: Sequence[Point],
    *,
    source: str | Path | None = None,
    auto_interval: Interval | None = None,
    seeds: int = 1,
    target: str | None = None,
    halving: bool = False,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Score points of a grid; ``sweep.json`` and ``grid.png`` in ``RUN/sweeps/NAME``.

    Every point starts from the same noise; with several seeds (sample.seed and the following ones) a point's scores are
    means, with standard deviations beside them. What exists of an earlier sweep is not made again. Under several
    processes each makes its share of every plan; those but the first return an empty result.

    ``grid``: what is swept, see ``grid_points``. ``source``: of the weights, see ``find_weights``; None: the run. The
    others are those of ``ig_dist.sweep``.

    Raises:
        ConfigError: a target that is not scored, or a folder that cannot be written.
    """
    metrics, place = config.evaluate.metrics, Path(out or config.run.dir)
    target = target or metrics[0]
    if target not in metrics:
        raise ConfigError(
            f"--target {target} is not scored: use one of {', '.join(metrics)}, or add it to evaluate.metrics"
        )
    if reason := why_unwritable(place):
        raise ConfigError(f"{place} cannot be written ({reason}): give --out FOLDER, one that can")
    # once: a run that goes on meanwhile must not change the weights between points
    emas, steps = (dict.fromkeys(values) for values in zip(*((point.ema, point.step) for point in grid), strict=True))
    exports = {
        (ema, step): find_weights(source or config.run.dir, ema=ema, step=step, config=config).export
        for ema, step in product(emas, steps)
    }
    if out is not None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(out)})})
    check_places(config)
    if not reference_of(config):
        raise ConfigError(f"{place} does not say what to hold samples against: set evaluate.reference")
    infos = [read_info(folder) for folder in exports.values()]
    reference = open_reference(
        reference_of(config),
        metrics,
        lambda name: config_extractor(config, name, this_device()),
        tokenizer=config.sample.tokenizer,
        side=infos[0].tokenizer.image_size,
    )
    points, first, whole = list(grid), config.sample.seed, config.sample.num
    rounds = _rounds(len(points), whole, config.sample.unit_size) if halving else [whole]
    rows: dict[Point, dict[str, Any]] = {}
    protocols: list[dict[str, Any]] = []
    for number, num in enumerate(rounds):
        if halving and is_first_process():
            console.print(f"round {number + 1} of {len(rounds)}: {len(points)} points on {num} images")
        for point in points:
            guidance = {key: value for key, value in point._asdict().items() if key not in ("ema", "step")}
            asked = with_guidance(config, **guidance, auto_interval=auto_interval)
            export_of, seeded = exports[point.ema, point.step], range(first, first + seeds)
            results = [_score(asked, seed, num, export_of, reference, every_process=halving) for seed in seeded]
            if results[0]:
                rows[point] = _row(asked, point, results)
                protocols += [result["protocol"] for result in results]
        if number + 1 < len(rounds):  # every process comes to the same: it reads the same features
            points = sorted(points, key=lambda point: order(rows[point], target))[: -(-len(points) // 2)]
    if not is_main_process():
        return {}
    found, models = list(rows.values()), [info.weights_sha256 for info in infos]
    name = _name(grid, [auto_interval, seeds, target, halving, models], config)
    folder = place / "sweeps" / name
    common = {key: value for key, value in protocols[0].items() if all(p.get(key) == value for p in protocols)}
    told = {"rows": found, "flat": flat_rows(found, target), "protocol": {**common, "seeds": seeds}}
    sweep = _write({"name": name, "target": target, **told}, folder)
    scales = dict.fromkeys(point.ig_scale for point in grid)
    _save_scale_grid(config, next(iter(exports.values())), scales, reference, folder / "grid.png")
    return sweep


def _name(points: Sequence[Point], asked: Sequence[Any], config: Config) -> str:
    """What is swept, and a hash of all that the scores depend on: the same command has the same name."""
    swept = [key for key in Point._fields if len({getattr(point, key) for point in points}) > 1] or ["ig_scale"]
    apart = {"url", "tokenizer", "keep_images", "png"}  # they say where, not what
    groups = [config.sample.model_dump(mode="json", exclude=apart), config.model_dump()["guidance"]]
    scores = config.evaluate.model_dump(mode="json", include={"metrics", "protocol"})
    told = json.dumps([points, *asked, *groups, scores, Path(reference_of(config)).name])
    return f"{'-'.join(swept)}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def _write(sweep: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write ``sweep.json`` with the time at which it was found; one that found the same keeps its own."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sweep.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    whole = {"written": before.get("written"), **json.loads(json.dumps(sweep))}
    if whole != before:
        whole["written"] = datetime.now(UTC).isoformat(timespec="seconds")
    replace_text(file, json.dumps(whole, indent=1) + "\n")
    return whole


def _rounds(points: int, num: int, unit_size: int) -> list[int]:
    """Images of each round: twice as many each time, whole units, all of them in the last."""
    rounds = [num]
    while points > 1:
        points = -(-points // 2)
        half = -(-rounds[0] // (2 * unit_size)) * unit_size
        if half >= rounds[0]:
            break
        rounds.insert(0, half)
    return rounds


def _score(
    config: Config, seed: int, num: int, export: Path, reference: Reference, *, every_process: bool
) -> dict[str, Any]:
    """Make the first images of a point and score them; empty where another process does."""
    config = config.model_copy(update={"sample": config.sample.model_copy(update={"seed": seed})})
    metrics = config.evaluate.metrics
    samples, files = sample_run(config, export, metrics, num=num, collected=False)
    if not (every_process or is_main_process()):
        return {}
    tag = "" if num == config.sample.num else f"_{num}"
    out = Path(config.run.dir) / "evaluations" / f"{samples.plan.digest}{tag}.json" if is_main_process() else None
    scores = Scores(files, reference, num, config.evaluate.protocol, this_device())
    return score_plan(samples, scores, metrics, out)


def _row(asked: Config, point: Point, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A point with its scores; means with standard deviations, where it has several seeds."""
    row = {**point._asdict(), **{f"{term.kind}_interval": list(term.interval) for term in asked.guidance}}
    row["num"] = results[0]["protocol"]["num"]
    values = {name: [result["scores"][name] for result in results] for name in results[0]["scores"]}
    row["scores"] = {name: float(np.mean(v)) for name, v in values.items()}
    if len(results) > 1:
        row["std"] = {name: float(np.std(v, ddof=1)) for name, v in values.items()}
    return {**row, "plans": [result["protocol"]["plan"] for result in results]}


def flat_rows(rows: Sequence[Mapping[str, Any]], target: str) -> list[int] | None:
    """Numbers of the rows that are as good as the best within the noise over seeds; None: the noise is not known."""
    best, alike = best_row(rows, target), comparable(rows)
    if best is None or "std" not in best:
        return None
    pooled = float(np.sqrt(np.mean([row["std"][target] ** 2 for row in alike]) / len(best["plans"]) * 2))
    return [
        i for i, row in enumerate(rows) if row in alike and order(row, target) <= order(best, target) + NOISE * pooled
    ]


def _save_scale_grid(
    config: Config, export: Path, ig_scales: Iterable[float], reference: Reference, file: Path
) -> None:
    """Real images above generated ones at every scale, the same noise in each column, without CFG and autoguidance."""
    device = this_device()
    model, info = load_export(export, device)
    models = Models(model, info, decoder(config, info, device))
    sample = config.sample.model_copy(
        update={"num": COLUMNS, "unit_size": COLUMNS, "batch_size": COLUMNS, "labels": "balanced", "classes": []}
    )
    shown = config.model_copy(update={"sample": sample})
    rows, names = list[tuple[str, NDArray[np.uint8], Sequence[str]]](), class_names(config, info)
    labels = make_plan(shown, info, info.weights_sha256).image_labels(torch.arange(COLUMNS))
    columns = [names[label] for label in labels]
    if reference.files is not None:
        rows.append(("real", _real_by_class(reference.files.images, len(info.classes)), columns))
    for scale in ig_scales:
        point = with_guidance(shown, ig_scale=scale, cfg_scale=1.0, auto_scale=1.0)
        plan = make_plan(point, info, info.weights_sha256)
        name = f"IG {scale:g}" if scale != 1 else "unguided"
        rows.append((name, make_unit(models, plan, 0).images, () if rows else columns))
    pictures_in_rows(rows, "the same noise in every column").save(file)


def _real_by_class(images: ImageSet, num_classes: int) -> NDArray[np.uint8]:
    """Real images in the order of balanced labels: 0, 1, 2, ...; a small class begins anew."""
    wanted = Counter(i % num_classes for i in range(COLUMNS))
    found = defaultdict[int, list[NDArray[np.uint8]]](list)
    for number in range(images.num_units):
        pictures = images.read(images.unit(number))
        labels = pictures.labels if pictures.labels is not None else np.arange(len(pictures.images)) % num_classes
        for image, label in zip(pictures.images, labels, strict=True):
            if len(found[int(label)]) < wanted[int(label)]:
                found[int(label)].append(image)
        if all(len(found[label]) >= count for label, count in wanted.items()):
            break
    spare = next(kept for kept in found.values() if kept)  # of a class that is not there any picture stands in
    chosen = [found[i % num_classes] or spare for i in range(COLUMNS)]
    return np.stack([kept[i // num_classes % len(kept)] for i, kept in enumerate(chosen)])
