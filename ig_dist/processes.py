"""Helper processes on this machine that do not outlive the one they help."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.context import ForkServerContext


def helpers() -> ForkServerContext:
    """How to start helper processes.

    They are not forked from this process: torch's threads, and a GPU's context, do not survive that. The server that
    forks them has imported torch and nothing else; there is one for all.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ig_dist.encoding.loader"])
    return context


def end_with_parent(*_: object) -> None:
    """To be called in a helper process: end when the process that it helps is killed.

    Watching who forked this one, as the DataLoader does, is not enough: that is the server, which lives as long as
    any of its children.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
