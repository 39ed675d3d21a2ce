"""A small ImageNet in all its forms, and the command that encodes it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests import forked, imagenet_like
from tests.conftest import ROOT
from tests.encoding import SCRIPT, USUAL, Encode, arguments, contents


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
