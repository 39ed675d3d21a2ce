"""Plans name what their images depend on; units and their features are functions of them; what is made of units."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from ig_dist.config.describe import guidance_name
from ig_dist.config.file import load_config
from ig_dist.diffusion.guidance import GuidanceTerm
from ig_dist.diffusion.samplers import SOLVERS
from ig_dist.errors import ConfigError, DataError
from ig_dist.evaluation.metrics import inception_score
from ig_dist.features.features import FeatureFiles
from ig_dist.features.images import plan_images
from ig_dist.plans.plan import Plan
from ig_dist.plans.plan import make_plan as plan_of
from ig_dist.plans.samples import Samples, read_unit, unit_name, write_unit
from ig_dist.sampling.generate import generate_units, make_unit
from ig_dist.sampling.run import write_pngs, write_samples_npz
from ig_dist.sampling.solving import Sampler
from tests.scoring import make_plan, pixel, quadrants, tiny_models

MODELS, INFO = tiny_models()


# --- plans


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
            {"guidance": (GuidanceTerm(kind="ig", scale=1.5, interval=(0.1, 1)),)},
            {"unit_size": 8},
            {"batch_size": 4},
            {"precision": "bf16"},
            {"weights_sha256": "1"},
            {"weak_sha256": "1"},
            {"time_shift": 2.0},
            {"correct_last_step": False},
            {"rtol": 1e-4},
            {"atol": 1e-4},
            {"guidance": (GuidanceTerm(kind="ig", scale=1.5, branches="null"),)},
            {"guidance": (GuidanceTerm(kind="ig", scale=1.5, channels=1),)},
            {"classes": (3, 1)},
            {"state": "fp32"},
            {"decode_precision": "tf32"},
            {"compile": True},
            {"compile": False},
        )
    }
    assert make_plan().digest == "02fa7622031d862b"  # samples that were made under it are found
    assert len(digests) == 24 and make_plan().digest in digests
    assert [list(make_plan().unit(k))[::15] for k in range(3)] == [[0, 15], [16, 31], [32]]


def test_labels_are_balanced_or_random() -> None:
    numbers = torch.arange(5000)
    balanced = make_plan(num=5000).image_labels(numbers)
    assert torch.bincount(balanced).tolist() == [500] * 10
    random = make_plan(num=5000, labels="random").image_labels(numbers)
    counts = torch.bincount(random, minlength=10)
    assert counts.min() > 420 and counts.max() < 580 and counts.tolist() != [500] * 10
    assert torch.equal(make_plan(num=5000, labels="random").image_labels(numbers[70:80]), random[70:80])


def test_chosen_classes_come_in_turn() -> None:
    numbers = torch.arange(7)
    assert make_plan(classes=(3, 1, 3)).image_labels(numbers).tolist() == [3, 1, 3, 3, 1, 3, 3]
    drawn = make_plan(classes=(3, 1), labels="random").image_labels(torch.arange(400))
    assert 150 < (drawn == 3).sum() < 250 and (drawn == 1).sum() == 400 - (drawn == 3).sum()
    config = load_config("configs/digits.yaml", ["sample.classes=[7, '2']"])
    assert plan_of(config, INFO, "0").classes == (7, 2)
    with pytest.raises(ConfigError, match=r"sample\.classes: there is no class 'sevn'"):
        plan_of(load_config("configs/digits.yaml", ["sample.classes=[sevn]"]), INFO, "0")


def test_a_plan_is_told_in_words() -> None:
    cfg = GuidanceTerm(kind="cfg", scale=1.35, interval=(0, 0.7))
    plan = make_plan(guidance=(GuidanceTerm(kind="auto", scale=2, branches="null"), cfg), time_shift=10 / 3)
    said = "autoguidance 2 on the null branch, CFG 1.35 for t in [0, 0.7], heun 3, time shift 3.33, seed 0"
    assert plan.describe() == f"{said}; plan {plan.digest[:8]}"
    plan = make_plan(guidance=(GuidanceTerm(kind="cfg", scale=1.5, channels=3),))
    told = json.loads(plan.model_dump_json())  # as it stands in a score's protocol
    assert plan.describe().startswith("CFG 1.5 on the first 3 channels, heun 3")
    assert told["guidance"][0]["channels"] == 3 and guidance_name(told["guidance"]) == "CFG 1.5 on the first 3 channels"
    plan = make_plan(classes=tuple(range(8)), labels="random", precision="bf16", guidance=())
    assert "unguided, heun 3, classes 0, 1, 2, 3, 4, 5 and 2 more, random labels, seed 0, bf16" in plan.describe()
    assert len({make_plan(unit_size=size).describe() for size in (16, 32)}) == 2


BLOCK = 5000  # of the inception score


@pytest.mark.parametrize("num_classes", [1000, 7])
@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_consecutive_blocks_are_mixed_in_their_classes(labels: str, num_classes: int) -> None:
    """The inception score of a perfect classifier is the number of classes; sorted labels would have a tenth of it."""
    numbers = torch.arange(4 * BLOCK)
    drawn = make_plan(num=len(numbers), num_classes=num_classes, labels=labels).image_labels(numbers)
    for block in drawn.split(BLOCK):
        counts = torch.bincount(block, minlength=num_classes)
        assert len(counts) == num_classes
        if labels == "balanced":
            assert counts.max() - counts.min() <= 1
        else:
            fit = ((counts - BLOCK / num_classes) ** 2 / (BLOCK / num_classes)).sum()  # chi-squared
            assert abs(fit - (num_classes - 1)) < 6 * (2 * (num_classes - 1)) ** 0.5

    def score(labels: torch.Tensor) -> float:
        eye = 30 * np.eye(num_classes, dtype=np.float32)
        return inception_score((eye[part.numpy()] for part in labels.split(512)), BLOCK)

    # what BLOCK draws of a thousand classes lack of the whole entropy: (K - 1) / 2N
    expected = num_classes * np.exp(-(num_classes - 1) / (2 * BLOCK)) if labels == "random" else num_classes
    assert score(drawn) == pytest.approx(expected, rel=0.01)
    if num_classes == 1000:
        assert score(drawn.sort().values) < expected / 3  # this test can fail


# --- units


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_depends_on_seed_and_number_only(solver: str) -> None:
    plan = make_plan(solver=solver)
    images, labels, work = make_unit(MODELS, plan, 1)
    assert images.shape == (16, 8, 8, 1) and images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(16, 32)]
    some = Sampler(MODELS, plan).generate(torch.arange(20, 23)).numpy()
    assert np.abs(some.astype(int) - images[4:7]).max() <= 1  # another batch: within rounding
    assert len({image.tobytes() for image in images}) == 16
    evaluations = {"euler": 3, "heun": 6, "euler_maruyama": 3}.get(solver, work[0, 0])
    assert work.tolist() == [[evaluations, evaluations, 0]] * 16 and work[0, 0] >= 3
    other = make_unit(MODELS, make_plan(solver=solver, seed=1), 1).images
    assert (other != images).mean() > 0.5


IG = GuidanceTerm(kind="ig", scale=1.4)


@pytest.mark.parametrize(
    ("recipe", "work"),
    [
        (
            {
                "solver": "euler_maruyama",
                "steps": 250,
                "guidance": (IG, GuidanceTerm(kind="cfg", scale=1.35, interval=(0.0, 0.7))),
            },
            [250, 422, 0],  # SiT as published, of 500
        ),
        (
            {
                "solver": "heun",
                "steps": 124,
                "time_shift": 1 / 0.3,
                "guidance": (IG, GuidanceTerm(kind="cfg", scale=1.45, interval=(0.0, 0.81))),
            },
            [248, 387, 0],  # LightningDiT as published, of 496
        ),
        ({"solver": "heun", "steps": 8, "correct_last_step": False}, [15, 15, 0]),
    ],
    ids=["sit", "lightningdit", "heun without its last correction"],
)
def test_the_published_recipes_take_the_published_forwards(recipe: dict[str, object], work: list[int]) -> None:
    unit = make_unit(MODELS, make_plan(num=2, unit_size=2, batch_size=2, **recipe), 0)
    assert unit.work.tolist() == [work] * 2


def test_a_shift_by_latent_dimension_is_a_number_in_the_plan() -> None:
    config = load_config("configs/digits.yaml", ["sample.time_shift=latent_dimension"])
    assert plan_of(config, INFO, "0").time_shift == (8 * 8 / 4096) ** 0.5


# --- units with their features, in a folder


EXTRACTORS = [pixel(), quadrants()]
UNITS = [unit_name(number) for number in range(3)]
FEATURES = [f"unit_{number:05d}.{name}.safetensors" for number in range(3) for name in ("inception", "pixel")]


def samples_in(folder: Path, plan: Plan | None = None) -> Samples:
    return Samples(plan or make_plan(), INFO, str(folder), "half up")


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All units of a plan, and the features of two extractors."""
    folder = tmp_path_factory.mktemp("made")
    generate_units(MODELS, samples_in(folder), EXTRACTORS)
    return folder


def test_units_hold_what_the_plan_says_and_features_are_made_on_the_way(made: Path, tmp_path: Path) -> None:
    assert sorted(content(made)) == sorted([*UNITS, *FEATURES])
    samples, later = samples_in(made), samples_in(tmp_path)
    for number in range(3):
        unit = make_unit(MODELS, samples.plan, number)
        write_unit(later.url, number, unit)
        again = read_unit(samples.plan, samples.url, number)
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(unit, again, strict=True))
    files = FeatureFiles(plan_images(later), EXTRACTORS)
    for number in range(3):
        files.make(number)
    assert content(tmp_path) == content(made)  # whether beside the solver or later


def test_what_is_there_is_not_solved_again(made: Path, tmp_path: Path) -> None:
    whole, solved = content(made), list[int]()

    def run(*extractors: Any, **options: Any) -> None:
        generate_units(MODELS, samples_in(tmp_path), extractors, on_progress=solved.append, **options)

    run(num=17)
    assert sorted(content(tmp_path)) == UNITS[:2] and solved == [8, 16, 0, 8, 16, 0]
    solved.clear()
    run()
    assert sorted(content(tmp_path)) == UNITS and solved == [0, 0, 8, 0]
    solved.clear()
    run(*EXTRACTORS)  # features of units that are there
    assert solved == [0, 0, 0] and content(tmp_path) == whole
    (tmp_path / FEATURES[2]).write_bytes(b"stale")
    (tmp_path / UNITS[2]).unlink()
    solved.clear()
    run(*EXTRACTORS, num=1000)  # as many as there are
    assert solved == [0, 0, 8, 0] and content(tmp_path) == whole
    run(*EXTRACTORS)
    assert solved[4:] == [0, 0, 0]


@pytest.mark.parametrize(("worker", "workers", "order"), [(0, 3, "012"), (1, 3, "120"), (2, 3, "201"), (5, 6, "201")])
def test_each_worker_begins_at_its_own_place(
    worker: int, workers: int, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(worker))
    monkeypatch.setenv("WORLD_SIZE", str(workers))
    generate_units(MODELS, samples_in(tmp_path))
    files = sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert [file.name for file in files] == [UNITS[int(number)] for number in order]


def test_features_stand_for_images_that_are_dropped(made: Path, tmp_path: Path) -> None:
    whole, solved = content(made), list[int]()

    def run(**options: Any) -> FeatureFiles:
        return generate_units(MODELS, samples_in(tmp_path), EXTRACTORS, on_progress=solved.append, **options)

    files = run(keep_images=False)
    assert content(tmp_path) == {name: whole[name] for name in [UNITS[0], *FEATURES]}
    pool = np.concatenate(list(files.rows("pixel", "pool", 40)))
    assert pool.shape == (40, 64)
    (tmp_path / FEATURES[5]).unlink()
    solved.clear()
    assert run(keep_images=False).unfit == set() and solved == [0, 0, 8, 0]
    (tmp_path / UNITS[0]).unlink()  # the one that is looked at
    solved.clear()
    run(keep_images=False)
    assert solved == [8, 16, 0, 0, 0] and content(tmp_path) == {name: whole[name] for name in [UNITS[0], *FEATURES]}

    damaged = tmp_path / FEATURES[3]
    damaged.write_bytes(whole[FEATURES[3]][:-1] + bytes([whole[FEATURES[3]][-1] ^ 1]))
    files = FeatureFiles(plan_images(samples_in(tmp_path)), EXTRACTORS)
    with pytest.raises(DataError, match=r"images of unit 1 of 3 are not there: run the same sampling again") as error:
        list(files.rows("pixel", "pool", 40))
    assert "keep_images=true" in str(error.value) and files.unfit == {(1, "pixel")}
    run(keep_images=False)  # as it was told
    assert content(tmp_path) == {name: whole[name] for name in [UNITS[0], *FEATURES]}
    run()
    assert content(tmp_path) == whole


def test_a_damaged_unit_is_told_from_one_that_is_missing(made: Path, tmp_path: Path) -> None:
    samples = samples_in(tmp_path)
    write_unit(samples.url, 1, read_unit(samples.plan, str(made), 1))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:40], b"", safetensors.numpy.save({"images": np.zeros(3)})):
        file.write_bytes(content)
        with pytest.raises(DataError, match="unit_00001.safetensors is damaged: delete it and run"):
            read_unit(samples.plan, samples.url, 1)
    file.write_bytes(whole)
    with pytest.raises(DataError, match="unit_00001.safetensors is of another plan"):
        read_unit(make_plan(num=30), samples.url, 1)
    with pytest.raises(DataError, match="images of unit 0 of 3 are not there"):
        read_unit(samples.plan, samples.url, 0)


# --- what is made of them


def test_the_npz_holds_all_images_in_order(made: Path, tmp_path: Path) -> None:
    samples = samples_in(tmp_path)
    for name in UNITS:
        (tmp_path / name).write_bytes((made / name).read_bytes())
    old, new = (tmp_path / f"{UNITS[0]}.{i}.tmp" for i in range(2))  # of a worker that was killed, of one at work
    for part in (old, new):
        part.write_bytes(b"a part")
    os.utime(old, (0, 0))
    write_samples_npz(samples)
    assert not old.exists() and new.exists()
    new.unlink()
    file = tmp_path / "samples.npz"
    units = [read_unit(samples.plan, samples.url, number) for number in range(3)]
    with np.load(file) as arrays:
        assert np.array_equal(arrays["arr_0"], np.concatenate([unit.images for unit in units]))
        assert arrays["arr_1"].tolist() == [i % 10 for i in range(40)] and arrays["arr_1"].dtype == np.int64
    whole, time = file.read_bytes(), file.stat().st_mtime_ns
    write_samples_npz(samples)
    assert file.stat().st_mtime_ns == time  # it is there
    file.write_bytes(whole[:-5])
    write_samples_npz(samples)
    assert file.read_bytes() == whole
    file.unlink()
    (tmp_path / UNITS[2]).unlink()
    with pytest.raises(DataError, match="unit 2 of 3 are not there"):
        write_samples_npz(samples)
    assert sorted(content(tmp_path)) == UNITS[:2]  # nothing torn


def test_single_pictures_for_people(made: Path, tmp_path: Path) -> None:
    samples = samples_in(tmp_path)
    for name in UNITS:
        (tmp_path / name).write_bytes((made / name).read_bytes())
    classes = [f"class {i}/x" for i in range(10)]
    write_pngs(samples, 20, classes)
    files = sorted((tmp_path / "png").iterdir())
    assert [file.name for file in files] == [f"{i:06d}_class_{i % 10}_x.png" for i in range(20)]
    images = np.concatenate([read_unit(samples.plan, samples.url, number).images for number in range(2)])
    for file, image in zip(files, images, strict=False):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(file.read_bytes()))), image[..., 0])
    write_pngs(samples, 1000, classes)
    assert len(list((tmp_path / "png").iterdir())) == 40
