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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
        names = group.split("+")
        with ThreadPoolExecutor() as pool, tempfile.TemporaryDirectory() as folder:
            places = [Path(folder, str(i)) for i in range(len(names))]
            runs = [
                pool.submit(run_tier, root, name, place, quiet=place is not places[0], beside=len(names) > 1)
                for name, place in zip(names, places, strict=True)
            ]
            for name, place, run in zip(names, places, runs, strict=True):
                print(f"=== {root.name}/{name}", flush=True)
                found, seconds = run.result()
                print((place / "said").read_text(encoding="utf-8", errors="replace"), end="", flush=True)
                sums += found
                times.append(f"{root.name}/{name:<20} {seconds:4.0f} s")
    print("=== time of each tier", *times, sep="\n")
    print(f"{sums['passed']} passed, {sums['failed']} failed, {sums['skipped']} skipped", flush=True)
    return int(sums["failed"] > 0)


def run_tier(root: Path, tier: str, scratch: Path, *, quiet: bool, beside: bool) -> tuple[Counter[str], float]:
    """How many tests of a tier passed, failed and were skipped, in which time; what pytest gives up counts as failure.

    Args:
        root: folder of the tiers.
        tier: its name, perhaps with an environment.
        scratch: a folder to be made, for its output.
        quiet: what it says goes to ``scratch/said``.
        beside: whether another tier runs at the same time.
    """
    began = time.monotonic()
    scratch.mkdir()
    folder, _, environment = tier.partition("@")
    python = root.parent / environment / "bin" / "python" if environment else sys.executable
    report = scratch / "report.xml"
    command = [str(python), "-m", "pytest", str(root / folder), f"--junitxml={report}"]
    # threads that wait spin: those of two processes slow each other many times
    env = {**os.environ, "OMP_NUM_THREADS": "1"} if beside else None
    with (scratch / "said").open("w") as said:
        out = said if quiet else None
        code = subprocess.run(command, cwd=root.parent, env=env, stdout=out, stderr=out, check=False).returncode
    suites = list(ElementTree.parse(report).iter("testsuite")) if report.exists() else []
    keys = ("tests", "errors", "failures", "skipped")
    tests, errors, failures, skipped = (sum(int(suite.get(key, 0)) for suite in suites) for key in keys)
    failed = errors + failures
    sums = Counter(passed=tests - failed - skipped, skipped=skipped)
    sums["failed"] = failed or int(code not in ENDED_WELL)
    return sums, time.monotonic() - began


if __name__ == "__main__":
    sys.exit(run_tiers(sys.argv[1:] or TIERS))
