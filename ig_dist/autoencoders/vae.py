"""Autoencoders as tokenizers: diffusers' AutoencoderKL, from a folder that it saved or from an LDM checkpoint."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ig_dist.arithmetic import arithmetic
from ig_dist.autoencoders.ldm import ldm_name, ldm_settings, read_checkpoint
from ig_dist.autoencoders.tokenizers import FOLDER_FILES, PUBLISHED, Precision, Tokenizer
from ig_dist.errors import ConfigError, first_line, listed
from ig_dist.storage.tensor_files import read_safetensors
from ig_dist.terminal.extras import imported

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SD_SCALE = 0.18215
SD_RULE = "trunc(255 clip((x + 1) / 2, 0, 1))"  # as SiT with Internal Guidance has it
LDM_RULE = "trunc(clip(127.5 x + 128, 0, 255))"  # as LightningDiT has it
_TO_UINT8: dict[str, Callable[[Tensor], Tensor]] = {
    SD_RULE: lambda x: (255.0 * ((x + 1.0) / 2.0).clamp(0.0, 1.0)).to(torch.uint8),
    LDM_RULE: lambda x: (127.5 * x + 128.0).clamp(0.0, 255.0).to(torch.uint8),
}
LISTED = 4  # names in a message, of each kind

# What of AutoencoderKL's settings changes its numbers. Others come and go with its versions.
_SETTINGS = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "up_block_types",
    "mid_block_add_attention",
    "norm_num_groups",
    "act_fn",
    "use_quant_conv",
    "use_post_quant_conv",
)
# Attention as diffusers named it until 2023; the published Stable Diffusion autoencoders still have it so.
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def load_vae(name: str, weights: Path, device: torch.device, precision: Precision) -> Tokenizer:
    """The tokenizer of an autoencoder: a folder with diffusers' files, an LDM checkpoint, or a folder with one.

    Its weights are cast to ``precision``. Autocast would keep the norms' results in fp32 and so move twice the bytes;
    inside, norms and softmax sum in fp32 either way. Mean and std are computed in fp32 from its outputs.
    """
    model, scale, rule = load_autoencoder(name, weights)
    config, dtype, to_uint8 = model.config, DTYPES[precision], _TO_UINT8[rule]
    described = {key: config[key] for key in _SETTINGS} | {"scale": scale, "uint8_rule": rule}
    sha256 = _hash(model.state_dict(), described)
    torch.nn.Module.to(model, device=device, dtype=dtype)  # diffusers' own warns of layers that this model lacks
    model.eval().requires_grad_(False)
    downsample = 2 ** (len(config.block_out_channels) - 1)

    def encode(images: Tensor) -> Tensor:
        side = images.shape[1:3]
        if images.ndim != 4 or images.shape[3] != config.in_channels or any(s % downsample or not s for s in side):
            raise ConfigError(
                f"images of shape {_by(images.shape[1:])}: tokenizer {name} takes {config.in_channels}"
                f" channels and sides that are multiples of {downsample}: choose another --image-size or tokenizer"
            )
        pixels = images.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with _inference(device, precision):
            # contiguous: the layout in memory chooses the convolutions' kernels, which round differently
            moments = model.encoder(pixels.to(dtype).contiguous())
            moments = moments if model.quant_conv is None else model.quant_conv(moments)
        mean, log_variance = moments.float().contiguous().chunk(2, dim=1)
        return torch.cat([mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))], dim=1).to(images.device)

    def decode(latents: Tensor) -> Tensor:
        if latents.ndim != 4 or latents.shape[1] != config.latent_channels:
            raise ConfigError(
                f"latents of shape {_by(latents.shape[1:])}: tokenizer {name} decodes"
                f" {config.latent_channels} channels: use the tokenizer that encoded the data"
            )
        with _inference(device, precision):
            hidden = latents.to(device=device, dtype=dtype).contiguous()
            hidden = hidden if model.post_quant_conv is None else model.post_quant_conv(hidden)
            images = model.decoder(hidden)
        return to_uint8(images.float()).permute(0, 2, 3, 1).contiguous().to(latents.device)

    return Tokenizer(
        name=name,
        sha256=sha256,
        downsample=downsample,
        image_channels=config.in_channels,
        stochastic=True,
        scale=scale,
        uint8_rule=rule,
        encode=encode,
        decode=decode,
        latent_channels=config.latent_channels,
    )


def load_autoencoder(name: str, weights: Path) -> tuple[Any, float | None, str]:
    """An AutoencoderKL in fp32 on the CPU, its latents' scale, and its uint8 rule."""
    AutoencoderKL = imported("vae", f"tokenizer {name} needs", "AutoencoderKL")
    file = _checkpoint_file(weights)
    if file is None:
        settings, tensors, scale = _read_folder(weights, AutoencoderKL)
        return _build(AutoencoderKL, settings, tensors, weights, lambda key: key), scale, SD_RULE
    tensors = read_checkpoint(file)
    settings = ldm_settings(tensors, file)
    levels = len(settings["block_out_channels"])
    return _build(AutoencoderKL, settings, tensors, file, lambda key: ldm_name(key, levels)), None, LDM_RULE


def _checkpoint_file(weights: Path) -> Path | None:
    """The LDM checkpoint in ``weights``, or None if it is a folder that diffusers saved."""
    if not weights.is_dir():
        return weights
    if (weights / FOLDER_FILES[0]).exists():
        return None
    published = [weights / file for known in PUBLISHED for file in known.files if (weights / file).exists()]
    found = [file for file in weights.iterdir() if file.suffix in {".pt", ".ckpt", ".safetensors"}]
    for files in (published, found):
        if len(files) == 1:
            return files[0]
    raise ConfigError(
        f"{weights} is no tokenizer: it should hold {' and '.join(FOLDER_FILES)} (diffusers' save_pretrained), or one"
        f" LDM checkpoint (.pt, .ckpt or .safetensors), and has {len(found)}"
    )


def _read_folder(folder: Path, autoencoder: Any) -> tuple[dict[str, Any], dict[str, Tensor], float | None]:
    """Arguments of the autoencoder, its tensors, and the latents' scale."""
    file = folder / FOLDER_FILES[0]
    try:
        if not file.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, scale = config.get("_class_name", "AutoencoderKL"), config.get("scaling_factor", SD_SCALE)
        centred = any(config.get(key) is not None for key in ("shift_factor", "latents_mean"))
        # A shift besides the scale is left to the statistics per channel, which make both.
        scale = None if scale is None or centred else float(scale)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file} is no config of an autoencoder ({error}): download or save it again") from None
    if kind != "AutoencoderKL" or (scale is not None and not 0 < scale < float("inf")):
        raise ConfigError(f"{file} describes {kind!r} with scale {scale}: use an AutoencoderKL with a positive scale")
    known = inspect.signature(autoencoder.__init__).parameters
    tensors = read_safetensors(folder / FOLDER_FILES[1])
    for old, new in _OLD_ATTENTION.items():
        tensors = {name.replace(old, new) if ".attentions." in name else name: t for name, t in tensors.items()}
    return {key: value for key, value in config.items() if key in known}, tensors, scale


def _build(
    autoencoder: Any,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    where: Path,
    stored_name: Callable[[str], str],
) -> Any:
    """An autoencoder with these weights, fp32 on the CPU; ``stored_name`` is what ``tensors`` calls one of its own."""
    try:
        if len(settings.get("block_out_channels", "1")) * settings.get("layers_per_block", 1) > len(tensors):
            raise ValueError("they are of more layers than there are tensors")
        with torch.device("meta"):
            model = autoencoder(**settings)
    except Exception as error:  # whatever meaningless settings make diffusers raise
        raise ConfigError(f"{where} has settings that make no autoencoder: {first_line(error)}") from None
    expected = {stored_name(name): (name, tensor.shape) for name, tensor in model.state_dict().items()}
    known = {name: (tensors[name].shape, shape) for name, (_, shape) in expected.items() if name in tensors}
    wrong = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": sorted(map(str, tensors.keys() - expected.keys())),
        "of another shape": [
            f"{name} ({_by(stored)} instead of {_by(shape)})"
            for name, (stored, shape) in known.items()
            if stored not in (shape, (*shape, 1, 1))  # a linear layer may be stored as a convolution
        ],
    }
    if any(wrong.values()):
        lists = "; ".join(f"{len(names)} {what}: {listed(names, LISTED)}" for what, names in wrong.items() if names)
        raise ConfigError(f"{where} does not fit its autoencoder: {lists}: download or save it again")
    weights = {name: tensors[stored].float().reshape(shape).contiguous() for stored, (name, shape) in expected.items()}
    model.load_state_dict(weights, assign=True)
    return model


def _by(shape: torch.Size) -> str:
    return "x".join(map(str, shape))


def _hash(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Of names, types, shapes and little-endian bytes, in the order of the names."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} float32 {list(tensor.shape)} ".encode())
        digest.update(tensor.numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


@contextmanager
def _inference(device: torch.device, precision: Precision) -> Iterator[None]:
    """No gradients, no autocast of a caller's, and fp32 that is fp32 unless tf32 is asked for."""
    with torch.no_grad(), arithmetic("tf32" if precision == "tf32" else "fp32", device):
        yield
