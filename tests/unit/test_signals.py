"""Signals: the first asks, the same one passed on is still the first, and a second one ends the process at once."""

from pathlib import Path

import pytest

from tests import forked

PROCESS = """
import os, signal, time
from ig_dist.parallel.dist import StopFlag
flag = StopFlag()
for pause in {pauses}:
    time.sleep(pause)
    os.kill(os.getpid(), signal.{name})
print("asked", flag.asked, flush=True)
"""


@pytest.mark.parametrize(
    ("name", "pauses", "code", "output"),
    [
        ("SIGTERM", [], 0, "asked False"),
        ("SIGTERM", [0], 0, "asked True"),
        ("SIGUSR2", [0, 1.2], 0, "asked True"),
        ("SIGTERM", [0, 0.1], 0, "asked True"),
        ("SIGTERM", [0, 1.2], 143, ""),
        ("SIGINT", [0, 0.1], 0, "asked True"),
        ("SIGINT", [0, 1.2], 1, ""),
    ],
)
def test_signals(name: str, pauses: list[float], code: int, output: str, tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(pauses=pauses, name=name))
    done = forked.run([script])
    assert (done.returncode, done.stdout.strip()) == (code, output), done.stderr
    assert ("KeyboardInterrupt" in done.stderr) == (code == 1)
