"""Scores by the command line: of samples, npz files and pictures, on disk and on S3; what bad input gets."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import s3fs
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from ig_dist import cli
from tests.conftest import ROOT, TINY, succeed
from tests.forked import finished, start
from tests.integration.test_bad_input import call, snapshot
from tests.scoring import EFFICIENTNET, noise, require_efficientnet

DIGITS = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]


class Place(NamedTuple):
    run: Path
    plan: Path
    """40 samples of it."""
    files: Path
    """Good and bad ones."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, digits_index: Path) -> Place:
    folder = tmp_path_factory.mktemp("scoring")
    tree = {**TINY, "data": {**TINY["data"], "index": str(digits_index)}, "run": {"dir": str(folder / "run")}}
    tree["evaluate"] = {"metrics": ["fd_pixel", "label_agreement"]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    sample = ["sample", folder / "run", "--ig-scale", "1.5", "--evaluate"]
    for command in (["train", folder / "tiny.yaml", "train.steps=2"], sample):
        log = folder / f"{command[0]}.log"
        finished(start(command, log), log)
    (plan,) = (folder / "run/samples").glob("*/plan.json")
    files = folder / "files"
    (files / "empty").mkdir(parents=True)
    pool = DIGITS.reshape(len(DIGITS), -1) / 127.5 - 1
    moments = {"mu_pixel": pool.mean(0), "sigma_pixel": np.cov(pool.T)}
    real: dict[str, dict[str, np.ndarray]] = {
        "statistics": {**moments, "arr_0": DIGITS[:50]},
        "inceptions": {"mu": np.zeros(2048), "sigma": np.eye(2048)},
        "larger": {"arr_0": noise(50, side=9)},
        "larger_statistics": {"mu_pixel": np.zeros(81), "sigma_pixel": np.eye(81)},
        "digits": {"arr_0": DIGITS[:100], "arr_1": load_digits().target[:100]},
        "outside": {"arr_0": DIGITS[:100], "arr_1": load_digits().target[:100] + 1},
        "floats": {"arr_0": DIGITS[:50] / 255},
        "channels_first": {"arr_0": np.zeros((50, 3, 8, 8), np.uint8)},
        "no_pictures": {"images": DIGITS[:50]},
    }
    for name, arrays in real.items():
        np.savez(files / f"{name}.npz", **arrays)
    whole = (files / "digits.npz").read_bytes()
    (files / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    (files / "text.npz").write_text("<html>404</html>")
    (files / "weights.pth").write_bytes(b"other weights")
    mixed = files / "mixed"
    mixed.mkdir()
    for i, side in enumerate((8, 9)):
        Image.fromarray(noise(1, side=side)[0, ..., 0]).save(mixed / f"{i}.png")
    shutil.copytree(plan.parent, files / "unfinished", ignore=shutil.ignore_patterns("plan.json"))
    return Place(folder / "run", plan.parent, files)


# --- what bad input gets

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# arguments after `ig-dist`, with PLAN, RUN and FILES for those places; and what the line must say
CASES: dict[str, tuple[str, list[str]]] = {
    "nothing named": ("evaluate", ["name what to score", "RUN/samples/PLAN"]),
    "nothing there": ("evaluate FILES/nowhere", ["FILES/nowhere does not exist"]),
    "nothing in it": ("evaluate FILES/empty", ["FILES/empty is empty"]),
    "samples that are not finished": ("evaluate FILES/unfinished", ["no plan.json", "ig-dist sample RUN"]),
    "nothing to hold an npz against": ("evaluate FILES/digits.npz", ["what to hold it against", "--reference"]),
    "an unknown score": ("evaluate PLAN --metrics fd_pixl", ["--metrics", "'fd_pixl'", "did you mean 'fd_pixel'"]),
    "no score": ("evaluate PLAN --metrics ,", ["--metrics", "unknown score ''"]),
    "an unknown protocol": ("evaluate PLAN --protocol clean-fid", ["--protocol 'clean-fid'", "adm or torch-fidelity"]),
    "other weights": (
        "evaluate PLAN --metrics fid --weights inception=FILES/weights.pth",
        ["FILES/weights.pth", "is not the published file", SHA256, "weights-inception-2015-12-05-6726825d.pth"],
    ),
    "weights that are not there": (
        "evaluate PLAN --metrics fid --weights inception=FILES/nowhere",
        ["no weights of extractor inception", "FILES/nowhere"],
    ),
    "no weights and no network": (
        "evaluate PLAN --metrics fid",
        ["no weights of extractor inception", "downloading them failed", "curl -L"],
    ),
    "weights of an unknown extractor": (
        "evaluate PLAN --weights vgg=x",
        ["--weights: 'vgg' is no extractor with weights", "inception"],
    ),
    "weights without an extractor": ("evaluate PLAN --weights x", ["--weights 'x'", "EXTRACTOR=PATH"]),
    "a reference that is not there": ("evaluate PLAN --reference FILES/nowhere.npz", ["no such file"]),
    "a reference without the keys": (
        "evaluate PLAN --metrics fd_pixel --reference FILES/inceptions.npz",
        ["inceptions.npz has no images (arr_0), and no mu_pixel and sigma_pixel, which fd_pixel needs"],
    ),
    "a reference of another size": (
        "evaluate PLAN --metrics fd_pixel --reference FILES/larger.npz",
        ["pictures of 9 x 9, the samples are 8 x 8", "evaluate.reference"],
    ),
    "statistics of another size": (
        "evaluate PLAN --metrics fd_pixel --reference FILES/larger_statistics.npz",
        ["has 81 pixel pool values an image, the samples 64"],
    ),
    "a reference without labels": (
        "evaluate PLAN --reference FILES/statistics.npz",
        ["label_agreement needs classes, and", "statistics.npz has none"],
    ),
    "labels outside the classes": (
        "evaluate FILES/outside.npz --reference FILES/digits.npz --metrics label_agreement",
        ["label_agreement: the samples have class 10, the reference 0 to 9"],
    ),
    "samples without labels": (
        "evaluate FILES/statistics.npz --reference FILES/digits.npz --metrics label_agreement",
        ["statistics.npz does not say which classes were asked for"],
    ),
    "an npz of another type": (
        "evaluate FILES/floats.npz --reference FILES/digits.npz --metrics fd_pixel",
        ["arr_0 of FILES/floats.npz is float64", "uint8"],
    ),
    "an npz of another layout": (
        "evaluate FILES/channels_first.npz --reference FILES/digits.npz --metrics fd_pixel",
        ["has the shape (50, 3, 8, 8)", "(N, H, W, 3)"],
    ),
    "an npz without pictures": (
        "evaluate FILES/no_pictures.npz --reference FILES/digits.npz --metrics fd_pixel",
        ["no_pictures.npz has no arr_0, it has images"],
    ),
    "a truncated npz": (
        "evaluate FILES/truncated.npz --reference FILES/digits.npz --metrics fd_pixel",
        ["truncated.npz is no npz, or only a part of one"],
    ),
    "a truncated reference": ("evaluate PLAN --reference FILES/truncated.npz", ["is no npz, or only a part of one"]),
    "no npz at all": ("evaluate PLAN --reference FILES/text.npz", ["text.npz is no npz"]),
    "pictures of several sizes": (
        "evaluate FILES/mixed --reference FILES/digits.npz --metrics fd_pixel",
        ["1.png has 9 x 9 pixels, the first one 8 x 8", "--image-size"],
    ),
    "ADM's files are not there": (
        "evaluate --check-against-adm FILES/empty",
        ["FILES/empty", "VIRTUAL_imagenet256_labeled.npz", "admnet_guided_upsampled_imagenet256.npz", "download"],
    ),
    "a reference of an unknown extractor": (
        "reference digits --out FILES/new.npz --extractors pixle",
        ["--extractors 'pixle'", "pixel"],
    ),
    "a reference that is no npz": ("reference digits --out FILES/new.json", ["--out", "new.npz"]),
    "a reference of nothing": ("reference FILES/nowhere --out FILES/new.npz --extractors pixel", ["does not exist"]),
    "a target that is not scored": ("sweep RUN --target fid", ["--target fid is not scored", "fd_pixel"]),
    "images dropped for nothing": ("sample RUN --drop-images", ["sample.keep_images=false", "--evaluate"]),
    "a config with an unknown score": ("sample RUN evaluate.metrics=[fdpixel]", ["'fdpixel'", "'fd_pixel'"]),
    "a config with unknown weights": (
        'sample RUN evaluate.weights={"pixel":"a"}',
        ["'pixel' is no extractor", "dinov2"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_that_names_culprit_and_remedy(
    case: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("IG_DIST_EXTRACTORS", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there

    def filled(text: str) -> str:
        if text.endswith("ig-dist sample RUN"):
            return text
        return text.replace("PLAN", str(place.plan)).replace("FILES", str(place.files)).replace("RUN", str(place.run))

    line, words = CASES[case]
    before = snapshot(place.run), snapshot(place.files)
    code, errors = call(["ig-dist", *map(filled, line.split())], capsys)
    errors = "".join(said for said in errors.splitlines(keepends=True) if not said.startswith("warning: "))
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("error: "), errors
    for word in words:
        assert (word if case == "nothing named" else filled(word)) in errors, errors
    assert (snapshot(place.run), snapshot(place.files)) == before  # nothing written


def scored(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, Any], list[str]]:
    """The JSON of `ig-dist evaluate`, run in this process, and its warnings."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ig-dist", "evaluate", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err.splitlines()


def test_few_images_are_warned_of_by_their_number(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    result, warnings = scored(capsys, place.plan, "--metrics", "fd_pixel")
    assert result["protocol"]["num"] == 40 and result["scores"]["fd_pixel"] > 0
    (line,) = warnings
    assert line.startswith("warning: 40 images for 64 pixel pool features: their covariance is singular")
    assert scored(capsys, place.files / "digits.npz", "--reference", "digits", "--metrics", "fd_pixel")[1] == []


def test_damaged_features_are_made_again_and_counted(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    whole, _ = scored(capsys, place.plan)
    assert json.loads((place.run / f"evaluations/{place.plan.name}.json").read_text()) == whole
    files = sorted(place.plan.glob("*.pixel.safetensors"))
    contents = [file.read_bytes() for file in files]
    files[0].write_bytes(contents[0][:-1] + bytes([contents[0][-1] ^ 1]))
    files[2].write_bytes(b"torn")
    mended, _ = scored(capsys, place.plan)
    assert mended["protocol"].pop("features_made_again") == 2 and mended == whole
    assert [file.read_bytes() for file in files] == contents
    assert scored(capsys, place.plan)[0] == whole


# --- what good input gets


def test_samples_in_every_form_have_one_score(
    place: Place, digits_index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, _ = scored(capsys, place.plan)
    log = tmp_path / "log"
    finished(start(["sample", place.run, "--ig-scale", "1.5", "--png", "40"], log), log)
    npz = shutil.copy(place.plan / "samples.npz", tmp_path / "copied.npz")
    for form in (Path(npz), place.plan / "png"):
        metrics = "fd_pixel,label_agreement" if form.suffix else "fd_pixel"
        result, _ = scored(capsys, form, "--reference", digits_index, "--metrics", metrics)
        assert result["scores"] == pytest.approx({key: expected["scores"][key] for key in metrics.split(",")}, rel=1e-9)
        told = result["protocol"]
        assert told["images"] == str(form) and told["num"] == 40 and told["extractor_sha256"]
        assert told["reference_sha256"] == expected["protocol"]["reference_sha256"]
    (kept,) = (place.run / "evaluations").glob("png_*.json")  # of pictures in a run, for its report
    assert json.loads(kept.read_text()) == result
    hashes = [scored(capsys, form, "--reference", digits_index, "--metrics", "fd_pixel")[0]["protocol"]["images_sha256"]
              for form in (npz, place.plan / "png")]  # fmt: skip
    assert hashes[0] == hashes[1]

    command = ["reference", digits_index, "--out", tmp_path / "real.npz", "--extractors", "pixel"]
    finished(start(command, log), log)
    before = set((place.run / "evaluations").iterdir())  # of other tests, too
    made, _ = scored(capsys, place.plan, "--reference", tmp_path / "real.npz", "--metrics", "fd_pixel")
    assert made["scores"]["fd_pixel"] == expected["scores"]["fd_pixel"]
    assert made["protocol"]["reference_images"] == 1797
    first, _ = scored(capsys, place.plan, "--num", "20", "--metrics", "fd_pixel")
    assert first["protocol"]["num"] == 20 and first["scores"] != made["scores"]
    new = set((place.run / "evaluations").iterdir()) - before  # each way of scoring has a file of its own
    assert len(new) == 2 and all(file.name.startswith(f"{place.plan.name}_") for file in new)
    assert json.loads((place.run / f"evaluations/{place.plan.name}.json").read_text()) == expected


def test_two_processes_of_the_launcher_score_once(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    expected, _ = scored(capsys, place.plan)
    for file in place.plan.glob("*.pixel.safetensors"):
        file.unlink()
    command = ["python", "launchers/local.py", "--processes", "2", "--job", "evaluate", place.plan, "--json"]
    done = succeed(command)
    assert json.loads(done.stdout) == expected


def test_a_full_disk_is_one_line_and_what_is_there_is_kept(place: Place, tmp_path: Path) -> None:
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()

    def mount(*options: str) -> subprocess.CompletedProcess[str]:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", disk]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def sample(code: int) -> str:
        errors = Path(f"{log}.err")
        errors.unlink(missing_ok=True)
        options = ["--num", "400", "--steps", "1", "--evaluate", "evaluate.metrics=[fd_pixel]"]
        process = start(["sample", place.run, *options, f"sample.url={disk}/samples"], log)
        process.join(120)
        said = errors.read_text()
        assert process.exitcode == code, said
        return said

    mounted = mount("size=96k")
    if mounted.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no small disk to fill: {mounted.stderr.strip()}")
    try:
        said = sample(4)
        assert said.count("\n") == 1 and f"{disk}/samples/" in said, said
        assert "No space left on device" in said and "make room" in said and "what is there is kept" in said
        kept = {file: file.stat().st_mtime_ns for file in disk.rglob("*.safetensors")}
        assert len(kept) > 5 and not list(disk.rglob("*.tmp"))
        mount("remount", "size=1m")
        sample(0)
        (npz,) = disk.rglob("samples.npz")
        whole = npz.read_bytes()
        npz.unlink()
        used = shutil.disk_usage(disk).used
        mount("remount", f"size={used + 4096}")
        said = sample(4)
        assert said.count("\n") == 1 and "samples.npz takes 0.00 GB" in said and "make room" in said, said
        assert not npz.exists() and not list(disk.rglob("*.tmp"))
        mount("remount", "size=1m")
        sample(0)
        assert npz.read_bytes() == whole
        assert {file: file.stat().st_mtime_ns for file in kept} == kept  # nothing was made twice
    finally:
        subprocess.run(["umount", disk], check=True)


# --- S3


def test_samples_features_npz_and_references_on_s3(place: Place, bucket: str, tmp_path: Path) -> None:
    require_efficientnet()
    fs, logs = s3fs.S3FileSystem(), [tmp_path / f"log{rank}" for rank in range(2)]
    np.savez(tmp_path / "real.npz", DIGITS[:20])
    fs.pipe_file(f"{bucket}/real.npz", (tmp_path / "real.npz").read_bytes())
    metrics = "evaluate.metrics=[fd_pixel,precision_efficientnet]"
    options = ["--ig-scale", "1.5", "--evaluate", metrics, f"evaluate.reference=s3://{bucket}/real.npz"]
    command = ["sample", place.run, *options, f"sample.url=s3://{bucket}/samples"]
    both = [start(command, log, rank=rank, workers=2) for rank, log in enumerate(logs)]
    for process, log in zip(both, logs, strict=True):
        finished(process, log)
    url = f"{bucket}/samples/{place.plan.name}"  # the plan does not depend on where it lies
    names = sorted(name.rpartition("/")[2] for name in fs.ls(url, detail=False))
    units = [f"unit_{number:05d}" for number in range(3)]
    expected = [f"{unit}{kind}.safetensors" for unit in units for kind in ("", f".{EFFICIENTNET}", ".pixel")]
    assert names == sorted(["plan.json", "samples.npz", *expected])
    for name in (*[f"{unit}.safetensors" for unit in units], *[f"{unit}.pixel.safetensors" for unit in units]):
        assert fs.cat_file(f"{url}/{name}") == (place.plan / name).read_bytes()  # as on a disk
    with np.load(io.BytesIO(fs.cat_file(f"{url}/samples.npz"))) as arrays, np.load(place.plan / "samples.npz") as local:
        assert np.array_equal(arrays["arr_0"], local["arr_0"]) and np.array_equal(arrays["arr_1"], local["arr_1"])

    whole = {name: fs.cat_file(f"{url}/{name}") for name in expected}
    fs.rm([f"{url}/{unit}.{EFFICIENTNET}.safetensors" for unit in units])
    fs.pipe_file(f"{url}/{units[1]}.pixel.safetensors", b"torn")
    for log in logs:
        log.unlink()
    both = [start(["evaluate", f"s3://{url}", "--json"], log, rank=rank, workers=2) for rank, log in enumerate(logs)]
    first, second = (finished(process, log) for process, log in zip(both, logs, strict=True))
    result = json.loads(first)
    assert second == "" and result["protocol"]["reference"] == f"s3://{bucket}/real.npz"
    assert result["scores"].keys() == {"fd_pixel", "precision_efficientnet"}
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    assert {name: fs.cat_file(f"{url}/{name}") for name in expected} == whole
    alone = start(["evaluate", f"s3://{url}/samples.npz", "--reference", f"s3://{bucket}/real.npz", "--metrics",
                   "fd_pixel", "--json"], tmp_path / "alone")  # fmt: skip
    assert json.loads(finished(alone, tmp_path / "alone"))["scores"]["fd_pixel"] == pytest.approx(
        result["scores"]["fd_pixel"], rel=1e-9
    )
