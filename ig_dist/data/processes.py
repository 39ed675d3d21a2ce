"""Helper processes on this machine that do not outlive the one they help."""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing import parent_process
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any


class _Helper(ForkServerProcess):
    """Does not import the script that was started, and so run it again, as multiprocessing has its processes do."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:  # noqa: N802
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return ForkServerProcess._Popen(process_obj)
        finally:
            sys.modules["__main__"] = main


class _Helpers(ForkServerContext):
    Process = _Helper


def helpers() -> ForkServerContext:
    """How to start helper processes.

    They are not forked from this process: torch's threads, and a GPU's context, do not survive that. The server that
    forks them has imported torch and nothing else; there is one for all.
    """
    context = _Helpers()
    context.set_forkserver_preload(["ig_dist.encoding.loader"])
    return context


def end_with_parent(*_: object) -> None:
    """To be called in a helper process: end when the process that it helps is killed.

    Watching who forked this one, as the DataLoader does, is not enough: that is the server, which lives as long as
    any of its children.
    """
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
