"""Published checkpoints to ours and back: to the bit, nothing in them runs, and what does not fit is named."""

import argparse
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from ig_dist import rng
from ig_dist.convert.formats import FROM_NOISE, read_config, read_format, to_ours, to_published
from ig_dist.convert.published import Conversion, convert_back, convert_published
from ig_dist.data.index import read_index
from ig_dist.data.latents import normalisation, normalised, tokenizer_latents
from ig_dist.errors import ConfigError
from ig_dist.export import read_info
from ig_dist.models.dit import DiT, DiTConfig, initialize
from ig_dist.models.presets import PRESETS
from ig_dist.training.beginning import load_weights
from tests.conftest import ROOT, run_command, succeed
from tests.foreign_shards import write_foreign
from tests.unit.conftest import Run

SIT = DiTConfig(
    depth=3, hidden_size=32, num_heads=2, patch_size=2, input_size=8, in_channels=4, num_classes=10, aux_depth=None
)
LIGHTNING = replace(SIT, norm="rmsnorm", mlp="swiglu", rope=True, time_input="one_minus_t")
MODELS = {
    "sit": replace(SIT, learn_sigma=True, time_input="one_minus_t"),
    "repa": replace(SIT, qk_norm=True),
    "ig-sit": replace(SIT, aux_depth=1),
    "lightningdit": replace(LIGHTNING, qk_norm=True, modulation_shift=False),
    "ig-lightningdit": replace(LIGHTNING, aux_depth=2, aux_init="xavier"),
}


def published_weights(name: str) -> dict[str, torch.Tensor]:
    """Weights under their published names, with a value that is not to be mistaken in every one."""
    with torch.device("meta"):
        shapes = to_published(DiT(MODELS[name]).state_dict(), name)
    if name == "repa":
        shapes |= {f"projectors.0.{layer}.weight": torch.empty(4, 4) for layer in (0, 2, 4)}
    draws = {
        n: rng.normal(1, rng.Purpose.NOISE, torch.tensor([i]), t.shape)[0] for i, (n, t) in enumerate(shapes.items())
    }
    weights = {n: (0.05 * draw).contiguous() for n, draw in draws.items()}
    weights["final_layer.linear.bias"][:2] = torch.tensor([0.0, -0.0])  # signs of zero come back, too
    return weights


def options(name: str) -> dict[str, int]:
    return {"num_heads": 2} | ({} if MODELS[name].aux_depth is None else {"aux_depth": MODELS[name].aux_depth})


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    bits = [{n: t.view(torch.int32) for n, t in weights.items()} for weights in (found, expected)]
    return bits[0].keys() == bits[1].keys() and all(torch.equal(bits[0][n], bits[1][n]) for n in bits[0])


def save(weights: dict[str, torch.Tensor], folder: Path) -> list[Path]:
    """The forms that published checkpoints come in."""
    args = argparse.Namespace(model="SiT-XL/2", lr=1e-4)
    wrapped = {f"module.{n}": t for n, t in weights.items()}
    rest = {"model": {n: t + 1 for n, t in weights.items()}, "opt": {"state": {0: {"step": 3}}}, "args": args}
    contents = {
        "plain": weights,
        "ema": {"ema": weights, **rest},
        "wrapped": {"ema": wrapped},
        "model": {"model": wrapped},
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
    safetensors.torch.save_file(weights, folder / "tensors.safetensors")
    return [*(folder / f"{name}.pt" for name in contents), folder / "tensors.safetensors"]


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_to_the_bit_in_every_form(name: str, tmp_path: Path) -> None:
    weights = published_weights(name)
    hashes = set()
    for number, file in enumerate(save(weights, tmp_path)):
        given = None if name == "repa" or number else name
        record = convert_published(file, tmp_path / f"ours{number}", published=given, **options(name))
        assert record.published == name and record.difference == 0
        assert record.model == MODELS[name]
        hashes.add(record.weights_sha256)
        for back in ("back.pt", "back.safetensors"):
            convert_back(tmp_path / f"ours{number}", tmp_path / f"{number}{back}")
        found = torch.load(tmp_path / f"{number}back.pt", weights_only=True)
        assert found.keys() == {"ema"} and same_bits(found["ema"], weights)
        assert same_bits(safetensors.torch.load_file(tmp_path / f"{number}back.safetensors"), weights)
    assert len(hashes) == 1
    (tmp_path / "any").touch()
    assert (tmp_path / "ours0/model.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
    ours = safetensors.torch.load_file(tmp_path / "ours0/model.safetensors")
    sign = -1 if name in FROM_NOISE else 1
    assert torch.equal(ours["final_layer.linear.weight"], sign * weights["final_layer.linear.weight"])
    DiT(MODELS[name]).load_state_dict(ours)
    raw = convert_published(tmp_path / "ema.pt", tmp_path / "raw", published=name, raw=True, **options(name))
    assert raw.weights_sha256 not in hashes


@pytest.mark.parametrize(("file", "name"), [("sit_ig_tiny", "ig-sit"), ("lightningdit_ig_tiny", "ig-lightningdit")])
def test_a_converted_golden_checkpoint_gives_the_published_numbers(file: str, name: str, tmp_path: Path) -> None:
    with safe_open(ROOT / f"tests/data/{file}.safetensors", "pt") as opened:
        golden = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        encoder_depth = json.loads(opened.metadata()["meta"])["model"]["encoder_depth"]
    weights = {key.removeprefix("state_dict."): t for key, t in golden.items() if key.startswith("state_dict.")}
    torch.save({"ema": weights}, tmp_path / "published.pt")
    command = ["ig-dist", "convert", tmp_path / "published.pt", tmp_path / "ours", "--aux-depth", encoder_depth]
    done = succeed([*command, "--num-heads", 4])
    record = Conversion.model_validate_json((tmp_path / "ours/convert.json").read_bytes())
    assert record.published == name and f"sha256 {record.weights_sha256}" in done.stdout
    shown = " ".join(done.stdout.split())
    assert f"{name}: 4 blocks of width 48, 4 heads" in shown and f"{record.parameters:,} parameters" in shown
    assert "converting back gives the same bits" in shown and "auxiliary head after block 2" in shown
    model = DiT(record.model)
    load_weights(model, str(tmp_path / "ours"))
    reverse = name in FROM_NOISE
    t = 1 - golden["forward.t"] if reverse else golden["forward.t"]
    output = model(golden["forward.x_t"], t, golden["forward.labels"])
    for key, velocity in (("forward.velocity", output.velocity), ("forward.aux_velocity", output.aux_velocity)):
        torch.testing.assert_close(-velocity if reverse else velocity, golden[key], rtol=1e-5, atol=1e-5)
    done = succeed(["ig-dist", "convert", tmp_path / "ours", tmp_path / "back.pt", "--json"])
    told = json.loads(done.stdout)
    assert (told["format"], told["parameters"]) == (name, record.parameters)
    assert told["written"] == str(tmp_path / "back.pt")
    assert same_bits(torch.load(tmp_path / "back.pt", weights_only=True)["ema"], weights)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_published_size_is_read_from_its_weights(preset: str) -> None:
    size, channels = (32, 4) if preset.startswith("SiT") else (16, 32)
    lightning = preset.startswith("Lightning")
    config = DiTConfig(
        **{**PRESETS[preset]._asdict(), "aux_init": "zero"},
        input_size=size,
        in_channels=channels,
        num_classes=1000,
        aux_depth=None,
        time_input="one_minus_t" if lightning else "t",
    )
    formats = ("lightningdit", "ig-lightningdit") if lightning else ("repa", "ig-sit")
    for name, depth in zip(formats, (None, 4), strict=True):
        expected = replace(config, aux_depth=depth, aux_init="xavier" if name == "ig-lightningdit" else "zero")
        with torch.device("meta"):
            weights = to_published(DiT(expected).state_dict(), name)
        assert read_format(weights, name) == name
        assert read_config(weights, name, aux_depth=depth, num_heads=None) == expected
        if depth and "XL" in preset:
            assert read_config(weights, name, aux_depth=None, num_heads=None).aux_depth == 8
        elif depth:
            with pytest.raises(ValueError, match="give --aux-depth"):
                read_config(weights, name, aux_depth=None, num_heads=None)


def test_the_format_is_read_where_the_weights_tell(tmp_path: Path) -> None:
    for name in MODELS:
        weights = published_weights(name)
        assert read_format(weights, None) == name
        for other in set(MODELS) - {name}:
            contradicted = not (name == "sit" and other == "lightningdit")  # LightningDiT can be built so, too
            contradicted &= not (name == "ig-sit" and other == "ig-lightningdit")
            if contradicted:
                with pytest.raises(ValueError, match=f"--format {other}: the weights are of {name}"):
                    read_format(weights, other)
    bare = {n: t for n, t in published_weights("repa").items() if not n.startswith("projectors.")}
    with pytest.raises(ValueError, match=r"can be of sit or repa, in which time runs in opposite.*with --format"):
        read_format(bare, None)
    assert read_format(bare, "sit") == "sit" and read_format(bare, "repa") == "repa"


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.mark, "it ran"))


def refusal(source: Path, tmp_path: Path, **given: object) -> str:
    """The one line that a conversion ends with; nothing is left."""
    before = set(tmp_path.iterdir())
    with pytest.raises(ConfigError) as caught:
        convert_published(source, tmp_path / "refused", **{**options("ig-sit"), **given})
    assert set(tmp_path.iterdir()) == before and "\n" not in str(caught.value)
    return str(caught.value)


def test_hostile_pickles_are_refused_and_do_not_run(tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "bad.pt"
    weights = published_weights("ig-sit")
    for content in (Hostile(mark), {"ema": weights, "args": Hostile(mark)}, {"ema": {**weights, "x": Hostile(mark)}}):
        for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
            write(content, file)
            assert "is not read because that could run code" in refusal(file, tmp_path)
    torch.save({"ema": weights, "args": argparse.Namespace(hook=Hostile(mark))}, file)
    assert "that could run code" in refusal(file, tmp_path)
    assert not mark.exists()
    done = run_command(["ig-dist", "convert", file, tmp_path / "refused"])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not mark.exists()


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    file, weights = tmp_path / "bad.pt", published_weights("ig-sit")

    def refused(**change: torch.Tensor | None) -> str:
        changed = {**weights, **{name.replace("__", "."): tensor for name, tensor in change.items()}}
        torch.save({n: t for n, t in changed.items() if t is not None}, file)
        return refusal(file, tmp_path)

    message = refused(blocks__1__attn__proj__bias=None, extra=torch.ones(1), t_embedder__mlp__0__bias=None)
    assert "lacks t_embedder.mlp.0.bias, blocks.1.attn.proj.bias and has extra" in message
    message = refused(**{f"extra{i}": torch.ones(1) for i in range(9)})
    assert "has extra0, extra1, extra2, extra3, extra4, extra5 and 3 more" in message
    message = refused(final_layer_xr__linear__weight=torch.ones(16, 8))
    assert "final_layer_xr.linear.weight is (16, 8), such a model has (16, 32)" in message
    assert "pos_embed is missing: this is no SiT or LightningDiT" in refused(pos_embed=None)
    assert "pos_embed has shape (2,), it should have 3 dimensions" in refused(pos_embed=torch.ones(2))
    assert "velocity is not finite" in refused(final_layer__linear__bias=torch.full((16,), torch.nan))
    assert "'labels' is not a weight" in refused(labels=torch.ones(3, dtype=torch.int64))
    file.write_bytes(file.read_bytes()[:3000])
    assert "is damaged" in refusal(file, tmp_path)
    torch.save(torch.zeros(3), file)
    assert "holds no weights" in refusal(file, tmp_path)
    assert "no file at" in refusal(tmp_path / "absent.pt", tmp_path)


def test_what_no_weight_tells_is_asked_for(tmp_path: Path) -> None:
    torch.save(published_weights("ig-sit"), tmp_path / "a.pt")
    assert "3 blocks of width 32 are no published size: give --num-heads" in refusal(
        tmp_path / "a.pt", tmp_path, num_heads=None
    )
    assert "which block the auxiliary head reads: give --aux-depth" in refusal(
        tmp_path / "a.pt", tmp_path, aux_depth=None
    )
    assert "aux_depth 3 is outside 1..2" in refusal(tmp_path / "a.pt", tmp_path, aux_depth=3)
    done = run_command(["ig-dist", "convert", tmp_path / "a.pt", tmp_path / "b", "--format", "ig_sit"])
    assert done.returncode == 2 and "did you mean 'ig-sit'? There are sit, repa," in " ".join(done.stderr.split())


def test_what_cannot_go_back_is_refused(tmp_path: Path) -> None:
    torch.save(published_weights("ig-sit"), tmp_path / "a.pt")
    convert_published(tmp_path / "a.pt", tmp_path / "ours", **options("ig-sit"))

    def refused(**given: object) -> str:
        with pytest.raises(ConfigError) as caught:
            convert_back(tmp_path / "ours", tmp_path / "back.pt", **given)
        assert not (tmp_path / "back.pt").exists()
        return str(caught.value)

    assert "cannot be written as repa: it has an auxiliary head" in refused(published="repa")
    assert "time embedding takes t (model.time_input)" in refused(published="ig-lightningdit")
    with pytest.raises(ConfigError, match="exists: give a folder that does not"):
        convert_published(tmp_path / "a.pt", tmp_path / "ours")
    with pytest.raises(ConfigError, match="exists: give a file that does not"):
        convert_back(tmp_path / "ours", tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="holds no weights of ours"):
        convert_back(tmp_path, tmp_path / "back.pt")
    with (tmp_path / "ours/model.safetensors").open("r+b") as opened:
        opened.seek(-3, 2)
        opened.write(b"?")
    assert "is missing or damaged (its hash differs)" in refused()


def test_a_model_trained_here_goes_back_by_its_format(tmp_path: Path, digits_index: Path) -> None:
    torch.save(weights_of_digits(aux_depth=1), tmp_path / "a.pt")
    convert_published(tmp_path / "a.pt", tmp_path / "ours", aux_depth=1, num_heads=2, index=str(digits_index))
    (tmp_path / "ours/convert.json").unlink()  # what is left is what `ig-dist export` writes
    with pytest.raises(ConfigError, match="was trained here: say which format to write with --format"):
        convert_back(tmp_path / "ours", tmp_path / "back.pt")
    convert_back(tmp_path / "ours", tmp_path / "back.pt", published="ig-sit")
    assert same_bits(torch.load(tmp_path / "back.pt", weights_only=True)["ema"], weights_of_digits(aux_depth=1))


def weights_of_digits(aux_depth: int | None) -> dict[str, torch.Tensor]:
    model = DiT(replace(SIT, in_channels=1, aux_depth=aux_depth))
    initialize(model, 0)
    return to_published(model.state_dict(), "ig-sit")


def test_converted_weights_are_sampled_from_like_a_run(tmp_path: Path, digits_index: Path) -> None:
    torch.save({"ema": weights_of_digits(aux_depth=1)}, tmp_path / "a.pt")
    command = ["ig-dist", "convert", tmp_path / "a.pt", tmp_path / "run", "--aux-depth", 1, "--num-heads", 2]
    done = run_command([*command, "--data", digits_index])
    assert done.returncode == 0 and "sample from it with `ig-dist sample" in " ".join(done.stdout.split()), done.stderr
    small = ["sample.num=8", "sample.steps=2", "sample.unit_size=4"]
    done = run_command(["ig-dist", "sample", tmp_path / "run", *small, "--ig-scale", "1.4"])
    assert done.returncode == 0 and "8 images" in done.stdout, done.stderr
    done = run_command(["ig-dist", "sample", tmp_path / "run", *small, "--raw"])
    assert done.returncode == 2 and "holds exported weights, and only these" in done.stderr
    succeed(["ig-dist", "report", tmp_path / "run"])
    page = (tmp_path / "run/report.html").read_text()
    assert "<dt>Published as</dt><dd>ig-sit</dd>" in page and 'id="training"' not in page
    assert "data:image/png;base64," in page  # of the samples
    with pytest.raises(ConfigError, match=r"takes latents 4x8x8 of 10 classes, but .* has latents 1x8x8 of 10 classes"):
        torch.save(published_weights("ig-sit"), tmp_path / "b.pt")
        convert_published(tmp_path / "b.pt", tmp_path / "x", **options("ig-sit"), index=str(digits_index))
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_with_a_scale_stands_for_an_index_and_ig_needs_a_head(tmp_path: Path) -> None:
    torch.save({"ema": weights_of_digits(aux_depth=None)}, tmp_path / "a.pt")
    convert_published(tmp_path / "a.pt", tmp_path / "run", published="repa", num_heads=2, tokenizer="pixel")
    succeed(["ig-dist", "sample", tmp_path / "run", "sample.num=2", "sample.steps=1"])
    done = run_command(["ig-dist", "sample", tmp_path / "run", "--ig-scale", "1.4"])
    assert done.returncode == 2 and "no auxiliary head" in done.stderr


def test_weights_are_sampled_with_the_published_statistics_and_no_data(tmp_path: Path, run: Run) -> None:
    from tests.autoencoders import save_vae  # slow to import: only here

    published, channels = tmp_path / "latents_stats.pt", 4
    mean, std = torch.linspace(-1, 1, channels).view(1, -1, 1, 1), torch.linspace(0.5, 4, channels).view(1, -1, 1, 1)
    torch.save({"mean": mean, "std": std}, published)
    save_vae(tmp_path / "vae", scaling_factor=None)  # of VA-VAE's kind: the tokenizer has no scale
    torch.save({"ema": published_weights("ig-lightningdit")}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"has no scale of its own: give --latent-stats latents_stats\.pt"):
        convert_published(tmp_path / "a.pt", tmp_path / "run", aux_depth=2, tokenizer=str(tmp_path / "vae"))
    with pytest.raises(ConfigError, match="not what makes them: give --tokenizer too"):
        convert_published(tmp_path / "a.pt", tmp_path / "run", aux_depth=2, latent_stats=published)
    given = {"aux_depth": 2, "tokenizer": str(tmp_path / "vae"), "latent_stats": published}
    convert_published(tmp_path / "a.pt", tmp_path / "run", **given)
    latent = read_info(tmp_path / "run").latent
    seen = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    back = tokenizer_latents(seen, normalisation(latent, seen.device))  # their way back to the autoencoder
    torch.testing.assert_close(back, seen * std + mean)
    done = run_command(["ig-dist", "sample", tmp_path / "run", "--ig-scale", 1.4, "sample.num=2", "sample.steps=2"])
    assert done.returncode == 0 and "2 images" in done.stdout, done.stderr
    command = ["ig-dist", "convert", tmp_path / "a.pt", tmp_path / "pixels", "--aux-depth", 2, "--tokenizer", "pixel"]
    done = run_command([*command, "--latent-stats", published])
    assert done.returncode == 0 and "sample from it with `ig-dist sample" in " ".join(done.stdout.split()), done.stderr
    assert read_info(tmp_path / "pixels").latent == latent

    truth = write_foreign(str(tmp_path / "shards"))["latents"]
    options = ["--shards", tmp_path / "shards", "--tokenizer", "pixel", "--latent-key", "npy"]
    assert run("index_shards", *options, "--latent-stats", published).code == 0
    info = read_index(str(tmp_path / "shards")).info
    expected = (torch.from_numpy(truth) - mean) / std  # what their data set hands to the model
    assert (info.latent.shift, info.latent.scale) == (latent.shift, latent.scale)
    torch.testing.assert_close(
        normalised(torch.from_numpy(truth), None, info.latent, normalisation(info.latent, torch.device("cpu"))),
        expected,
    )
    assert info.statistics.mean == pytest.approx(expected.double().mean((0, 2, 3)).tolist(), abs=1e-6)

    # an index that is there is given them without a look at its shards, and back
    before = read_index(str(tmp_path / "shards"))
    plain = ["--shift", 0, "--scale", "1"]
    assert "needs --latent-stats FILE" in run("index_shards", *options, "--renormalise", "--shift", 0).err
    assert run("index_shards", *options, "--renormalise", *plain).code == 0
    info = read_index(str(tmp_path / "shards")).info
    assert info.statistics.mean == pytest.approx(truth.astype(np.float64).mean((0, 2, 3)).tolist())
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    assert run("index_shards", *options, "--renormalise", "--latent-stats", published).code == 0
    after = read_index(str(tmp_path / "shards"))
    (tmp_path / "shards" / f"index.{before.sha256[:12]}.json").replace(tmp_path / "shards" / "index.json")
    assert read_index(str(tmp_path / "shards")).sha256 == before.sha256  # the first one is kept, to the byte
    assert after.info.statistics.std == pytest.approx(before.info.statistics.std)
    changed = {"latent": before.info.latent, "statistics": before.info.statistics}
    assert after.info.latent == before.info.latent and after.info.model_copy(update=changed) == before.info

    def refused(*more: object) -> str:
        ran = run("index_shards", *options, "--force", "--latent-stats", published, *more)
        assert ran.code == 2
        return ran.err

    assert "says what --shift and --scale say" in refused("--shift", 0)
    for held, said in (
        ({"mean": mean}, "has no 'std' of one number a channel"),
        ({"mean": mean, "std": 0 * std}, "std above 0"),
        ({"mean": mean[:, :3], "std": std[:, :3]}, "--latent-stats has 3 numbers, the latents have 4"),
        ({"mean": mean, "std": Hostile(tmp_path / "mark")}, "that could run code"),
    ):
        torch.save(held, published)
        assert said in refused("--renormalise")
    assert not (tmp_path / "mark").exists()
    published.unlink()
    assert "no such file" in refused("--renormalise")


def test_training_begins_with_converted_weights_and_a_new_head(tmp_path: Path) -> None:
    weights = published_weights("lightningdit")
    torch.save({"ema": weights}, tmp_path / "a.pt")
    convert_published(tmp_path / "a.pt", tmp_path / "ours", **options("lightningdit"))
    model = DiT(replace(MODELS["lightningdit"], aux_depth=1))
    initialize(model, 0)
    load_weights(model, str(tmp_path / "ours"))
    ours, _ = to_ours(weights, "lightningdit")
    assert all(torch.equal(model.state_dict()[n], t) for n, t in ours.items())
    other = DiT(replace(MODELS["lightningdit"], hidden_size=16))
    with pytest.raises(ConfigError, match=r"is of another model: blocks.0.adaLN_modulation.1.bias is \(128,\), this"):
        load_weights(other, str(tmp_path / "ours"))
