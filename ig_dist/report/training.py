"""A run in the report: what ran and where, curves of the metrics, its saves, and where the time went."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ig_dist.checkpoints.manifest import MANIFEST
from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.config import Config
from ig_dist.config.catalogue import Row
from ig_dist.convert.published import Conversion
from ig_dist.data.index import IndexFile
from ig_dist.models.dit import DiT, count_parameters
from ig_dist.report.plots import Chart, Curve, curve_chart, event_chart
from ig_dist.report.text import Facts, items, number
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import open_url, read_file
from ig_dist.training.goodput import KINDS, LEAST_PERCENT, duration, read_goodput, read_saves

_ONCE = Patience(stall_s=10.0, deadline_s=0.0)  # with a storage that does not answer the report does without
Told = dict[str, str]  # what is not known is empty


def run_facts(
    run: Path,
    config: Config,
    metrics: Sequence[Row],
    index: IndexFile | None,
    manifest: Row | None,
    conversion: Conversion | None,
) -> dict[str, Facts]:
    """Names and values, by what they are about.

    ``metrics`` are the lines that are of steps. None: the index cannot be read, there is no checkpoint, or the weights
    were not converted but trained here.
    """
    about = {"Model": _model(config), "Data": _data(config, index, metrics)}
    if conversion is not None:
        told = {"Checkpoint": conversion.source, "Published as": conversion.published}
        about = {"Converted": {"Directory": str(run), **told, "sha256": conversion.source_sha256}, **about}
    else:
        about = {"Run": _run(run, config, manifest or {}), **about, "Training": _training(config, metrics)}
    return {title: [fact for fact in told.items() if fact[1]] for title, told in about.items()}


def provenance_facts(starts: Sequence[Row]) -> list[tuple[str, Facts]]:
    """Who ran what and where, of each start, the newest first; of the earlier ones what differs from the next."""
    pairs = pairwise([*map(items, starts), []])
    told = [[fact for fact in facts if fact not in later] for facts, later in pairs]
    return [(f"Start {number_}", facts) for number_, facts in enumerate(told, start=1)][::-1]


def read_index(url: str) -> IndexFile | None:
    """What the data folder says of itself; None where it cannot be read from here."""
    folder = url.removesuffix("/index.json").rstrip("/")
    try:
        fs, path = open_url(f"{folder}/index.json", "data.index", web=True)
        return IndexFile.model_validate_json(read_file(fs, path, _ONCE))
    except Exception:  # every storage has errors of its own; the report does without
        return None


def newest_manifest(config: Config, run: Path) -> dict[str, Any] | None:
    """Of the newest checkpoint; its files are not verified, only sampling and training need them whole."""
    url = config.checkpoint.url or f"{run}/checkpoints"
    try:
        steps = CheckpointStore(url, patience=_ONCE).steps()
        fs, path = open_url(url, "checkpoint.url")
        manifest = f"{path}/step_{steps[-1]:010d}/{MANIFEST}" if steps else ""
        found = dict(json.loads(read_file(fs, manifest, _ONCE))) if steps else None
        return found if found and isinstance(found["step"], int) else None
    except Exception:  # as above
        return None


def training_charts(run: Path, lines: Sequence[Row]) -> list[Chart]:
    """A chart for each thing that was measured; lines of steps have a loss, those of a validation ``val_loss``."""
    steps = [line for line in lines if "images_seen" in line]
    validated = [line for line in lines if "val_loss" in line]
    if not steps:
        return []
    batch = steps[-1]["images_seen"] / steps[-1]["step"]

    def curve(key: str, factor: float = 1.0, of: Sequence[Row] = steps) -> Curve:
        return [(line["step"], line[key] * factor) for line in of if line.get(key) is not None]

    losses = {"total": curve("loss"), "final head": curve("loss_final"), "auxiliary head": curve("loss_aux")}
    held_out = {"total": curve("val_loss", of=validated), "final head": curve("val_loss_final", of=validated)}
    mfu, memory = {"%": curve("mfu", 100)}, {"GiB": curve("peak_memory_bytes", 2**-30)}
    waiting = [line for line in steps if line.get("data_wait_s") is not None]
    waited = [(line["step"], 100 * line["data_wait_s"] * line["images_per_s"] / batch) for line in waiting]
    charts = [
        curve_chart("Loss", "of the logged step's batch", losses, smoothed=True),
        curve_chart("Validation loss", "of the average, held-out shards", held_out),
        curve_chart("Learning rate", "", {"rate": curve("lr")}, from_zero=True),
        curve_chart("Gradient norm", "before clipping", {"norm": curve("grad_norm")}, from_zero=True, smoothed=True),
        curve_chart("Throughput", "images/s", {"images/s": curve("images_per_s")}, from_zero=True, smoothed=True),
        curve_chart("Waiting for data", "% of the time", {"%": waited}, from_zero=True, smoothed=True),
        curve_chart("Model FLOPs utilisation", "% of the peak", mfu, from_zero=True, smoothed=True),
        curve_chart("Peak memory", "GiB, of the rank that took most", memory, from_zero=True),
        event_chart("Saving a checkpoint", "s, each save", _saves(run, steps)),
    ]
    return [chart for chart in charts if chart is not None]


def _saves(run: Path, steps: Sequence[Row]) -> dict[str, Curve]:
    """How long the loop stood still for each save, and how long it was written in the background.

    A line of metrics has the newest save's time of writing: a new value is of the save before that line.
    """
    saves = read_saves(run)
    written: dict[int, float] = {}
    for before, line in pairwise([{}, *steps]):
        value = line.get("checkpoint_write_s")
        if value is not None and value != before.get("checkpoint_write_s"):
            written[max((step for step in saves if step < line["step"]), default=line["step"])] = value
    return {"the loop stands still": saves.items(), "written meanwhile": written.items()}


def goodput_section(run: Path) -> dict[str, Any] | None:
    """Where the time went: (name, time, percent) of what took any, and what lies outside of it."""
    found = read_goodput(run)
    if found is None:
        return None
    return {
        "shares": [
            (name, duration(found.seconds[kind]), round(found.percent(kind), 1))
            for kind, name in KINDS.items()
            if found.percent(kind) >= LEAST_PERCENT
        ],
        "unit": f"{duration(found.running_s)} in {found.starts} start{'s' if found.starts > 1 else ''}",
        "note": f"{number(found.lost_steps)} steps were done again; {duration(found.between_s)} lie between the starts."
        if found.starts > 1
        else "",
    }


def _run(run: Path, config: Config, manifest: Row) -> Told:
    processes = manifest.get("world_size")
    return {
        "Directory": str(run),
        "Seed": str(config.run.seed),
        "Processes": f"{processes}, {config.engine.kind}" if processes else "",
        "Checkpoint": f"step {number(manifest['step'])}, the newest" if manifest else "",
    }


def _model(config: Config) -> Told:
    model, parameters, latent, tokens = config.model, "", "", ""
    if model.input_size and model.in_channels and model.num_classes and model.patch_size:
        try:
            with torch.device("meta"):  # counted, not allocated
                parameters = f"{count_parameters(DiT(model.to_dit())):,}"
            latent = f"{model.in_channels} × {model.input_size} × {model.input_size}"
            side = model.input_size // model.patch_size
            tokens = f"{side**2:,}, from patches of {model.patch_size} × {model.patch_size}"
        except RuntimeError:  # of sizes beyond any tensor's
            pass
    return {
        "Parameters": parameters,
        "Preset": model.preset or "",
        "Blocks": f"{model.depth}, width {model.hidden_size}, {model.num_heads} heads",
        "Auxiliary head": f"after block {model.aux_depth}" if model.aux_depth else "none: no Internal Guidance",
        "Latent": latent,
        "Tokens": tokens,
    }


def _data(config: Config, index: IndexFile | None, metrics: Sequence[Row]) -> Told:
    if index is None:
        return {"Index": config.data.index, "Source": "not known: no index can be read there from here"}
    images = sum(shard.samples for shard in index.shards)
    side, channels = index.tokenizer.image_size, index.tokenizer.image_channels
    return {
        "Source": index.source,
        "Images": f"{images:,} of {len(index.classes):,} classes",
        "Passes": f"{number(metrics[-1]['images_seen'] / images, 3)} over the data" if metrics else "",
        "Image size": f"{side} × {side}, {'grey' if channels == 1 else f'{channels} channels'}",
        "Tokenizer": index.tokenizer.name,
        "Index": config.data.index,
    }


def _training(config: Config, metrics: Sequence[Row]) -> Told:
    train, optimizer, loss = config.train, config.optimizer, config.loss

    def counted(key: str) -> str:
        """The whole run's count from a counter that starts at 0 with every start."""
        counts = [0, *(int(line.get(key) or 0) for line in metrics)]
        return f"{sum(b - a if b >= a else b for a, b in pairwise(counts)):,}"

    warmup = f" after {optimizer.warmup_steps:,} steps up" if optimizer.warmup_steps else ""
    skipped, damaged, unsaved = map(counted, ("nonfinite_steps", "quarantined", "failed_saves"))
    return {
        "Batch": f"{train.global_batch_size:,} images",
        "Optimizer": f"{optimizer.kind}, {number(optimizer.lr)}, {optimizer.schedule}{warmup}",
        "Loss": f"{loss.path} path, auxiliary weight {number(loss.aux_weight)}",
        "Precision": train.precision + (", compiled" if train.compile else ""),
        "Recompiled": f"{counted('recompiles')} graphs after the first step" if train.compile else "",
        "Averages (EMA)": ", ".join(map(str, config.ema.decays)) or "none",
        "Passed over": f"{skipped} non-finite steps, {damaged} damaged samples, {unsaved} failed saves",
    }
