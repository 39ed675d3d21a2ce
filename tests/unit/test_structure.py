"""The house rules: what each part may import, and a command line that answers at once."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# part -> modules that it must not import
FORBIDDEN = {
    "ig_dist/models": [
        "torch.distributed",
        "torch._dynamo",
        "ig_dist.diffusion",
        "ig_dist.data",
        "ig_dist.parallel",
        "fsspec",
    ],
    "ig_dist/diffusion": ["ig_dist.parallel", "ig_dist.data", "ig_dist.latents", "torch.distributed", "ig_dist.rng"],
    "ig_dist/trainer.py": [
        "submitit",
        "tarfile",
        "s3fs",
        "fsspec",
        "webdataset",
        "ig_dist.evaluation",
        "ig_dist.diffusion.samplers",
    ],
    "ig_dist/parallel": ["ig_dist.models.presets", "ig_dist.trainer", "ig_dist.evaluation"],
    "ig_dist/evaluation": ["ig_dist.parallel", "ig_dist.trainer"],
    "ig_dist/report.py": ["ig_dist.parallel", "ig_dist.trainer", "ig_dist.evaluation"],
    "launchers": ["ig_dist.trainer", "ig_dist.models", "ig_dist.parallel", "torch"],
    "ig_dist": ["launchers", "data_prep", "deepspeed"],
}
ALLOWED = {"ig_dist/parallel/deepspeed.py": ["deepspeed"]}


def files(part: str) -> list[Path]:
    path = ROOT / part
    return [path] if path.suffix else sorted(path.rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", FORBIDDEN)
def test_import_rules(part: str) -> None:
    assert files(part)
    for file in files(part):
        allowed = ALLOWED.get(str(file.relative_to(ROOT)), [])
        for name in imports(file):
            for rule in FORBIDDEN[part]:
                breach = (name == rule or name.startswith(f"{rule}.")) and rule not in allowed
                assert not breach, f"{file.relative_to(ROOT)} imports {name}"


def test_models_do_not_compile_and_the_trainer_knows_no_engine_class() -> None:
    for file in files("ig_dist/models"):
        assert "compile(" not in file.read_text()
    trainer = (ROOT / "ig_dist/trainer.py").read_text()
    assert "isinstance(engine" not in trainer and "DDPEngine" not in trainer


def test_no_file_of_the_product_is_unpickled() -> None:
    for part in ("ig_dist", "data_prep", "launchers"):
        for file in files(part):
            text = file.read_text()
            assert "pickle" not in " ".join(imports(file)), file
            assert "torch.load(" not in text.replace("safetensors.torch.load(", ""), file


def test_help_answers_in_under_a_second() -> None:
    command = [sys.executable, "-m", "ig_dist.cli", "--help"]
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1.0, seconds
    assert "quickstart" in done.stdout
    heavy = "import sys; sys.argv = ['ig-dist']; import ig_dist.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", heavy], check=True)
