"""Whether a GPU does what was tried on CPUs, and how fast: one command for the first minutes on a new machine.

    python benchmarks/gpu.py                                             # the checks first, eight minutes at most
    python benchmarks/gpu.py --only training --only profile              # those with that in their names
    python benchmarks/gpu.py --only published --reference DIR            # against the published code in DIR
    python benchmarks/gpu.py --only sampling --only plan

Each check is a process of its own with a time limit, so that one that crashes or hangs costs one row of the table. The
table is written after each, as Markdown and as JSON. It needs a checkout and torch, nothing from the network. On a CPU
the same checks run in a small form, which measures nothing. Exit code 1: a check failed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # who only asks for GPUs does not begin with CUDA
try:
    import torch._dynamo
    import torch.utils.tensorboard  # here, once for all checks

    from benchmarks import gpu_checks, gpu_speed
    from benchmarks.gpu_cases import Case, Found, NotHereError
    from ig_dist.run_dir import replace_text
    from ig_dist.terminal import console, run_app
    from ig_dist.terminal.extras import EXTRAS
    from tests import golden
except ModuleNotFoundError as error:
    sys.exit(f"{error}: bring its wheel along (docs/installation.md, 'A GPU machine without a network')")

LIMIT_S = 480
FORK = multiprocessing.get_context("fork")
"""The checks start with everything imported. CUDA begins in them, never here: it does not survive a fork."""


@dataclass
class Row:
    """What came of a check."""

    check: str
    result: str
    """passed, failed, or not run."""
    found: Found
    said: str
    """Why it failed, or was not run."""
    seconds: float

    def line(self) -> str:
        """As a line of the table in Markdown."""
        figures = ", ".join(f"{name} {_figure(value)}" for name, value in self.found.items())
        said = " ".join(f"{figures} {self.said}".replace("|", "/").split())
        return f"| {self.check} | {self.result} | {said} | {self.seconds:.0f} |"


def _figure(value: float | int | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def machine(case: Case) -> Found:
    """What this runs on, and which optional packages are not installed."""
    cuda = torch.cuda.is_available()
    found: Found = {"device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()}
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {"GPUs": torch.cuda.device_count(), "GiB": properties.total_memory / 2**30}
        nccl: Any = torch.cuda.nccl
        found |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, nccl.version()))}
    missing = [e for e in EXTRAS.values() if importlib.util.find_spec(e) is None]
    packages = ", ".join(missing) or "none"
    return {**found, "torch": torch.__version__, "Python": platform.python_version(), "not installed": packages}


def run_check(name: str, check: Callable[[Case], Found], case: Case, limit_s: float, log: Path) -> Row:
    """A check in a process of its own, which ends with its limit."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_work, args=(check, case, theirs, log))
    began = time.monotonic()
    process.start()
    theirs.close()
    try:
        result, found, said = ours.recv() if ours.poll(limit_s) else ("failed", {}, f"not done in {limit_s:.0f} s")
        seconds = time.monotonic() - began
        process.join(5)
    except EOFError:
        process.join()
        seconds = time.monotonic() - began
        result, found, said = "failed", {}, f"its process ended with {process.exitcode}"
    finally:
        process.kill()
        if process.pid is not None:
            _end(process.pid)
        process.join()
    return Row(name, result, found, said, seconds)


def _end(group: int) -> None:
    """End a check and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _work(check: Callable[[Case], Found], case: Case, answer: Connection, log: Path) -> None:
    """In the process of a check."""
    os.setsid()
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        if not case.small:
            torch.cuda.set_device(case.device)
        answer.send(("passed", check(case), ""))
    except NotHereError as reason:
        answer.send(("not run", {}, str(reason)))
    except BaseException as error:
        traceback.print_exc()
        answer.send(("failed", {}, f"{type(error).__name__}: {str(error).strip()[:400]}"))


def main(
    out: Annotated[Path, typer.Option(envvar="OUT", help="Folder for gpu.md, gpu.json and log.txt.")] = Path(
        "runs/gpu"
    ),
    only: Annotated[list[str] | None, typer.Option(help="Only checks with this in their names.")] = None,
    numbers: Annotated[Path, typer.Option(help="Folder of the recorded numbers.")] = golden.FOLDER,
    reference: Annotated[Path | None, typer.Option(help="Folder of the published code to compare with.")] = None,
    limit_s: Annotated[float, typer.Option(help="Seconds that all checks may take together.")] = LIMIT_S,
) -> None:
    """Check this machine's GPU, and measure."""
    out.mkdir(parents=True, exist_ok=True)
    log, began = out / "log.txt", time.monotonic()
    log.unlink(missing_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        case = Case(torch.device("cpu"), numbers, Path(scratch), reference)
        for name, (budget_s, check) in {"machine": (60, machine), **gpu_checks.CHECKS, **gpu_speed.SPEED}.items():
            if rows and only and not any(part in name for part in only):
                continue
            left = limit_s - (time.monotonic() - began)
            if left > 0:
                rows.append(run_check(name, check, case, left if case.small else min(budget_s, left), log))
            else:
                rows.append(Row(name, "not run", {}, f"the {limit_s:.0f} s were over", 0.0))
            if len(rows) == 1 and "CUDA" in rows[0].found:
                case = case._replace(device=torch.device("cuda", 0))
            console.print(rows[-1].line())
            write(rows, out, small=case.small)
    failed = sum(row.result == "failed" for row in rows)
    console.print(f"{out}/gpu.md: {failed} of {len(rows)} failed, {time.monotonic() - began:.0f} s")
    if failed:
        raise typer.Exit(1)


def write(rows: list[Row], out: Path, *, small: bool) -> None:
    """The table until now."""
    form = "small form, on a CPU: it shows that the checks run, and measures nothing" if small else "on a GPU"
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    head = f"# benchmarks/gpu.py, {date}, {form}\n\n| check | result | what was found | s |\n|---|---|---|---|\n"
    replace_text(out / "gpu.md", head + "".join(f"{row.line()}\n" for row in rows))
    told = {"date": date, "small": small, "rows": [asdict(row) for row in rows]}
    replace_text(out / "gpu.json", json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    run_app(main)
