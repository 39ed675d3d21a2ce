"""Published checkpoints to ours and back: files, and the checks that a conversion ends with."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from ig_dist.autoencoders.ldm import Normalisation, read_latent_stats
from ig_dist.autoencoders.tokenizers import get_tokenizer
from ig_dist.config.file import to_yaml
from ig_dist.convert.checks import check_bits, check_names, check_numbers
from ig_dist.convert.formats import FROM_NOISE, Format, read_config, read_format, to_ours, to_published
from ig_dist.data.classes import imagenet_classes
from ig_dist.data.index import LatentInfo, TokenizerInfo, read_index
from ig_dist.errors import ConfigError
from ig_dist.export import INFO_NAME, WEIGHTS_NAME, ExportInfo, ModelInfo, config_of, read_info
from ig_dist.models.dit import DiTConfig, count_parameters, load_model
from ig_dist.storage.files import read_file
from ig_dist.storage.tensor_files import read_safetensors, read_torch_file
from ig_dist.storage.urls import LOCAL

RECORD_NAME = "convert.json"
OTHERS_NAME = "training_only.safetensors"
_WRAPPERS = ("module.", "_orig_mod.")  # of DDP and torch.compile


class Conversion(BaseModel):
    """What stands beside converted weights."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format: Literal["ig-dist-conversion/1"] = "ig-dist-conversion/1"
    published: Format
    model: DiTConfig
    parameters: int
    source: str
    source_sha256: str
    weights_sha256: str
    difference: float
    """Largest one of the self-check, between our velocities and those of the untouched weights in their own time."""

    def describe(self) -> str:
        """The model in a line."""
        model, side = self.model, self.model.input_size
        head = "no auxiliary head" if model.aux_depth is None else f"auxiliary head after block {model.aux_depth}"
        return (
            f"{model.depth} blocks of width {model.hidden_size}, {model.num_heads} heads,"
            f" patches of {model.patch_size}, {model.norm}, {model.mlp}{', RoPE' * model.rope}"
            f"{', QK-norm' * model.qk_norm}{', learned sigma' * model.learn_sigma}; {head};"
            f" latents {model.in_channels}x{side}x{side}, {model.num_classes} classes"
        )


def convert_published(
    source: Path,
    dest: Path,
    *,
    published: Format | None = None,
    aux_depth: int | None = None,
    num_heads: int | None = None,
    raw: bool = False,
    index: str | None = None,
    tokenizer: str | None = None,
    latent_stats: Path | None = None,
) -> Conversion:
    """Convert a published checkpoint into a folder that ``train.init_from`` takes.

    With an index or a tokenizer, which say what the latents are, the folder can be sampled from like a run. The other
    options are those of ``ig-dist convert``.

    Raises:
        ConfigError: no such weights, or weights that do not fit.
    """
    if dest.exists():
        raise ConfigError(f"{dest} exists: give a folder that does not")
    theirs = _read_published(source, raw)
    try:
        published = read_format(theirs, published)
        config = read_config(theirs, published, aux_depth=aux_depth, num_heads=num_heads)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    ours, others = to_ours(theirs, published)
    check_names({name: t for name, t in theirs.items() if name not in others}, config, published, source)
    scaled = None if latent_stats is None else read_latent_stats(latent_stats)
    if scaled and index is None and tokenizer is None:
        raise ConfigError("--latent-stats says how latents are scaled, not what makes them: give --tokenizer too")
    info = None if index is None and tokenizer is None else _model_info(config, index, tokenizer, scaled)

    dest.parent.mkdir(parents=True, exist_ok=True)
    building = dest.with_name(f".{dest.name}.{uuid.uuid4().hex}")
    building.mkdir()
    try:
        weights_sha256 = _write(ours, building / WEIGHTS_NAME)
        if others:
            _write(others, building / OTHERS_NAME)
        written = read_safetensors(building / WEIGHTS_NAME)
        check_bits(to_published(written, published) | others, theirs, source)
        record = Conversion(
            published=published,
            model=config,
            parameters=count_parameters(load_model(config, written)),
            source=source.name,
            source_sha256=_sha256(source),
            weights_sha256=weights_sha256,
            difference=check_numbers(theirs, written, config, published, source),
        )
        (building / RECORD_NAME).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if info is not None:  # an export and a config, so that the folder can be sampled from like a run
            of = {"checkpoint_sha256": record.source_sha256, "weights_sha256": weights_sha256}
            told = ExportInfo(**dict(info), ema=None, step=0, images_seen=0, **of)
            (building / INFO_NAME).write_text(told.model_dump_json(indent=1) + "\n", encoding="utf-8")
            run_config = to_yaml(config_of(told, str(dest), index or "data"))
            (building / "config.yaml").write_text(run_config, encoding="utf-8")
        building.rename(dest)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return record


def convert_back(source: Path, dest: Path, *, published: Format | None = None) -> Conversion:
    """Write our weights (a folder of ``convert_published`` or ``ig-dist export``) in a published format.

    They become ``{"ema": weights}`` in a ``.pt``, or ``.safetensors``; without a format the one that they came in.

    Raises:
        ConfigError: no such weights, or the format does not have what this model is made of.
    """
    if dest.exists():
        raise ConfigError(f"{dest} exists: give a file that does not")
    config, came_as, file = _read_ours(source)
    published = published or came_as
    if published is None:
        raise ConfigError(f"{source} was trained here: say which format to write with --format")
    if reason := _unfit(config, published):
        raise ConfigError(f"{source} cannot be written as {published}: {reason}")
    ours = read_safetensors(file)
    theirs = to_published(ours, published)
    if published == came_as and (source / OTHERS_NAME).is_file():
        theirs |= read_safetensors(source / OTHERS_NAME)
    dest.parent.mkdir(parents=True, exist_ok=True)
    building = dest.with_name(f".tmp-{dest.name}")
    if dest.suffix == ".safetensors":
        _write(theirs, building)
    else:
        torch.save({"ema": theirs}, building)
    check_bits(to_ours(_read_published(building), published)[0], ours, dest)
    difference = check_numbers(theirs, ours, config, published, source)
    building.rename(dest)
    return Conversion(
        published=published,
        model=config,
        parameters=count_parameters(load_model(config, ours)),
        source=str(source),
        source_sha256=_sha256(file),
        weights_sha256=_sha256(dest),
        difference=difference,
    )


def _read_published(path: Path, raw: bool = False) -> dict[str, Tensor]:
    """The weights in a checkpoint, in fp32, under names without the marks of DDP and torch.compile."""
    if not path.is_file():
        raise ConfigError(f"no file at {path}: give a published checkpoint (.pt, .safetensors), or a folder of ours")
    found = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    if isinstance(found, dict):
        for part in ("model",) if raw else ("ema", "state_dict", "model"):
            if isinstance(found.get(part), dict):
                found = found[part]
                break
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{path} holds no weights: it should be a state_dict, or have one under 'ema' or 'model'")
    weights = {}
    for name, tensor in found.items():
        if (
            not isinstance(name, str)
            or not isinstance(tensor, Tensor)
            or not tensor.is_floating_point()
            or not tensor.numel()
        ):
            raise ConfigError(f"{path}: {name!r} is not a weight: save the model's state_dict in it")
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        weights[name] = tensor.float().contiguous()
    return weights


def read_conversion(folder: Path) -> Conversion | None:
    """What stands beside converted weights; None: the weights there were trained here.

    Raises:
        ConfigError: the file is damaged.
    """
    file = folder / RECORD_NAME
    try:
        return Conversion.model_validate_json(read_file(LOCAL, str(file))) if file.exists() else None
    except (OSError, ValidationError):
        raise ConfigError(f"{file} is damaged: convert the published checkpoint again") from None


def _read_ours(folder: Path) -> tuple[DiTConfig, Format | None, Path]:
    """The model, the format that it was converted from, and the file with its weights."""
    file, record = folder / WEIGHTS_NAME, read_conversion(folder)
    if record is None and not (folder / INFO_NAME).is_file():
        raise ConfigError(f"{folder} holds no weights of ours: give a folder of `ig-dist export`")
    told, published = (read_info(folder), None) if record is None else (record, record.published)
    if not file.is_file() or _sha256(file) != told.weights_sha256:
        raise ConfigError(f"{file} is missing or damaged (its hash differs): convert or export again")
    return told.model, published, file


def _unfit(config: DiTConfig, published: Format) -> str:
    """Why a model cannot be written in a format; empty if it can."""
    if config.time_input != ("one_minus_t" if published in FROM_NOISE else "t"):
        return f"its time embedding takes {config.time_input} (model.time_input), that format has the other direction"
    if published.startswith("ig-") != (config.aux_depth is not None):
        return "it has an auxiliary head" if config.aux_depth is not None else "it has no auxiliary head"
    lightning = config.rope or config.norm == "rmsnorm" or config.mlp == "swiglu" or not config.modulation_shift
    if lightning and "lightningdit" not in published:
        return "it has layers of LightningDiT"
    return ""


def _model_info(config: DiTConfig, index: str | None, tokenizer: str | None, scaled: Normalisation | None) -> ModelInfo:
    """What the model goes with: latents and classes of an index, or of a tokenizer with a known scale."""
    side, channels, classes = config.input_size, config.in_channels, config.num_classes
    shape = (channels, side, side)
    if index is not None:
        info = read_index(index).info
        found = f"latents {'x'.join(map(str, info.latent.shape))} of {len(info.classes)} classes"
        latent, made_by, names = info.latent, info.tokenizer, info.classes
    else:
        vae = get_tokenizer(tokenizer or "")
        if vae.scale is None and scaled is None:
            raise ConfigError(
                f"tokenizer {vae.name} has no scale of its own: give --latent-stats latents_stats.pt, as published"
                " beside the weights, or --data INDEX, which holds statistics"
            )
        latent_channels = vae.latent_channels or channels
        names = list(imagenet_classes())
        if len(names) != classes:
            names = [str(i) for i in range(classes)]
        latent = LatentInfo(
            kind="sample",
            shape=(latent_channels, side, side),
            dtype="float32",
            shift=[0.0] * latent_channels,
            scale=[vae.scale or 1.0] * latent_channels,
        )
        image_channels = vae.image_channels or channels
        image_size = side * vae.downsample
        made_by = TokenizerInfo(name=vae.name, sha256=vae.sha256, image_size=image_size, image_channels=image_channels)
        found = f"latents of {latent_channels} channels"
    if scaled is not None:
        if len(scaled.shift) != channels:
            raise ConfigError(f"--latent-stats has {len(scaled.shift)} channels, the model takes {channels}")
        latent = latent.model_copy(update=scaled._asdict())
    if latent.shape != shape or len(names) != classes:
        raise ConfigError(
            f"the model takes latents {'x'.join(map(str, shape))} of {classes} classes, but {index or tokenizer} has"
            f" {found}: give what it was trained on"
        )
    return ModelInfo(
        model=config, path="linear", latent=latent, tokenizer=made_by, classes=names, trained_with_null_label=True
    )


def _write(weights: Mapping[str, Tensor], path: Path) -> str:
    safetensors.torch.save_file({name: weights[name] for name in sorted(weights)}, path)
    umask = os.umask(0)  # the library makes a file that only its owner may read
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
