"""What inductor makes of a block, by its own schedule, and the tokens between blocks in bf16."""

import pytest
import torch

from benchmarks.roofline import count
from ig_dist.config.file import load_config
from ig_dist.errors import ConfigError
from ig_dist.models.dit import DiT, DiTConfig
from ig_dist.parallel.build import apply


def test_a_compiled_block_has_few_kernels_and_norms_modulates_and_gates_in_one_each() -> None:
    for preset, share in (("SiT-S/2", 0.75), ("LightningDiT-B/1", 0.5)):
        found = count(preset, 8)
        kernels = found["compiled"]
        assert len(kernels) <= 55  # of which casts are 15, matrix products 15 and attention 2
        names = [kernel.name for kernel in kernels]
        assert (
            names.count("matrix product") == 15 and names.count("attention") == names.count("attention backward") == 1
        )
        modulated = [name for name in names if "addcmul" in name and ("native_layer_norm" in name or "rsqrt" in name)]
        assert len(modulated) == 2 and "add_addcmul" in modulated[1]  # the second reads the first gate's sum too
        moved = {form: sum(kernel.bytes for kernel in kernels) for form, kernels in found.items()}
        assert moved["compiled"] < share * moved["eager"]
        flops = {form: sum(kernel.flops for kernel in kernels) for form, kernels in found.items()}
        assert flops["compiled"] == flops["eager"]


def test_tokens_between_blocks_in_bf16() -> None:
    config = DiTConfig(3, 32, 2, patch_size=2, input_size=8, in_channels=4, num_classes=10, aux_depth=1)
    torch.manual_seed(0)
    wanted, found = DiT(config), DiT(config)
    found.load_state_dict(wanted.state_dict())
    for model, residual in ((wanted, "fp32"), (found, "bf16")):
        overrides = ["train.precision=bf16", f"train.residual={residual}"]
        apply(model, load_config("configs/digits.yaml", overrides), torch.device("cpu"))
    kinds: list[torch.dtype] = []
    for block in found.blocks:
        block.register_forward_hook(lambda _, given, out: kinds.extend([given[0].dtype, out.dtype]))
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    expected, got = wanted(*inputs).velocity.float(), found(*inputs).velocity.float()
    assert kinds == [torch.bfloat16] * 6
    assert 0 < (got - expected).norm() < 0.03 * expected.norm()
    with pytest.raises(ConfigError, match=r"train.residual=bf16 needs train.precision=bf16"):
        load_config("configs/digits.yaml", ["train.residual=bf16"])
