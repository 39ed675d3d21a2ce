"""Compiled kernels are kept where other ranks, the next start and sampling find them: one rank compiles, others load.

They are in ``$IG_DIST_COMPILED``, by default ``~/.cache/ig_dist/compiled``, and never in a run's folder, which holds no
code. PyTorch finds them by the graph, the settings, its version and the device, and writes each file whole.
"""

import fcntl
import getpass
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from ig_dist.errors import ConfigError, first_line
from ig_dist.storage.writable import others_may_change
from ig_dist.terminal import warn

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_OF_THE_COMPILER = ("torch._dynamo", "torch._inductor")


def keep_compiled() -> None:
    """Choose the folder, unless the user has; without one that can be written PyTorch's own, in /tmp, is used.

    What is kept there is code: where others may change it, this process has a folder of its own.
    """
    if _VARIABLE in os.environ:
        return
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        folder = Path(os.environ.get("IG_DIST_COMPILED") or "~/.cache/ig_dist/compiled").expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if open_place := others_may_change(folder, code=True):
            _warn_once(f"compiled kernels are not kept in {folder}: other users may change files in {open_place}")
        else:
            with tempfile.TemporaryFile(dir=folder):
                os.environ[_VARIABLE] = str(folder)
                return
    with suppress(OSError, KeyError):  # KeyError: this user has no name, nor has PyTorch's folder then
        theirs = Path(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser()))
        with suppress(FileExistsError):
            theirs.mkdir(mode=0o700)
        if open_place := others_may_change(theirs, code=True):  # its name is known to all: anybody may have made it
            _warn_once(f"compiled kernels are not kept in {theirs}: other users may change files in {open_place}")
            os.environ[_VARIABLE] = tempfile.mkdtemp(prefix="ig-dist-compiled-")


_warn_once = cache(warn)  # there are as many compiled functions as blocks


def shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function whose first call compiles on one process while others wait, who load what it has kept.

    What is kept may be damaged: then a folder of this process's own takes its place.
    """
    called = False

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal called
        if called:
            return function(*arguments, **options)
        try:
            with _one_at_first():
                result = function(*arguments, **options)
        except RuntimeError as error:
            if not type(error).__module__.startswith(_OF_THE_COMPILER):
                raise
            damaged = os.environ.get(_VARIABLE, "PyTorch's own folder in /tmp")
            warn(f"the kernels in {damaged} are not used: compiling failed with them; delete that folder")
            os.environ[_VARIABLE] = tempfile.mkdtemp(prefix="ig-dist-compiled-")
            if os.environ.get("TRITON_CACHE_DIR", "").startswith(damaged):  # which PyTorch has set, to a part of it
                del os.environ["TRITON_CACHE_DIR"]
            import torch._dynamo

            torch._dynamo.reset()
            try:
                result = function(*arguments, **options)
            except RuntimeError as again:
                if not type(again).__module__.startswith(_OF_THE_COMPILER):
                    raise
                why = first_line(again)
                raise ConfigError(
                    f"the model cannot be compiled here ({why}): see that there is a C++ compiler (c++ --version),"
                    " or set train.compile=false or sample.compile=false"
                ) from None
        called = True
        return result

    return call


@contextmanager
def _one_at_first() -> Iterator[None]:
    """The process that comes first has this block for itself; then all others have it together."""
    import torch._functorch.config as functorch

    with ExitStack() as held:
        with suppress(KeyError, OSError):  # no folder, or a file system without locks: each compiles for itself
            lock = held.enter_context(Path(os.environ[_VARIABLE], ".lock").open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(lock, fcntl.LOCK_SH)
        if hasattr(functorch, "force_non_lazy_backward_lowering"):  # or all compile the backward when they come to it
            held.enter_context(functorch.patch("force_non_lazy_backward_lowering", True))
        yield
