"""The report of a GPU in its small form, which trains with every engine. CI runs it with the oldest packages."""

import json
from pathlib import Path

from benchmarks.gpu_checks import CHECKS
from benchmarks.gpu_speed import SPEED
from tests.conftest import run_command


def test_the_gpu_report_runs_in_its_small_form_on_a_cpu(tmp_path: Path) -> None:
    done = run_command(["python", "benchmarks/gpu.py", "--out", tmp_path])
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["check"] for row in rows] == ["machine", *CHECKS, *SPEED]
    unknown = {row["check"]: row["said"] for row in rows if row["result"] != "passed" and "GPU" not in row["said"]}
    assert unknown.keys() <= {"apex"}, unknown  # all else says that it needs a GPU
    table = (tmp_path / "gpu.md").read_text()
    assert all(f"\n| {row['check']} | {row['result']} | " in table for row in rows)
