"""A run directory that suffered: one line each, or the checkpoint before, and never other weights.

A case is a line: what is damaged, and what is right afterwards. ``before``: the run goes on from the checkpoint before
and ends with the same weights, bit for bit; ``goes on``: the same from the newest; otherwise the run is refused with
exit code 2 or 4 and a line that holds these words.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ig_dist
from ig_dist import run_dir
from ig_dist.checkpoints.manifest import sealed
from ig_dist.config.file import config_from_tree
from ig_dist.errors import ConfigError, DataError, IgDistError
from ig_dist.storage.json_lines import read_lines
from ig_dist.terminal import console

STEPS = 3
DEEP = 100_000
Harm = Callable[[Path], object]
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 64))


def settings(run: Path, index: Path, seed: int = 0) -> dict[str, Any]:
    return {
        "run": {"dir": str(run), "seed": seed},
        "model": {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 2, "aux_depth": 1},
        "data": {"index": str(index), "streams": 2, "window_samples": 64},
        "train": {"steps": STEPS, "global_batch_size": 8},
        "checkpoint": {"every_steps": 1, "keep_last": 2},
        "log": {"every_steps": 1},
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits_index: Path) -> Path:
    """``whole``: a run of two steps of three; ``ended``: all three; ``other``: two steps with another seed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed, steps in (("whole", 0, 2), ("other", 1, 2)):
        tree = settings(folder / name, digits_index, seed)
        tree["train"] |= {"steps": steps}
        ig_dist.train(tree)
    shutil.copytree(folder / "whole", folder / "ended")
    ig_dist.train(settings(folder / "ended", digits_index))
    return folder


def step(run: Path, number: int = 2) -> Path:
    return run / "checkpoints" / f"step_{number:010d}"


def manifest(run: Path) -> Path:
    return step(run) / "manifest.json"


def data(run: Path) -> Path:
    *_, file = sorted(step(run).glob("*.safetensors"))  # of several ranks the last one's
    return file


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = step(run, STEPS).glob("*.safetensors")
    return safetensors.torch.load_file(file)


def edit(change: Callable[[dict[str, Any]], object], *, kept: bool = True) -> Harm:
    """Change the manifest, and make its hash right again."""

    def harm(run: Path) -> None:
        document = json.loads(manifest(run).read_text())
        change(document)
        manifest(run).write_text(json.dumps(sealed(document) if kept else document))

    return harm


def tensor(document: dict[str, Any], name: str = "model/blocks.0.attn.proj.weight") -> dict[str, Any]:
    found: dict[str, Any] = document["tensors"][name]
    return found


def put(*keys: Any, value: Any) -> Harm:
    """Put a value into the manifest, and make its hash right again."""

    def change(document: dict[str, Any]) -> None:
        node: Any = document
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value

    return edit(change)


def drop(*keys: Any) -> Harm:
    def change(document: dict[str, Any]) -> None:
        node: Any = document
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]

    return edit(change)


def write(name: str, content: str | bytes) -> Harm:
    """Put a file in place of another, of the newest checkpoint where the name is in braces."""

    def harm(run: Path) -> None:
        place(run, name).write_bytes(content.encode() if isinstance(content, str) else content)

    return harm


def place(run: Path, name: str) -> Path:
    return {"manifest": manifest, "data": data}.get(name, lambda run: run / name)(run)


def replace(name: str, by: Callable[[Path], object]) -> Harm:
    """Something else than a file in a file's place."""

    def harm(run: Path) -> None:
        file = place(run, name)
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        by(file)

    return harm


def cut(name: str, share: float) -> Harm:
    return lambda run: os.truncate(place(run, name), int(place(run, name).stat().st_size * share))


def cut_in_a_key(share: float) -> Harm:
    """Cut between two lines, a config would be whole, and go on."""

    def harm(run: Path) -> None:
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text[: text.index(":", int(len(text) * share))])

    return harm


def flip(name: str, share: float) -> Harm:
    def harm(run: Path) -> None:
        content = bytearray(place(run, name).read_bytes())
        content[int((len(content) - 1) * share)] ^= 4
        place(run, name).write_bytes(content)

    return harm


def add(name: str, content: bytes) -> Harm:
    return lambda run: place(run, name).write_bytes(place(run, name).read_bytes() + content)


def sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(64 * 2**30)


def link(target: str) -> Callable[[Path], object]:
    return lambda file: file.symlink_to(target)


def moved_out(run: Path) -> None:
    """The file of the checkpoint is a link to a copy outside of the run."""
    file = data(run)
    outside = run.parent / "outside"
    shutil.move(file, outside)
    file.symlink_to(outside)


def of_another_run(run: Path) -> None:
    shutil.rmtree(step(run))
    shutil.copytree(step(run.parents[1] / "other"), step(run))


def of_another_run_in_a_new_one(run: Path) -> None:
    shutil.rmtree(run)
    shutil.copytree(step(run.parents[1] / "other"), step(run))


def two_share_a_piece(document: dict[str, Any]) -> None:
    tensor(document)["pieces"] = tensor(document, "ema/0.9999/blocks.0.attn.proj.weight")["pieces"]


def of_another_dtype(document: dict[str, Any]) -> None:
    tensor(document)["dtype"] = "int32"


def huge(document: dict[str, Any]) -> None:
    tensor(document).update(shape=[2**40], pieces=[[0, 0, 2**40, 0, [0]]])


def nested(opened: str, closed: str) -> str:
    return opened * DEEP + closed * DEEP


PIECE = ("tensors", "model/blocks.0.attn.proj.weight", "pieces", 0)
TENSOR = PIECE[:2]
CASES: dict[str, tuple[Harm, str]] = {
    # a manifest that is no manifest
    **{f"manifest cut to {share}": (cut("manifest", share), "before") for share in (0, 0.1, 0.5, 0.9, 0.999)},
    **{f"manifest flipped at {share}": (flip("manifest", share), "before") for share in (0, 0.01, 0.3, 0.6, 0.9, 1)},
    **{
        f"manifest is {name}": (write("manifest", content), "before")
        for name, content in {
            "nothing": "",
            "null": "null",
            "a number": "1",
            "a string": '"x"',
            "a list": "[]",
            "an object": "{}",
            "not JSON": "{",
            "not UTF-8": b"\xff\xfe",
            "zeros": bytes(4096),
            "deep lists": nested("[", "]"),
            "deep objects": '{"a":' * DEEP + "1" + "}" * DEEP,
            "a pickle": b"\x80\x04\x95\x00.",
            "NaN": "NaN",
            "a long number": "1" * 10_000,
        }.items()
    },
    "manifest is gone": (lambda run: manifest(run).unlink(), "before"),
    "manifest with a tail": (add("manifest", b"{}"), "before"),
    "manifest of 64 GiB": (replace("manifest", sparse), "before"),
    "manifest is a folder": (replace("manifest", Path.mkdir), "before"),
    "manifest is a FIFO": (replace("manifest", os.mkfifo), "before"),
    "manifest is a link to /dev/zero": (replace("manifest", link("/dev/zero")), "before"),
    "manifest is a link to itself": (replace("manifest", link("manifest.json")), "before"),
    "manifest is a dead link": (replace("manifest", link("/nowhere")), "before"),
    "manifest edited, its hash not": (edit(lambda m: m.update(world_size=2), kept=False), "before"),
    # one whose own hash is right
    **{
        f"manifest without {key}": (drop(key), "before")
        for key in ("format", "step", "world_size", "meta", "files", "tensors")
    },
    **{
        f"{'.'.join(map(str, keys))} is {value!r}"[:60]: (put(*keys, value=value), "before")
        for keys, values in {
            ("format",): [None, 3, "", "ig-dist-checkpoint/0", "another/3"],
            ("step",): [12.0, 2.0, -2, "2", None, True, [], 2**70, 1, 3],
            ("world_size",): [-1, "1", 1.5, None],
            ("files",): [[], {}, None, "x", [None], [{}]],
            ("files", 0, "name"): [None, "", "../x.safetensors", "/etc/passwd", "a/b.safetensors", "x", 5],
            ("files", 0, "bytes"): [-1, 0, "9", 1.5, None, 2**62, 2**70],
            ("files", 0, "sha256"): [None, "", 5],
            ("files", 0, "header"): [None, [], [1], [0, 0], [-1, 0], [2**40, 0], ["a", 0]],
            ("tensors",): [None, [], "x", {}],
            TENSOR: [None, [], {}, "x"],
            (*TENSOR, "shape"): [None, "x", [2**62] * 4, [-16, -16], [16.0, 16.0], [None], [16], [256], 256, [0, 16]],
            (*TENSOR, "dtype"): [None, [], "float8", "int32", "float16", "object", 5],
            (*TENSOR, "pieces"): [None, [], [None], [[]], {}, "x"],
            PIECE: [None, [], [0, 0, 256], "x"],
            (*PIECE, 0): [99, -1, "0", None, 0.0],
            (*PIECE, 1): ["0", 1, -1, None, 2**50],
            (*PIECE, 2): [255, 257, "256", 2**50, None],
            (*PIECE, 3): [2**50, -4, "0", 0, None, 1.0],
            (*PIECE, 4): [None, [], [1], [1, 2], "x", -1, ["x"], [2**40]],
            ("meta",): [None, {}, [], "x"],
            ("meta", "optimizer_steps"): [-5, "2", 2.0, None, 2**70],
            ("meta", "config"): [None, "x", [], 5],
            ("meta", "index_sha256"): [None, 5],
            ("meta", "images_seen"): [None, "x", -1],
            ("meta", "run"): [None, "x", {}, {"id": 5, "parent": ""}],
        }.items()
        for value in values
    },
    **{f"meta without {key}": (drop("meta", key), "before") for key in ("optimizer_steps", "config", "index_sha256")},
    "a tensor is gone": (drop(*TENSOR), "before"),
    "an average is gone": (drop("tensors", "ema/0.9999/blocks.0.attn.proj.weight"), "before"),
    "a moment is gone": (drop("tensors", "exp_avg/blocks.0.attn.proj.weight"), "before"),
    "a moment of another dtype": (put("tensors", "exp_avg/x_embedder.proj.bias", "dtype", value="int32"), "before"),
    "a tensor of 2^40": (edit(huge), "before"),
    "a tensor of another dtype": (edit(of_another_dtype), "before"),
    "two tensors of one piece": (edit(two_share_a_piece), "before"),
    "another tensor's name": (edit(lambda m: m["tensors"].update(x=m["tensors"].pop(TENSOR[1]))), "before"),
    "config of an unknown key": (put("meta", "config", "train", "newer", value=1), "saved by another version"),
    "config of an unknown group": (put("meta", "config", "newer", value={}), "saved by another version"),
    "of a later format": (put("format", value="ig-dist-checkpoint/9"), "use the version that saved it"),
    "of another index": (put("meta", "index_sha256", value="0" * 64), "is not the one that"),
    "of another run": (of_another_run, "is of another run"),
    "of another run, in a new one": (of_another_run_in_a_new_one, "belongs to another config"),
    # the data
    **{f"data cut to {share}": (cut("data", share), "before") for share in (0, 0.5, 0.999)},
    **{f"data flipped at {share}": (flip("data", share), "before") for share in (0, 0.02, 0.4, 0.7, 1)},
    "data is gone": (lambda run: data(run).unlink(), "before"),
    "data with a tail": (add("data", b"x"), "before"),
    "data of zeros": (lambda run: data(run).write_bytes(bytes(data(run).stat().st_size)), "before"),
    "data is a folder": (replace("data", Path.mkdir), "before"),
    "data is a FIFO": (replace("data", os.mkfifo), "before"),
    "data is a link to /dev/zero": (replace("data", link("/dev/zero")), "before"),
    "data is a link out of the run": (moved_out, "before"),
    "data of another run": (lambda run: shutil.copy(data(run.parents[1] / "other"), data(run)), "before"),
    # the folder of checkpoints
    "an odd folder": (lambda run: (run / "checkpoints" / "step_abc").mkdir(), "goes on"),
    "a later empty folder": (lambda run: step(run, 9).mkdir(), "goes on"),
    "a file named as a later step": (lambda run: step(run, 9).write_text("x"), "goes on"),
    "a later folder of rubbish": (lambda run: shutil.copytree(run / "tensorboard", step(run, 9)), "goes on"),
    "the folder under another step": (lambda run: step(run).rename(step(run, 7)), "before"),
    "checkpoints is a file": (replace("checkpoints", Path.touch), "not a folder"),
    "all manifests cut": (lambda run: [os.truncate(step(run, n) / "manifest.json", 9) for n in (1, 2)], "is whole"),
    # config.yaml
    **{
        f"config.yaml is {name}": (write("config.yaml", content), "config.yaml")
        for name, content in {
            "garbage": "}{",
            "no YAML": "a: [",
            "a list": "[1, 2]",
            "a scalar": "5",
            "a string": "hello",
            "a Python tag": "!!python/object/apply:os.system ['true']",
            "binary": b"\x00\xff\x01",
            "deep": nested("[", "]"),
            "deep mappings": "{a: " * DEEP + "1" + "}" * DEEP,
            "a bomb": BOMB,
            "a loop": "a: &a [*a]",
            "a tab": "a:\n\tb: 1",
            "of numbers as keys": "1: 2",
            "of two documents": "a: 1\n---\nb: 2",
            "not UTF-8": b"run: \xe9\n",
        }.items()
    },
    **{
        f"config.yaml is {name}": (write("config.yaml", content), "belongs to another config")
        for name, content in {
            "empty": "",
            "a comment": "# x",
            "null": "null",
            "of a list as group": "run: [1]\n",
            "of a scalar as group": "run: 5\n",
            "of another type": "train: {steps: many}\n",
            "of an unknown key": "train: {newer: 1}\n",
            "of a date": "run: {dir: 2026-01-01}\n",
            "of a number as folder": "run: {dir: 5}\n",
        }.items()
    },
    **{f"config.yaml cut to {share}": (cut_in_a_key(share), "config") for share in (0.3, 0.52)},
    "config.yaml is a folder": (replace("config.yaml", Path.mkdir), "config.yaml"),
    "config.yaml is a FIFO": (replace("config.yaml", os.mkfifo), "config.yaml"),
    "config.yaml is a link to /dev/zero": (replace("config.yaml", link("/dev/zero")), "config.yaml"),
    "config.yaml of 64 GiB": (replace("config.yaml", sparse), "config.yaml"),
    "config.yaml is gone": (lambda run: (run / "config.yaml").unlink(), "goes on"),
    "config.yaml.tmp is a folder": (lambda run: (run / "config.yaml.tmp").mkdir(), "goes on"),
    "config.yaml.tmp is there": (lambda run: (run / "config.yaml.tmp").write_text("x"), "goes on"),
    "config.yaml.tmp is a link": (lambda run: (run / "config.yaml.tmp").symlink_to(run / "victim"), "goes on"),
    # run.json
    **{
        f"run.json is {name}": (write("run.json", content), "goes on")
        for name, content in {
            "empty": "",
            "garbage": "}{",
            "a list": "[]",
            "deep": nested("[", "]"),
            "binary": b"\xff",
            "of numbers": '{"id": 5}',
            "null": "null",
            "of more": '{"id": "x", "parent": "", "newer": 1}',
        }.items()
    },
    "run.json is gone": (lambda run: (run / "run.json").unlink(), "goes on"),
    "run.json is a folder": (replace("run.json", Path.mkdir), "run.json"),
    "run.json is a FIFO": (replace("run.json", os.mkfifo), "run.json"),
    "run.json of another run": (
        lambda run: shutil.copy(run.parents[1] / "other" / "run.json", run),
        "is of another run",
    ),
    # what is logged
    **{
        f"{file} {name}": (add(file, content), "goes on")
        for file in ("metrics.jsonl", "goodput.jsonl", "provenance.jsonl")
        for name, content in {
            "with a binary tail": b"\xff\x00\xfe",
            "with a cut line": b'{"step": 2',
            "with deep lines": (nested("[", "]") + "\n").encode(),
            "with other lines": b'5\nnull\n[]\n{}\n{"step": "x"}\n{"step": null}\n',
            "with empty lines": b"\n\n",
            "with a line of odd values": b'{"began": "x", "from_step": null, "step": [], "seconds": 5}\n',
            "with a huge step": b'{"began": 1, "from_step": 0, "step": 1%s, "seconds": {}}\n' % (b"0" * 400),
            "with long times": b'{"began": 1, "from_step": 0, "step": 2, "seconds": {"step": 1e308, "data": 1e308}}\n',
        }.items()
    },
    **{
        f"{file} is {name}": (replace(file, by), wanted)
        for file in ("metrics.jsonl", "goodput.jsonl", "provenance.jsonl")
        for name, by, wanted in (
            ("a folder", Path.mkdir, file),
            ("a FIFO", os.mkfifo, file),
            ("gone", lambda file: None, "goes on"),
            ("a link to /dev/full", link("/dev/full"), file),
        )
    },
    "tensorboard is a file": (replace("tensorboard", Path.touch), "tensorboard"),
    "tensorboard is gone": (lambda run: shutil.rmtree(run / "tensorboard"), "goes on"),
    "tensorboard with rubbish": (
        lambda run: (run / "tensorboard" / "events.out.tfevents.0").write_bytes(b"\xff" * 99),
        "goes on",
    ),
    "export is a file": (replace("export", Path.touch), "export"),
    "samples is a file": (replace("samples", Path.touch), "samples"),
    # the lock
    ".lock is a link to another file": (
        replace(".lock", lambda file: file.symlink_to(file.parent / "victim")),
        "is a link",
    ),
    ".lock is a link to nothing": (replace(".lock", link("/nowhere/at/all")), "is a link"),
    ".lock is a folder": (replace(".lock", Path.mkdir), ".lock"),
    ".lock is a FIFO": (replace(".lock", os.mkfifo), ".lock"),
    ".lock is binary": (write(".lock", b"\xff\xfe\x00"), "goes on"),
    ".lock is gone": (lambda run: (run / ".lock").unlink(), "goes on"),
}


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """A hang ends as an error: also one in a system call."""

    def too_long(*_: object) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# of the many values of one key in a manifest CI tries every third
OFTEN = [name for name, (harm, _) in CASES.items() if " is " in name and harm.__qualname__.startswith("edit.")]
LONG = {name for number, name in enumerate(OFTEN) if number % 3}


@pytest.mark.parametrize("case", [pytest.param(n, marks=pytest.mark.full) if n in LONG else n for n in CASES])
def test_a_damaged_run_goes_on_right_or_is_refused_in_a_line(
    case: str, runs: Path, digits_index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm, wanted = CASES[case]
    run = runs / "tried" / "run"
    shutil.rmtree(run.parent, ignore_errors=True)
    shutil.copytree(runs / "whole", run)
    (run / "victim").write_text("precious")
    # the run that was copied is this one
    config = (run / "config.yaml").read_text().replace(str(runs / "whole"), str(run))
    (run / "config.yaml").write_text(config)
    harm(run)
    refused = None
    with within(60):
        try:
            ig_dist.train(settings(run, digits_index))
        except IgDistError as error:
            refused = error
    if wanted in ("before", "goes on"):
        assert refused is None
        ours, theirs = weights(run), weights(runs / "ended")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        *_, noted = read_lines(run / "provenance.jsonl")
        assert noted["step"] == (1 if wanted == "before" else 2)
        if wanted == "before":
            assert steps_of(run) == [1, 2, 3]
    else:
        assert refused is not None and refused.exit_code in (2, 4), case
        assert wanted in str(refused) and "\n" not in str(refused) and len(str(refused)) < 600
    if (run / "victim").exists():
        assert (run / "victim").read_text() == "precious"


def test_there_are_as_many_cases_as_were_tried_from_outside() -> None:
    assert len(CASES) >= 246


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k,nr_inodes=64", "tmpfs", disk]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_run_whose_own_disk_is_full_goes_on_and_writes_its_lines_when_there_is_space(
    small_disk: Path, tmp_path: Path, digits_index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, saved = small_disk / "run", tmp_path / "checkpoints"
    tree = settings(run, digits_index) | {"checkpoint": {"every_steps": 100, "url": str(saved)}}
    tree["train"]["steps"] = 60
    filler = small_disk / "filler"

    def fill_and_free() -> None:
        wait_for(lambda: len(steps_of(run)) > 2)
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        wait_for(lambda: "wait for space" in "".join(said))
        filler.unlink()

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(console, "print", lambda *words, **options: said.append(" ".join(map(str, words))))
        filled = pool.submit(fill_and_free)
        ig_dist.train(tree)
        filled.result()
    assert sum("wait for space" in line for line in said) >= 1
    assert (saved / "step_0000000060" / "manifest.json").is_file()
    assert steps_of(run) == list(range(1, 61)), "the lines that waited are there, each once"


def test_a_run_that_begins_on_a_full_disk_is_refused_in_a_line(small_disk: Path, digits_index: Path) -> None:
    config = config_from_tree(settings(small_disk / "run", digits_index), "here")
    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    for _ in range(2):  # one that was refused has left nothing behind that refuses the next
        with pytest.raises(ConfigError, match="No space left"), run_dir.claim(config):
            pass
    (small_disk / "filler").unlink()
    with run_dir.claim(config):
        pass


def test_a_run_whose_folder_is_removed_ends_with_a_line(tmp_path: Path, digits_index: Path) -> None:
    run = tmp_path / "run"
    tree = settings(run, digits_index)
    tree["train"]["steps"] = 100_000
    tree["checkpoint"]["every_steps"] = 100_000

    def remove() -> None:
        wait_for(lambda: len(steps_of(run)) > 2)
        shutil.rmtree(run)

    with ThreadPoolExecutor(1) as pool, within(60), pytest.raises(DataError, match="is gone while the run goes on"):
        removed = pool.submit(remove)
        ig_dist.train(tree)
    removed.result()


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in read_lines(run / "metrics.jsonl")]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
