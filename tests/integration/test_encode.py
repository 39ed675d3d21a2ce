"""Encoding a small ImageNet: exact in all its forms, in parallel, and again after a kill."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import ig_dist.encoding.encode
from ig_dist.data.images import decode_image
from ig_dist.data.index import read_index
from ig_dist.features.images import index_images
from tests import imagenet_like
from tests.conftest import succeed
from tests.encoding import SHARDS, SIZE, Encode, arguments, contents, slow_links, usually_named
from tests.forked import Process
from tests.imagenet_like import CORRUPT, SYNSETS, TRUNCATED
from tests.scoring import all_pictures
from tests.waiting import wait_until


def stop_before_the_index(encode: Encode, monkeypatch: pytest.MonkeyPatch, dest: Path, options: str = "") -> None:
    """Encode, and be killed when every shard is complete."""

    def kill(*_: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ig_dist.encoding.encode, "gather", kill)
        assert encode(dest, options)[0] == 130
    assert len(list((dest / "parts").iterdir())) == SHARDS


@pytest.mark.parametrize("form", imagenet_like.FORMS)
def test_every_form_gives_the_same_images_and_labels(
    form: str, forms: dict[str, Path], encode: Encode, tmp_path: Path
) -> None:
    code, said, errors = encode(tmp_path / "out", source=forms[form])
    assert code == 0, errors
    truth = sorted(
        (file.label, decode_image(file.data, SIZE).tobytes())
        for file in imagenet_like.files()
        if file.name not in (CORRUPT, TRUNCATED)
    )
    index = read_index(str(tmp_path / "out"))
    images, labels, _ = all_pictures(index_images(index))
    assert sorted((int(label), image.tobytes()) for label, image in zip(labels, images, strict=True)) == truth
    assert labels is not None and labels.tolist() != sorted(labels.tolist())
    with (tmp_path / "out/rejected.csv").open(newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert sorted(reason.split(":")[0] for reason in reasons.values()) == [
        "cannot be decoded",
        "not a PNG, JPEG, WebP, GIF or BMP picture",
    ]
    if form not in ("WebDataset", "parquet"):
        assert [Path(path).name for path in reasons] == [CORRUPT, TRUNCATED]
    assert forms[form].name in said.splitlines()[0]  # what was recognised


def test_the_summary_says_what_is_there(encode: Encode, tmp_path: Path) -> None:
    code, said, _ = encode(tmp_path / "out", "--image-size 64")
    assert code == 0
    said = " ".join(said.split())
    index = read_index(str(tmp_path / "out"))
    small = [file for file in imagenet_like.files() if file.name not in (CORRUPT, TRUNCATED)]
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert "238 images of 20 classes (11 to 12 a class) -> 15 shards of 3x64x64 latents" in said
    assert f"({stored / 1e6:.1f} MB)" in said and f"2 rejected ({tmp_path}/out/rejected.csv)" in said
    assert f"{index.info.upscaled} upscaled from less than 64 x 64" in said and 0 < index.info.upscaled < len(small)
    images = all_pictures(index_images(index)).images / 127.5 - 1
    for value, found in (
        (images.mean((0, 1, 2)), index.info.statistics.mean),
        (images.std((0, 1, 2)), index.info.statistics.std),
    ):
        assert np.abs(value - found).max() < 1e-3
        assert " ".join(f"{number:.3f}" for number in found) in said
    assert f"index: {tmp_path}/out/index.json" in said
    assert f"next: ig-dist train digits data.index={tmp_path}/out run.dir=runs/out-run" in said
    assert index.info.rejected == 2 and index.info.class_names is not None
    assert index.info.class_names[0] == "tench, Tinca tinca"


def test_odd_names_and_the_command_that_comes_next(encode: Encode, forms: dict[str, Path], tmp_path: Path) -> None:
    source, dest = tmp_path / "my [1] {x,y} Ü#?%20/a's", tmp_path / " out * & $HOME"
    shutil.copytree(forms["ImageFolder"] / SYNSETS[0], source / 'b"c [2]/d e')
    (source / "a$b").mkdir()
    (source / "a$b/1.gif").write_bytes(imagenet_like.files()[0].data)
    code, said, errors = encode(dest, "--max-rejected 0.1", source=source)
    assert code == 0, errors
    assert read_index(str(dest)).info.classes == ["a$b", 'b"c [2]']
    command = shlex.split(said.splitlines()[-1].removeprefix("next: "))
    assert command[:3] == ["ig-dist", "train", "digits"]
    tiny = ["model.depth=2", "model.aux_depth=1", "model.hidden_size=16", "model.patch_size=8", "train.steps=1"]
    succeed([*command, *tiny], cwd=tmp_path)
    assert (tmp_path / command[4].removeprefix("run.dir=") / "metrics.jsonl").exists()


def test_a_killed_worker_and_its_replacement_change_no_byte(
    forms: dict[str, Path], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    dest, source = tmp_path / "out", forms["ImageFolder"]

    def start(options: str) -> Process:
        return Process(arguments(source, dest, options), before=slow_links)

    def wait_for(count: int, numbers: range, process: Process) -> set[Path]:
        """The tars among these shards that are complete, once there are so many."""

        def found() -> set[Path]:
            return {dest / f"shard-{n:06d}.tar" for n in numbers if (dest / f"parts/shard-{n:06d}.json").exists()}

        wait_until(lambda: len(found()) >= count, process)
        return found()

    first = start("--worker 0/2 --workers 1 --batch-size 7")
    wait_for(2, range(SHARDS), first)
    first.send_signal(signal.SIGSTOP)  # so that it leaves something to do, however slow the others start
    victim = start("--worker 1/2 --workers 1 --batch-size 5")
    wait_for(2, range(7, SHARDS), victim)
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=30)
    # a worker that died in the middle of writing
    (dest / f"shard-000014.tar.{'0' * 32}.tmp").write_bytes(b"half")
    finished = wait_for(4, range(SHARDS), first)
    before = {path: path.stat().st_mtime_ns for path in finished}
    replacement = start("--worker 1/2 --batch-size 100")
    wait_for(len(finished) + 1, range(SHARDS), replacement)
    first.send_signal(signal.SIGCONT)
    for process in (first, replacement):
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "238 images of 20 classes" in out
    assert contents(dest) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in finished} == before  # what was complete was not made again
    assert not (dest / "parts").exists()


def test_what_is_complete_is_left_alone_and_what_is_not_is_made_again(
    undisturbed: dict[str, bytes], encode: Encode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dest = tmp_path / "out"
    stop_before_the_index(encode, monkeypatch, dest)
    (dest / "shard-000003.tar").unlink()  # without its tar
    (dest / "parts/shard-000005.json").unlink()  # without its record
    (dest / "parts/shard-000007.json").write_text("{")  # no record
    with (dest / "shard-000009.tar").open("r+b") as tar:  # another tar than the record's
        tar.seek(2000)
        tar.write(b"\xff" * 3000)
    (dest / "shard-000011.tar").write_bytes(b"short")
    again = {3, 5, 7, 9, 11}
    kept = [dest / f"shard-{number:06d}.tar" for number in range(SHARDS) if number not in again]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert encode(dest)[0] == 0
    assert usually_named(contents(dest)) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    # no tar is ever written over: what is made in place of a damaged one has another name
    assert [path.name for path in dest.glob("shard-*.*.tar")] == [
        path.name for path in dest.glob("shard-0000[01][91].*.tar")
    ]


def test_finished_is_finished(
    forms: dict[str, Path], encode: Encode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dest = tmp_path / "out"
    assert encode(dest)[0] == 0
    before = contents(dest)
    (dest / "parts").mkdir()  # killed between the index and the sweeping
    (dest / "parts/shard-000002.json").write_text("{}")
    monkeypatch.setattr("ig_dist.encoding.loader.load_rgb", None)  # nothing is decoded
    code, said, _ = encode(dest)
    assert code == 0 and "complete: 238 samples in 15 shards, nothing to do" in said
    assert contents(dest) == before and not (dest / "parts").exists()
    # the same files by another name are the same images, and the size of shards need not be repeated
    code, said, errors = encode(dest, source=forms["class tars"], usual="--image-size 16 --workers 0")
    assert code == 0 and "nothing to do" in said, errors
    for options, words in (
        ("--seed 5", "(seed: 0 there, 5 here)"),
        ("--flips", "(flips: False there, True here)"),
        ("--samples-per-shard 17", "(samples_per_shard: 16 there, 17 here)"),
    ):
        code, _, errors = encode(dest, options)
        assert code == 2 and errors.count("\n") == 1 and "other settings or images" in errors and words in errors
    assert contents(dest) == before


def test_other_settings_are_refused_in_the_middle_too(
    encode: Encode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dest = tmp_path / "out"
    stop_before_the_index(encode, monkeypatch, dest)
    before = contents(dest)
    code, _, errors = encode(dest, "--seed 5")
    assert code == 2 and errors.count("\n") == 1 and "seed: 0 there, 5 here" in errors
    assert contents(dest) == before


def test_a_straggler_ends_well(
    undisturbed: dict[str, bytes], encode: Encode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another worker finishes everything while this one is about to write a shard."""
    dest, other = tmp_path / "out", tmp_path / "other"
    assert encode(other)[0] == 0
    link, met = os.link, []

    def overtaken(temporary: Path, target: Path) -> None:
        if target.name == "shard-000004.tar" and not met:
            for path in other.iterdir():
                shutil.copy(path, dest)
            shutil.rmtree(dest / "parts")
            temporary.unlink()  # swept away with what killed workers left
            met.append(target)
        link(temporary, target)

    monkeypatch.setattr(os, "link", overtaken)
    code, said, errors = encode(dest)
    assert code == 0 and "238 images" in said and met, errors
    assert contents(dest) == undisturbed


def test_a_dry_run_counts_and_writes_nothing(
    forms: dict[str, Path], encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code, said, errors = encode(tmp_path / "out", "--dry-run --gpus 8")
    assert code == 0, errors
    said = " ".join(said.split())
    assert "240 images of 20 classes -> 15 shards, 860.2 kB" in said  # 2560 + 1024 bytes a sample
    assert "8 processes" in said and "hours" in said and "images/s" in said
    rates = re.search(
        r"decodes ([\d,]+) images/s, cpu encodes ([\d,]+) images/s, fed by (\d+) .* \(two by (\d+)\)", said
    )
    assert rates, said
    decoded, encoded, one, two = (int(number.replace(",", "")) for number in rates.groups())
    for count, processes in ((1, one), (2, two)):  # as many as keep up, and not one more; rates are printed rounded
        assert (processes - 1) * decoded < count * encoded * 1.05 and processes * decoded > count * encoded * 0.95
    assert encode(tmp_path / "real")[0] == 0
    real = sum(path.stat().st_size for path in tmp_path.glob("real/*.tar"))
    assert 860_200 <= real <= 860_200 + SHARDS * 10_240  # tars end in blocks of 10 kB
    code, said, errors = encode(tmp_path / "out", "--dry-run", source=forms["parquet"])
    assert code == 0 and (part := re.search(r"about (\d+) images of 20 classes", said)), (said, errors)
    assert 230 <= int(part[1]) <= 250  # by the size of the first of two files
    assert [path.name for path in tmp_path.iterdir()] == ["real"]


def test_too_many_rejected_files_end_it_early(encode: Encode, forms: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(forms["ImageFolder"], source)
    bad = sorted(source.rglob("*.JPEG"))[::3]
    for file in bad:
        file.write_text("no picture")
    code, _, errors = encode(tmp_path / "out", "--max-rejected 0.05", source=source)
    assert code == 2 and errors.count("\n") == 1
    with (tmp_path / "out/rejected.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rejected = {CORRUPT, TRUNCATED, *(file.name for file in bad)}
    assert {Path(row["path"]).name for row in rows} == rejected  # 12 would be too many: the others are counted only
    assert len(list(tmp_path.glob("out/*.tar"))) < 5  # of 15
    assert f"{len(rows)} of 240 files are rejected, the first is {rows[0]['path']}: {rows[0]['reason']}" in errors
    enough = re.search(r"allow them with (--max-rejected [\d.]+) \(it was 0.05\)", errors)
    assert enough, errors
    # allowed after all, it goes on from there
    assert encode(tmp_path / "out", enough[1], source=source)[0] == 0
    assert read_index(str(tmp_path / "out")).info.rejected == len(rejected)


def test_a_shard_of_rejected_files_only(encode: Encode, tmp_path: Path) -> None:
    assert encode(tmp_path / "out", "--samples-per-shard 1")[0] == 0
    index = read_index(str(tmp_path / "out"))
    assert index.num_samples == 238 == len(index.info.shards) == len(list(tmp_path.glob("out/*.tar")))


def test_a_full_disk_is_one_line_before_and_in_the_middle(
    encode: Encode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
        code, _, errors = encode(tmp_path / "out")
    assert code == 2 and errors.count("\n") == 1 and "needs about 860.2 kB, 100.0 kB are free" in errors
    assert not (tmp_path / "out").exists()
    opened = Path.open
    for name in ("shard-000005.tar", "index.json"):

        def full(self: Path, *options: Any, **more: Any) -> Any:
            if self.name.startswith(name) and self.suffix == ".tmp":  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")
            return opened(self, *options, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", full)
            code, _, errors = encode(tmp_path / "out")
        assert code == 4 and errors.count("\n") == 1, errors
        assert f"{name} cannot be written (No space left on device)" in errors and "run the same command" in errors
    assert encode(tmp_path / "out")[0] == 0


def test_sources_and_shards_in_an_object_store(
    forms: dict[str, Path], undisturbed: dict[str, bytes], encode: Encode, tmp_path: Path
) -> None:
    store = fsspec.filesystem("memory")
    for file in forms["WebDataset"].iterdir():
        store.pipe_file(f"/{tmp_path.name}/in/{file.name}", file.read_bytes())
    dest = f"memory://{tmp_path.name}/out"
    code, said, errors = encode(dest, source=f"memory://{tmp_path.name}/in")
    assert code == 0 and f"index: {dest}/index.json" in said, errors
    assert read_index(dest).num_samples == 238
    names = {Path(name).name for name in store.find(f"/{tmp_path.name}/out")}
    assert names == set(undisturbed)
    shutil.rmtree(tmp_path / "spool")  # nor is it needed to see that all is done
    code, said, _ = encode(dest, source=f"memory://{tmp_path.name}/in")
    assert code == 0 and "nothing to do" in said and not (tmp_path / "spool").exists()


def test_the_records_are_gone_and_the_index_says_all(undisturbed: dict[str, bytes]) -> None:
    index = json.loads(undisturbed["index.json"])
    assert index["samples_per_shard"] == 16 and index["rejected"] == 2 and len(index["shards"]) == SHARDS
    assert sum(shard["samples"] for shard in index["shards"]) == 238
    assert set(undisturbed) == {
        "index.json",
        "index.samples.safetensors",
        "rejected.csv",
        *(f"shard-{number:06d}.tar" for number in range(SHARDS)),
    }
