"""The tiers of the tests, one after the other, those after a failing one too; the last line counts all of them.

python -m tests.tally [TIER ...]

``TIER@ENVIRONMENT`` runs a tier with the packages of another environment: ``unit@.venv-lowest``. ``TIER+TIER`` runs
tiers of one process side by side, with one thread each; what the later ones say follows at their end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent
TIERS = ("unit", "reports", "distributed", "integration", "gpu")
ENDED_WELL = (0, 5)  # 5: no tests


def run_tiers(tiers: Sequence[str], root: Path = ROOT) -> int:
    """Run the folders of tests below ``root`` and print times and sums; 0 if nothing failed."""
    sums: Counter[str] = Counter()
    times = []
    for group in tiers:
        first, *others = group.split("+")
        with ThreadPoolExecutor() as pool, tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder, str(number)) for number, name in enumerate(others)}
            # threads that wait spin: those of two processes slow each other many times
            env = {"OMP_NUM_THREADS": "1"} if others else {}
            runs = {name: pool.submit(run_tier, root, name, env, files.get(name)) for name in (first, *others)}
            for name, run in runs.items():
                print(f"=== {root.name}/{name}", flush=True)
                counts, seconds = run.result()
                if file := files.get(name):
                    print(file.read_text(encoding="utf-8", errors="replace"), end="", flush=True)
                sums += counts
                times.append(f"{root.name}/{name:<20} {seconds:4.0f} s")
    print("=== time of each tier", *times, sep="\n")
    print(f"{sums['passed']} passed, {sums['failed']} failed, {sums['skipped']} skipped", flush=True)
    return int(sums["failed"] > 0)


def run_tier(
    root: Path, tier: str, env: Mapping[str, str] | None = None, out: Path | None = None
) -> tuple[Counter[str], float]:
    """How many tests of a tier passed, failed and were skipped, and seconds; one that pytest gives up is a failure.

    Args:
        root: folder of the tiers.
        tier: its name, perhaps with an environment.
        env: what is added to the environment.
        out: file for what it says; None: where this process says it.
    """
    began = time.monotonic()
    folder, _, environment = tier.partition("@")
    python = root.parent / environment / "bin" / "python" if environment else sys.executable
    with tempfile.TemporaryDirectory() as scratch, out.open("w") if out else nullcontext() as said:
        report = Path(scratch, "report.xml")
        command = [str(python), "-m", "pytest", str(root / folder), f"--junitxml={report}"]
        environ = {**os.environ, **(env or {})}
        code = subprocess.run(command, cwd=root.parent, env=environ, stdout=said, stderr=said, check=False).returncode
        suites = list(ElementTree.parse(report).iter("testsuite")) if report.exists() else []
    keys = ("tests", "errors", "failures", "skipped")
    tests, errors, failures, skipped = (sum(int(suite.get(key, 0)) for suite in suites) for key in keys)
    failed = errors + failures
    sums = Counter(passed=tests - failed - skipped, skipped=skipped)
    sums["failed"] = failed or int(code not in ENDED_WELL)
    return sums, time.monotonic() - began


if __name__ == "__main__":
    sys.exit(run_tiers(sys.argv[1:] or TIERS))
