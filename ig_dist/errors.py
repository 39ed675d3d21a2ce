"""The errors that a user can meet, each with the exit code that a launcher acts on.

Every message is one line that says what is wrong, where, and how to mend it. Anything else that escapes is a
bug: it keeps its traceback and exits 1.
"""

import difflib
from collections.abc import Iterable, Sequence


class IgDistError(Exception):
    """Base of the errors that end a command with one line instead of a traceback."""

    exit_code = 1
    everywhere = False
    """Whether all processes of a job end with it: then the first of a machine says it."""
    said = False
    """Whether the user has been told of it."""

    def _render_traceback_(self) -> list[str]:
        """In a notebook too it is one line."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(IgDistError):
    """The user's mistake: a key, a value, a path, or a combination. Running again changes nothing."""

    exit_code = 2
    everywhere = True


class NonFiniteError(IgDistError):
    """Too many steps in a row had a non-finite gradient."""

    exit_code = 3


class DataError(IgDistError):
    """Data or storage is beyond repair."""

    exit_code = 4


class StorageError(DataError):
    """A storage stayed away for longer than its faults are borne. Later the same command may succeed."""

    exit_code = 8


class DamagedError(DataError):
    """Bytes differ from what was written, or are gone: a copy of them, or an older checkpoint, may help."""


class HangError(IgDistError):
    """A rank made no progress for longer than it may."""

    exit_code = 5


class NodeError(IgDistError):
    """A machine is broken or slow; the message names it, and the launcher is told (``parallel/blame.py``)."""

    exit_code = 6
    everywhere = True


class OutOfMemoryError(IgDistError):
    """A device or the machine has too little memory for this run. Running again changes nothing."""

    exit_code = 7


class RankError(IgDistError):
    """A bug or a fault ended one of several processes; its traceback was printed when it happened."""


class LostPeerError(IgDistError):
    """Another process of the job ended; its own message says why."""


class Preempted(IgDistError):  # noqa: N818  (not a failure: the run was saved and asks to be started again)
    """The run was asked to stop, has saved, and goes on when the same command is run again."""

    exit_code = 75
    everywhere = True


class Ending(Exception):  # noqa: N818  (the training loop turns it into one of the others)
    """All ranks agree to end here: asked to stop, or one of them has this ``error``."""

    def __init__(self, error: IgDistError | None = None) -> None:
        self.error = error


def nearest(name: str, known: Iterable[str], n: int = 1, least: float = 0.0) -> list[str]:
    """The known names that are most like this one, the nearest first: what was meant by a name that is not known."""
    return difflib.get_close_matches(name, list(dict.fromkeys(known)), n=n, cutoff=least)


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error of a name that is none of those that are known."""
    known = list(known)
    return ConfigError(f"{what} {name!r}: did you mean {nearest(name, known)[0]!r}? There are {', '.join(known)}")


def first_line(error: BaseException) -> str:
    """What an error of a library says, in a line; its kind, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def listed(items: Sequence[str], most: int = 8) -> str:
    """The first of several names, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
