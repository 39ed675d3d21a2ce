"""A run's paths are its own: from any folder, and wherever it was moved or copied to."""

from __future__ import annotations

import fcntl
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from ig_dist.config import Config
from ig_dist.config.file import load_config, load_run
from ig_dist.config.paths import absolute_paths
from ig_dist.data.index import read_index
from ig_dist.errors import ConfigError
from ig_dist.run_dir import changed_keys, claim
from ig_dist.this_process import LOCK_WAIT_VARIABLE
from ig_dist.training.objective import open_reader


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, and a run that was started in it with relative paths."""
    project, other = tmp_path / "project", tmp_path / "other"
    (project / "data/digits").mkdir(parents=True)
    (project / "runs/weak").mkdir(parents=True)
    other.mkdir()
    monkeypatch.chdir(project)
    with claim(load_config("digits", ["run.dir=runs/a", "data.index=data/digits", "sample.weak_model=runs/weak@20"])):
        pass
    monkeypatch.chdir(other)
    return project


def paths(run: Path) -> tuple[str, str, str]:
    config = load_run(run)
    return config.run.dir, config.data.index, config.sample.weak_model


@pytest.mark.parametrize("stored", ["absolute", "relative"])
def test_a_run_is_used_from_another_folder_moved_and_copied(project: Path, stored: str) -> None:
    run = project / "runs/a"
    if stored == "relative":  # as older runs have them
        text = (run / "config.yaml").read_text().replace(f"{project}/", "")
        assert yaml.safe_load(text)["run"]["dir"] == "runs/a"
        (run / "config.yaml").write_text(text)
    assert paths(run) == (str(run), f"{project}/data/digits", f"{project}/runs/weak@20")

    copy = project.parent / "copies/b"
    shutil.copytree(run, copy)
    if stored == "absolute":
        assert paths(copy) == (str(copy), f"{project}/data/digits", f"{project}/runs/weak@20")

    moved = project.rename(project.parent / "moved")  # with its data
    assert paths(moved / "runs/a") == (str(moved / "runs/a"), f"{moved}/data/digits", f"{moved}/runs/weak@20")
    config = load_config(moved / "runs/a/config.yaml")  # training goes on in it, not in the place that it left
    assert Path(config.run.dir) == moved / "runs/a" and config.data.index == f"{moved}/data/digits"
    assert changed_keys(moved / "runs/a", config) == []


def test_what_lies_in_a_run_is_its_own(project: Path) -> None:
    run, copy = project / "runs/a", project.parent / "copy"
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["checkpoint"]["url"], tree["sample"]["url"] = f"{run}/checkpoints", "s3://bucket/samples"
    tree["evaluate"] |= {"reference": "https://host/a.npz", "weights": {"inception": f"{run}/inception.pth"}}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    shutil.copytree(run, copy)
    config = load_run(copy)
    assert config.checkpoint.url == f"{copy}/checkpoints" and config.sample.url == "s3://bucket/samples"
    assert config.evaluate.reference == "https://host/a.npz"
    assert config.evaluate.weights == {"inception": f"{copy}/inception.pth"}


def test_overrides_are_paths_of_the_folder_one_stands_in(project: Path) -> None:
    assert load_run(project / "runs/a", ["data.index=x"]).data.index == "x"


def test_a_config_of_ones_own_called_config_yaml_is_no_run(project: Path) -> None:
    shutil.copy(project / "runs/a/config.yaml", "config.yaml")
    assert load_config("config.yaml").run.dir == f"{project}/runs/a"


def test_a_key_that_came_later_does_not_refuse_a_run(tmp_path: Path) -> None:
    run = tmp_path / "runs/a"
    config = load_config("digits", [f"run.dir={run}"])
    with claim(config):
        pass
    tree = yaml.safe_load((run / "config.yaml").read_text())
    del tree["loss"]["aux_weight"], tree["train"]["preflight"]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    assert changed_keys(run, config) == []
    assert changed_keys(run, load_config("digits", [f"run.dir={run}", "train.preflight=false"])) == []
    changed = load_config("digits", [f"run.dir={run}", "loss.aux_weight=0.25"])
    assert changed_keys(run, changed) == ["loss.aux_weight (0.5 -> 0.25)"]


def test_a_run_that_is_held_is_refused_or_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("digits", [f"run.dir={tmp_path / 'a'}"])
    for wait_s, goes_on in (("0", False), ("10", True)):  # the second as under a launcher that starts again
        monkeypatch.setenv(LOCK_WAIT_VARIABLE, wait_s)
        (tmp_path / "a").mkdir(exist_ok=True)
        lock = (tmp_path / "a/.lock").open("a")
        fcntl.flock(lock, fcntl.LOCK_EX)
        letting_go = threading.Timer(0.3, lock.close)
        letting_go.start()
        with nullcontext() if goes_on else pytest.raises(ConfigError, match="is in use by process"), claim(config):
            assert lock.closed
        letting_go.join()


def test_a_variable_in_the_folder_of_the_cache_is_each_nodes_own(
    tmp_path: Path, digits_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {"data": {"index": str(digits_index), "cache_dir": "$SLURM_TMPDIR/x"}, "train": {"steps": 1}}
    assert absolute_paths(tree)["data"]["cache_dir"] == "$SLURM_TMPDIR/x"
    config, index = Config.model_validate({"model": {"preset": "SiT-B/2"}, **tree}), read_index(str(digits_index))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    with pytest.raises(ConfigError, match="no such variable"):
        open_reader(index, config)
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    open_reader(index, config)
    assert (tmp_path / "x").is_dir()
