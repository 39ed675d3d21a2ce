"""What bad input gets: exit code 2, one line that names the culprit and the remedy, no traceback, nothing written."""

from __future__ import annotations

import errno
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ig_dist import cli
from ig_dist.checkpoints.manifest import sealed
from tests.conftest import ROOT, TINY, run_command, succeed

GOOD = "CONFIG"  # stands for the path of a good config


def call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr of a command line, run in this process: a start of Python each would take minutes."""
    old = sys.argv
    sys.argv = arguments
    try:
        if arguments[0].endswith(".py"):
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
        else:
            cli.main()
    except SystemExit as end:
        return int(end.code or 0), capsys.readouterr().err
    finally:
        sys.argv = old
    return 0, capsys.readouterr().err


# what is wrong: arguments after `ig-dist`, and what the line must say
CASES: dict[str, tuple[list[str], list[str]]] = {
    "unknown group": (["train", GOOD, "modle.depth=3"], ["'modle'", "'model'"]),
    "unknown key": (["train", GOOD, "train.step=3"], ["'train.step'", "'train.steps'"]),
    "wrong type": (["train", GOOD, "train.steps=many"], ["train.steps", "'many'", "integer"]),
    "not positive": (["train", GOOD, "train.global_batch_size=0"], ["train.global_batch_size", "greater than 0"]),
    "not a number": (["train", GOOD, "optimizer.lr=.nan"], ["optimizer.lr"]),
    "override without value": (["train", GOOD, "train.steps"], ["'train.steps'", "group.key=value"]),
    "override with bad YAML": (["train", GOOD, "train.steps={"], ["train.steps", "YAML"]),
    "override into a value": (["train", GOOD, "train.steps.more=1"], ["train.steps", "no key 'more'"]),
    "steps and epochs": (["train", GOOD, "train.epochs=2"], ["train.steps", "train.epochs", "exactly one"]),
    "batch and streams": (["train", GOOD, "data.streams=5"], ["data.streams 5", "use", "train.global_batch_size=35"]),
    "accumulation": (["train", GOOD, "train.accumulation=5"], ["train.accumulation 5", "use train.accumulation=1"]),
    "Muon under DeepSpeed": (
        ["train", GOOD, "optimizer.kind=muon", "engine.kind=deepspeed"],
        ["needs whole matrices", "engine.kind=fsdp2 or ddp"],
    ),
    "apex that is not there": (["train", GOOD, "optimizer.implementation=apex"], ["NVIDIA's apex", "fused"]),
    "no config file": (["train", "nowhere.yaml"], ["nowhere.yaml", "give a file, or one of digits"]),
    "config is no mapping": (["train", "LIST"], ["must hold a mapping"]),
    "config is no YAML": (["train", "BROKEN"], ["not valid YAML"]),
    "no index": (["train", GOOD, "data.index=null"], ["data.index"]),
    "empty index": (["train", GOOD, "data.index=''"], ["data.index is empty", "ig-dist encode"]),
    "missing data": (["train", GOOD, "data.index=nowhere"], ["nowhere does not exist", "ig-dist encode"]),
    "empty data folder": (["train", GOOD, "data.index=EMPTY"], ["without an index.json", "ig-dist encode"]),
    "unknown protocol": (["train", GOOD, "data.index=s4://bucket/x"], ["s4://bucket/x"]),
    "index of another kind": (["train", GOOD, "data.index=OTHER"], ["is not an index of format"]),
    "shard is missing": (["train", GOOD, "data.index=MISSING"], ["shard-000003.tar", "missing"]),
    "shard of another size": (["train", GOOD, "data.index=SHORT"], ["shard-000003.tar", "does not match its shards"]),
    "unknown preset": (["train", GOOD, "model.preset=SiT-XL2"], ["'SiT-XL2'", "SiT-XL/2"]),
    "aux_depth out of range": (["train", GOOD, "model.aux_depth=3"], ["aux_depth 3", "1..2"]),
    "heads do not divide": (["train", GOOD, "model.num_heads=5"], ["num_heads 5", "32"]),
    "patch does not divide": (["train", GOOD, "model.patch_size=3"], ["patch_size 3", "8"]),
    "other classes than the data": (["train", GOOD, "model.num_classes=7"], ["model.num_classes is 7", "has 10"]),
    "window memory": (["train", GOOD, "data.window_bytes=1000"], ["data.window_samples", "data.window_bytes="]),
    "more streams than samples": (
        ["train", GOOD, "data.streams=4096", "train.global_batch_size=4096"],
        ["data.streams 4096", "at most 1797"],
    ),
    "guidance without a head": (
        ["train", GOOD, "model.aux_depth=null", "guidance=[{kind: ig, scale: 2}]"],
        ["ig", "auxiliary head", "model.aux_depth"],
    ),
    "guidance interval": (
        ["train", GOOD, "guidance=[{kind: ig, scale: 2, interval: [0.9, 0.1]}]"],
        ["interval", "low <= high"],
    ),
    "two terms at one time": (
        ["train", GOOD, "guidance=[{kind: cfg, scale: 2}, {kind: cfg, scale: 3}]"],
        ["two 'cfg'", "disjoint"],
    ),
    "equal EMA decays": (["train", GOOD, "ema.decays=[0.9, 0.9]"], ["0.9", "differ"]),
    "run.dir is a file": (["train", GOOD, "run.dir=CONFIG"], ["is a file", "run.dir"]),
    "fork and init": (
        ["train", GOOD, "run.fork_from=a", "train.init_from=b"],
        ["run.fork_from", "train.init_from", "one of them"],
    ),
    "fork of no run": (["train", GOOD, "run.fork_from=nowhere@3"], ["nowhere", "config.yaml"]),
    "init from nothing": (["train", GOOD, "train.init_from=nowhere"], ["train.init_from nowhere", "ig-dist export"]),
    "init from no weights": (["train", GOOD, "train.init_from=BROKEN"], ["no safetensors weights", "ig-dist export"]),
    "validation without shards": (
        ["train", GOOD, "log.validate_every_steps=5"],
        ["log.validate_every_steps", "data.validation_shards"],
    ),
    "validation on every shard": (
        ["train", GOOD, "data.validation_shards=8"],
        ["data.validation_shards 8", "8 shards"],
    ),
    "cfg without label drop": (
        ["train", GOOD, "loss.label_drop=0", "guidance=[{kind: cfg, scale: 2}]"],
        ["cfg", "loss.label_drop=0.1"],
    ),
    "unknown metric": (["train", GOOD, "evaluate.metrics=[fdi]"], ["evaluate.metrics", "'fdi'", "did you mean 'fid'"]),
    "no metric": (["train", GOOD, "evaluate.metrics=[]"], ["evaluate.metrics is empty", "fd_pixel"]),
    "unknown labels": (["sample", "RUN", "--labels", "even"], ["sample.labels", "'balanced'"]),
    "unknown solver": (["sample", "RUN", "--solver", "dpm"], ["sample.solver", "'heun'"]),
    "scale is no number": (["sample", "RUN", "--ig-scale", "nan"], ["guidance", "finite"]),
    "interval of one number": (["sample", "RUN", "--ig-interval", "0.3"], ["--ig-interval", "LOW,HIGH"]),
    "interval outside": (["sweep", "RUN", "--cfg-interval", "0.3,1.2"], ["--cfg-interval", "HIGH <= 1"]),
    "scales are no numbers": (["sweep", "RUN", "--ig-scale", "1,two"], ["--ig-scale", "separated by commas"]),
    "an average that is not there": (["export", "RUN", "--ema", "0.5"], ["--ema 0.5", "[0.99, 0.9]"]),
    "guidance of a model without a head": (
        ["sample", "HEADLESS", "--ig-scale", "2"],
        ["ig", "auxiliary head", "model.aux_depth"],
    ),
    "guidance of a model without a head, whatever the config says": (
        ["sample", "HEADLESS", "--ig-scale", "2", "model.aux_depth=1"],
        ["ig", "no auxiliary head", "train with model.aux_depth"],
    ),
    "cfg of a model that saw every label": (["sample", "NODROP", "--cfg-scale", "2"], ["cfg", "loss.label_drop=0.1"]),
    "cfg of a model that saw every label, whatever the config says": (
        ["sweep", "NODROP", "--cfg-scale", "2", "loss.label_drop=0.1"],
        ["cfg", "never saw the null label", "train with loss.label_drop=0.1"],
    ),
    "autoguidance without a second model": (["sample", "RUN", "--auto-scale", "2"], ["auto", "sample.weak_model=RUN"]),
    "a second model that is not there": (
        ["sample", "RUN", "--auto-scale", "2", "--weak", "nowhere"],
        ["sample.weak_model nowhere", "RUN@STEP"],
    ),
    "a second model of no step": (
        ["sample", "RUN", "--auto-scale", "2", "--weak", "RUN@last"],
        ["'last' is no step", "RUN@1000"],
    ),
    "a second model of a step that is not there": (
        ["sample", "RUN", "--auto-scale", "2", "--weak", "RUN@1"],
        ["no whole checkpoint", "step 1"],
    ),
    "a second model without the null label": (
        ["sample", "RUN", "--auto-scale", "2", "--cfg-scale", "2", "--weak", "NODROP"],
        ["NODROP", "null label", "branches=conditional"],
    ),
    "branches of cfg": (
        ["sample", "RUN", "guidance=[{kind: cfg, scale: 2, branches: 'null'}]"],
        ["cfg", "leave its branches out"],
    ),
    "guidance of more channels than there are": (
        ["sample", "RUN", "guidance=[{kind: cfg, scale: 2, channels: 3}]"],
        ["cfg on 3 channels", "the latents have 1", "leave channels out"],
    ),
    "a shift of the SDE": (
        ["sample", "RUN", "--solver", "euler_maruyama", "sample.time_shift=2"],
        ["sample.time_shift", "euler_maruyama", "sample.time_shift=1"],
    ),
    "the last step of euler": (
        ["sample", "RUN", "--solver", "euler", "sample.correct_last_step=false"],
        ["sample.correct_last_step", "heun"],
    ),
    "a run without a checkpoint": (["sample", "FRESH"], ["has no checkpoint", "ig-dist train"]),
    "report of no run": (["report", "nowhere"], ["nowhere"]),
    "checkpoints of an unknown protocol": (["train", GOOD, "checkpoint.url=s4://b/x"], ["checkpoint.url", "s4"]),
    "a password in a URL": (
        ["train", GOOD, "checkpoint.url=https://me:hun" + "ter2@host/x"],
        ["checkpoint.url https://***@host/x: no credentials in a URL", "~/.netrc"],
    ),
    "checkpoints over http": (["train", GOOD, "checkpoint.url=https://host/x"], ["checkpoint.url", "http", "s3://"]),
    "samples of an unknown protocol": (["sample", "RUN", "sample.url=s4://b/x"], ["sample.url", "s4"]),
    "fork beyond the end": (
        ["train", GOOD, "run.fork_from=RUN", "train.steps=2"],
        ["at step 2", "train.steps is 2", "raise train.steps"],
    ),
    "export of no run": (["export", "nowhere"], ["nowhere", "config.yaml"]),
    "sample of no run": (["sample", "nowhere"], ["nowhere", "config.yaml"]),
    "sweep of no run": (["sweep", "nowhere"], ["nowhere", "config.yaml"]),
    "evaluate of no samples": (["evaluate", "nowhere"], ["nowhere does not exist", "an npz, an index, a folder"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits_index: Path) -> dict[str, str]:
    """A trained run, one without an auxiliary head, one that dropped no label, and one that was never trained."""
    folder = tmp_path_factory.mktemp("runs")
    for name, aux_depth, label_drop in (("RUN", 1, 0.1), ("HEADLESS", None, 0.1), ("NODROP", 1, 0.0)):
        tree = {**TINY, "model": {**TINY["model"], "aux_depth": aux_depth}, "run": {"dir": str(folder / name)}}
        tree["data"], tree["loss"] = {**TINY["data"], "index": str(digits_index)}, {"label_drop": label_drop}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        succeed(["ig-dist", "train", folder / f"{name}.yaml", "train.steps=2"])
    (folder / "FRESH").mkdir()
    shutil.copy(folder / "RUN" / "config.yaml", folder / "FRESH")
    return {name: str(folder / name) for name in ("RUN", "HEADLESS", "NODROP", "FRESH")}


@pytest.fixture
def places(
    tmp_path: Path, digits_index: Path, tiny_config: Callable[..., Path], runs: dict[str, str]
) -> dict[str, str]:
    """Good and bad files that the cases name."""
    paths = {name: tmp_path / name.lower() for name in ("EMPTY", "OTHER", "MISSING", "SHORT", "LIST", "BROKEN")}
    paths["EMPTY"].mkdir()
    for name in ("OTHER", "MISSING", "SHORT"):
        shutil.copytree(digits_index, paths[name])
    (paths["OTHER"] / "index.json").write_text('{"format": "mds"}')
    (paths["MISSING"] / "shard-000003.tar").unlink()
    (paths["SHORT"] / "shard-000003.tar").write_bytes(b"short")
    paths["LIST"].write_text("- 1\n")
    paths["BROKEN"].write_text("{: ]")
    return {GOOD: str(tiny_config()), **runs, **{name: str(path) for name, path in paths.items()}}


@pytest.mark.parametrize("case", CASES)
def test_one_line_that_names_culprit_and_remedy(
    case: str,
    places: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, words = CASES[case]
    for name, path in places.items():
        arguments = [argument.replace(name, path) if argument != name else path for argument in arguments]
    monkeypatch.chdir(ROOT)
    before = [snapshot(Path(folder)) for folder in (tmp_path, places["RUN"], places["FRESH"])]
    code, errors = call(["ig-dist", *arguments], capsys)
    assert code == 2, errors
    assert errors.count("\n") == 1 and errors.startswith("error: "), errors
    for word in words:
        assert word in errors, errors
    after = [snapshot(Path(folder)) for folder in (tmp_path, places["RUN"], places["FRESH"])]
    assert after == before  # nothing written


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """Folders of pictures that the cases name."""
    root = tmp_path / "folders"
    files: dict[str, list[str]] = {
        "GOOD": ["a/1.png", "b/2.png"],
        "EMPTY": [".DS_Store", "Thumbs.db"],
        "FLAT": ["1.png", "2.png"],
        "STRAY": ["a/1.png", "b/2.png", "3.png"],
        "NOCLASSES": ["notes.txt"],
        "HOLLOW": ["a/.hidden.png", "b/.hidden.png"],
        "USELESS": [*(f"a/{i}.png" for i in range(200)), "b/notes.txt"],
        "LOOP": ["a/1.png"],
    }
    for folder, names in files.items():
        for name in names:
            file = root / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".png":
                Image.new("RGB", (20, 20)).save(file)
            else:
                file.write_text("no picture")
    (root / "LOOP/a/again").symlink_to(root / "LOOP/a")
    (root / "FILE").write_text("no folder")
    return {name: str(root / name) for name in (*files, "FILE")}


PIXELS = ["--tokenizer", "pixel", "--image-size", "16"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "cats"], ["'cats'", "does not exist", "digits"]),
        (["--source", "digits", "--tokenizer", "pixle"], ["'pixle'", "'pixel'"]),
        (["--source", "GOOD", "--image-size", "16", "--tokenizer", "pixle"], ["'pixle'", "'pixel'"]),
        (["--source", "digits", "--dest", "DONE", "--seed", "5"], ["other settings", "--dest"]),
        (["--source", "GOOD", *PIXELS, "--dest", "DONE"], ["other settings or images", "--dest"]),
        (["--source", "digits", "--image-size", "8"], ["--image-size", "leave it out"]),
        (["--source", "GOOD"], ["needs --image-size", "--image-size 16"]),
        (["--source", "GOOD", "--image-size", "0"], ["--image-size 0", "--image-size 16"]),
        (["--source", "GOOD", *PIXELS, "--max-rejected", "5"], ["--max-rejected 5", "0 to 1"]),
        (["--source", "GOOD", *PIXELS, "--max-rejected", "nan"], ["--max-rejected nan", "0 to 1"]),
        (["--source", "GOOD", *PIXELS, "--dest", "GOOD/shards"], ["--dest", "lies in --source", "move it out"]),
        (["--source", "FILE", *PIXELS], ["FILE", "is a file", "sub-folder"]),
        (["--source", "EMPTY", *PIXELS], ["EMPTY is empty", "one sub-folder per class"]),
        (["--source", "FLAT", *PIXELS], ["FLAT", "1.png", "without a class", "one sub-folder per class"]),
        (["--source", "STRAY", *PIXELS], ["STRAY", "3.png", "without a class", "one sub-folder per class"]),
        (["--source", "NOCLASSES", *PIXELS], ["NOCLASSES", "no class folders", "one sub-folder per class"]),
        (["--source", "HOLLOW", *PIXELS], ["HOLLOW", "class folders are empty"]),
        (["--source", "GOOD", *PIXELS, "--dest", "FILE"], ["--dest", "is a file", "choose a folder"]),
        (["--source", "GOOD", *PIXELS, "--dest", "s4://bucket/x"], ["--dest", "s4"]),
        (["--source", "GOOD", *PIXELS, "--store", "moments"], ["--store moments", "pixel has none"]),
        (["--source", "GOOD", *PIXELS, "--store", "mean"], ["--store 'mean'", "moments or sample"]),
        (["--source", "GOOD", *PIXELS, "--precision", "fp8"], ["--precision 'fp8'", "bf16"]),
        (["--source", "GOOD", *PIXELS, "--worker", "4/4"], ["--worker 4/4", "0/4"]),
        (["--source", "GOOD", *PIXELS, "--worker", "2"], ["--worker 2", "i/W"]),
        (["--source", "LOOP", *PIXELS], ["LOOP/a/again", "counted already", "remove the link"]),
    ],
)
def test_encoding(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    digits_index: Path,
    folders: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    dest = [] if "--dest" in arguments else ["--dest", str(tmp_path / "out")]
    places = {"DONE": str(digits_index), **folders}
    parts = (argument.partition("/") for argument in arguments)
    arguments = [places.get(name, name) + slash + rest for name, slash, rest in parts]
    before = snapshot(tmp_path), snapshot(digits_index)
    code, errors = call(["data_prep/encode_latents.py", *arguments, *dest], capsys)
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("error: "), errors
    for word in words:
        assert word in errors, errors
    assert (snapshot(tmp_path), snapshot(digits_index)) == before  # nothing written


def test_a_class_without_a_picture(tmp_path: Path, folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    dest = tmp_path / "out"
    arguments = ["--source", folders["USELESS"], *PIXELS, "--dest", str(dest)]
    for _ in range(2):  # what is known does not have to be found out again
        code, errors = call(["data_prep/encode_latents.py", *arguments], capsys)
        assert code == 2 and errors.count("\n") == 1, errors
        for word in (folders["USELESS"], "class 'b' has no usable picture", "b/notes.txt: not a PNG", "remove"):
            assert word in errors, errors
        assert not (dest / "index.json").exists() and "b/notes.txt" in (dest / "rejected.csv").read_text()


def test_a_folder_that_cannot_be_read(
    tmp_path: Path, folders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def closed(path: str | Path) -> Iterator[os.DirEntry[str]]:  # root reads what chmod closes
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    arguments = ["--source", folders["GOOD"], *PIXELS, "--dest", str(tmp_path / "out")]
    code, errors = call(["data_prep/encode_latents.py", *arguments], capsys)
    assert code == 2 and errors.count("\n") == 1, errors
    assert f"{folders['GOOD']}/b cannot be read (Permission denied)" in errors
    assert not (tmp_path / "out").exists()


def test_too_many_rejected_pictures_leave_the_list_only(
    tmp_path: Path, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    source, dest = Path(folders["GOOD"]), tmp_path / "out"
    (source / "b/3.jpg").write_text("no picture")
    arguments = ["data_prep/encode_latents.py", "--source", str(source), *PIXELS, "--dest", str(dest)]
    code, errors = call([*arguments, "--max-rejected", "0.33"], capsys)
    assert code == 2 and errors.count("\n") == 1, errors
    for word in ("1 of 3 files are rejected", "b/3.jpg: not a PNG", f"{dest}/rejected.csv", "--max-rejected 0.334"):
        assert word in errors, errors
    assert [path.name for path in dest.iterdir()] == ["rejected.csv"]
    assert call([*arguments, "--max-rejected", "0.34"], capsys)[0] == 0
    assert "rejected.csv" in {path.name for path in dest.iterdir()} and (dest / "index.json").exists()
    # once the folder is mended, the list of the failed try does not stay
    shutil.rmtree(dest)
    assert call([*arguments, "--max-rejected", "0"], capsys)[0] == 2
    (source / "b/3.jpg").unlink()
    assert call([*arguments, "--max-rejected", "0"], capsys)[0] == 0
    assert not (dest / "rejected.csv").exists() and (dest / "index.json").exists()


def test_a_run_directory_of_another_config_names_the_keys(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny_config(train={"steps": 2}))
    assert call(["ig-dist", "train", config], capsys)[0] == 0
    before = snapshot(tmp_path)
    code, errors = call(["ig-dist", "train", config, "optimizer.lr=0.5", "run.seed=3", "log.every_steps=7"], capsys)
    assert code == 2 and errors.count("\n") == 1
    assert "optimizer.lr (0.002 -> 0.5), run.seed (0 -> 3)" in errors and "log.every" not in errors
    assert snapshot(tmp_path) == before


def test_an_index_that_changed_since_the_run_began_is_refused(
    tiny_config: Callable[..., Path], tmp_path: Path, digits_index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(digits_index, copy)
    config = str(tiny_config(train={"steps": 2}, data={"index": str(copy)}))
    assert call(["ig-dist", "train", config], capsys)[0] == 0
    (copy / "index.json").write_text((copy / "index.json").read_text().replace("digits", "others"))
    code, errors = call(["ig-dist", "train", config, "train.steps=4"], capsys)
    assert code == 2 and "is not the one" in errors


def test_a_checkpoint_of_a_later_version_is_refused_and_stays(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny_config(train={"steps": 2}))
    assert call(["ig-dist", "train", config], capsys)[0] == 0
    (file,) = (tmp_path / "runs/tiny/checkpoints").glob("step_*/manifest.json")
    manifest = json.loads(file.read_text())
    later = json.loads(json.dumps(manifest))
    later["meta"]["config"]["engine"]["sorcery"] = 2
    for changed, said in ((later, "engine.sorcery"), (manifest | {"format": "ig-dist-checkpoint/4"}, "checkpoint/4")):
        file.write_text(json.dumps(sealed(changed)))
        for command in (
            ["ig-dist", "train", config, "train.steps=4"],
            ["ig-dist", "export", str(tmp_path / "runs/tiny")],
        ):
            before = snapshot(tmp_path / "runs")
            code, errors = call(command, capsys)
            assert code == 2 and errors.count("\n") == 1 and said in errors and "use th" in errors, errors
            assert snapshot(tmp_path / "runs") == before


def test_layouts_that_do_not_fit_are_said_once(tmp_path: Path, digits_index: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "data": {"index": str(digits_index), "streams": 8}}))
    done = run_command(["python", "launchers/local.py", "--processes", "3", config, f"run.dir={tmp_path / 'run'}"])
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "use 1, 2, 4, 8 processes" in errors[0]
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    hsdp = ["engine.kind=fsdp2", "engine.replicate=4", f"run.dir={tmp_path / 'run'}"]
    done = run_command(["python", "launchers/local.py", "--processes", "2", config, *hsdp])
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "use engine.replicate=1 or 2" in errors[0]


def test_damage_that_restarting_cannot_mend_is_exit_code_4(
    tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny_config(train={"steps": 4}))
    assert call(["ig-dist", "train", config], capsys)[0] == 0
    for file in (tmp_path / "runs/tiny/checkpoints").rglob("*.safetensors"):
        file.write_bytes(b"gone")
    code, errors = call(["ig-dist", "train", config, "train.steps=8"], capsys)
    assert code == 4 and "none of the 1 checkpoints" in errors
