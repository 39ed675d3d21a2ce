"""Model sizes, initial weights, compilation and the refusal of impossible configs."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d
from torch.utils._python_dispatch import TorchDispatchMode

from ig_dist import rng
from ig_dist.models.dit import DiT, DiTConfig, count_parameters, initialize
from ig_dist.models.layers import (
    AffineNorm,
    ModulatedNorm,
    PatchEmbed,
    RotaryTable,
    rotary_table,
    rotate,
    sincos_pos_embed,
)
from ig_dist.models.presets import PRESETS, forward_flops

TINY = DiTConfig(
    depth=3, hidden_size=32, num_heads=2, patch_size=2, input_size=8, in_channels=4, num_classes=10, aux_depth=1
)
LIGHTNING = replace(TINY, norm="rmsnorm", mlp="swiglu", rope=True, aux_init="xavier")
OTHERS = replace(TINY, qk_norm=True, modulation_shift=False, learn_sigma=True)
VARIANTS = {"sit": TINY, "lightningdit": LIGHTNING, "others": OTHERS, "rms-qk": replace(LIGHTNING, qk_norm=True)}
# All parameters with both heads and the sine-cosine table, 1,000 classes; latents 4 x 32 x 32, or 32 x 16 x 16.
PUBLISHED_COUNTS = {
    "SiT-S/2": 33_259_040,
    "SiT-S/4": 33_240_704,
    "SiT-S/8": 33_443_840,
    "SiT-B/2": 131_693_600,
    "SiT-B/4": 131_656_832,
    "SiT-B/8": 132_062_720,
    "SiT-L/2": 460_202_016,
    "SiT-L/4": 460_152_960,
    "SiT-L/8": 460_694_016,
    "SiT-XL/2": 677_786_144,
    "SiT-XL/4": 677_730_944,
    "SiT-XL/8": 678_339_584,
    "LightningDiT-B/1": 131_762_752,
    "LightningDiT-B/2": 131_836_672,
    "LightningDiT-L/1": 460_285_984,
    "LightningDiT-L/2": 460_384_480,
    "LightningDiT-XL/1": 677_951_296,
    "LightningDiT-XL/2": 678_062_080,
    "LightningDiT-1p0B/1": 1_034_173_504,
    "LightningDiT-1p0B/2": 1_034_321_152,
    "LightningDiT-1p6B/1": 1_638_252_400,
    "LightningDiT-1p6B/2": 1_638_424_624,
}


def published_config(name, aux_depth=4):
    shape = PRESETS[name]._asdict()
    size, channels = (32, 4) if name.startswith("SiT") else (16, 32)
    return DiTConfig(**shape, input_size=size, in_channels=channels, num_classes=1000, aux_depth=aux_depth)


def initialized(config, seed):
    model = DiT(config)
    initialize(model, seed)
    return model


def inputs(batch=2, config=TINY):
    ids = torch.arange(batch)
    x = rng.normal(0, rng.Purpose.NOISE, ids, (config.in_channels, config.input_size, config.input_size))
    return x, torch.linspace(0.1, 0.9, batch), ids % config.num_classes


def randomized(config):
    """Every parameter random, so that no path through the model is switched off by its zero init."""
    model = DiT(config)
    for i, parameter in enumerate(model.parameters()):
        noise = rng.normal(1, rng.Purpose.NOISE, torch.tensor([i]), parameter.shape)[0]
        parameter.data.copy_(0.2 * noise)
    return model


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = DiT(published_config(name))
    assert count_parameters(model) == PUBLISHED_COUNTS[name]


def test_no_preset_is_left_unpinned_and_the_table_is_not_trainable():
    assert set(PRESETS) == set(PUBLISHED_COUNTS)
    with torch.device("meta"):
        model = DiT(published_config("SiT-XL/2"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 677_491_232
    assert "pos_embed" in model.state_dict() and "pos_embed" not in dict(model.named_parameters())


def test_forward_flops():
    # The paper's 118.6 GMAC at 2 FLOP each; attention is 28 * 2 * (2 * 256^2 * 1152) of it.
    with_head = forward_flops(published_config("SiT-XL/2"))
    assert with_head == pytest.approx(237.2e9, rel=0.005)
    width, tokens = 1152, 256
    head = 2 * tokens * width * 16 + 2 * width * 2 * width
    assert with_head - forward_flops(published_config("SiT-XL/2", aux_depth=None)) == head
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width + 2 * 6 * width**2
    assert forward_flops(replace(published_config("SiT-XL/2"), depth=29)) - with_head == block


GFLOPS = {  # of a forward with both heads, 2 per multiply-accumulate
    "SiT-S/2": 12.1,
    "SiT-S/4": 2.8,
    "SiT-S/8": 0.7,
    "SiT-B/2": 46.0,
    "SiT-B/4": 11.1,
    "SiT-B/8": 2.8,
    "SiT-L/2": 161.4,
    "SiT-L/4": 39.4,
    "SiT-L/8": 10.0,
    "SiT-XL/2": 237.2,
    "SiT-XL/4": 58.1,
    "SiT-XL/8": 14.8,
    "LightningDiT-B/1": 46.0,
    "LightningDiT-B/2": 11.2,
    "LightningDiT-L/1": 161.4,
    "LightningDiT-L/2": 39.4,
    "LightningDiT-XL/1": 237.3,
    "LightningDiT-XL/2": 58.1,
    "LightningDiT-1p0B/1": 358.3,
    "LightningDiT-1p0B/2": 88.4,
    "LightningDiT-1p6B/1": 566.7,
    "LightningDiT-1p6B/2": 140.1,
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_forward_flops_of_every_size(name):
    config = published_config(name)
    width, patch, tokens = config.hidden_size, config.patch_size, config.grid_size**2
    hidden = {"gelu": 2 * 4 * width, "swiglu": 3 * int(2 / 3 * 4 * width)}[config.mlp]
    block = tokens * (4 * width**2 + hidden * width) + 2 * tokens**2 * width + 6 * width**2
    patches = tokens * width * patch**2 * config.in_channels  # of the embedding, and of each head
    rest = patches + 256 * width + width**2 + 2 * (patches + 2 * width**2)
    assert forward_flops(config) == 2 * (config.depth * block + rest)
    assert forward_flops(config) / 1e9 == pytest.approx(GFLOPS[name], abs=0.05)


def test_position_table_rows_first_and_columns_in_the_first_half():
    table = sincos_pos_embed(8, 3)[0].reshape(3, 3, 8)
    assert torch.equal(table[0, :, :4], table[2, :, :4])  # the same in every row: it encodes the column
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    angle = torch.tensor([2.0, 2.0 / 100])
    expected = torch.cat([angle.sin(), angle.cos()])
    torch.testing.assert_close(table[1, 2, :4], expected)


def test_no_head_without_aux_depth():
    model = initialized(replace(TINY, aux_depth=None), 0)
    assert not any("aux" in name for name in model.state_dict())
    assert not model.has_aux_head
    output = model(*inputs())
    assert output.aux_velocity is None and output.velocity.shape == (2, 4, 8, 8)


def test_aux_head_reads_the_block_it_is_told_to():
    model = randomized(TINY)
    before = model(*inputs())
    model.blocks[1].attn.proj.bias.data += 1.0  # block 2 of 3; the head sits after block 1
    after = model(*inputs())
    assert torch.equal(before.aux_velocity, after.aux_velocity)
    assert not torch.equal(before.velocity, after.velocity)
    model.blocks[0].attn.proj.bias.data += 1.0
    assert not torch.equal(after.aux_velocity, model(*inputs()).aux_velocity)


@pytest.mark.parametrize("variant", VARIANTS)
def test_time_input_one_minus_t(variant):
    TINY = VARIANTS[variant]
    model = randomized(TINY)
    flipped = randomized(replace(TINY, time_input="one_minus_t"))
    x, t, labels = inputs()
    assert torch.equal(model(x, 1 - t, labels).velocity, flipped(x, t, labels).velocity)
    assert not torch.allclose(model(x, t, labels).velocity, flipped(x, t, labels).velocity)


def test_null_label_is_the_last_row_and_is_used():
    model = randomized(TINY)
    x, t, labels = inputs()
    assert model.null_label == 10 and model.y_embedder.embedding_table.num_embeddings == 11
    null = model(x, t, torch.full_like(labels, model.null_label)).velocity
    assert not torch.allclose(null, model(x, t, labels).velocity)


def test_rotary_angles_turn_neighbours_by_row_then_column():
    cos, sin = rotary_table(8, 3)
    cos, sin = cos.reshape(3, 3, 8), sin.reshape(3, 3, 8)
    angle = torch.tensor([2.0, 2.0, 0.02, 0.02, 1.0, 1.0, 0.01, 0.01])  # row 2, column 1
    torch.testing.assert_close(cos[2, 1], angle.cos())
    torch.testing.assert_close(sin[2, 1], angle.sin())
    x = rng.normal(0, rng.Purpose.NOISE, torch.arange(1), (2, 9, 8))
    rope = RotaryTable(8, 3)()
    turned = rotate(x, rope)
    as_complex = torch.view_as_complex(x.reshape(1, 2, 3, 3, 4, 2))[:, :, 2, 1] * torch.polar(torch.ones(4), angle[::2])
    torch.testing.assert_close(turned.reshape(1, 2, 3, 3, 8)[:, :, 2, 1], torch.view_as_real(as_complex).flatten(-2))
    queries, keys = (rotate(x[:, :, :1].expand(-1, -1, 9, -1), rope) for _ in range(2))
    products = (queries[:, :, :, None] * keys[:, :, None]).sum(-1)  # depend on the difference of positions only
    torch.testing.assert_close(products[:, :, 0, 4], products[:, :, 4, 8])


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_with_weights_are_torchs_and_round_weights_under_autocast(kind):
    norm, reference = AffineNorm(kind, 12, eps=1e-6), {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[kind](12, 1e-6)
    for i, (own, theirs) in enumerate(zip(norm.parameters(), reference.parameters(), strict=True)):
        draw = rng.normal(1, rng.Purpose.NOISE, torch.tensor([i]), (12,))[0]
        own.data, theirs.data = draw.clone(), draw.clone()
    x = 3 * rng.normal(0, rng.Purpose.NOISE, torch.arange(2), (5, 12)) + 1
    torch.testing.assert_close(norm(x), reference(x))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = norm(x)
        for parameter in norm.parameters():
            parameter.data = parameter.data.bfloat16().float()
        assert rounded.dtype == torch.float32 and torch.equal(rounded, norm(x))
    assert not torch.equal(rounded, reference(x))


def test_queries_and_keys_are_normed():
    attention = randomized(replace(TINY, qk_norm=True)).blocks[0].attn
    x = rng.normal(0, rng.Purpose.NOISE, torch.arange(2), (5, 32))
    before = attention(x, None)
    attention.qkv.weight.data[:64] *= 7.0  # of queries and keys: a norm takes the factor out
    attention.qkv.bias.data[:64] *= 7.0
    torch.testing.assert_close(attention(x, None), before, rtol=1e-3, atol=1e-4)
    attention.q_norm.weight.data *= 2.0
    assert not torch.allclose(attention(x, None), before, rtol=1e-2)


def test_position_reaches_attention_by_rope():
    model = randomized(replace(LIGHTNING, patch_size=1))
    model.pos_embed.zero_()
    x, t, labels = inputs()
    shifted = model(x.roll(1, dims=3), t, labels).velocity.roll(-1, dims=3)
    with_rope = (model(x, t, labels).velocity - shifted).abs().max()
    model.feat_rope.freqs_cos.fill_(1.0)
    model.feat_rope.freqs_sin.zero_()
    shifted = model(x.roll(1, dims=3), t, labels).velocity.roll(-1, dims=3)
    torch.testing.assert_close(model(x, t, labels).velocity, shifted, rtol=1e-4, atol=1e-4)
    assert with_rope > 0.002


def test_learned_sigma_is_the_second_half_of_the_channels_and_left_alone():
    model, plain = randomized(replace(TINY, learn_sigma=True)), randomized(TINY)
    assert model.final_layer.linear.weight.shape == (2 * 2 * 8, 32)
    weights = model.state_dict()
    for name in (
        "final_layer.linear.weight",
        "final_layer.linear.bias",
        "aux_layer.linear.weight",
        "aux_layer.linear.bias",
    ):
        weights[name] = weights[name].unflatten(0, (4, 8))[:, :4].flatten(0, 1)  # (pixels of a patch, channels)
    plain.load_state_dict(weights)
    for own, expected in zip(model(*inputs()), plain(*inputs()), strict=True):
        torch.testing.assert_close(own, expected)


def test_modulation_without_shift_has_four_parts():
    model = randomized(OTHERS)
    assert model.blocks[0].adaLN_modulation[1].weight.shape == (4 * 32, 32)
    assert model.final_layer.adaLN_modulation[1].weight.shape == (2 * 32, 32)
    shifting = randomized(replace(OTHERS, modulation_shift=True))
    weights = model.state_dict()
    for i in range(3):
        for name in (f"blocks.{i}.adaLN_modulation.1.weight", f"blocks.{i}.adaLN_modulation.1.bias"):
            scale_msa, gate_msa, scale_mlp, gate_mlp = weights[name].chunk(4)
            zero = torch.zeros_like(scale_msa)
            weights[name] = torch.cat([zero, scale_msa, gate_msa, zero, scale_mlp, gate_mlp])
    shifting.load_state_dict(weights)
    torch.testing.assert_close(shifting(*inputs()).velocity, model(*inputs()).velocity)


def test_initial_weights_are_a_function_of_seed_and_name():
    model, again, other = initialized(TINY, 3), initialized(TINY, 3), initialized(TINY, 4)
    deeper = initialized(replace(TINY, depth=5, aux_depth=None), 3)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
        if not name.startswith("aux_layer"):
            assert torch.equal(weight, deeper.state_dict()[name]), name
        if weight.any() and name != "pos_embed":
            assert not torch.equal(weight, other.state_dict()[name]), name
    blocks = [block.attn.qkv.weight for block in model.blocks]
    assert not torch.equal(blocks[0], blocks[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_initialize_completes_a_meta_model_and_ignores_the_global_generator(variant):
    expected = initialized(VARIANTS[variant], 3)
    with torch.device("meta"):
        model = DiT(VARIANTS[variant])
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    state = torch.get_rng_state()
    initialize(model, 3)
    assert torch.equal(state, torch.get_rng_state())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name


def test_initial_weights_follow_the_published_scheme():
    model = initialized(replace(TINY, hidden_size=128), 0)
    for name, weight in model.named_parameters():
        if "adaLN" in name or name.startswith(("final_layer", "aux_layer")) or name.endswith("bias"):
            assert not weight.any(), name
        elif name.startswith(("y_embedder", "t_embedder")):
            assert weight.std().item() == pytest.approx(0.02, rel=0.06), name
        else:
            flat = weight.flatten(1)
            bound = (6 / sum(flat.shape)) ** 0.5
            assert 0.98 * bound < flat.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03), name
    output = model(*inputs())
    assert not output.velocity.any() and not output.aux_velocity.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_lightningdit_starts_with_identity_norms_and_a_drawn_auxiliary_head(variant):
    config = VARIANTS[variant]
    model = initialized(config, 0)
    norms = {name: p for name, p in model.named_parameters() if "norm" in name}
    assert all((p == (0 if name.endswith("bias") else 1)).all() for name, p in norms.items())
    blocks, per_block = config.depth, (2 if config.norm == "rmsnorm" else 0) + (2 if config.qk_norm else 0)
    biases = 2 * blocks if config.qk_norm and config.norm == "layernorm" else 0
    assert len(norms) == blocks * per_block + (2 if config.norm == "rmsnorm" else 0) + biases
    for weight in (model.aux_layer.linear.weight, model.aux_layer.adaLN_modulation[1].weight):
        assert weight.any() == (config.aux_init == "xavier")
    assert not model.final_layer.linear.weight.any() and not model.aux_layer.linear.bias.any()


class Calls(TorchDispatchMode):
    """Counts what PyTorch's kernels are asked for: names of operators, and casts of parameters to another type."""

    def __init__(self, model):
        super().__init__()
        self.names, self.casts = Counter(), Counter()
        self._places = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self._places:
            self.casts[self._places[args[0].data_ptr()]] += 1
        return function(*args, **(kwargs or {}))


def test_modulated_norms_and_patches_are_the_plain_mathematics():
    x, shift, scale = torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(2, 8)
    for kind in ("layernorm", "rmsnorm"):
        norm, plain = ModulatedNorm(kind, 8), AffineNorm(kind, 8, 1e-6)
        if norm.weight is not None:
            norm.weight.data = plain.weight.data = torch.randn(8)
        for bf16, bound in ((False, {}), (True, {"rtol": 0.01, "atol": 0.03})):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                scaled = plain(x) * (1 + scale[:, None])
                torch.testing.assert_close(norm(x, shift, scale), scaled + shift[:, None], **bound)
                torch.testing.assert_close(norm(x, None, scale), scaled, **bound)
    patches = PatchEmbed(2, 4, 32)
    latents = torch.randn(2, 4, 8, 6)
    strided = conv2d(latents, patches.proj.weight, patches.proj.bias, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches(latents), strided)


@pytest.mark.parametrize("variant", ["sit", "lightningdit", "others"])
def test_tokens_are_never_copied_into_another_layout(variant):
    model = randomized(VARIANTS[variant])
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: layouts.append(given[0].is_contiguous()))
    layouts = []
    with Calls(model) as calls:
        output = model(*inputs())
        (output.velocity.square().mean() + output.aux_velocity.square().mean()).backward()
    assert layouts == [True] * model.config.depth
    of_latents = 1 + 2 * 2 + model.config.learn_sigma  # cut into patches, put together
    assert calls.names["clone"] == of_latents and not calls.names["copy_"]


def test_autocast_casts_each_weight_once_a_forward():
    model = randomized(TINY)
    with Calls(model) as calls, torch.autocast("cpu", torch.bfloat16):
        model(*inputs())
    tables = {"y_embedder.embedding_table.weight"}
    assert calls.casts == {name: 1 for name, _ in model.named_parameters() if name not in tables}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_compiles_as_one_graph(variant):
    TINY = VARIANTS[variant]
    model = randomized(TINY)
    expected = model(*inputs()).velocity
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")  # a graph break raises; no code generation needed
    torch.testing.assert_close(model(*inputs()).velocity, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_module_takes_float32_inputs(variant):
    output = randomized(VARIANTS[variant]).bfloat16()(*inputs())
    assert output.velocity.dtype == torch.bfloat16 and output.velocity.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_keeps_close_to_fp32(variant):
    model = randomized(VARIANTS[variant])
    expected = model(*inputs()).velocity
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*inputs()).velocity
    assert 0 < (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aux_depth": 0}, r"aux_depth 0 is outside 1\.\.2"),
        ({"aux_depth": 3}, r"aux_depth 3 is outside 1\.\.2"),
        ({"patch_size": 3}, "patch_size 3 does not divide input_size 8"),
        ({"num_heads": 5}, "num_heads 5 does not divide hidden_size 32"),
        ({"hidden_size": 34}, "hidden_size 34 is not a multiple of 4"),
        ({"depth": 0}, "depth is 0"),
        ({"time_input": "1-t"}, "time_input is '1-t'"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'; write 'layernorm' or 'rmsnorm'"),
        ({"mlp": "relu"}, "mlp is 'relu'"),
        ({"aux_init": "ones"}, "aux_init is 'ones'"),
        ({"rope": True, "num_heads": 16}, "hidden_size 32 over num_heads 16 is 2; choose another num_heads"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        replace(TINY, **change)
    assert "\n" not in str(caught.value)
