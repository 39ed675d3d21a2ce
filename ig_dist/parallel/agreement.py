"""What ranks wait for together, each in its own time: they ask each other, so that nobody waits in a collective."""

import concurrent.futures
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from ig_dist.errors import Ending, IgDistError
from ig_dist.parallel.dist import Dist, StopFlag, begin_any, gather_objects

T = TypeVar("T")

MEET_S = 0.5  # far below any train.timeout_s


def meet(
    work: Future[Any] | None,
    dist: Dist,
    beat: Callable[[], None] = lambda: None,
    given_up: Callable[[], bool] = lambda: False,
) -> None:
    """Return when every rank's work is done, well or not, or given up; ``beat`` is called until then. COLLECTIVE.

    The ranks ask each other every half second. One collective at the end would take a rank that is still at work,
    or waits for a storage to come back, for one that hangs.
    """

    def done() -> bool:
        if work is None:
            return True
        concurrent.futures.wait([work], timeout=MEET_S)
        return work.done() or given_up()

    while not all(gather_objects(done(), dist)):
        beat()


class Awaited(Generic[T]):
    """What comes to each rank in its own time, handed out on all ranks or on none: nobody waits in a collective.

    ``get`` gives this rank's next item, None when it has not come in so many seconds. With ``finish`` a stop does not
    end it while items come without delay. ``beat`` is called while some rank has to wait.
    """

    def __init__(
        self,
        get: Callable[[float], T | None],
        stop_flag: StopFlag,
        dist: Dist,
        *,
        finish: bool = False,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._get, self._stop_flag, self._dist, self._finish, self._beat = get, stop_flag, dist, finish, beat
        self._item: T | None = None
        self._error: IgDistError | None = None
        self._answer: Callable[[], list[bool]] | None = None

    def next(self, *, final: bool) -> T:
        """The next item, once every rank has its own; ``final``: nothing is wanted after it. COLLECTIVE.

        As a rule it is there before it is wanted: then the ranks have asked each other, and about a stop, while they
        were busy with the one before, and this waits for nothing. Otherwise they ask again until all have it.

        Raises:
            Ending: a rank was asked to stop, or will never have its item. Nobody gets one.
        """
        stop, lacks, failed = (self._answer or self._vote(MEET_S))()
        while lacks and not (stop or failed):
            self._beat()
            stop, lacks, failed = self._vote(MEET_S)()
        if stop and (lacks or not self._finish):
            raise Ending
        if failed:
            raise Ending(next(error for error in gather_objects(self._error, self._dist) if error is not None))
        item, self._item = self._item, None
        self._answer = None if final else self._vote(0.0)
        assert item is not None
        return item

    def _vote(self, timeout_s: float) -> Callable[[], list[bool]]:
        """Whether some rank was asked to stop, does not have its next item, will not have it."""
        if self._item is None and self._error is None:
            try:
                self._item = self._get(timeout_s)
            except IgDistError as error:
                self._error = error
        stop = self._stop_flag.asked and (timeout_s > 0 or not self._finish)  # that it is not there yet is no delay
        return begin_any((stop, self._item is None, self._error is not None), self._dist)
