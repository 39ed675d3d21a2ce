"""The lock of what CI installs: whole, of the versions in constraints.txt, and what is installed there."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "constraints-hashes.txt").read_text()
LOCKED = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCK, re.MULTILINE))
FREE = re.compile(r"torch|triton|cuda-.*|nvidia-.*|pip|ig-dist")
"""Their build is for a machine's own index to say; and what is ours."""


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=;~! ]", text.strip())[0]).lower()


def test_each_locked_version_has_hashes_and_is_that_of_the_constraints() -> None:
    blocks = re.split(r"\n(?=\S)", LOCK.strip())
    assert len(blocks) == len(LOCKED) > 100
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+(?: \\\n    --hash=sha256:[0-9a-f]{64})+", block) for block in blocks)
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if version and name != "torch":
            assert LOCKED[name_of(name)] == version, f"{line}: run `make lock`"


def test_all_that_the_project_asks_for_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {
        name_of(each) for part in (project["dependencies"], *project["optional-dependencies"].values()) for each in part
    }
    assert {name for name in asked if not FREE.fullmatch(name)} <= LOCKED.keys(), "run `make lock`"


@pytest.mark.skipif("CI" not in os.environ, reason="other environments may have other versions")
def test_ci_has_what_is_locked() -> None:
    if sys.prefix.endswith(".venv-lowest"):
        pytest.skip("the oldest packages are not locked")
    found = {name_of(each.metadata["Name"]): each.version for each in distributions()}
    assert found.items() >= {name: version for name, version in LOCKED.items() if name in found}.items()
