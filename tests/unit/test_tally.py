"""The line that closes `make test` and CI."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.tally import run_tiers


def test_all_tiers_run_and_are_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take longer than these tests
    root = tmp_path / "tests"
    tiers = {
        "first": "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('not here')\n",
        "broken": "import no_such_module\n",
        "crashes": "import os\ndef test_a(): os._exit(9)\n",
        "last": "def test_a(): pass\ndef test_b(): pass\n",
    }
    for name, text in tiers.items():
        (root / name).mkdir(parents=True)
        (root / name / f"test_{name}.py").write_text(text)
    assert run_tiers(list(tiers), root) == 1
    assert capfd.readouterr().out.splitlines()[-1] == "3 passed, 3 failed, 1 skipped"
    assert run_tiers(["last"], root) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "2 passed, 0 failed, 0 skipped"
    python = tmp_path / "other" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ntouch {tmp_path}/used\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert run_tiers(["last", "last@other"], root) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "4 passed, 0 failed, 0 skipped"
    assert (tmp_path / "used").exists()
    assert run_tiers(["last+first@other"], root) == 1
    said = capfd.readouterr().out
    assert said.splitlines()[-1] == "3 passed, 1 failed, 1 skipped" and "def test_b(): assert 0" in said
