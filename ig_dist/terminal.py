"""The terminal: one console, and how errors and exit codes reach the user."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from rich.console import Console

from ig_dist.errors import IgDistError

console = Console(soft_wrap=True, highlight=False)


MERGED_LATER = "IG_DIST_MERGED_LATER"
"""Set in the tasks of an array, which a job of its own follows."""


def is_first_process() -> bool:
    """Whether this process shows what all of them do: rank 0, or alone."""
    return os.environ.get("RANK", "0") == "0"


def is_main_process() -> bool:
    """Whether this process collects, scores or merges what all have made: the first one, but no task of an array."""
    return is_first_process() and MERGED_LATER not in os.environ


def this_worker() -> tuple[int, int]:
    """Number of this process and of all that share its work (RANK, WORLD_SIZE)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def warn(text: str) -> None:
    """Say what a command goes on in spite of."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def run_app(app: typer.Typer | Callable[..., Any]) -> None:
    """Run a command line: an IgDistError becomes one line on stderr and its exit code, a bug keeps its traceback."""
    if not isinstance(app, typer.Typer):
        command, app = app, typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(command)
    try:
        app()
    except IgDistError as error:
        say(error)
        leave(error.exit_code)
    except KeyboardInterrupt:
        leave(130)
    except SystemExit as end:  # typer's way to end
        leave(end.code if isinstance(end.code, int) else int(end.code is not None))


_code: int | None = None


def leave(code: int) -> NoReturn:
    """End the process with this exit code."""
    global _code
    _code = code
    sys.exit(code)


def without_teardown() -> None:
    """From now on ``leave`` ends the process at once, with the interpreter as it is.

    Gloo's threads need the interpreter to let go of a collective's tensors, late on a busy machine. One that asks for
    it while it is being taken down aborts the process (SIGABRT), whatever the exit code was to be.
    """

    def end() -> None:
        if _code is not None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):  # whoever read it is gone
                    stream.flush()
            os._exit(_code)

    atexit.register(end)


def say(error: IgDistError) -> None:
    """Print the one line of an error, once."""
    if error.said:
        return
    error.said = True
    # What all processes of a job end with is said by the first of a machine. Others name their rank.
    rank = os.environ.get("RANK")
    if not error.everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        where = f"rank {rank}: " if rank is not None and not error.everywhere else ""
        print(f"{'stopped' if error.exit_code == 75 else 'error'}: {where}{error}", file=sys.stderr, flush=True)
