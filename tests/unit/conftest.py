"""What the tests of tokenizers share, and those of the commands in data_prep."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import nn

from ig_dist.terminal import console
from tests.conftest import ROOT


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokenizer of this machine, and no network."""
    monkeypatch.setenv("IG_DIST_TOKENIZERS", str(tmp_path / "tokenizers"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    from tests.autoencoders import save_vae  # slow to import: only for who asks

    folder = tmp_path_factory.mktemp("small")
    return folder, save_vae(folder)


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a command of data_prep in this process: a start of Python each would take minutes."""

    def run_script(script: str, *arguments: object) -> Ran:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(console, "stderr", False)  # --json leaves it set
        code = 0
        try:
            runpy.run_path(str(ROOT / f"data_prep/{script}.py"), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        ran = Ran(code, *capsys.readouterr())
        assert not code or (ran.err.splitlines()[-1].startswith("error: ")), ran.err
        return ran

    yield run_script
    console.stderr = False
