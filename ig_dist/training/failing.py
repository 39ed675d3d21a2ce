"""A rank that fails says so at once, to its log, its launcher and its peers, and leaves without waiting for anybody.

What is closed while an exception goes up may wait for peers or a storage (NCCL's end of a group does), and the peers
wait for this rank: without this, an error of one rank looks like a hang of all.
"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as torch_dist

from ig_dist.config import Config
from ig_dist.errors import (
    Ending,
    HangError,
    IgDistError,
    LostPeerError,
    NonFiniteError,
    OutOfMemoryError,
    RankError,
    first_line,
)
from ig_dist.parallel.blame import blame, note_failure
from ig_dist.parallel.dist import Dist
from ig_dist.terminal import say
from ig_dist.this_process import BROKEN
from ig_dist.training.phases import Phases
from ig_dist.training.watchdog import Watchdog, end_within
from ig_dist.training.words import place

LEAVE_S = 8.0  # for what is closed meanwhile; within the 10 s that ig-dist launch gives the others
_PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "remote process exited or there was a network error",  # NCCL
)
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # of CUDA and NCCL, of the CPU's allocator


@contextmanager
def failures_told(config: Config, dist: Dist, phases: Phases, watchdog: Watchdog | None = None) -> Iterator[None]:
    """Say and tell the error that leaves this block, unless all ranks have it, or it is a peer's.

    Raises:
        IgDistError: what the error means to a user; of a process alone an unknown one stays what it is.
    """
    try:
        yield
    except (Ending, LostPeerError, NonFiniteError):  # of all ranks, or a peer's
        raise
    except Exception as error:
        explained = _explained(error, config, dist, phases)
        if explained is None:
            raise
        if not (explained.everywhere or explained.said):
            _tell(explained, error, dist, watchdog)
        raise explained from error


def _explained(error: Exception, config: Config, dist: Dist, phases: Phases) -> IgDistError | None:
    """The error as a user meets it; None: of a process alone, whose traceback Python prints."""
    if isinstance(error, IgDistError):
        return error
    if isinstance(error, RuntimeError):  # gloo has no class of its own for what befalls it
        if isinstance(error, torch.AcceleratorError) and any(sign in str(error) for sign in BROKEN):
            blame([dist.rank])
        if "Timed out waiting" in str(error):
            return HangError("a collective timed out: a rank hangs; run the same command again to go on")
        if isinstance(error, torch_dist.DistNetworkError) or any(sign in str(error) for sign in _PEER_IS_GONE):
            lost = LostPeerError(f"another of the {dist.world_size} processes ended; its message says why")
            say(lost)  # at once: what is closed now may take longer than a launcher gives the others
            return lost
    now = phases.now
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)
    ):
        rows, said = config.micro_batch(dist.world_size), first_line(error)
        return OutOfMemoryError(
            f"out of memory at {place(now.step, now.phase)}, with {rows} rows in a forward pass ({said}): set"
            f" train.accumulation={2 * config.train.accumulation}, train.activation_checkpointing=true or"
            " engine.kind=fsdp2; `ig-dist train CONFIG --dry-run` says what fits"
        )
    if dist.world_size == 1:
        return None
    said = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    return RankError(f"failed at {place(now.step, now.phase)}: {said}")


def _tell(explained: IgDistError, error: Exception, dist: Dist, watchdog: Watchdog | None) -> None:
    if isinstance(explained, RankError):
        traceback.print_exception(error)
        sys.stderr.flush()
    say(explained)
    if dist.world_size > 1:
        note_failure(dist.rank, str(explained))
        end_within(LEAVE_S, explained.exit_code)
        if watchdog is not None:
            watchdog.tell_failure(str(explained))
