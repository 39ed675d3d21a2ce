"""What a start does not wait for before its first step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT

CODE = """
import sys
from ig_dist.models.dit import DiT
from ig_dist.config.file import load_config
from ig_dist.training.trainer import train

forward, calls = DiT.forward, []
DiT.forward = lambda *arguments, **options: calls.append(1) or forward(*arguments, **options)
train(load_config(sys.argv[1]))
print("passes", len(calls))
print("loaded", *(name for name in {names} if name in sys.modules))
"""
SLOW = ["torch._dynamo", "torch._inductor", "sympy", "scipy", "sklearn", "diffusers", "transformers", "torchvision"]


def test_one_process_without_compilation_loads_no_compiler_and_runs_no_pass_in_vain(
    tiny_config: Callable[..., Path],
) -> None:
    config = tiny_config(train={"steps": 2}, log={"every_steps": 1})
    code = CODE.format(names=SLOW)
    done = subprocess.run([sys.executable, "-c", code, config], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["passes 2", "loaded"]
