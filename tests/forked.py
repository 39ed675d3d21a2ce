"""Processes of ``ig-dist`` that begin at once, forked from one that has imported everything, and SIGKILL for them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from ig_dist import cli
from ig_dist.evaluation import collecting

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded", "pytest"])


def start(
    arguments: Sequence[object], log: Path, *, rank: int = 0, workers: int = 1, slow_s: float = 0.0
) -> BaseProcess:
    """``ig-dist ARGUMENTS`` as one of several workers, told only its number, with its output in ``log``.

    Args:
        arguments: of the command.
        log: stdout; stderr goes to the same name with ``.err``.
        rank: number of this worker.
        workers: all of them.
        slow_s: how much longer a file takes from being written to bearing its name, and a unit to be merged.
    """
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(workers)}
    process = _CONTEXT.Process(target=_run, args=([str(a) for a in arguments], environment, str(log), slow_s))
    process.start()
    return process


def run(arguments: Sequence[object], cwd: Path, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    """``ig-dist ARGUMENTS`` in a folder, to its end; as ``subprocess.run`` with its output captured as text."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "out")
        typed = [str(argument) for argument in arguments]
        process = _CONTEXT.Process(target=_run, args=(typed, dict(os.environ), str(log), 0.0, cwd))
        process.start()
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(["ig-dist", *typed], timeout_s)
        said = (Path(name).read_text(encoding="utf-8") for name in (log, f"{log}.err"))
        return subprocess.CompletedProcess(["ig-dist", *typed], process.exitcode or 0, *said)


def _run(arguments: list[str], environment: dict[str, str], log: str, slow_s: float, cwd: Path | None = None) -> None:
    if cwd is not None:
        os.chdir(cwd)
    for number, name in ((1, log), (2, f"{log}.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()  # the server's is of the time when it began
    os.environ |= environment
    if slow_s:
        Path.replace = _slowly(Path.replace, slow_s)  # type: ignore[method-assign]
        collecting.read_unit = _slowly(collecting.read_unit, slow_s)  # type: ignore[attr-defined]
    sys.argv = ["ig-dist", *arguments]
    cli.main()


def _slowly(function: Callable[..., object], slow_s: float) -> Callable[..., object]:
    def slow(*arguments: object) -> object:
        time.sleep(slow_s)
        return function(*arguments)

    return slow


def finished(process: BaseProcess, log: Path, timeout_s: float = 120.0) -> str:
    """What a command said that ended well."""
    process.join(timeout_s)
    assert process.exitcode == 0, (
        f"exit code {process.exitcode}: {log.with_name(log.name + '.err').read_text()[-2000:]}"
    )
    return log.read_text()
