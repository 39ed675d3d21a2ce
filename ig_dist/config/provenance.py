"""Where a run comes from: what was typed, with which code and versions, on which machine.

Each start of a training adds a line of JSON to ``RUN/provenance.jsonl``. It stands beside the checkpoints and not in
them: the same training elsewhere gives the same checkpoints. What cannot be found out is left out; nothing here ends a
run.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ig_dist import __version__
from ig_dist.storage.json_lines import append
from ig_dist.this_process import host, this_process

FILE_NAME = "provenance.jsonl"
COMMIT_NAME = "commit.json"
"""Beside a copy of the package: what `commit` said where it was copied from."""

SOURCE = Path(__file__).resolve().parents[2]
GIT_S = 10.0  # a shared file system may be slow


def note_start(run: Path, **more: Any) -> None:
    """Add this start to the run's provenance, with what else is given."""
    with suppress(OSError):
        append(run / FILE_NAME, {**provenance(), **more})


def provenance() -> dict[str, Any]:
    """What is known of this process, as JSON holds it."""
    cwd = None
    with suppress(OSError):  # it was removed
        cwd = str(Path.cwd())
    facts = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "cwd": cwd,
        "host": host(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "processes": this_process().world_size,
        **_hardware(),
        **commit(),
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def command() -> str:
    """What was typed, as a shell takes it."""
    if "ipykernel" in sys.modules:  # whose own command says nothing
        return "a notebook"
    ours = Path(sys.argv[0]).name in ("ig-dist", "cli.py", "ig_dist.cli")
    return shlex.join(["ig-dist" if ours else sys.argv[0], *sys.argv[1:]])


def commit() -> dict[str, Any]:
    """The commit of the checkout that the package is run from, and whether its files were changed since.

    A job's copy of the package remembers it. An installed package is of no commit: its version says what it is.
    """
    with suppress(OSError, ValueError):
        return dict(json.loads((SOURCE / COMMIT_NAME).read_text(encoding="utf-8")))
    if not (SOURCE / ".git").exists():  # or git would tell of a checkout that has us in its environment
        return {}
    with suppress(OSError, subprocess.SubprocessError):
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--", "ig_dist"))}
    return {}


def _git(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "--no-optional-locks", "-C", str(SOURCE), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=GIT_S,
        check=True,
    )
    return done.stdout.strip()


def _hardware() -> dict[str, Any]:
    import torch

    versions = {"ig_dist": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        versions["cuda"] = str(torch.version.cuda or torch.version.hip)
        return {"device": torch.cuda.get_device_name(), "versions": versions}
    cpu = platform.machine()
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        cpu = found[1].strip() if found else cpu
    return {"device": cpu, "cpus": len(os.sched_getaffinity(0)), "versions": versions}
