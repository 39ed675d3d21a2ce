"""apex: what is asked for by name must be NVIDIA's, from source; whatever else there is, one line says so."""

import sys
from pathlib import Path

import pytest

from ig_dist.config.file import load_config
from ig_dist.errors import ConfigError
from ig_dist.parallel.build import check_engine

NVIDIAS = {"apex/__init__.py": "raise SystemExit", "apex/optimizers/fused_adam.py": "raise SystemExit"}


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "it is not installed"),
        ({"apex/__init__.py": "raise SystemExit"}, "is another one, as PyPI has it: pip uninstall apex"),
        (NVIDIAS, "it was built without its CUDA extensions"),
        ({**NVIDIAS, "amp_C.py": ""}, "there is no GPU here"),
    ],
)
def test_apex_that_cannot_be_used_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], problem: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p) / "apex").exists())])
    config = load_config("configs/digits.yaml", ["optimizer.implementation=apex"])
    with pytest.raises(ConfigError) as caught:
        check_engine(config)
    assert problem in str(caught.value) and "\n" not in str(caught.value)
    assert "needs NVIDIA's apex, built from the source at https://github.com/NVIDIA/apex" in str(caught.value)
    assert "or use optimizer.implementation=fused" in str(caught.value)
    check_engine(load_config("configs/digits.yaml"))
