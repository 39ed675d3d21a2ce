"""The fast ways of sampling equal the plain ones: weights cast once, compiled blocks, batches of one size."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ig_dist.arithmetic import arithmetic, compiled
from ig_dist.autoencoders.tokenizers import PIXEL
from ig_dist.models.dit import DiT, DiTConfig
from ig_dist.models.presets import PRESETS
from ig_dist.sampling.generate import make_unit, solve_unit
from ig_dist.sampling.solving import Models, Sampler, as_planned, compiles, decode
from ig_dist.training.meter import compiled_graphs
from tests.counting import Operations
from tests.scoring import make_plan, tiny_models

MODELS, INFO = tiny_models()
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"depth": 3, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "input_size": 8}
SHAPE: dict[str, Any] = {"in_channels": 4, "num_classes": 10, "aux_depth": 1}
LIGHTNING: dict[str, Any] = {"norm": "rmsnorm", "mlp": "swiglu", "rope": True, "qk_norm": True}


def random_model(**layers: Any) -> DiT:
    model = DiT(DiTConfig(**SIZES, **SHAPE, **layers)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    return model


class Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the casts of some tensors to bf16."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights, self.count = {weight.data_ptr() for weight in weights}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name == "aten::_to_copy" and kwargs.get("dtype") == torch.bfloat16:
            self.count += args[0].data_ptr() in self._weights
        return func(*args, **kwargs)


@pytest.mark.parametrize("layers", [{}, {"qk_norm": True}, LIGHTNING], ids=["sit", "sit with norms", "lightningdit"])
def test_weights_are_cast_once_to_the_bits_that_autocast_gives(layers: dict[str, Any]) -> None:
    model = random_model(**layers)
    asked = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 1.0]), torch.tensor([3, 0, 10])
    ready = as_planned(model, "bf16", compiling=False)
    found, casts = {}, {}
    for name, network in (("autocast", model), ("cast once", ready)):
        with torch.no_grad(), arithmetic("bf16", CPU), Casts(network.parameters()) as mode:
            network(*asked)
            found[name] = network(*asked)
        casts[name] = mode.count
    assert all(map(torch.equal, found["autocast"], found["cast once"]))
    assert casts["cast once"] == 0 and casts["autocast"] >= 2 * 3 * 6  # each weight of three blocks, in both calls
    kept = [weight for weight in ready.parameters() if weight.dtype == torch.float32]
    assert [weight.shape[0] for weight in kept] == [11]  # the labels' table, which is shared
    assert kept[0].data_ptr() == model.y_embedder.embedding_table.weight.data_ptr()
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert as_planned(model, "tf32", compiling=False) is model


def test_a_model_in_training_keeps_its_weights_and_autocast_their_casts() -> None:
    model = random_model().requires_grad_()
    assert as_planned(model, "bf16", compiling=True) is model
    info = INFO.model_copy(update={"latent": INFO.latent.model_copy(update={"shape": (4, 8, 8)})})
    sampler = Sampler(Models(model, info, PIXEL), make_plan(steps=4, precision="bf16"))
    with Casts(model.parameters()) as mode:
        sampler.solve(torch.arange(2))
    assert 0 < mode.count <= len(list(model.parameters())) + 8  # a view of one is cast in each of eight evaluations


def test_compiled_blocks_and_noise_are_the_plain_ones() -> None:
    """To 1e-5 of the latents, in fp32; the bound of tf32 and bf16 is that of their own rounding."""
    plan, numbers = make_plan(num=4, unit_size=4, batch_size=4, solver="euler_maruyama"), torch.arange(4)
    before = compiled_graphs()
    plain, fast = (Sampler(MODELS, plan.model_copy(update={"compile": way})).solve(numbers)[0] for way in (False, True))
    assert compiled_graphs() - before >= 3  # of a block, a head and the noise
    assert (fast - plain).abs().max() < 1e-5 * plain.abs().max()
    assert plain.abs().max() > 1
    graphs = compiled_graphs()
    short, long = (plan.model_copy(update={"compile": True, "num": num}) for num in (7, 8))
    for cut, whole in zip(make_unit(MODELS, short, 1), make_unit(MODELS, long, 1), strict=True):
        assert len(cut) == 3 and len(whole) == 4 and (cut == whole[:3]).all()  # filled up with what comes next
    assert compiled_graphs() == graphs


def test_a_function_may_have_many_graphs() -> None:
    """A sweep has seeds, a pipeline calls of any size."""
    with torch._dynamo.config.patch(recompile_limit=1):
        doubled = compiled(lambda x: 2 * x, dynamic=False)
        for size in (1, 2):
            assert doubled(torch.ones(size)).tolist() == [2.0] * size


def test_a_plan_is_compiled_where_it_takes_longer_than_that() -> None:
    size = DiTConfig(**PRESETS["SiT-XL/2"]._asdict(), input_size=32, in_channels=4, num_classes=1000, aux_depth=8)
    on_gpu: Any = SimpleNamespace(pos_embed=SimpleNamespace(device=torch.device("cuda")), config=size)
    whole = make_plan(num=50_000, solver="euler_maruyama", steps=250)
    assert compiles(whole, on_gpu) and not compiles(whole, MODELS.model)
    assert not compiles(make_plan(num=8, solver="euler_maruyama", steps=250), on_gpu)
    for way in (True, False):
        assert compiles(make_plan(compile=way), on_gpu) is compiles(make_plan(compile=way), MODELS.model) is way


def test_a_unit_is_cut_into_equal_batches() -> None:
    plan = make_plan(num=270, unit_size=100, batch_size=64)
    for one_size, last in ((False, [(range(200, 235), 35), (range(235, 270), 35)]), (True, [])):
        first = [(range(50), 50), (range(50, 100), 50)]
        last = last or [(range(200, 250), 50), (range(250, 300), 20)]
        for number, expected in ((0, first), (2, last)):
            batches = plan.batches(number, one_size=one_size)
            assert [(batch.solved, len(batch.kept)) for batch in batches] == expected
    for one_size in (False, True):
        batches = make_plan(num=3, unit_size=100, batch_size=64).batches(0, one_size=one_size)
        assert [len(batch.solved) for batch in batches] == [3]


def test_nothing_waits_for_the_device_from_batch_to_batch() -> None:
    sampler = Sampler(MODELS, make_plan(solver="euler_maruyama", classes=(3, 1), state="fp32"))
    assert sampler.solve(torch.arange(2))[0].dtype == torch.float32
    with Operations() as operations:
        solve_unit(sampler, 0)
    assert operations.waits == []


def test_an_autoencoder_decodes_as_much_as_memory_is_made_for() -> None:
    seen: list[int] = []

    def pictures(latents: Tensor) -> Tensor:
        seen.append(len(latents))
        return latents.permute(0, 2, 3, 1).to(torch.uint8)

    decoder: Any = SimpleNamespace(decode=pictures, downsample=8)
    affine = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    for side, parts in ((32, [16, 16, 8]), (64, [4] * 10), (512, [1] * 40), (4, [40])):
        seen.clear()
        assert len(decode(decoder, torch.zeros(40, 1, side, side), affine)) == 40
        assert seen == parts
