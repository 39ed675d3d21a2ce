"""Checkpoints in the layout of latent diffusion (VA-VAE's): the same numbers, any form of file, and what is refused."""

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL

from ig_dist.autoencoders import ldm
from ig_dist.autoencoders.tokenizers import get_tokenizer
from ig_dist.autoencoders.vae import load_autoencoder
from tests.autoencoders import LDM, error_of, images

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module", params=["attention at the latent", "attention between"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, LDM]]:
    torch.manual_seed(3)
    between = request.param == "attention between"
    model = LDM([32, 64, 96], 1, [1], 6) if between else LDM([32, 32, 64], 2, [2], 5)
    for parameter in model.parameters():  # norms and biases say something too
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.quant_conv.bias.data[-1] = 50.0  # one channel's log-variance is beyond its bound
    file = tmp_path_factory.mktemp("ldm") / "model.pt"
    rest = {
        "loss.logvar": torch.zeros(()),
        "foundation_model.model.cls": torch.zeros(3),
        "linear_proj.weight": torch.ones(1),
    }
    torch.save({"state_dict": {**model.state_dict(), **rest}, "epoch": 3}, file)
    yield file, model.requires_grad_(False)


def test_the_conversion_gives_the_same_numbers(published: tuple[Path, LDM]) -> None:
    file, model = published
    tokenizer = get_tokenizer(str(file))
    latent = model.quant_conv.out_channels // 2
    assert (tokenizer.downsample, tokenizer.latent_channels, tokenizer.image_channels) == (4, latent, 3)
    assert tokenizer.stochastic and tokenizer.scale is None
    shown = images(2)
    expected = model.moments(shown.permute(0, 3, 1, 2) / 127.5 - 1)
    moments = tokenizer.encode(shown)
    assert expected[:, -1].max() > 2e4  # exp(20 / 2): the bound holds
    torch.testing.assert_close(moments, expected, atol=1e-5, rtol=1e-5)

    autoencoder, _, _ = load_autoencoder(tokenizer.name, file)
    z = torch.randn(2, latent, 4, 4)
    values = model.images(z)
    torch.testing.assert_close(autoencoder.decode(z).sample, values, atol=1e-5, rtol=1e-5)
    rule = (127.5 * values + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    decoded = tokenizer.decode(z.to(torch.float64))
    assert (decoded.int() - rule.int()).abs().max() <= 1 and (decoded != rule).float().mean() < 1e-3


def test_a_checkpoints_form_does_not_matter(published: tuple[Path, LDM], tmp_path: Path) -> None:
    file, model = published
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "plain.ckpt")
    (tmp_path / "tokenizers").mkdir()
    shutil.copytree(file.parent, tmp_path / "tokenizers" / "va-vae-f16d32")
    names = [str(file), str(tmp_path / "model.safetensors"), str(tmp_path / "plain.ckpt"), "va-vae-f16d32"]
    assert len({get_tokenizer(name).sha256 for name in names}) == 1
    assert [get_tokenizer(name).name for name in names] == names


def test_the_ldm_uint8_rule(published: tuple[Path, LDM], tmp_path: Path) -> None:
    for name, values, expected in (("a", [-1.5, -1.0, 0.0], [0, 0, 128]), ("b", [0.99, 1.0, 9.0], [254, 255, 255])):
        tensors = dict(published[1].state_dict())
        tensors["decoder.conv_out.weight"] = torch.zeros_like(tensors["decoder.conv_out.weight"])
        tensors["decoder.conv_out.bias"] = torch.tensor(values)
        torch.save(tensors, tmp_path / f"{name}.pt")
        tokenizer = get_tokenizer(str(tmp_path / f"{name}.pt"))
        decoded = tokenizer.decode(torch.zeros(1, tokenizer.latent_channels or 0, 2, 2))
        assert decoded[0, 0, 0].tolist() == expected and (decoded == decoded[0, 0, 0]).all()
        assert tokenizer.uint8_rule == "trunc(clip(127.5 x + 128, 0, 255))"


def test_the_published_va_vae_layout() -> None:
    """ch 128, ch_mult 1 1 2 2 4, two blocks a level, attention at 16 of 256, 32 channels: shapes without numbers."""
    with torch.device("meta"):
        stored = LDM([128, 128, 256, 256, 512], 2, [4], 32).state_dict()
        settings = ldm.ldm_settings(stored, Path("file"))
        model = AutoencoderKL(**settings)
    assert settings["down_block_types"] == (*["DownEncoderBlock2D"] * 4, "AttnDownEncoderBlock2D")
    assert settings["up_block_types"] == ("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 4)
    assert settings["latent_channels"] == 32 and settings["layers_per_block"] == 2
    own = model.state_dict()
    names = {ldm.ldm_name(name, 5): tensor.shape for name, tensor in own.items()}
    assert names.keys() == stored.keys() and len(own) == len(stored)
    assert all(stored[name].shape in (shape, (*shape, 1, 1)) for name, shape in names.items())
    assert {"encoder.down.4.attn.1.q.weight", "decoder.up.4.attn.2.proj_out.bias"} <= names.keys()
    assert sum(p.numel() for p in model.parameters()) == 69_836_067


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.mark, "it ran"))


def test_checkpoints_that_are_none(published: tuple[Path, LDM], tmp_path: Path) -> None:
    tensors, file = dict(published[1].state_dict()), tmp_path / "bad.pt"
    mark = tmp_path / "mark"
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        for value in (Hostile(mark), {**tensors, "extra": Hostile(mark)}):
            save(value, file)
            assert "holds more than tensors" in error_of(str(file))
    assert not mark.exists()
    file.write_bytes(published[0].read_bytes()[:3000])
    assert "is damaged" in error_of(str(file))
    torch.save(torch.zeros(3), file)
    assert "no state_dict" in error_of(str(file))
    torch.save({"state_dict": {}}, file)
    assert "encoder.down.0.block.0.conv1.weight is missing" in error_of(str(file))
    torch.save({**tensors, "decoder.conv_in.weight": torch.zeros(3)}, file)
    assert "decoder.conv_in.weight has shape (3,)" in error_of(str(file))

    key = "encoder.mid.block_1.conv1.weight"
    wrong = {name: tensor for name, tensor in tensors.items() if name != "decoder.up.1.upsample.conv.bias"}
    wrong |= {key: torch.zeros(1, 2, 3, 3), "encoder.more": torch.zeros(1)}
    torch.save(wrong, file)
    message = error_of(str(file))
    assert "1 missing: decoder.up.1.upsample.conv.bias" in message and "1 unexpected: encoder.more" in message
    assert f"1 of another shape: {key} (1x2x3x3 instead of " in message
    for name in ("decoder.up.0.block.0.conv1.weight", "encoder.down.1.block.0.conv2.bias"):
        torch.save({k: v for k, v in tensors.items() if k != name}, file)
        assert name in error_of(str(file))
