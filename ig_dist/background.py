"""Work beside the training loop: in threads that never keep a process alive, met by all ranks without time-outs."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ig_dist.parallel.dist import Dist
    from ig_dist.storage import Patience

T = TypeVar("T")
R = TypeVar("R")

MEET_S = 0.5  # far below any train.timeout_s


def in_background(function: Callable[[], T]) -> Future[T]:
    """Call a function in a daemon thread; an executor's threads would hold up the exit of a process that failed."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def meet(work: Future[Any] | None, dist: Dist) -> None:
    """Return when every rank's work is done, well or not. COLLECTIVE.

    The ranks ask each other every half second. One collective at the end would take a rank that is still at work,
    or waits for a storage to come back, for one that hangs.
    """
    from ig_dist.parallel.dist import gather_objects  # torch, which the commands for shards do without

    def done() -> bool:
        if work is None:
            return True
        concurrent.futures.wait([work], timeout=MEET_S)
        return work.done()

    while not all(gather_objects(done(), dist)):
        pass


def at_once(function: Callable[[int], None], count: int, threads: int) -> None:
    """Call ``function(0)`` to ``function(count - 1)`` from some threads; the first error ends it."""
    numbers = iter(range(count))  # taking the next one is atomic
    failed = threading.Event()

    def run() -> None:
        for number in numbers:
            if failed.is_set():
                return
            try:
                function(number)
            except BaseException:
                failed.set()
                raise

    workers = [in_background(run) for _ in range(min(threads, count))]
    concurrent.futures.wait(workers)
    for worker in workers:
        worker.result()


def in_parallel(work: Callable[[T], R], items: Sequence[T], threads: int, patience: Patience) -> list[R]:
    """``work`` on each item, by some threads; results in the order of the items.

    The first error, or a signal, ends it at once: what the threads have begun has no further tries, and nobody waits
    for it.
    """
    numbers, results = iter(range(len(items))), dict[int, R]()  # taking the next number is atomic

    def run() -> None:
        for number in numbers:
            if patience.stop.is_set():
                return
            results[number] = work(items[number])

    workers = [in_background(run) for _ in range(min(threads, len(items)))]
    try:
        for worker in concurrent.futures.wait(workers, return_when=FIRST_EXCEPTION).done:
            worker.result()
        return [results[number] for number in range(len(items))]
    except BaseException:
        patience.stop.set()
        raise
