"""Requests that outlast the storage's faults: what is transient, how long it is borne, what is said of the rest."""

import concurrent.futures
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ig_dist.errors import ConfigError, DamagedError, DataError, StorageError, first_line
from ig_dist.storage.background import in_background
from ig_dist.storage.urls import full_url, is_local, once
from ig_dist.terminal import console

T = TypeVar("T")

_LOG_EVERY_S = 5.0
_LOOK_S = 0.2  # between looks for a stop
_LONGEST_PAUSE_S = 10.0
_READS = 4  # of the same bytes, before they are damaged and did not suffer on the way

_TRANSIENT_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}

# of the clients that are in use: a connection that fails before or in the answer is no OSError there
_CLIENT_FAULTS = {
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
}

_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"}

_LASTING = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)


@dataclass(eq=False)
class Patience:
    """How long faults of a storage are borne, and how many were. Safe to share between threads."""

    stall_s: float = 60.0
    """A request of up to ``REQUEST_BYTES`` that takes longer is given up and made again."""
    deadline_s: float = 600.0
    """A request that fails for this long ends the command."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set: no further tries, and whoever waits for one waits no longer."""
    faults: int = 0
    """Requests that had to be made again."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _said_at: float = -_LOG_EVERY_S
    _unsaid: int = 0

    def count(self, what: str, error: BaseException, wait_s: float) -> None:
        """Count a fault, and say it: at most one line in some seconds, which tells of the others."""
        with self._lock:
            self.faults += 1
            if time.monotonic() - self._said_at < _LOG_EVERY_S:
                self._unsaid += 1
                return
            others = f" ({self._unsaid} more since the last line)" if self._unsaid else ""
            self._said_at, self._unsaid = time.monotonic(), 0
        console.print(f"storage: {what}: {first_line(error)}; again in {wait_s:.1f} s{others}")


PATIENCE = Patience()
"""For whoever has no reason for another."""


def patience_of(fs: Any) -> Patience:
    """What a file system was opened with."""
    found: Patience = getattr(fs, "patience", PATIENCE)
    return found


def retried(fs: Any, path: str, operation: Callable[[], T]) -> T:
    """Do an operation on a file, again after a transient fault: with back-off and jitter, under the deadline.

    A local file system is tried once.

    Raises:
        StorageError: the deadline passed.
        DataError: access is denied.
        OSError: a fault that no repetition mends, such as FileNotFoundError.
    """
    if is_local(fs):
        return operation()
    patience = patience_of(fs)
    failing_since, pause_s = math.inf, 0.1  # a long operation is not late because it once fails
    while True:
        try:
            return _unless_stopped(operation, patience)
        except Exception as error:
            failing_since = min(failing_since, time.monotonic())
            late = time.monotonic() - failing_since >= patience.deadline_s
            if late or patience.stop.is_set() or not _is_transient(error):
                said = _explained(error, full_url(fs, path), patience)
                if said is error:
                    raise
                raise said from None
            wait_s = min(pause_s + random.uniform(0.0, 0.5), _LONGEST_PAUSE_S)
            patience.count(full_url(fs, path), error, wait_s)
        patience.stop.wait(wait_s)
        pause_s *= 2


class _Persistent:
    """A remote file system whose calls on a path are ``retried``; all else is the file system's own."""

    _READS = ("cat_file", "exists", "find", "glob", "info", "isdir", "isfile", "ls", "size")
    _CALLS = frozenset((*_READS, "makedirs", "mv", "pipe_file", "rm", "rm_file", "rmdir"))

    def __init__(self, fs: Any, patience: Patience) -> None:
        self.wrapped, self.patience = fs, patience

    def __getattr__(self, name: str) -> Any:
        if name in ("wrapped", "patience"):  # while it is copied
            raise AttributeError(name)
        call = getattr(self.wrapped, name)
        if name not in self._CALLS:
            return call

        def persistent(path: Any, *arguments: Any, **options: Any) -> Any:
            return retried(self, path, lambda: call(path, *arguments, **options))

        return persistent


def under(fs: Any, patience: Patience | None) -> Any:
    """The same file system with another patience; None: its own."""
    return fs if patience is None else _Persistent(once(fs), patience)


def _explained(error: Exception, url: str, patience: Patience) -> Exception:
    """What is said of a fault that is not borne any longer; what the caller knows better stays as it is."""
    what = first_line(error)
    if isinstance(error, PermissionError):
        return DataError(
            f"{url}: access denied ({what}): check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, instance role) and"
            " what the bucket allows them"
        )
    if type(error).__name__ in _NO_CREDENTIALS:
        return DataError(f"{url}: {what}: set AWS_PROFILE or AWS_ACCESS_KEY_ID, or run `aws login`")
    if _is_transient(error):
        if patience.stop.is_set():
            return DataError(f"{url}: given up, because the command ends")
        return StorageError(
            f"{url}: the storage has failed for {patience.deadline_s:g} s, last with: {what}: see that it is up and"
            " reachable, then run the same command again"
        )
    if isinstance(error, ValueError) or type(error).__module__.startswith(("botocore", "aiohttp")):
        remedy = "check the URL, AWS_ENDPOINT_URL, AWS_PROFILE and ~/.aws (with SSO, log in again), or ~/.netrc"
        return ConfigError(f"{url}: {what}: {remedy}")
    return error


def _unless_stopped(operation: Callable[[], T], patience: Patience) -> T:
    """What an operation gives, or InterruptedError soon after ``patience.stop`` is set.

    It runs in a thread of its own, so that one that hangs can be left alone, whatever client it hangs in: it ends by
    the client's time-out, or with the process.
    """
    work = in_background(operation)
    while not concurrent.futures.wait([work], timeout=_LOOK_S).done:
        if patience.stop.is_set():
            raise InterruptedError("stopped")
    return work.result()


def intact(fs: Any, path: str, read: Callable[[], T]) -> T:
    """What a read gives that checks what came: again, some times, for the bytes may have suffered on the way.

    A local file is read once.

    Raises:
        DamagedError: the read's own, time after time.
    """
    left = 1 if is_local(fs) else _READS
    while True:
        try:
            return read()
        except DamagedError as error:
            left -= 1
            if not left:
                raise
            patience_of(fs).count(full_url(fs, path), error, 0.0)


def unreadable(fs: Any, path: str, error: OSError) -> DataError:
    """What is said of a file that the machine itself cannot read."""
    gone = isinstance(error, FileNotFoundError)
    words = error.strerror or first_line(error)
    return DataError(
        f"{full_url(fs, path)} {'is gone' if gone else f'cannot be read ({words})'}: restore it and run again"
    )


def _is_transient(error: BaseException) -> bool:
    response = getattr(error.__cause__, "response", None)  # s3fs keeps the server's answer there
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in (408, 429) or response.get("Error", {}).get("Code") in _TRANSIENT_CODES
    status = getattr(error, "status", None)  # of aiohttp's answers
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    if type(error).__name__ in _NO_CREDENTIALS or isinstance(error, _LASTING):
        return False
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return isinstance(error, OSError) or not kinds.isdisjoint(_CLIENT_FAULTS)
