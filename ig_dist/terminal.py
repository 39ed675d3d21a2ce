"""The terminal: one console, and how errors and exit codes reach the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

from ig_dist.errors import IgDistError

console = Console(soft_wrap=True, highlight=False)


def is_main_process() -> bool:
    """Whether this process is rank 0 (or alone)."""
    return os.environ.get("RANK", "0") == "0"


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
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


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
