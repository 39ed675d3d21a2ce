"""The tiers of the tests, one after the other, those after a failing one too; the last line counts all of them.

python -m tests.tally [TIER ...]

``TIER@ENVIRONMENT`` runs a tier with the packages of another environment: ``unit@.venv-lowest``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent
TIERS = ("unit", "reports", "distributed", "integration", "gpu")
ENDED_WELL = (0, 5)  # 5: no tests


def run_tiers(tiers: Sequence[str], root: Path = ROOT) -> int:
    """Run the folders of tests below ``root`` and print times and sums; 0 if nothing failed."""
    sums: Counter[str] = Counter()
    times = []
    for tier in tiers:
        print(f"=== {root.name}/{tier}", flush=True)
        began = time.monotonic()
        sums += run_tier(root, tier)
        times.append(f"{root.name}/{tier:<20} {time.monotonic() - began:4.0f} s")
    print("=== time of each tier", *times, sep="\n")
    print(f"{sums['passed']} passed, {sums['failed']} failed, {sums['skipped']} skipped", flush=True)
    return int(sums["failed"] > 0)


def run_tier(root: Path, tier: str) -> Counter[str]:
    """How many tests of a tier passed, failed and were skipped; one that pytest gives up counts as a failure."""
    folder, _, environment = tier.partition("@")
    python = root.parent / environment / "bin" / "python" if environment else sys.executable
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [str(python), "-m", "pytest", str(root / folder), f"--junitxml={report}"]
        code = subprocess.run(command, cwd=root.parent, check=False).returncode
        suites = list(ElementTree.parse(report).iter("testsuite")) if report.exists() else []
    keys = ("tests", "errors", "failures", "skipped")
    tests, errors, failures, skipped = (sum(int(suite.get(key, 0)) for suite in suites) for key in keys)
    failed = errors + failures
    sums = Counter(passed=tests - failed - skipped, skipped=skipped)
    sums["failed"] = failed or int(code not in ENDED_WELL)
    return sums


if __name__ == "__main__":
    sys.exit(run_tiers(sys.argv[1:] or TIERS))
