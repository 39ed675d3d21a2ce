"""Packages that not everyone needs: the table is pyproject's, and the message works wherever ig-dist came from."""

import tomllib
from pathlib import Path

import pytest

from ig_dist.errors import ConfigError
from ig_dist.storage.files import open_url
from ig_dist.terminal.extras import EXTRAS, missing, requirement
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_table_is_that_of_the_package() -> None:
    extras = PROJECT["optional-dependencies"]
    assert extras.keys() - {"dev"} == EXTRAS.keys()
    for name, package in EXTRAS.items():
        assert extras[name] == [line for line in extras[name] if line.startswith(package)]
        assert f"{package} (extra `{name}`)" in (ROOT / "docs/dependencies.md").read_text()


def test_what_is_missing_is_named_with_the_releases_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(requirement("deepspeed").removeprefix("deepspeed").split(",")) == ["<0.20", ">=0.19.7"]
    text = str(missing("deepspeed", "engine.kind=deepspeed needs", "use engine.kind=fsdp2"))
    assert text.startswith(f"engine.kind=deepspeed needs deepspeed: pip install '{requirement('deepspeed')}' (the")
    assert text.endswith(", or use engine.kind=fsdp2")
    monkeypatch.setattr("importlib.metadata.requires", lambda name: None)  # a copy that was not installed
    assert requirement("deepspeed") == "deepspeed"


def test_no_text_sends_anyone_to_an_index_for_ig_dist() -> None:
    texts = [*ROOT.glob("ig_dist/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    assert [str(text) for text in texts if "pip install 'ig-dist[" in text.read_text()] == []


def test_object_storage_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(*arguments: object, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(ConfigError, match=r"--dest s3://a/b needs s3fs: pip install 's3fs>="):
        open_url("s3://a/b", "--dest")
