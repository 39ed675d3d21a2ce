"""The rows of docs/security.md that no other test holds: secrets, folders of others, hostile names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ig_dist.arithmetic import compile_cache
from ig_dist.data.sources.spool import spool
from ig_dist.errors import ConfigError
from ig_dist.storage.faults import PATIENCE
from ig_dist.storage.writable import others_may_change
from tests.conftest import run_command

SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "DB_PASSWORD")
PLANTED = "planted-3f9a1c"


def test_nothing_that_a_run_writes_holds_a_secret_of_its_environment(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(SECRETS):
        monkeypatch.setenv(name, f"{PLANTED}-{number}")
    config = tiny_config("tiny", train={"steps": 3}, checkpoint={"every_steps": 1})
    run = tmp_path / "runs" / "tiny"
    said = ""
    for command in (
        ["train", config],
        ["sample", run, "--num", "8", "--evaluate"],
        ["report", run],
        ["slurm", config, "--nodes", "2", "--dry-run", "run.dir=" + str(tmp_path / "job")],
        ["launch", "--processes", "2", config, "--dry-run"],
    ):
        done = run_command(["ig-dist", *map(str, command)])
        assert done.returncode in (0, 2), done.stderr  # 2: no SLURM here
        said += done.stdout + done.stderr
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 20
    assert PLANTED not in said
    assert not [file for file in written if PLANTED.encode() in file.read_bytes()]


def test_a_folder_in_which_others_may_write_holds_no_copies_and_no_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (shared := tmp_path / "shared").mkdir()
    (own := shared / "own").mkdir(mode=0o700)
    assert others_may_change(own) == ""
    shared.chmod(0o777)
    assert others_may_change(own) == str(shared)
    shared.chmod(0o1777)
    assert others_may_change(own) == ""
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match="other users may change files in"):
        spool([], own / "copies", None, PATIENCE)  # type: ignore[arg-type]
    monkeypatch.setenv("IG_DIST_COMPILED", str(own))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    compile_cache.keep_compiled()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert "other users may change files" in capfd.readouterr().err
    shared.chmod(0o700)
    compile_cache.keep_compiled()
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == str(own)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of another user")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (folder := tmp_path / "theirs").mkdir()
    os.chown(folder, 65534, 65534)
    assert others_may_change(folder) == str(folder)


def test_an_index_names_files_of_its_own_folder_only(digits_index: Path, tmp_path: Path) -> None:
    tree = json.loads((digits_index / "index.json").read_text())
    for name in ("../digits/shard-000000.tar", "/etc/passwd", "a/../../x.tar", ""):
        tree["shards"][0]["name"] = name
        (tmp_path / "index.json").write_text(json.dumps(tree))
        for file in digits_index.glob("*.*"):
            if file.name != "index.json" and not (tmp_path / file.name).exists():
                (tmp_path / file.name).symlink_to(file)
        done = run_command(["ig-dist", "train", "digits", f"data.index={tmp_path}", f"run.dir={tmp_path}/run"])
        assert done.returncode == 2 and "is missing" in done.stderr and "Traceback" not in done.stderr, done.stderr
