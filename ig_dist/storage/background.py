"""Work in threads that never keep a process alive."""

import concurrent.futures
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


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


def in_turn(calls: Iterable[Callable[[], T]]) -> Callable[[float], T | None]:
    """Calls one after another in the background: asked again and again, gives the next result or, in time, None."""
    left = iter(calls)
    under_way: Future[T] | None = None

    def get(timeout_s: float) -> T | None:
        nonlocal under_way
        under_way = under_way or in_background(next(left))
        if not concurrent.futures.wait([under_way], timeout=timeout_s).done:
            return None
        done, under_way = under_way, None
        return done.result()

    return get


def in_parallel(
    work: Callable[[T], R], items: Sequence[T], threads: int, stop: threading.Event | None = None
) -> list[R]:
    """``work`` on each item, by some threads; results in the order of the items.

    The first error, or a signal, ends it at once and sets ``stop``: what the threads have begun has no further tries,
    and nobody waits for it.
    """
    stop = stop or threading.Event()
    numbers, results = iter(range(len(items))), dict[int, R]()  # taking the next number is atomic

    def run() -> None:
        for number in numbers:
            if stop.is_set():
                return
            results[number] = work(items[number])

    workers = [in_background(run) for _ in range(min(threads, len(items)))]
    try:
        for worker in concurrent.futures.wait(workers, return_when=FIRST_EXCEPTION).done:
            worker.result()
        return [results[number] for number in range(len(items))]
    except BaseException:
        stop.set()
        raise
