"""Python processes that begin at once, forked from one that has imported everything, and SIGKILL for them.

A process of ``ig-dist launch`` forks its ranks in turn: they run the product's own code, all but ``exec``.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkProcess, ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

from ig_dist import cli
from ig_dist.launching import ranks
from ig_dist.sampling import run as sampling_run

ROOT = Path(__file__).resolve().parents[1]
CLI = ("-m", "ig_dist.cli")
multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.preloaded", "pytest"])
_numbers = itertools.count()


class _LikePopen(BaseProcess):
    """What ``subprocess.Popen`` calls otherwise than ``multiprocessing``."""

    @property
    def returncode(self) -> int | None:
        return self.exitcode

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout or 0.0)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        if self.pid is not None and self.exitcode is None:
            os.kill(self.pid, number)


class Process(_LikePopen, ForkServerProcess):
    """``python ARGUMENTS``, begun.

    Args:
        arguments: of Python: a script of this checkout, or ``-m`` and a module.
        out: file for stdout; None: one that ``communicate`` reads.
        err: file for stderr; None: the same name with ``.err``.
        env: environment; None: that of this process, now.
        cwd: where.
        new_session: so that one signal reaches it and its ranks.
        before: called in the process before all else; it may change modules there.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        out: Path | None = None,
        err: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        new_session: bool = False,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.out = out or _logs() / str(next(_numbers))
        self.err = err or Path(f"{self.out}.err")
        typed = [str(argument) for argument in arguments]
        environment = dict(os.environ if env is None else env)
        files = (str(self.out), str(self.err))
        super().__init__(target=_begin, args=(typed, environment, files, cwd, new_session, before))
        self.start()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it said, when it has ended."""
        self.wait(timeout)
        return self.out.read_text(encoding="utf-8"), self.err.read_text(encoding="utf-8")


class _Rank(_LikePopen, ForkProcess):
    """Stands for ``subprocess.Popen`` in a launcher."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], preexec_fn: Callable[[], None]) -> None:
        super().__init__(target=_run, args=(list(command[1:]), dict(env), preexec_fn))
        self.start()


@functools.cache
def _logs() -> Path:
    return Path(tempfile.mkdtemp(prefix="forked-"))


def start(arguments: Sequence[object], log: Path, *, rank: int = 0, workers: int = 1, slow_s: float = 0.0) -> Process:
    """``ig-dist ARGUMENTS`` as one of several workers, told only its number, with its output in ``log``.

    Args:
        arguments: of the command.
        log: stdout; stderr goes to the same name with ``.err``.
        rank: number of this worker.
        workers: all of them.
        slow_s: how much longer a file takes from being written to bearing its name, and a unit to be merged.
    """
    worker = {"RANK": str(rank), "WORLD_SIZE": str(workers)}
    before = functools.partial(_slow_down, slow_s) if slow_s else None
    return Process([*CLI, *arguments], out=log, env={**os.environ, **worker}, before=before)


def run(
    arguments: Sequence[object], cwd: Path = ROOT, timeout_s: float = 300.0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` in a folder, to its end; as ``subprocess.run`` with its output captured as text."""
    process = Process(arguments, cwd=cwd, env=env)
    typed = ["python", *map(str, arguments)]
    try:
        said = process.communicate(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise subprocess.TimeoutExpired(typed, timeout_s) from None
    for file in (process.out, process.err):
        file.unlink()
    return subprocess.CompletedProcess(typed, process.wait(), *said)


def _begin(
    arguments: list[str],
    environment: dict[str, str],
    files: tuple[str, str],
    cwd: Path,
    new_session: bool,
    before: Callable[[], None] | None,
) -> None:
    if new_session:
        os.setsid()
    os.chdir(cwd)
    for number, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if before is not None:
        before()
    ranks.subprocess = SimpleNamespace(Popen=_Rank)  # type: ignore[assignment]
    _run(arguments, environment)


def _run(arguments: list[str], environment: dict[str, str], before: Callable[[], None] | None = None) -> None:
    if before is not None:
        before()
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):  # a launcher's handlers do not outlive exec
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()  # the server's is of the time when it began
    os.environ |= environment
    if tuple(arguments[:2]) == CLI:
        sys.argv = ["ig-dist", *arguments[2:]]
        cli.main()
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _slow_down(slow_s: float) -> None:
    Path.replace = _slowly(Path.replace, slow_s)  # type: ignore[method-assign]
    sampling_run.read_unit = _slowly(sampling_run.read_unit, slow_s)  # type: ignore[attr-defined]


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
