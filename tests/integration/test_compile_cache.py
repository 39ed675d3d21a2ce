"""What one process has compiled, the others and later ones load; and a cache that is of no use is no harm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ig_dist.arithmetic.compile_cache import keep_compiled
from tests.conftest import ROOT

CODE = """
import torch
from ig_dist.arithmetic import compiled

x = torch.ones(9, requires_grad=True)
function = lambda x: (x.sin() * x).tanh()
(expected,) = torch.autograd.grad(function(x).sum(), x)
compiled(function)(x).sum().backward()
torch.testing.assert_close(x.grad, expected)
print(dict(torch._dynamo.utils.counters["aot_autograd"]))
"""


def begin(home: Path, **more: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if "CACHE_DIR" not in name}
    return subprocess.Popen(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env={**environment, "HOME": f"{home}", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two processes that compiled the same at the same time."""
    home = tmp_path_factory.mktemp("home")
    found = [end(process)[0] for process in [begin(home), begin(home)]]
    assert sorted("autograd_cache_hit" in out for out in found) == [False, True], found
    return home


def test_one_process_compiles_and_the_others_load(home: Path) -> None:
    assert [*(home / ".cache/ig_dist/compiled").rglob("*.so")]


@pytest.mark.full  # seconds, of a real compilation
def test_damaged_kernels_are_compiled_again(home: Path) -> None:
    for file in (home / ".cache/ig_dist/compiled").rglob("*.so"):
        os.truncate(file, 3000)
    _, err = end(begin(home))
    assert re.search("warning: the kernels in .*/compiled are not used", err)


def test_without_a_compiler_it_is_said(tmp_path: Path) -> None:
    process = begin(tmp_path, CXX="/bin/false")
    _, err = process.communicate(timeout=200)
    assert process.returncode and "ConfigError: the model cannot be compiled here" in err, err
    assert "set train.compile=false" in err


def test_without_a_folder_that_can_be_written_pytorchs_own_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IG_DIST_COMPILED", f"{tmp_path}/file/compiled")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("no folder")
    keep_compiled()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    (tmp_path / "file").unlink()
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/file/compiled"
