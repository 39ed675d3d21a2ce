"""What pip installs: the wheel holds the whole package and works in an environment without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

import ig_dist
from tests.conftest import ROOT
from tests.slurm_cluster import SlurmCluster

SHIPPED = ("ig_dist", "tests", "launchers", "data_prep", "pyproject.toml", "README.md", "LICENSE")
SMALL = ["model.depth=3", "model.hidden_size=32", "model.num_heads=2", "train.global_batch_size=16"]
SMALL += ["optimizer.schedule=constant", "log.every_steps=1", "log.sample_every_steps=0"]

# one process for all that is asked of the library: what it is, what a job would copy, and pictures
LIBRARY = """
import json, sys
from pathlib import Path
import ig_dist
from ig_dist.slurm.submit import snapshot

snapshot(Path("source"))
picture, = ig_dist.load("my run")(labels=[3], steps=2, seed=0)
print(json.dumps({"file": ig_dist.__file__, "path": sys.path, "size": picture.size}))
"""


class Built(NamedTuple):
    wheel: Path
    sdist: Path
    source: Path


class Installed(NamedTuple):
    """An environment with the wheel, and an empty folder to stand in."""

    bin: Path
    site: Path
    folder: Path

    def run(self, *command: object, code: int = 0, **environment: str) -> str:
        """The output of a command that ends with this code."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            list(map(str, command)),
            cwd=self.folder,
            env={**clean, **environment, "PATH": f"{self.bin}:{environment.get('PATH', os.environ['PATH'])}"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout


def build(kind: str, source: Path, dest: Path) -> Path:
    """What pip calls to build, from this environment."""
    code = f"from flit_core import buildapi; import sys; print(buildapi.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, dest], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dest / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    source = folder / "checkout"
    source.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, source / name)
    return Built(build("wheel", source, folder), build("sdist", source, folder), source)


def make_environment(folder: Path, wheel: Path, *options: str) -> Installed:
    environment, empty = folder / "environment", folder / "an empty folder"
    empty.mkdir()
    venv.create(environment, with_pip=False)
    python = environment / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *options, wheel]
    done = subprocess.run(pip, capture_output=True, text=True, check=False, cwd=empty)
    assert done.returncode == 0, done.stderr
    (site,) = environment.glob("lib/python3*/site-packages")
    return Installed(environment / "bin", site, empty)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel alone, its dependencies lent by this environment: a path file adds them, but no path file of theirs."""
    made = make_environment(tmp_path_factory.mktemp("installed"), built.wheel, "--no-deps", "--no-index")
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (made.site / "dependencies.pth").write_text("".join(f"{path}\n" for path in paths))
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    held = contents(built.wheel)
    about = f"ig_dist-{ig_dist.__version__}.dist-info/"
    expected = {str(file.relative_to(built.source)) for file in built.source.glob("ig_dist/**/*") if file.is_file()}
    assert {name for name in held if not name.startswith(about)} == expected
    suffixes = {Path(name).suffix for name in expected}
    assert suffixes >= {".py", ".yaml", ".jinja", ".css", ".txt", ".typed"}
    assert f"\nVersion: {ig_dist.__version__}\n" in held[f"{about}METADATA"].decode()
    assert b"ig-dist=ig_dist.cli:main" in held[f"{about}entry_points.txt"]


def test_the_source_distribution_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as opened:
        opened.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert contents(build("wheel", source, tmp_path)) == contents(built.wheel)


def use(made: Installed) -> None:
    """What a newcomer types, in an empty folder whose name has spaces."""
    assert made.run("ig-dist", "--version").strip() == f"ig-dist {ig_dist.__version__}"
    assert "quickstart" in made.run("ig-dist", "--help")
    made.run("ig-dist", "encode", "--source", "digits", "--dest", "my data", "--tokenizer", "pixel")
    train = ["digits", "data.index=my data", "run.dir=my run", "train.steps=2", *SMALL]
    made.run("ig-dist", "train", *train)
    (line,) = (made.folder / "my run/provenance.jsonl").read_text().splitlines()
    start = json.loads(line)
    assert start["command"].startswith("ig-dist train digits 'data.index=my data'") and "commit" not in start
    assert start["versions"]["ig_dist"] == ig_dist.__version__ and start["cwd"] == str(made.folder)
    made.run("ig-dist", "launch", "--processes", "1", "--job", "sample", "my run", "sample.num=4", "sample.steps=2")
    made.run("ig-dist", "report", "my run")
    assert (made.folder / "my run/report.html").stat().st_size > 10_000
    script = made.run("ig-dist", "slurm", "--nodes", "2", "--tasks-per-node", "1", "--dry-run", *train)
    assert "#SBATCH --nodes=2" in script and str(made.bin / "python") in script


def test_from_a_wheel_in_an_empty_folder(installed: Installed, built: Built) -> None:
    use(installed)
    said = json.loads(installed.run("python", "-c", LIBRARY).splitlines()[-1])
    assert said["file"] == str(installed.site / "ig_dist/__init__.py") and said["size"] == [8, 8]
    assert str(ROOT) not in said["path"]
    # a job's copy of the package: all of it, and it comes before the one that is installed
    copied = {str(file.relative_to(installed.folder / "source")) for file in installed.folder.glob("source/**/*.*")}
    assert copied >= {name for name in contents(built.wheel) if name.startswith("ig_dist/")}
    there = {"PYTHONPATH": "source", "PYTHONSAFEPATH": "1"}
    assert installed.run("python", "-c", "import ig_dist; print(ig_dist.__file__)", **there).startswith(
        str(installed.folder / "source")
    )


def test_a_job_runs_the_copy_of_an_installed_package(
    installed: Installed, slurm: SlurmCluster, digits_index: Path
) -> None:
    """While it waits, the installed package is changed."""
    file = installed.site / "ig_dist/__init__.py"
    text = file.read_text()
    change = f"sed -i 's/^__version__.*/__version__ = \"later\"/' '{file}'"
    job = ["--nodes", "1", "--tasks-per-node", "1", "--setup", change, "--follow"]
    train = ["digits", f"data.index={digits_index}", "run.dir=job run", "train.steps=2", *SMALL]
    try:
        installed.run("ig-dist", "slurm", *job, *train, **slurm.environment(), IG_DIST_CLUSTER="")
        assert '"later"' in file.read_text()
    finally:
        file.write_text(text)
    (line,) = (installed.folder / "job run/provenance.jsonl").read_text().splitlines()
    assert json.loads(line)["versions"]["ig_dist"] == ig_dist.__version__ and json.loads(line)["slurm_job"]


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_from_a_wheel_with_what_pip_gets_for_it(built: Built, tmp_path: Path) -> None:
    """No extras: 40 s and 1.4 GB with torch for CPUs at hand."""
    made = make_environment(tmp_path, built.wheel)
    use(made)
    for name in "abab":
        picture = made.folder / "my pictures" / name / f"{time.monotonic_ns()}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), "red").save(picture)
    made.run(
        "ig-dist", "encode", "--source", "my pictures", "--dest", "b", "--tokenizer", "pixel", "--image-size", "16"
    )
    made.run("ig-dist", "quickstart", "--short")
    text = made.run("ig-dist", "quickstart", "--short")
    assert "finds nothing to do" in text and "SIGTERM" not in text
