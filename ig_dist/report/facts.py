"""What ran and where, as far as a run directory, its checkpoints and its data's index say it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ig_dist.checkpoints.manifest import MANIFEST
from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.config import Config
from ig_dist.convert.published import Conversion
from ig_dist.data.index import IndexFile
from ig_dist.models.dit import DiT, count_parameters
from ig_dist.report.text import Facts, items, number
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import open_url, read_file

_ONCE = Patience(stall_s=10.0, deadline_s=0.0)  # with a storage that does not answer the report does without
Metrics = Sequence[Mapping[str, Any]]


def run_facts(
    run: Path,
    config: Config,
    metrics: Metrics,
    index: IndexFile | None,
    manifest: Mapping[str, Any] | None,
    conversion: Conversion | None,
) -> dict[str, Facts]:
    """Names and values, by what they are about.

    ``metrics`` are the lines that are of steps. None: the index cannot be read, there is no checkpoint, or the weights
    were not converted but trained here.
    """
    about = {"Model": _model_facts(config), "Data": _data_facts(config, index, metrics)}
    if conversion is not None:
        told = [("Checkpoint", conversion.source), ("Published as", conversion.published)]
        return {"Converted": [("Directory", str(run)), *told, ("sha256", conversion.source_sha256)], **about}
    return {"Run": _run_facts(run, config, manifest), **about, "Training": _training_facts(config, metrics)}


def provenance_facts(starts: Sequence[Mapping[str, Any]]) -> list[tuple[str, Facts]]:
    """Who ran what and where, of each start, the newest first; of the earlier ones what differs from the next."""
    told: list[tuple[str, Facts]] = []
    later: Facts = []
    for number_, start in reversed(list(enumerate(starts, start=1))):
        facts = items(start)
        told.append((f"Start {number_}", [fact for fact in facts if fact not in later]))
        later = facts
    return told


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


def _run_facts(run: Path, config: Config, manifest: Mapping[str, Any] | None) -> Facts:
    processes = manifest.get("world_size") if manifest else None
    return [
        ("Directory", str(run)),
        ("Seed", str(config.run.seed)),
        *([("Processes", f"{processes}, {config.engine.kind}")] if processes else []),
        *([("Checkpoint", f"step {number(manifest['step'])}, the newest")] if manifest else []),
    ]


def _model_facts(config: Config) -> Facts:
    model = config.model
    facts = [("Preset", model.preset)] if model.preset else []
    facts += [
        ("Blocks", f"{model.depth}, width {model.hidden_size}, {model.num_heads} heads"),
        ("Auxiliary head", f"after block {model.aux_depth}" if model.aux_depth else "none: no Internal Guidance"),
    ]
    if model.input_size and model.in_channels and model.num_classes and model.patch_size:
        try:
            with torch.device("meta"):  # counted, not allocated
                parameters = count_parameters(DiT(model.to_dit()))
        except RuntimeError:  # of sizes beyond any tensor's
            return facts
        tokens = (model.input_size // model.patch_size) ** 2
        facts.insert(0, ("Parameters", f"{parameters:,}"))
        facts.append(("Latent", f"{model.in_channels} × {model.input_size} × {model.input_size}"))
        facts.append(("Tokens", f"{tokens:,}, from patches of {model.patch_size} × {model.patch_size}"))
    return facts


def _data_facts(config: Config, index: IndexFile | None, metrics: Metrics) -> Facts:
    if index is None:
        return [("Index", config.data.index), ("Source", "not known: no index can be read there from here")]
    images = sum(shard.samples for shard in index.shards)
    side, channels = index.tokenizer.image_size, index.tokenizer.image_channels
    return [
        ("Source", index.source),
        ("Images", f"{images:,} of {len(index.classes):,} classes"),
        *([("Passes", f"{number(metrics[-1]['images_seen'] / images, 3)} over the data")] if metrics else []),
        ("Image size", f"{side} × {side}, {'grey' if channels == 1 else f'{channels} channels'}"),
        ("Tokenizer", index.tokenizer.name),
        ("Index", config.data.index),
    ]


def _training_facts(config: Config, metrics: Metrics) -> Facts:
    train, optimizer, loss = config.train, config.optimizer, config.loss
    schedule = optimizer.schedule + (f" after {optimizer.warmup_steps:,} steps up" if optimizer.warmup_steps else "")
    skipped, damaged, unsaved = (_counted(metrics, key) for key in ("nonfinite_steps", "quarantined", "failed_saves"))
    compiled = ", compiled" if train.compile else ""
    return [
        ("Batch", f"{train.global_batch_size:,} images"),
        ("Optimizer", f"{optimizer.kind}, {number(optimizer.lr)}, {schedule}"),
        ("Loss", f"{loss.path} path, auxiliary weight {number(loss.aux_weight)}"),
        ("Precision", f"{train.precision}{compiled}"),
        *(
            [("Recompiled", f"{_counted(metrics, 'recompiles'):,} graphs after the first step")]
            if train.compile
            else []
        ),
        ("Averages (EMA)", ", ".join(map(str, config.ema.decays)) or "none"),
        ("Passed over", f"{skipped:,} non-finite steps, {damaged:,} damaged samples, {unsaved:,} failed saves"),
    ]


def _counted(metrics: Metrics, key: str) -> int:
    """The whole run's count from a counter that starts at 0 with every start."""
    counts = [0, *(int(line.get(key) or 0) for line in metrics)]
    return sum(b - a if b >= a else b for a, b in pairwise(counts))
