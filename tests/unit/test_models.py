"""Model sizes, initial weights, compilation and the refusal of impossible configs."""

from dataclasses import replace

import pytest
import torch

from ig_dist import rng
from ig_dist.models.dit import DiT, DiTConfig, count_parameters, initialize
from ig_dist.models.layers import sincos_pos_embed
from ig_dist.models.presets import PRESETS, forward_flops

TINY = DiTConfig(
    depth=3, hidden_size=32, num_heads=2, patch_size=2, input_size=8, in_channels=4, num_classes=10, aux_depth=1
)
# All parameters with both heads and the sine-cosine table, 1,000 classes, 32 x 32 x 4.
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
}


def published_config(name, aux_depth=4):
    shape = PRESETS[name]._asdict()
    return DiTConfig(**shape, input_size=32, in_channels=4, num_classes=1000, aux_depth=aux_depth)


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


def test_time_input_one_minus_t():
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


def test_initialize_completes_a_meta_model_and_ignores_the_global_generator():
    expected = initialized(TINY, 3)
    with torch.device("meta"):
        model = DiT(TINY)
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


def test_a_block_compiles_as_one_graph():
    model = randomized(TINY)
    expected = model(*inputs()).velocity
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")  # a graph break raises; no code generation needed
    torch.testing.assert_close(model(*inputs()).velocity, expected)


def test_bfloat16_module_takes_float32_inputs():
    output = randomized(TINY).bfloat16()(*inputs())
    assert output.velocity.dtype == torch.bfloat16 and output.velocity.isfinite().all()


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
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        replace(TINY, **change)
    assert "\n" not in str(caught.value)
