"""How commands end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMAND = """
import os, sys, threading
import typer
from ig_dist import errors, terminal

class AbortsTheTeardown:  # as gloo's threads may
    def __del__(self):
        os.abort()

sys.modules["kept until the interpreter is taken down"] = AbortsTheTeardown()
sys.kept = AbortsTheTeardown()
terminal.without_teardown()

def main() -> None:
    sys.stdout.write("written before")
    {body}

terminal.run_app(main)
"""


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("return", 0),
        ("raise errors.Preempted('saved')", 75),
        ("raise errors.DataError('broken')", 4),
        ("raise typer.Exit(7)", 7),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_the_exit_code_survives_what_would_abort_the_end_of_the_interpreter(body: str, code: int) -> None:
    command = [sys.executable, "-c", COMMAND.replace("{body}", body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout == "written before"
    without = [*command[:2], command[2].replace("terminal.without_teardown()", "")]
    assert subprocess.run(without, capture_output=True, timeout=60, check=False).returncode == -6  # there is something


def test_a_line_is_written_in_one_piece() -> None:
    """Or those of several ranks would mix."""
    reading, writing = os.pipe2(os.O_DIRECT)  # each read gives what one write has written
    said = "from ig_dist.terminal import to_stderr; to_stderr('error: rank 1')"
    subprocess.run([sys.executable, "-c", said], stderr=writing, check=True)
    assert os.read(reading, 100) == b"error: rank 1\n"
    for number in (reading, writing):
        os.close(number)
