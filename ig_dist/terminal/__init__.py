"""The terminal: one console, and how errors and exit codes reach the user."""

import atexit
import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from ig_dist.errors import ConfigError, IgDistError
from ig_dist.terminal.usage import UsageError, explained
from ig_dist.this_process import Process, this_process

# in a notebook plain lines: its kernel asks for colours, which rich takes for a terminal; each line would be a block
_NOTEBOOK: dict[str, Any] = {"force_jupyter": False, "force_terminal": False} if "ipykernel" in sys.modules else {}


def visible(text: str) -> str:
    """Text of files, as a terminal may have it: what would steer the terminal stands there as its code."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


class _Console(Console):
    """What is printed is text, names of files and classes too: it has no markup, see also ``visible``."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


console = _Console(soft_wrap=True, highlight=False, markup=False, **_NOTEBOOK)


MERGED_LATER = "IG_DIST_MERGED_LATER"
"""Set in the tasks of an array, which a job of its own follows."""


def is_first_process() -> bool:
    """Whether this process shows what all of them do: rank 0, or alone."""
    return _me().rank == 0


def is_main_process() -> bool:
    """Whether this process collects, scores or merges what all have made: the first one, but no task of an array."""
    return is_first_process() and MERGED_LATER not in os.environ


def _me() -> Process:
    """This process, for what it says: where that is wrong too, each speaks for itself."""
    try:
        return this_process()
    except ConfigError:
        return Process(0, 1, 0, 1, 0)


def warn(text: str) -> None:
    """Say what a command goes on in spite of."""
    to_stderr(f"warning: {visible(text)}")


def to_stderr(line: str) -> None:
    """Write a line in one piece; print takes two, between which another rank may write its own."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def run_app(app: typer.Typer | Callable[..., Any], name: str | None = None) -> None:
    """Run verbs, or one command: what the user can mend becomes one line on stderr and its exit code.

    A bug keeps its traceback. ``name`` is the program's; None: as it was started.
    """
    name = name or Path(sys.argv[0]).name
    if not isinstance(app, typer.Typer):
        command, app = app, typer.Typer(rich_markup_mode=None, add_completion=False)
        app.command()(command)
    try:
        if f"_{name.replace('-', '_').upper()}_COMPLETE" in os.environ:  # a shell asks
            app(prog_name=name)
        code = _run(app, name, sys.argv[1:])
    except IgDistError as error:
        say(error)
        code = error.exit_code
    except KeyboardInterrupt:
        if is_first_process():
            print("\nstopped: Ctrl-C; what is finished stays, run the same command again to go on", file=sys.stderr)
        leave(130)
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        code = 1
    except SystemExit as end:  # typer's way to end
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    leave(code)


def _run(app: typer.Typer, name: str, typed: list[str]) -> int:
    """Run the verb that was typed; its exit code. As typer's own ``main``, which prints errors in its own way."""
    try:
        with typer.main.get_command(app).make_context(name, [*typed]) as context:
            context.command.invoke(context)
            sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except UsageError as error:
        raise explained(error, typed) from None
    return 0


def _reader_is_gone() -> bool:
    """Whether whoever read stdout or stderr has left, as `head` does; then nothing more is written there."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            gone = True
    return gone


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
    me = _me()
    if not error.everywhere or me.local_rank == 0:
        where = f"rank {me.rank}: " if me.world_size > 1 and not error.everywhere else ""
        ended = "stopped" if error.exit_code == 75 else "error"
        to_stderr(f"{ended}: {where}{visible(str(error))}")
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun repeats below its own traceback
        told = {"message": f"{error}", "extraInfo": {"timestamp": f"{time.time():.0f}"}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": told}), encoding="utf-8")
