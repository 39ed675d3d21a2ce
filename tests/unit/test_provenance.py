"""Where a run comes from: the commit of a checkout, of a job's copy, of none; and never an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ig_dist.config import provenance
from ig_dist.slurm.submit import snapshot


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "a clone"
    (root / "ig_dist").mkdir(parents=True)
    (root / "ig_dist/a.py").write_text("")
    git(root, "init", "--quiet")
    git(root, "add", "ig_dist")
    git(root, "commit", "--quiet", "--message", "a")
    monkeypatch.setattr(provenance, "SOURCE", root)
    return root


def test_the_commit_of_a_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    monkeypatch.chdir("/")
    (checkout / "notes.txt").write_text("no code")
    head = (checkout / ".git" / (checkout / ".git/HEAD").read_text().split()[1]).read_text().strip()
    assert provenance.commit() == {"commit": head, "dirty": False}
    (checkout / "ig_dist/new.py").write_text("")
    assert provenance.commit() == {"commit": head, "dirty": True}


def test_what_lies_in_a_checkout_is_not_of_it(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "SOURCE", checkout / "ig_dist")  # an environment in somebody's project
    assert provenance.commit() == {}


def test_nothing_that_lacks_is_an_error(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert provenance.commit() == {}
    monkeypatch.setattr(provenance, "SOURCE", tmp_path)
    (tmp_path / ".git").write_text("gitdir: /nowhere")
    assert provenance.commit() == {}
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    known = provenance.provenance().keys()
    assert known >= {"started", "command", "host", "processes", "device", "versions"} and "cwd" not in known
    provenance.note_start(gone)
    (gone.parent / provenance.FILE_NAME).mkdir()  # not even a file that can be written
    provenance.note_start(gone.parent)


def test_a_jobs_copy_knows_its_commit(tmp_path: Path) -> None:
    snapshot(tmp_path / "source")
    code = "from ig_dist.config import provenance as p; import json; print(json.dumps([p.__file__, p.commit()]))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "source"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    file, commit = json.loads(done.stdout)
    assert file.startswith(str(tmp_path)) and commit == provenance.commit()


def test_the_command_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "argv", ["/a b/bin/ig-dist", "train", "digits", "run.dir=my run"])
    assert provenance.command() == "ig-dist train digits 'run.dir=my run'"
    monkeypatch.setattr(sys, "argv", ["mine.py", "1"])
    assert provenance.command() == "mine.py 1"
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert provenance.command() == "a notebook"
