"""The house rules: what each part may import, and a command line that answers at once."""

import ast
import importlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PARTS_OF_IMAGES = ["ig_dist/plans", "ig_dist/features", "ig_dist/sampling", "ig_dist/evaluation"]
IMAGES = [part.replace("/", ".") for part in PARTS_OF_IMAGES]
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
    "ig_dist/diffusion": [
        "ig_dist.parallel",
        "ig_dist.data",
        "ig_dist.autoencoders",
        "torch.distributed",
        "ig_dist.rng",
    ],
    "ig_dist/training/trainer.py": [
        "ig_dist.slurm",
        "ig_dist.launching.jobs",
        "tarfile",
        "s3fs",
        "fsspec",
        "webdataset",
        *IMAGES,
        "ig_dist.diffusion.samplers",
    ],
    "ig_dist/parallel": ["ig_dist.models.presets", "ig_dist.training.trainer", "ig_dist.checkpoints", *IMAGES],
    **{part: ["ig_dist.parallel", "ig_dist.training.trainer"] for part in PARTS_OF_IMAGES},
    "ig_dist/report": ["ig_dist.parallel", "ig_dist.training.trainer", *IMAGES],
    "ig_dist/data/sources": ["torch", "ig_dist.encoding"],
    "ig_dist/encoding": ["ig_dist.parallel", "ig_dist.training.trainer", "ig_dist.models", *IMAGES],
    "ig_dist/commands/launch.py": ["ig_dist.training", "ig_dist.models", "ig_dist.parallel", "torch"],
    "ig_dist/launching": ["ig_dist.training", "ig_dist.models", "ig_dist.parallel", "torch"],
    "ig_dist/commands/slurm.py": ["ig_dist.training", "ig_dist.models", "ig_dist.parallel", "torch"],
    "ig_dist": ["launchers", "data_prep", "deepspeed"],
}
ALLOWED = {
    "ig_dist/parallel/deepspeed.py": ["deepspeed"],
}
# slow to import, or not installed everywhere: never by importing a module of ours
LAZY = ["diffusers", "huggingface_hub", "deepspeed", "torchdiffeq"]


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
                breach = name == rule or name.startswith(f"{rule}.")
                breach = breach and not any(name == part or name.startswith(f"{part}.") for part in allowed)
                assert not breach, f"{file.relative_to(ROOT)} imports {name}"


def test_optional_packages_are_imported_where_they_are_used() -> None:
    for file in files("ig_dist"):
        for node in ast.parse(file.read_text()).body:  # the module's own level
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & set(LAZY), file


def test_models_do_not_compile_and_the_trainer_knows_no_engine_class() -> None:
    for file in files("ig_dist/models"):
        assert "compile(" not in file.read_text()
    for name in ("trainer", "learner"):
        text = (ROOT / f"ig_dist/training/{name}.py").read_text()
        assert "isinstance(engine" not in text and "DDPEngine" not in text


def test_pickles_are_read_in_one_place_and_tensors_only() -> None:
    mentions, calls = [], []
    for part in ("ig_dist",):
        for file in files(part):
            assert not any("pickle" in name or name == "torch.load" for name in imports(file)), file
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                    mentions.append(str(file.relative_to(ROOT)))
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    calls.append({keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
    assert mentions == ["ig_dist/storage/tensor_files.py"]  # published weights come so
    assert [call["weights_only"] for call in calls] == ["True"]


PROGRAMS = {
    "-m ig_dist.cli": "quickstart",
    "data_prep/encode_latents.py": "--source",
    "data_prep/index_shards.py": "--workers",
    "data_prep/verify_shards.py": "--workers",
    "launchers/slurm.py": "--nodes",
}
HEAVY = {"torch", "numpy", "matplotlib", "webdataset"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_answers_in_under_a_second(program: str) -> None:
    command = [sys.executable, "-X", "importtime", *program.split(), "--help"]
    for _ in range(5):  # another program may have the core
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        if time.perf_counter() - began < 1.0:
            break
    else:
        pytest.fail("it takes longer")
    assert PROGRAMS[program] in done.stdout
    assert not HEAVY & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_the_command_line_alone_imports_neither_torch_nor_numpy() -> None:
    modules = "ig_dist.cli, ig_dist.slurm.batch, ig_dist.launching.supervisor"  # ranks wait for these two
    heavy = f"import sys, {modules}; assert not {{'torch', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", heavy], check=True)


def test_every_exit_code_is_in_the_operators_document() -> None:
    errors = vars(importlib.import_module("ig_dist.errors")).values()
    codes = {kind.exit_code for kind in errors if hasattr(kind, "exit_code")}
    given = re.compile(r"(?:exit|leave)\((?:128 \+ number|(\d+))\)")
    for file in files("ig_dist"):  # those that no error has
        codes |= {int(code) if code else 128 + signal.SIGTERM for code in given.findall(file.read_text())}
    assert codes >= {1, 2, 3, 4, 5, 75, 130, 143}
    table = set(re.findall(r"^\| (\d+) \|", (ROOT / "docs/running.md").read_text(), re.MULTILINE))
    assert table == {str(code) for code in codes | {0}}
    assert "docs/running.md" in (ROOT / "README.md").read_text()


def test_every_phase_of_the_loop_is_in_the_operators_document() -> None:
    entered = [
        phase
        for name in ("trainer", "learner")
        for phase in re.findall(r'phases\.enter\("([\w-]+)"', (ROOT / f"ig_dist/training/{name}.py").read_text())
    ]
    assert len(set(entered)) >= 10
    table = (ROOT / "docs/running.md").read_text().split("| phase |")[1].split("\n\n")[0]
    assert all(phase in table for phase in entered)


def test_every_name_of_the_package_is_where_it_is_looked_for() -> None:
    package = importlib.import_module("ig_dist")
    assert all(getattr(package, name) is not None for name in package.__all__)
