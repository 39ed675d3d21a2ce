"""Published checkpoints to ours and back: files, and the checks that a conversion ends with."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from ig_dist.autoencoders.ldm import read_latent_stats
from ig_dist.autoencoders.tokenizers import get_tokenizer
from ig_dist.config.file import to_yaml
from ig_dist.convert.formats import FROM_NOISE, Format, read_config, read_format, to_ours, to_published
from ig_dist.data.classes import imagenet_classes
from ig_dist.data.index import LatentInfo, TokenizerInfo, read_index
from ig_dist.errors import ConfigError, listed
from ig_dist.export import INFO_NAME, WEIGHTS_NAME, ExportInfo, ModelInfo, config_of, read_info, whole_folder
from ig_dist.models.dit import DiT, DiTConfig, count_parameters, load_model
from ig_dist.rng import Purpose, normal
from ig_dist.storage.files import beside, read_file
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
    _check_names({name: t for name, t in theirs.items() if name not in others}, config, published, source)
    info = _model_info(config, index, tokenizer, latent_stats)

    with whole_folder(dest) as building:
        _write(ours, file := building / WEIGHTS_NAME)
        if others:
            _write(others, building / OTHERS_NAME)
        written = read_safetensors(file)
        _check_bits(to_published(written, published) | others, theirs, source)
        record = _conversion(theirs, written, config, published, source, (source, file))
        (building / RECORD_NAME).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if info is not None:  # an export and a config, so that the folder can be sampled from like a run
            of = {"checkpoint_sha256": record.source_sha256, "weights_sha256": record.weights_sha256}
            told = ExportInfo(**dict(info), ema=None, step=0, images_seen=0, **of)
            (building / INFO_NAME).write_text(told.model_dump_json(indent=1) + "\n", encoding="utf-8")
            run_config = to_yaml(config_of(told, str(dest), index or "data"))
            (building / "config.yaml").write_text(run_config, encoding="utf-8")
    return record


def convert_back(source: Path, dest: Path, *, published: Format | None = None) -> Conversion:
    """Write our weights (a folder of ``convert_published`` or ``ig-dist export``) in a published format.

    They become ``{"ema": weights}`` in a ``.pt``, or ``.safetensors``; without a format the one that they came in.

    Raises:
        ConfigError: no such weights, or the format does not have what this model is made of.
    """
    if dest.exists():
        raise ConfigError(f"{dest} exists: give a file that does not")
    file, record = source / WEIGHTS_NAME, read_conversion(source)
    if record is None and not (source / INFO_NAME).is_file():
        raise ConfigError(f"{source} holds no weights of ours: give a folder of `ig-dist export`")
    told = record or read_info(source)
    if not file.is_file() or _sha256(file) != told.weights_sha256:
        raise ConfigError(f"{file} is missing or damaged (its hash differs): convert or export again")
    published = published or (None if record is None else record.published)
    if published is None:
        raise ConfigError(f"{source} was trained here: say which format to write with --format")
    if reason := _unfit(told.model, published):
        raise ConfigError(f"{source} cannot be written as {published}: {reason}")
    ours = read_safetensors(file)
    theirs = to_published(ours, published)
    if record and published == record.published and (source / OTHERS_NAME).is_file():
        theirs |= read_safetensors(source / OTHERS_NAME)
    dest.parent.mkdir(parents=True, exist_ok=True)
    with beside(dest) as building:
        if dest.suffix == ".safetensors":
            _write(theirs, building)
        else:
            torch.save({"ema": theirs}, building)
        back = read_safetensors(building) if dest.suffix == ".safetensors" else read_torch_file(building)["ema"]
        _check_bits(to_ours(back, published)[0], ours, dest)
        done = _conversion(theirs, ours, told.model, published, source, (file, building))
        building.rename(dest)
    return done


def _conversion(
    theirs: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    model: DiTConfig,
    published: Format,
    source: Path,
    files: tuple[Path, Path],
) -> Conversion:
    """What became of weights, once their numbers are checked; ``files``: that they were read from and written to."""
    before, after = map(_sha256, files)
    return Conversion(
        published=published,
        model=model,
        parameters=count_parameters(load_model(model, ours)),
        source=source.name,
        source_sha256=before,
        weights_sha256=after,
        difference=_check_numbers(theirs, ours, model, published, source),
    )


def _read_published(path: Path, raw: bool) -> dict[str, Tensor]:
    """The weights in a checkpoint, in fp32, under names without the marks of DDP and torch.compile."""
    if not path.is_file():
        raise ConfigError(f"no file at {path}: give a published checkpoint (.pt, .safetensors), or a folder of ours")
    found = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    if isinstance(found, dict):
        parts = (found.get(part) for part in (("model",) if raw else ("ema", "state_dict", "model")))
        found = next((part for part in parts if isinstance(part, dict)), found)
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{path} holds no weights: it should be a state_dict, or have one under 'ema' or 'model'")
    weights = {}
    for name, tensor in found.items():
        weight = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel()
        if not isinstance(name, str) or not weight:
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


def _unfit(config: DiTConfig, published: Format) -> str:
    """Why a model cannot be written in a format; empty if it can."""
    if config.time_input != ("one_minus_t" if published in FROM_NOISE else "t"):
        return f"its time embedding takes {config.time_input} (model.time_input), that format has the other direction"
    if published.startswith("ig-") != (config.aux_depth is not None):
        return "it has an auxiliary head" if config.aux_depth is not None else "it has no auxiliary head"
    lightning = config.rope or config.norm == "rmsnorm" or config.mlp == "swiglu" or not config.modulation_shift
    return "it has layers of LightningDiT" if lightning and "lightningdit" not in published else ""


def _model_info(
    config: DiTConfig, index: str | None, tokenizer: str | None, latent_stats: Path | None
) -> ModelInfo | None:
    """What the model goes with: latents and classes of an index, or of a tokenizer; None: nobody says it."""
    if index is None and tokenizer is None:
        if latent_stats is not None:
            raise ConfigError("--latent-stats says how latents are scaled, not what makes them: give --tokenizer too")
        return None
    side, channels, classes = config.input_size, config.in_channels, config.num_classes
    if index is not None:
        told = read_index(index).info
        latent, made_by, names = told.latent, told.tokenizer, told.classes
    else:
        vae = get_tokenizer(tokenizer or "")
        if vae.scale is None and latent_stats is None:
            raise ConfigError(
                f"tokenizer {vae.name} has no scale of its own: give --latent-stats latents_stats.pt, as published"
                " beside the weights, or --data INDEX, which holds statistics"
            )
        count = vae.latent_channels or channels
        scaling = {"shift": [0.0] * count, "scale": [vae.scale or 1.0] * count}
        latent = LatentInfo(kind="sample", shape=(count, side, side), dtype="float32", **scaling)
        images = {"image_size": side * vae.downsample, "image_channels": vae.image_channels or channels}
        made_by = TokenizerInfo(name=vae.name, sha256=vae.sha256, **images)
        imagenet = list(imagenet_classes())
        names = imagenet if len(imagenet) == classes else [str(i) for i in range(classes)]
    if latent_stats is not None:
        scaled = read_latent_stats(latent_stats)
        if len(scaled.shift) != channels:
            raise ConfigError(f"--latent-stats has {len(scaled.shift)} channels, the model takes {channels}")
        latent = latent.model_copy(update=scaled._asdict())
    if latent.shape != (channels, side, side) or len(names) != classes:
        raise ConfigError(
            f"the model takes latents {channels}x{side}x{side} of {classes} classes, but {index or tokenizer} has"
            f" latents {'x'.join(map(str, latent.shape))} of {len(names)} classes: give what it was trained on"
        )
    return ModelInfo(
        model=config, path="linear", latent=latent, tokenizer=made_by, classes=names, trained_with_null_label=True
    )


def _check_names(theirs: Mapping[str, Tensor], config: DiTConfig, published: Format, source: Path) -> None:
    """Raise ConfigError, with a list, unless published weights have the names and shapes of such a model."""
    with torch.device("meta"):
        expected = to_published(DiT(config).state_dict(), published)
    missing = [name for name in expected if name not in theirs]
    unexpected = [name for name in theirs if name not in expected]
    if missing or unexpected:
        lists = [f"{kind} {listed(names, 6)}" for kind, names in (("lacks", missing), ("has", unexpected)) if names]
        raise ConfigError(f"{source} does not fit a model of {published}: it {' and '.join(lists)}")
    for name, tensor in theirs.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, such a model has {tuple(expected[name].shape)}"
            raise ConfigError(f"{source} does not fit a model of {published}: {name} is {shapes}")


def _check_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path) -> None:
    """Raise ConfigError unless converting back has given what was converted, to the bit."""
    for name in found.keys() | expected.keys():
        same = name in found and name in expected
        if not same or not torch.equal(found[name].view(torch.int32), expected[name].view(torch.int32)):
            raise ConfigError(f"{source}: {name} does not come back as it was: check memory and disk, convert again")


@torch.no_grad()
def _check_numbers(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], config: DiTConfig, published: Format, source: Path
) -> float:
    """Our velocities against those of the untouched weights, in their own direction of time.

    Raises:
        ConfigError: they differ, or are not finite.
    """
    ids = torch.arange(2)
    x = normal(0, Purpose.NOISE, ids, (config.in_channels, config.input_size, config.input_size))
    t, labels = torch.tensor([0.25, 0.75]), ids % config.num_classes
    untouched, _ = to_ours(theirs, "ig-sit")  # a format that turns nothing
    untouched = {name: tensor for name, tensor in untouched.items() if name in ours}
    reverse = published in FROM_NOISE
    plain = load_model(dataclasses.replace(config, time_input="t"), untouched)
    expected = plain(x, 1 - t if reverse else t, labels)
    found = load_model(config, ours)(x, t, labels)
    difference = 0.0
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            continue
        if not one.isfinite().all():
            raise ConfigError(f"{source}: the model's velocity is not finite: the weights are damaged")
        largest = float((one + other if reverse else one - other).abs().max())
        difference = max(difference, largest)
        if largest > 1e-5 * max(1.0, float(other.abs().max())):
            raise ConfigError(f"{source}: the converted model differs by {largest:g}: this conversion is wrong")
    return difference


def _write(weights: Mapping[str, Tensor], path: Path) -> None:
    path.write_bytes(safetensors.torch.save({name: weights[name] for name in sorted(weights)}))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
