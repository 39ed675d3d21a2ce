"""Export: the weights that sampling reads, as safetensors with all that is needed to use them."""

import dataclasses
import hashlib
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ig_dist.checkpoints.manifest import MANIFEST, Count
from ig_dist.checkpoints.reading import Checkpoint
from ig_dist.checkpoints.store import CheckpointStore, checkpoint_store
from ig_dist.config import Config
from ig_dist.config.file import config_from_tree, load_run, saved_config
from ig_dist.data.index import LatentInfo, ShardIndex, TokenizerInfo, read_index
from ig_dist.errors import ConfigError, DataError
from ig_dist.models.dit import DiT, DiTConfig, load_model
from ig_dist.parallel.dist import Dist
from ig_dist.run_dir import Identity
from ig_dist.storage.writable import CACHE_VARIABLE, cache_folder, why_unwritable

WEIGHTS_NAME = "model.safetensors"
INFO_NAME = "export.json"
MOST_INFO_BYTES = 2**26  # it names all classes
UNKNOWN_DATA = "unknown"
"""``data.index`` of an export that has no run."""
ALONE = Dist(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


class Meta(BaseModel):
    """What a training stores beside the tensors of a checkpoint."""

    images_seen: Count
    optimizer_steps: Count
    config: dict[str, Any]
    index_sha256: str
    run: Identity = Identity("")


class ModelInfo(BaseModel):
    """What sampling must know of a model besides its weights."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: DiTConfig
    path: Literal["linear", "cosine"]
    latent: LatentInfo
    tokenizer: TokenizerInfo
    classes: list[str]
    trained_with_null_label: bool


class ExportInfo(ModelInfo):
    """What stands beside exported weights."""

    format: Literal["ig-dist-export/1"] = "ig-dist-export/1"
    ema: float | None  # decay of the exported average; None for the raw weights
    step: int
    images_seen: int
    checkpoint_sha256: str
    weights_sha256: str


def model_info(config: Config, index: ShardIndex) -> ModelInfo:
    """What a run's config and data say of its model."""
    return ModelInfo(
        model=config.model.to_dit(),
        path=config.loss.path,
        latent=index.info.latent,
        tokenizer=index.info.tokenizer,
        classes=index.info.classes,
        trained_with_null_label=config.loss.label_drop > 0,
    )


def export_checkpoint(checkpoint: Checkpoint, config: Config, *, ema: float | None = None, raw: bool = False) -> Path:
    """Export a checkpoint of a run, into the cache where the run cannot be written; the folder, once it is whole.

    Its average of decay ``ema`` (None: the first of ``ema.decays``), or with ``raw`` the weights themselves.

    Raises:
        ConfigError: the run has no such average, another index, or no place that can be written.
    """
    meta, saved = _saved(checkpoint)
    if not raw and ema is None:
        ema = saved.ema.decays[0]
    if ema is not None and ema not in saved.ema.decays:
        raise ConfigError(f"--ema {ema}: the run has averages with decay {saved.ema.decays}; choose one, or --raw")
    name = f"step_{checkpoint.step:010d}_" + ("raw" if ema is None else f"ema_{ema}")
    own, cached = Path(config.run.dir) / "export" / name, cache_folder() / "export" / checkpoint.sha256[:16] / name
    for folder in (own, cached):
        if _exported_from(folder) == checkpoint.sha256:
            return folder
        if not why_unwritable(folder):  # or it is another's run
            break

    index = read_index(config.data.index)
    if index.sha256 != meta.index_sha256:
        raise ConfigError(
            f"the index at {index.folder} is not the one that {checkpoint.url} was trained on: restore it"
        )
    averaged = set() if ema is None else set(checkpoint.names(f"ema/{ema}"))  # the rest are buffers
    stored = {key: f"ema/{ema}/{key}" if key in averaged else f"model/{key}" for key in checkpoint.names("model")}
    found = checkpoint.tensors(stored.values())
    packed = safetensors.torch.save({key: found[stored[key]] for key in sorted(stored)})
    info = ExportInfo(
        **dict(model_info(saved, index)),
        ema=ema,
        step=checkpoint.step,
        images_seen=meta.images_seen,
        checkpoint_sha256=checkpoint.sha256,
        weights_sha256=hashlib.sha256(packed).hexdigest(),
    )
    try:
        if folder.exists() and _exported_from(folder) != checkpoint.sha256:
            shutil.rmtree(folder)
        with whole_folder(folder) as building:
            (building / WEIGHTS_NAME).write_bytes(packed)
            (building / INFO_NAME).write_text(info.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        if _exported_from(folder) != checkpoint.sha256:  # nor has another worker exported the same bytes first
            said = f"{folder.parent} cannot be written ({error.strerror})"
            raise ConfigError(f"{said}: set {CACHE_VARIABLE} to a folder that can") from None
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of this one at the end; after an error nothing is left.

    Raises:
        OSError: there is one with files already, or it cannot be written.
    """
    building = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    building.mkdir(parents=True)
    try:
        yield building
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _saved(checkpoint: Checkpoint) -> tuple[Meta, Config]:
    """What a training stored beside the tensors, and its config; ConfigError where it is no training's."""
    try:
        meta = Meta.model_validate(checkpoint.meta)
    except ValidationError as error:
        key = error.errors(include_url=False, include_input=False)[0]["loc"][0]
        raise ConfigError(f"{checkpoint.url} does not say its {key}: give a checkpoint of `ig-dist train`") from None
    return meta, saved_config(meta.config, checkpoint.url)


def _exported_from(folder: Path) -> str | None:
    """Hash of the checkpoint that an export was made from; None where there is no whole export."""
    try:
        return read_info(folder).checkpoint_sha256
    except ConfigError:
        return None


def read_info(folder: Path) -> ExportInfo:
    """Read what stands beside exported weights.

    Raises:
        ConfigError: no export there.
    """
    file = folder / INFO_NAME
    try:
        if not file.is_file() or file.stat().st_size > MOST_INFO_BYTES:
            raise FileNotFoundError(file)
        return ExportInfo.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        raise ConfigError(f"{folder} holds no export: make one with `ig-dist export RUN`") from None


def load_export(folder: Path, device: torch.device) -> tuple[DiT, ExportInfo]:
    """The exported model in eval mode, and what stands beside it.

    Raises:
        ConfigError: no export there.
        DataError: its weights are gone or are not the ones that were exported.
    """
    info, file = read_info(folder), folder / WEIGHTS_NAME
    if file.exists() and not file.is_file():
        raise DataError(f"{file} is not a file: delete the folder and export again")
    try:
        packed = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}: delete the folder and export again") from None
    if hashlib.sha256(packed).hexdigest() != info.weights_sha256:
        raise DataError(f"{file} is damaged (its hash differs): delete the folder and export again")
    try:
        model = load_model(info.model, safetensors.torch.load(packed))
    except (RuntimeError, TypeError, ValueError, KeyError, safetensors.SafetensorError):  # its hash may be right
        raise DataError(f"{file} does not hold the model of {INFO_NAME}: delete the folder and export again") from None
    return model.to(device).requires_grad_(False), info


class Weights(NamedTuple):
    """Weights that sampling can read, and how they were asked for."""

    config: Config  # of their run; of an export without one the defaults, with what the export says of its model
    export: Path  # folder of ``model.safetensors`` and ``export.json``
    run: Path | None  # the run, where it is known


def find_weights(
    source: str | Path,
    *,
    ema: float | None = None,
    raw: bool = False,
    step: int | None = None,
    overrides: Sequence[str] = (),
    config: Config | None = None,
) -> Weights:
    """The weights that ``source`` names; those of a checkpoint are exported, once.

    Args:
        source: a run (its newest checkpoint), RUN@STEP, a checkpoint's folder, an export's, or one that ``ig-dist
            convert`` made.
        ema: as for ``export_checkpoint``, as is ``raw``.
        raw: see ``ema``.
        step: of the checkpoint, before that of ``source``.
        overrides: ``a.b=c`` for the config.
        config: one that ``find_run`` gave, with more changes.

    Raises:
        ConfigError: no weights there, or none of that average or step.
    """
    theirs, run, named = find_run(source, overrides)
    config, folder, step = config or theirs, Path(source), named if step is None else step
    if (folder / INFO_NAME).is_file():
        if raw or ema is not None or step is not None:
            raise ConfigError(f"{folder} holds exported weights, and only these: leave out --ema, --raw and steps")
        return Weights(config, folder, run)
    store = checkpoint_store(config)
    checkpoint = store.find(ALONE, step)
    if checkpoint is None:
        raise ConfigError(f"{config.run.dir} has no checkpoint: train it first with `ig-dist train`")
    return Weights(config, export_checkpoint(checkpoint, config, ema=ema, raw=raw), run)


def find_run(source: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, Path | None, int | None]:
    """Config, run and step that ``source`` names, see ``find_weights``; nothing is exported.

    Returns:
        The config, with overrides; the run, None of an export or a checkpoint without one; the step, where it is said.

    Raises:
        ConfigError: no weights there.
    """
    folder = Path(source)
    if (folder / "config.yaml").is_file():
        return load_run(folder, overrides), folder, None
    above, exported = folder.absolute().parent.parent, (folder / INFO_NAME).is_file()
    saved = re.fullmatch(r"step_(\d{10})", folder.name) if (folder / MANIFEST).is_file() else None
    if (exported or saved) and (above / "config.yaml").is_file():
        return load_run(above, overrides), above, int(saved[1]) if saved else None
    if exported:
        return config_of(read_info(folder), str(folder), UNKNOWN_DATA, overrides), None, None
    if saved:
        step, url = int(saved[1]), str(folder.absolute().parent)
        checkpoint = CheckpointStore(url).find(ALONE, step)
        assert checkpoint is not None  # it would have been said
        tree = _saved(checkpoint)[1].model_dump(mode="json")
        tree = {**tree, "run": {**tree["run"], "dir": url}, "checkpoint": {**tree["checkpoint"], "url": url}}
        return config_from_tree(tree, str(folder), overrides), None, step
    run, at, step_text = str(source).rpartition("@")
    if at and (Path(run) / "config.yaml").is_file():
        if not step_text.isdecimal():
            raise ConfigError(f"{source}: {step_text!r} is no step; write RUN or RUN@1000")
        return load_run(run, overrides), Path(run), int(step_text)
    raise ConfigError(
        f"{source}: no run and no weights there (no config.yaml, {INFO_NAME} or {MANIFEST}): give RUN, RUN@STEP, or the"
        " folder of a checkpoint or an export"
    )


def config_of(info: ExportInfo, folder: str, index: str, overrides: Sequence[str] = ()) -> Config:
    """Defaults for weights that have no run; what is made of them lies beside them."""
    model = {name: value for name, value in dataclasses.asdict(info.model).items() if name != "mlp_ratio"}
    tree: dict[str, Any] = {"run": {"dir": folder}, "model": model, "data": {"index": index}}
    tree |= {"loss": {"path": info.path, "label_drop": 0.1 if info.trained_with_null_label else 0.0}}
    tree |= {"train": {"steps": max(1, info.step)}}
    return config_from_tree(tree, folder, overrides)
