"""What only a GPU can show. Skips without one: CI has none.

The checks are those of ``benchmarks/gpu.py``, which needs no pytest and gives each a process of its own.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu_cases import Case, NotHereError
from benchmarks.gpu_checks import CHECKS
from ig_dist.evaluation.metrics import precision_recall
from ig_dist.features.extractors.extractor import get_extractor
from ig_dist.plans.samples import Samples, read_unit
from ig_dist.sampling.generate import generate_units, make_unit
from ig_dist.training import preflight
from ig_dist.training.meter import OwnWork
from tests import golden
from tests.extractors import random_inception
from tests.scoring import make_plan, tiny_models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checks go on with the runs of those before them."""
    return tmp_path_factory.mktemp("checks")


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, shared: Path) -> None:
    try:
        CHECKS[name][1](Case(torch.device("cuda", 0), golden.FOLDER, shared))
    except NotHereError as reason:
        pytest.skip(str(reason))


def test_the_trials_of_a_gpu_find_it_sound() -> None:
    seconds, wrong = preflight._matmul(torch.device("cuda"))
    assert not wrong
    assert 100 * 2 * 4096**3 / seconds > 1e13  # well below any GPU that trains these models
    own = OwnWork(torch.device("cuda"))
    with own.timed():
        torch.cuda._sleep(100_000_000)  # cycles
    assert 0.01 < own.take() < 1
    assert own.take() == 0


def test_what_is_made_beside_the_solver_is_what_is_made_alone(tmp_path: Path) -> None:
    models, info = tiny_models()
    models.model.cuda()
    plan = make_plan(num=2000, unit_size=100, batch_size=50, steps=2)
    samples = Samples(plan, info, str(tmp_path), "")
    files = generate_units(models, samples, [get_extractor("pixel", device="cuda")])
    for number in range(plan.num_units):
        beside, alone = read_unit(plan, str(tmp_path), number), make_unit(models, plan, number)
        assert all(np.array_equal(one, other) for one, other in zip(beside, alone, strict=True)), number
        features = files.read(number, "pixel", "pool")
        assert np.array_equal(features, beside.images.reshape(len(beside.images), -1) / np.float32(127.5) - 1)


def test_inception_is_that_of_the_cpu_and_repeats_itself(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(random_inception(), weights)
    images = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)
    here, there, again = (
        get_extractor("inception", weights=str(weights), device=device, allow_other=True)(images)
        for device in ("cpu", "cuda", "cuda")
    )
    for name, values in here.items():
        error = (there[name].cpu() - values).abs().max() / values.abs().max()
        assert error < 1e-4 and torch.equal(there[name], again[name]), (name, error)


def test_precision_and_recall_are_those_of_the_cpu() -> None:
    random = np.random.default_rng(0)
    samples, reference = (random.standard_normal((3000, 64)).astype(np.float32) + shift for shift in (0.2, 0.0))
    here, there = (precision_recall(samples, reference, half=False, device=device) for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, abs=2e-3)
