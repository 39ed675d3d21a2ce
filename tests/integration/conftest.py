"""A small ImageNet in all its forms, and the command that encodes it."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import forked, imagenet_like
from tests.conftest import ROOT
from tests.encoding import SCRIPT, USUAL, Encode, arguments, contents
from tests.slurm_cluster import SlurmCluster
from tests.slurm_runs import TWO, launch, write_config


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp("form") / name) for name, make in imagenet_like.FORMS.items()}


@pytest.fixture
def encode(
    forms: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Encode:
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(
        dest: Path | str, options: str = "", *, source: Path | str = forms["ImageFolder"], usual: str = USUAL
    ) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", arguments(source, dest, f"--spool {tmp_path}/spool {options}", usual))
        code = 0
        try:
            runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="session")
def undisturbed(forms: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one worker makes of the class folders."""
    dest = tmp_path_factory.mktemp("undisturbed") / "out"
    done = forked.run(arguments(forms["ImageFolder"], dest, ""))
    assert done.returncode == 0, done.stderr
    return contents(dest)


@pytest.fixture
def cluster(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster, empty before and after a test, and an environment in which commands find it."""
    for name, value in slurm.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IG_DIST_CLUSTER", "")
    yield slurm
    slurm.cancel_all()
    slurm.run("scontrol", "update", "partitionname=main", "gracetime=0")
    for node in slurm.nodes:
        slurm.restore_node(node)
    slurm.wait_for_nodes()


@pytest.fixture(scope="session")
def uninterrupted(
    slurm: SlurmCluster, digits_index: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """The run directory of a training of so many steps on two nodes, which nothing disturbs."""
    runs: dict[int, Path] = {}

    def train(steps: int) -> Path:
        if steps not in runs:
            folder = tmp_path_factory.mktemp("whole")
            config = write_config(folder, digits_index, steps)
            done = launch(*TWO, "--config", config, "--follow", env=slurm.environment())
            assert done.returncode == 0, done.stdout + done.stderr
            assert f"step {steps}/{steps}" in done.stdout and "COMPLETED" in done.stdout
            runs[steps] = folder / "run"
        return runs[steps]

    return train
