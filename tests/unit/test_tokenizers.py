"""Tokenizers: the Stable Diffusion layout, what a hash stands for, arithmetic, and the tokenizer of an index."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from torch import nn

from ig_dist.autoencoders.tokenizers import Tokenizer, get_tokenizer, index_tokenizer
from ig_dist.data.index import LatentInfo, TokenizerInfo
from ig_dist.errors import ConfigError
from tests.autoencoders import SMALL, images, save_vae

pytestmark = pytest.mark.usefixtures("alone")

SD = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def test_pixel_is_as_it_was() -> None:
    pixel = get_tokenizer("pixel", device="cpu", precision="bf16")
    assert (pixel.downsample, pixel.image_channels, pixel.stochastic, pixel.scale) == (1, None, False, 1.0)
    rule = "pixel: x / 127.5 - 1; clip(round(127.5 (x + 1)), 0, 255) of [-1, 1]"
    assert pixel.sha256 == hashlib.sha256(rule.encode()).hexdigest()
    assert torch.equal(pixel.decode(pixel.encode(images(3))), images(3))


def test_the_published_sd_layout(tmp_path: Path) -> None:
    model = save_vae(tmp_path / "vae", **SD)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    tokenizer = get_tokenizer(str(tmp_path / "vae"))
    assert (tokenizer.downsample, tokenizer.image_channels, tokenizer.latent_channels) == (8, 3, 4)
    assert tokenizer.stochastic and tokenizer.scale == 0.18215 and tokenizer.name == str(tmp_path / "vae")
    shown = images(2, 32)
    moments = tokenizer.encode(shown)
    assert moments.shape == (2, 8, 4, 4) and moments.dtype == torch.float32
    posterior = model.encode(shown.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.std], 1), atol=1e-5, rtol=1e-5)
    decoded = tokenizer.decode(moments[:, :4].double())
    assert decoded.shape == (2, 32, 32, 3) and decoded.dtype == torch.uint8
    values = (model.decode(moments[:, :4]).sample + 1) / 2
    expected = (values.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert (decoded.int() - expected.int()).abs().max() <= 1
    assert (decoded != expected).float().mean() < 1e-3  # a value on the edge between two


def test_scale_is_the_configs(tmp_path: Path) -> None:
    scales = {"0.5": 0.5, "null": None, "absent": 0.18215}
    hashes = set()
    for text, scale in scales.items():
        folder = tmp_path / text
        save_vae(folder)
        config = json.loads((folder / "config.json").read_text())
        del config["scaling_factor"]
        if text != "absent":
            config["scaling_factor"] = json.loads(text)
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer = get_tokenizer(str(folder))
        assert tokenizer.scale == scale
        hashes.add(tokenizer.sha256)
    assert len(hashes) == 3
    save_vae(tmp_path / "shifted", shift_factor=0.1)
    assert get_tokenizer(str(tmp_path / "shifted")).scale is None


def test_a_hash_of_the_weights_not_of_the_file(tmp_path: Path, small: tuple[Path, nn.Module]) -> None:
    folder, model = small
    known = get_tokenizer(str(folder))
    assert get_tokenizer(str(folder)) is known  # loaded once
    assert get_tokenizer(str(folder), precision="bf16").sha256 == known.sha256

    again, old, other = tmp_path / "again", tmp_path / "old", tmp_path / "other"
    AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).save_pretrained(again)
    assert get_tokenizer(str(again)).sha256 == known.sha256
    # as published in 2022: another file, older names of the attention, fewer settings
    shutil.copytree(folder, old)
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = model.state_dict()
    for new, before in names.items():
        tensors = {name.replace(new, before): tensor for name, tensor in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    safetensors.torch.save_file(tensors, old / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = json.loads((old / "config.json").read_text())
    for key in ("scaling_factor", "force_upcast", "latents_mean", "use_quant_conv", "mid_block_add_attention"):
        del config[key]
    (old / "config.json").write_text(json.dumps({**config, "_diffusers_version": "0.4.2"}))
    assert get_tokenizer(str(old)).sha256 == known.sha256
    assert torch.equal(get_tokenizer(str(old)).encode(images(1)), known.encode(images(1)))
    save_vae(other, seed=1)
    assert get_tokenizer(str(other)).sha256 != known.sha256


def test_the_hash_is_the_same_on_every_machine(tmp_path: Path) -> None:
    model = AutoencoderKL(**SMALL)
    for parameter in model.parameters():
        parameter.data = (torch.arange(parameter.numel()) % 7 / 8).reshape(parameter.shape)
    model.save_pretrained(tmp_path)
    assert get_tokenizer(str(tmp_path)).sha256 == "dab96d51717b8c11791beb7e4aee05da59f18d4b61c45d493ac0cb4e1d011769"


def test_batches_may_be_cut_anywhere(small: tuple[Path, nn.Module]) -> None:
    tokenizer, shown = get_tokenizer(str(small[0])), images(7)
    whole = tokenizer.encode(shown)
    parts = torch.cat([tokenizer.encode(part) for part in shown.split([1, 4, 2])])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    cut = torch.cat([tokenizer.decode(part) for part in whole[:, :4].split([3, 4])])
    assert (cut.int() - tokenizer.decode(whole[:, :4]).int()).abs().max() <= 1


@pytest.mark.parametrize(("precision", "near"), [("bf16", 0.1), ("fp16", 0.01)])
def test_precisions_agree(small: tuple[Path, nn.Module], precision: str, near: float) -> None:
    exact = get_tokenizer(str(small[0]))
    coarse = get_tokenizer(str(small[0]), precision=precision)
    shown = images(2)
    expected = exact.encode(shown)
    moments = coarse.encode(shown)
    assert moments.dtype == torch.float32
    assert 0 < (moments - expected).abs().max() < near * expected.abs().max()
    difference = coarse.decode(expected[:, :4].half()).int() - exact.decode(expected[:, :4]).int()
    assert difference.abs().float().mean() < 2 * 127 * near


def test_the_layout_in_memory_changes_nothing(small: tuple[Path, nn.Module]) -> None:
    tokenizer, shown = get_tokenizer(str(small[0])), images(32)
    moments = tokenizer.encode(shown)
    assert moments.is_contiguous()
    assert torch.equal(tokenizer.encode(shown.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)), moments)
    z = moments[:, :4]
    for other in (z.clone(), z.contiguous(memory_format=torch.channels_last), z.double()):
        assert torch.equal(tokenizer.decode(other), tokenizer.decode(z))


def test_a_callers_autocast_changes_nothing(small: tuple[Path, nn.Module]) -> None:
    tokenizer = get_tokenizer(str(small[0]))
    expected = tokenizer.encode(images(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(images(1)), expected)
    assert not expected.requires_grad


def constant_vae(folder: Path, values: list[float]) -> Tokenizer:
    """Decodes everything to ``values``, a channel each."""
    model = AutoencoderKL(**SMALL)
    nn.init.zeros_(model.decoder.conv_out.weight)
    model.decoder.conv_out.bias.data = torch.tensor(values)
    model.save_pretrained(folder)
    return get_tokenizer(str(folder))


def test_the_sd_uint8_rule(tmp_path: Path) -> None:
    for name, values, expected in (("a", [-1.5, -1.0, 0.0], [0, 0, 127]), ("b", [0.999, 1.0, 9.0], [254, 255, 255])):
        tokenizer = constant_vae(tmp_path / name, values)
        assert tokenizer.decode(torch.zeros(1, 4, 2, 2)).unique(dim=2)[0, 0, 0].tolist() == expected
        assert tokenizer.uint8_rule == "trunc(255 clip((x + 1) / 2, 0, 1))"


def test_shapes_that_do_not_fit(small: tuple[Path, nn.Module]) -> None:
    tokenizer = get_tokenizer(str(small[0]))
    with pytest.raises(ConfigError, match="multiples of 2"):
        tokenizer.encode(images(1, 15))
    with pytest.raises(ConfigError, match="takes 3 channels"):
        tokenizer.encode(torch.zeros(1, 16, 16, 1, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="decodes 4 channels"):
        tokenizer.decode(torch.zeros(1, 5, 8, 8))


def described(tokenizer: Tokenizer, *shape: int) -> tuple[TokenizerInfo, LatentInfo]:
    info = TokenizerInfo(name=tokenizer.name, sha256=tokenizer.sha256, image_size=16, image_channels=3)
    channels = shape[0]
    return info, LatentInfo(
        kind="moments", shape=shape, dtype="float16", shift=[0.0] * channels, scale=[1.0] * channels
    )


def test_the_tokenizer_of_an_index(tmp_path: Path, small: tuple[Path, nn.Module]) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(small[0], tmp_path / "first")
    info, latent = described(get_tokenizer(str(tmp_path / "first")), 4, 8, 8)
    assert index_tokenizer(info, latent).sha256 == info.sha256
    shutil.move(tmp_path / "first", moved)
    with pytest.raises(ConfigError, match=r"first'.*\(sample.tokenizer=PLACE says where"):
        index_tokenizer(info, latent)
    assert index_tokenizer(info, latent, str(moved)).sha256 == info.sha256

    save_vae(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError) as caught:
        index_tokenizer(info, latent, str(tmp_path / "other"))
    assert all(text in str(caught.value) for text in ("first", "other", info.sha256[:16]))
    with pytest.raises(ConfigError, match="makes latents of shape 4x8x8 .*says 4x4x4"):
        index_tokenizer(*described(get_tokenizer(str(moved)), 4, 4, 4))
    pixel = described(get_tokenizer("pixel"), 3, 16, 16)
    assert index_tokenizer(*pixel, str(moved)).name == "pixel"
    with pytest.raises(ConfigError, match="says 1x16x16"):
        index_tokenizer(*described(get_tokenizer("pixel"), 1, 16, 16))
