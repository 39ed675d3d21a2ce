"""Scores: the distance against closed forms, moments against numpy, plans that name what they depend on."""

import numpy as np
import pytest
import torch

from ig_dist.config import GuidanceConfig
from ig_dist.config_file import load_config
from ig_dist.errors import ConfigError
from ig_dist.evaluation.features import Moments, pixel_extractor, streamed_moments
from ig_dist.evaluation.generate import generate, make_unit
from ig_dist.evaluation.plan import Plan
from ig_dist.evaluation.plan import make_plan as plan_of
from ig_dist.evaluation.scores import frechet_distance
from ig_dist.export import ExportInfo
from ig_dist.latents.tokenizer import PIXEL
from ig_dist.models.dit import DiT, DiTConfig, initialize

RNG = np.random.default_rng(0)


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    return Moments(100, mean, covariance)


def test_distance_of_commuting_gaussians_is_the_closed_form() -> None:
    basis = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    a, b = RNG.uniform(0, 2, 6), RNG.uniform(0, 2, 6)
    a[0] = b[0] = a[1] = 0  # singular, as with pixels that are always black
    m1, m2 = RNG.normal(size=(2, 6))
    expected = np.square(m1 - m2).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    first, second = gaussian(m1, basis * a @ basis.T), gaussian(m2, basis * b @ basis.T)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_distance_of_general_gaussians_equals_the_matrix_root_formula() -> None:
    from scipy.linalg import sqrtm

    x, y = RNG.normal(size=(2, 40, 5)) @ RNG.normal(size=(5, 5))
    first, second = (gaussian(z.mean(0), np.cov(z.T)) for z in (x, y + 1))
    root = sqrtm(first.covariance @ second.covariance).real
    expected = np.square(first.mean - second.mean).sum() + np.trace(first.covariance + second.covariance - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-8)


def test_streamed_moments_equal_numpys_for_any_batches() -> None:
    images = RNG.integers(0, 256, size=(101, 3, 4, 1), dtype=np.uint8)
    features = images.reshape(101, -1) / 127.5 - 1
    for sizes in ([101], [1, 99, 1], [50, 51]):
        moments = streamed_moments(np.split(images, np.cumsum(sizes)[:-1]), pixel_extractor())
        assert moments.count == 101
        np.testing.assert_allclose(moments.mean, features.mean(0), atol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(features.T), atol=1e-12)


def test_moments_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ConfigError, match="at least two"):
        streamed_moments([np.zeros((1, 2, 2, 1), np.uint8)], pixel_extractor())
    with pytest.raises(ConfigError, match="fd_pixel is for images of at most"):
        streamed_moments([np.zeros((2, 256, 256, 3), np.uint8)], pixel_extractor())


def make_plan(**changes: object) -> Plan:
    values: dict[str, object] = {
        "num": 40,
        "labels": "balanced",
        "num_classes": 10,
        "seed": 0,
        "solver": "heun",
        "steps": 3,
        "guidance": (GuidanceConfig(kind="ig", scale=1.5),),
        "precision": "fp32",
        "unit_size": 16,
        "batch_size": 8,
        "weights_sha256": "0",
    }
    return Plan(**{**values, **changes})


def test_the_plans_hash_names_everything() -> None:
    digests = {
        make_plan(**change).digest
        for change in (
            {},
            {"num": 41},
            {"labels": "random"},
            {"seed": 1},
            {"solver": "euler"},
            {"steps": 4},
            {"guidance": ()},
            {"guidance": (GuidanceConfig(kind="ig", scale=1.5, interval=(0.1, 1)),)},
            {"unit_size": 8},
            {"batch_size": 4},
            {"precision": "bf16"},
            {"weights_sha256": "1"},
            {"weak_sha256": "1"},
            {"time_shift": 2.0},
            {"correct_last_step": False},
            {"rtol": 1e-4},
            {"atol": 1e-4},
            {"guidance": (GuidanceConfig(kind="ig", scale=1.5, branches="null"),)},
        )
    }
    assert len(digests) == 18 and make_plan().digest in digests
    assert [list(make_plan().unit(k))[::15] for k in range(3)] == [[0, 15], [16, 31], [32]]


def test_labels_are_balanced_or_random() -> None:
    numbers = torch.arange(5000)
    balanced = make_plan(num=5000).image_labels(numbers)
    assert torch.bincount(balanced).tolist() == [500] * 10
    random = make_plan(num=5000, labels="random").image_labels(numbers)
    counts = torch.bincount(random, minlength=10)
    assert counts.min() > 420 and counts.max() < 580 and counts.tolist() != [500] * 10
    assert torch.equal(make_plan(num=5000, labels="random").image_labels(numbers[70:80]), random[70:80])


@pytest.fixture
def model() -> tuple[DiT, ExportInfo]:
    config = DiTConfig(
        depth=2, hidden_size=32, num_heads=2, patch_size=4, input_size=8, in_channels=1, num_classes=10, aux_depth=1
    )
    model = DiT(config)
    initialize(model, 0)
    with torch.no_grad():  # heads start at zero: give them something to say
        for name, parameter in model.named_parameters():
            if name.endswith("linear.weight") or "adaLN" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    info = ExportInfo.model_validate(
        {
            "model": config,
            "path": "linear",
            "latent": {"kind": "sample", "shape": (1, 8, 8), "dtype": "float16", "shift": [0.0], "scale": [1.0]},
            "tokenizer": {"name": "pixel", "sha256": "0", "image_size": 8, "image_channels": 1},
            "classes": [str(i) for i in range(10)],
            "trained_with_null_label": True,
            "ema": None,
            "step": 1,
            "images_seen": 1,
            "checkpoint_sha256": "0",
            "weights_sha256": "0",
        }
    )
    return model.eval(), info


@pytest.mark.parametrize("solver", ["euler", "heun", "euler_maruyama", "dopri5"])
def test_an_image_depends_on_seed_and_number_only(model: tuple[DiT, ExportInfo], solver: str) -> None:
    plan = make_plan(solver=solver)
    images, labels, work = make_unit(*model, plan, 1, PIXEL)
    assert images.shape == (16, 8, 8, 1) and images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(16, 32)]
    numbers = torch.arange(20, 23)
    some = generate(*model, plan, numbers, plan.image_labels(numbers), PIXEL)[0].numpy()
    assert np.abs(some.astype(int) - images[4:7]).max() <= 1  # another batch: within rounding
    assert len({image.tobytes() for image in images}) == 16
    evaluations = {"euler": 3, "heun": 6, "euler_maruyama": 3}.get(solver, work[0, 0])
    assert work.tolist() == [[evaluations, evaluations, 0]] * 16 and work[0, 0] >= 3
    other = make_unit(*model, make_plan(solver=solver, seed=1), 1, PIXEL).images
    assert (other != images).mean() > 0.5


IG = GuidanceConfig(kind="ig", scale=1.4)


@pytest.mark.parametrize(
    ("recipe", "work"),
    [
        (
            {
                "solver": "euler_maruyama",
                "steps": 250,
                "guidance": (IG, GuidanceConfig(kind="cfg", scale=1.35, interval=(0.0, 0.7))),
            },
            [250, 422, 0],  # SiT as published, of 500
        ),
        (
            {
                "solver": "heun",
                "steps": 124,
                "time_shift": 1 / 0.3,
                "guidance": (IG, GuidanceConfig(kind="cfg", scale=1.45, interval=(0.0, 0.81))),
            },
            [248, 387, 0],  # LightningDiT as published, of 496
        ),
        ({"solver": "heun", "steps": 8, "correct_last_step": False}, [15, 15, 0]),
    ],
    ids=["sit", "lightningdit", "heun without its last correction"],
)
def test_the_published_recipes_take_the_published_forwards(
    model: tuple[DiT, ExportInfo], recipe: dict[str, object], work: list[int]
) -> None:
    unit = make_unit(*model, make_plan(num=2, unit_size=2, batch_size=2, **recipe), 0, PIXEL)
    assert unit.work.tolist() == [work] * 2


def test_a_shift_by_latent_dimension_is_a_number_in_the_plan(model: tuple[DiT, ExportInfo]) -> None:
    config = load_config("configs/digits.yaml", ["sample.time_shift=latent_dimension"])
    assert plan_of(config, model[1], "0").time_shift == (8 * 8 / 4096) ** 0.5
