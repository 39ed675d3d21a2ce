"""Before the first step: can every rank compute, be reached, and read the data, and is one slower than the others?

One bad machine makes a whole job slow, wrong or stuck. Here it is named before it costs anything.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as torch_dist

from ig_dist.config import Config
from ig_dist.data.index import ShardIndex
from ig_dist.data.reader import ShardReader
from ig_dist.errors import ConfigError, IgDistError, LostPeerError, NodeError
from ig_dist.parallel.agreement import meet
from ig_dist.parallel.blame import blame
from ig_dist.parallel.dist import Dist, StopFlag, gather_objects, sum_over_ranks
from ig_dist.storage.background import in_background
from ig_dist.storage.faults import Patience
from ig_dist.terminal import console

T = TypeVar("T")

ROUNDS = 3  # the best one counts: of a short work the others tell more of what else the machine does
READ_S = 60.0
SLOW = 0.5
WORKS = {"matmul": 5e-3, "link": 1e-3, "read": 0.5}  # what is timed, and seconds below which it is never called slow


class Findings(NamedTuple):
    """What one rank found of itself; seconds of a work that is the same for all."""

    place: str
    matmul: float
    link: float
    read: float
    wrong: str  # what it does wrong; empty: nothing
    damaged: str  # what comes to it damaged, by whose fault that does not say; empty: nothing
    unread: str  # why it cannot read; empty: it can


def preflight(index: ShardIndex, config: Config, dist: Dist, stop_flag: StopFlag, beat: Callable[[], None]) -> None:
    """Try each rank; say what was found, and who is slow. COLLECTIVE.

    Takes well under a second, unless a storage is away. A stop that is asked for meanwhile is left to the caller.
    Raises NodeError where a rank computes wrong numbers, does not get what others send, cannot read what others can, or
    is slower than ``train.preflight_min_speed`` allows.
    """
    if dist.world_size == 1 or not config.train.preflight:
        return
    matmul, wrong = _matmul(dist.device)
    link, damaged = _links(dist)
    read, unread = _storage(index, config, dist, stop_flag, beat)
    if any(gather_objects(stop_flag.asked, dist)):
        return
    everyone: list[Findings] = gather_objects(Findings(dist.place, matmul, link, read, wrong, damaged, unread), dist)
    slow = slow_ranks(everyone, max(SLOW, config.train.preflight_min_speed))
    if dist.is_main:
        console.print(summary(everyone))
        for rank, what in slow.items():
            console.print(f"slow: {everyone[rank].place}: {what}")
    late: dict[int, str] = {}
    if config.train.preflight_min_speed:  # not for a link: it slows the ranks on both of its sides
        late = slow_ranks(everyone, config.train.preflight_min_speed, ("matmul", "read"))
    broken = {rank: one.wrong for rank, one in enumerate(everyone) if one.wrong}
    guilty = late | minority([one.unread for one in everyone]) | broken
    bad = {rank: one.damaged for rank, one in enumerate(everyone) if one.damaged} | guilty
    _end_where_bad([one.place for one in everyone], bad, guilty, dist)


def read_everywhere(read: Callable[[], T], sha256: Callable[[T], str], dist: Dist) -> T:
    """What every rank reads, the same on all of them by its hash. COLLECTIVE.

    Raises:
        ConfigError: it was replaced meanwhile.
        NodeError: some cannot, but others can.
        IgDistError: this rank's own error, where it is not that of a few.
    """
    try:
        result, error = read(), None
    except IgDistError as problem:
        result, error = None, problem
    mine = dist.place, str(error or ""), "" if result is None else sha256(result)
    places, errors, hashes = zip(*gather_objects(mine, dist), strict=True)
    bad = minority([error and f"cannot read the data ({error})" for error in errors])
    _end_where_bad(places, bad, bad, dist)
    if error is not None:
        raise error
    if any(errors):
        raise LostPeerError("other processes cannot read the data; their messages say why")
    if len(set(hashes)) > 1:
        raise ConfigError(
            "data.index was replaced while this run started, and its ranks have read different ones: start it again"
        )
    return cast("T", result)


def _end_where_bad(places: Sequence[str], bad: dict[int, str], guilty: Iterable[int], dist: Dist) -> None:
    """Raise NodeError if there are bad ranks; the launcher hears of the guilty ones."""
    if not bad:
        return
    if dist.is_main:
        blame(guilty)
    named = "; ".join(f"{places[rank]}: {what}" for rank, what in sorted(bad.items()))
    raise NodeError(f"{named}: mend that machine, or start without it (ig-dist slurm --exclude)")


def minority(problems: Sequence[str]) -> dict[int, str]:
    """The ranks with a problem, if at least as many have none: what most cannot do is no machine's fault."""
    found = {rank: problem for rank, problem in enumerate(problems) if problem}
    return found if 2 * len(found) <= len(problems) else {}


def slow_ranks(everyone: Sequence[Findings], least: float, works: Iterable[str] = tuple(WORKS)) -> dict[int, str]:
    """Ranks with less than this share of the median rank's speed in something, and in what."""
    found: dict[int, str] = {}
    for what in works:
        middle = statistics.median_low(getattr(one, what) for one in everyone)
        for rank, one in enumerate(everyone):
            seconds = getattr(one, what)
            if seconds * least > middle and seconds > WORKS[what]:
                found.setdefault(rank, f"{what} at {middle / seconds:.2f} of the median rank's speed")
    return dict(sorted(found.items()))


def summary(everyone: Sequence[Findings]) -> str:
    """One line: the median and the slowest rank of each work."""
    parts = []
    for what in WORKS:
        seconds = [getattr(one, what) for one in everyone]
        worst = max(range(len(seconds)), key=seconds.__getitem__)
        parts.append(
            f"{what} {1e3 * statistics.median_low(seconds):.2f} ms (slowest {1e3 * seconds[worst]:.2f},"
            f" {everyone[worst].place})"
        )
    return f"pre-flight of {len(everyone)} ranks: {', '.join(parts)}"


def _matmul(device: torch.device) -> tuple[float, str]:
    """Seconds of some products, and whether they are wrong.

    The entries are -1, 0 and 1, few enough of them that all sums are exact in bf16. The product is compared by what
    it does to a vector of integers (Freivalds 1977), in fp64, where that is exact too.
    """
    size, count, dtype = (4096, 100, torch.bfloat16) if device.type == "cuda" else (512, 4, torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    draw = torch.randint(8, (2, size, size), device=device, dtype=torch.int8, generator=generator)
    a, b = (draw == 0).to(dtype) - (draw == 1).to(dtype)
    vector = torch.arange(size, device=device, dtype=torch.float64) % 97 - 48
    product = a @ b

    def work() -> None:
        for _ in range(count):
            torch.mm(a, b, out=product)

    seconds = _best(work, device)
    right = torch.equal(product.double() @ vector, a.double() @ (b.double() @ vector))
    return seconds, "" if right else "a matrix product is wrong"


def _links(dist: Dist) -> tuple[float, str]:
    """Seconds to send to the same device of the next machine while the one before sends here; and what went wrong.

    Not around the ranks one by one: most of these would share a machine, and its network would not be tried.
    """
    size = 2**22 if dist.device.type == "cuda" else 2**18
    step = dist.local_world_size if dist.nodes > 1 else 1
    there, here = (dist.rank + step) % dist.world_size, (dist.rank - step) % dist.world_size
    mine = torch.full((size,), float(dist.rank), device=dist.device)
    theirs = torch.empty_like(mine)
    total = torch.full((size,), float(dist.rank + 1), device=dist.device)
    sum_over_ranks(total, dist)

    def work() -> None:
        exchange = [torch_dist.P2POp(torch_dist.isend, mine, there), torch_dist.P2POp(torch_dist.irecv, theirs, here)]
        for request in torch_dist.batch_isend_irecv(exchange):
            request.wait()

    def together() -> None:
        sum_over_ranks(torch.zeros(1, device=dist.device), dist)

    seconds = _best(work, dist.device, together)
    if not bool((total == dist.world_size * (dist.world_size + 1) / 2).all()):
        return seconds, "a sum over all ranks is wrong"
    return seconds, "" if bool((theirs == here).all()) else f"what rank {here} sent comes damaged"


def _storage(
    index: ShardIndex, config: Config, dist: Dist, stop_flag: StopFlag, beat: Callable[[], None]
) -> tuple[float, str]:
    """Seconds to read the first sample; why it cannot be read. All wait for the last one."""
    deadline_s = min(READ_S, config.data.retry_s)
    patience = Patience(deadline_s=deadline_s, stall_s=min(config.data.stall_s, deadline_s))
    reader = ShardReader(index, on_corrupt="skip", patience=patience)  # a sample that is damaged is so everywhere
    began, ended = time.perf_counter(), 0.0

    def read() -> str:
        nonlocal ended
        try:
            reader.read_ids(0, 1)
        except (IgDistError, OSError) as error:
            return f"cannot read the data ({error})"
        finally:
            ended = time.perf_counter()
        return ""

    def wait() -> None:
        beat()
        if stop_flag.asked:
            patience.stop.set()

    def given_up() -> bool:  # a mount that hangs knows no deadline
        return patience.stop.is_set() or time.perf_counter() - began > 2 * deadline_s

    reading = in_background(read)
    meet(reading, dist, wait, given_up)
    if not reading.done():
        seconds = time.perf_counter() - began
        return seconds, f"cannot read the data (a read does not return within {seconds:.0f} s)"
    return ended - began, reading.result()


def _best(work: Callable[[], None], device: torch.device, before: Callable[[], None] = lambda: None) -> float:
    """Seconds of the fastest of some rounds."""
    wait: Callable[[], object] = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(ROUNDS):
        before()
        wait()
        began = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
