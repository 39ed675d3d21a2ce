"""The watchdog: a rank that makes no progress ends the run, with one line that says who is behind.

One thread looks whether the phase of the loop changes, on the host or on its device; another one tells the job's store
where this rank is, and reads where the others are once this one stands still. Neither is ever waited for, and both work
while the main thread is in a call that does not return.
"""

import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import TCPStore  # torch.distributed does not name it as its own

from ig_dist.config import Config
from ig_dist.errors import HangError, LostPeerError
from ig_dist.parallel.blame import blame
from ig_dist.parallel.collectives import Recorder, Standing, communication_error
from ig_dist.parallel.dist import Dist, from_main
from ig_dist.storage.faults import Patience
from ig_dist.terminal import to_stderr
from ig_dist.training.phases import Phases, device_marks
from ig_dist.training.words import Word, judge, place

FIRST_TIMES = 3.0  # what compiles, loads or is done seldom may take that many times longer
POLL_S = 2.0
_SILENT_POLLS = 4
_RANKS_PER_POLL = 256  # whose reading of all ranks' words the store can serve: 2 ms for each of 512
_GRACE_POLLS = 4  # the others hear of it, and end by themselves; all within the 10 s that ig-dist launch gives them


def phase_limits(config: Config) -> dict[str, float]:
    """Seconds that a phase may last once a start is warm; others than these ``train.timeout_s``.

    What waits for a storage is given the storage's own deadline on top, so that the storage's error comes first.
    """
    one = config.train.timeout_s
    reads = config.data.retry_s + config.data.stall_s
    writes = config.checkpoint.retry_s + Patience().stall_s
    return {
        "start-up": FIRST_TIMES * one + reads + writes,
        "compile": FIRST_TIMES * one,
        "data": one + reads,
        "validation": FIRST_TIMES * one + reads,
        "sampling": FIRST_TIMES * one,
        "scoring": FIRST_TIMES * one,
        "checkpoint": FIRST_TIMES * one + writes,
    }


def longest_wait_s(config: Config) -> float:
    """What a collective is given: longer than any phase, for the watchdog knows more than a time-out."""
    return max(phase_limits(config).values()) + 10 * POLL_S


@contextmanager
def watched(phases: Phases, config: Config, dist: Dist, *, lives_on: bool = False) -> Iterator["Watchdog"]:
    """End the process with exit code 5 when it hangs, or when another rank does. COLLECTIVE.

    One that ``lives_on`` after the training and has no peers is told of the hang, and left to its user.
    """
    watchdog = Watchdog(phases, config, dist, lives_on=lives_on and dist.world_size == 1)
    threading.Thread(target=watchdog.watch, name="watchdog", daemon=True).start()
    if dist.world_size > 1:
        threading.Thread(target=watchdog.talk, name="watchdog's talk", daemon=True).start()
    try:
        with watchdog.has_the_last_word():
            yield watchdog
    finally:
        watchdog.stop.set()
        phases.on_change = None


class Watchdog:
    """Of one rank; see ``watched``."""

    def __init__(self, phases: Phases, config: Config, dist: Dist, *, lives_on: bool = False) -> None:
        self._phases, self._dist, self._lives_on = phases, dist, lives_on
        self._timeout_s, self._limits = config.train.timeout_s, phase_limits(config)
        self._poll_s = min(POLL_S, self._timeout_s / 10)
        self._turns = 1 + dist.world_size // _RANKS_PER_POLL
        self._folder = Path(config.run.dir) / "hang"
        self.stop = threading.Event()
        self._marks = device_marks(dist.device, self._poll_s, self.stop)
        if self._marks is not None:
            phases.on_change = self._marks.put
        self._recorder = Recorder()
        self._word = Word()
        unheard = self._word._replace(ticks=-1), time.monotonic()
        self._heard = {rank: unheard for rank in range(dist.world_size) if rank != dist.rank}
        """The others' last words, and when they came."""
        self.ending = self._asking = self._told = False
        self._failure = self._others_failure = ""
        self._failure_told = threading.Event()
        self._answered = self._read = time.monotonic()  # when the store did, and when the others' words were read
        self._patience_s = max(1.0, _SILENT_POLLS * self._turns * self._poll_s)
        self._launcher = os.getppid() if "RANK" in os.environ else None
        self._prefix = f"watchdog/{from_main(uuid.uuid4().hex, dist)}"  # a store may outlive a start: torchrun's does

    @contextmanager
    def has_the_last_word(self) -> Iterator[None]:
        """A peer that ended may free the main thread while this process ends too: nothing more is said then."""
        try:
            yield
        finally:
            if self.ending:
                time.sleep(60.0)  # the end is near

    def tell_failure(self, text: str) -> None:
        """Tell the others that this rank fails and comes to no collective any more. Returns once they know, or soon."""
        self._failure = text
        with suppress(OSError):
            self._keep_records()
        self._failure_told.wait(3 * self._poll_s)
        if self._dist.is_main:
            time.sleep(2 * self._poll_s)  # the store, which they read it from, ends with this process

    def watch(self) -> None:
        """Look whether the loop and its device go on. A thread's work, as is the next."""
        idle, ticks, last = 0.0, 0, time.monotonic()
        seen = (-1, -1)
        while not self.stop.wait(self._poll_s):
            host, at = self._phases.now, time.monotonic()
            now = (self._marks and self._marks.behind) or host  # what the device is in, where that is another phase
            # a process that was stopped itself (a suspended job) was not idle meanwhile
            idle = 0.0 if (host.entered, now.entered) != seen else idle + min(at - last, 2 * self._poll_s)
            seen, last, ticks = (host.entered, now.entered), at, ticks + 1
            limit = self._limits.get(now.phase, self._timeout_s * (1 if self._phases.warm else FIRST_TIMES))
            if self._others_failure:
                self._leave()
            if problem := communication_error(self._dist.device):  # a peer that failed may still say why
                self._others_failure = f"NCCL reports {problem}: another process is gone, or the network to it"
            if self._launcher not in (None, os.getppid()):
                self._stop_alone()
            self._asking, told = idle > min(limit, self._timeout_s) / 2, self._told
            standing = self._recorder.read(self._poll_s / 2) if self._asking or told else Standing({}, None)
            beside = "" if now is host else place(host.step, host.phase)
            self._word = Word(now.entered, now.phase, now.step, idle, limit - idle, ticks, beside, standing)
            # whatever this rank waits for, it will not come from one that does not even answer
            lost = idle > self._timeout_s and (self._silent() or self._store_is_silent())
            if told or lost or (idle > limit and not self._excused()):
                if not self._lives_on:
                    self._end()
                self._say()
                idle = 0.0  # to be said again after as long

    def talk(self) -> None:
        """Tell and read the store; it may not answer, which is why the other thread never waits for it."""
        store, ended, failed = None, f"{self._prefix}/ended", f"{self._prefix}/failed"
        while not self.stop.is_set():  # at once, or one that is stopped early would never have said a word
            try:
                if store is None:
                    store = TCPStore(
                        os.environ["MASTER_ADDR"],
                        int(os.environ["MASTER_PORT"]),
                        is_master=False,
                        wait_for_workers=False,
                        timeout=timedelta(seconds=max(1.0, self._poll_s)),
                    )
                store.set(self._key(self._dist.rank), json.dumps(self._word))
                if self.ending:
                    store.set(ended, "")
                if self._failure and not self._failure_told.is_set():
                    store.set(failed, f"rank {self._dist.rank}: {self._failure}")
                    self._failure_told.set()
                elif not self._failure and store.check([failed]):
                    self._others_failure = store.get(failed).decode()
                    return  # nothing is left to say, and the store ends with rank 0
                told = self._told or store.check([ended])
                turn = (self._word.ticks + self._dist.rank) % self._turns == 0  # ranks tick together: each has its own
                if told or (self._asking and turn):
                    ranks = self._known(store, list(self._heard))
                    for rank, text in zip(ranks, store.multi_get([self._key(rank) for rank in ranks]), strict=True):
                        word = Word.loads(text)
                        if self._heard[rank][0].ticks != word.ticks:
                            self._heard[rank] = word, time.monotonic()
                    self._read = time.monotonic()
                self._answered = time.monotonic()
                if told:
                    self._answered, self._told = math.inf, True  # once the others have been heard
                    return
            except (RuntimeError, ValueError):  # of the store: a time-out, or a connection that broke
                store = None
            self.stop.wait(self._poll_s)

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _known(self, store: TCPStore, ranks: list[int]) -> list[int]:
        """Those that have said a word; asked by halves, since as a rule all have, or all but one."""
        if store.check([self._key(rank) for rank in ranks]):
            return ranks
        middle = len(ranks) // 2
        return [*self._known(store, ranks[:middle]), *self._known(store, ranks[middle:])] if middle else []

    def _silent(self) -> list[int]:
        """Ranks that had said nothing new for too long when their words were last read."""
        return [rank for rank, (_, at) in self._heard.items() if self._read - at > self._patience_s]

    def _store_is_silent(self) -> bool:
        return bool(self._heard) and time.monotonic() - self._answered > self._patience_s

    def _excused(self) -> bool:
        """Whether this rank waits for one that is behind, runs, and is within its own time."""
        mine, silent = self._word.entered, self._silent()
        late = [rank for rank, (word, _) in self._heard.items() if word.entered < mine and word.left_s > 0]
        return not self._store_is_silent() and any(rank not in silent for rank in late)

    def _behind(self) -> tuple[str, list[int]]:
        """Who is to blame: in words, and as ranks where that is sure: it may be this one that nothing reaches."""
        if self._store_is_silent():
            return "; behind: rank 0 or its machine, whose store does not answer; no machine is blamed", []
        words = {rank: word for rank, (word, _) in self._heard.items()} | {self._dist.rank: self._word}
        return judge(words, self._silent(), self._dist.rank, self._dist.local_world_size)

    def _stop_alone(self) -> None:
        """Whoever started the ranks is gone: nobody would signal them, nor see them end. They save and stop."""
        self._launcher = None
        to_stderr(f"rank {self._dist.rank}: the launcher is gone, the run saves and stops")
        os.kill(os.getpid(), signal.SIGUSR2)  # of ig-dist launch a SIGTERM may have come before, and a second one kills

    def _leave(self) -> None:
        """Another rank has failed: if this one's main thread does not find out by itself, it ends here."""
        if self.stop.wait(_GRACE_POLLS * self._poll_s) or self._told:
            return
        end_within(1.0, LostPeerError.exit_code)
        to_stderr(f"error: rank {self._dist.rank} ends: {self._others_failure}")
        os._exit(LostPeerError.exit_code)

    def _end(self) -> None:
        """Say it, and end the process; also where stderr or the disk hang too."""
        self.ending = True  # the others are told
        grace = _GRACE_POLLS * self._poll_s if self._dist.world_size > 1 else 0.0
        end_within(grace + 1.0, HangError.exit_code)
        self._say()
        time.sleep(grace)
        os._exit(HangError.exit_code)

    def _say(self) -> None:
        """One line, and the stacks."""
        word, (behind, ranks) = self._word, self._behind()
        where = f"{word.place} (the host is at {word.host})" if word.host else word.place
        file = self._file(".txt")
        to_stderr(
            f"error: rank {self._dist.rank}: no progress for {word.idle_s:.0f} s at {where}"
            f"{behind}. The stacks of all threads are in {file}; run the same command again to go on from the newest"
            " checkpoint, with a higher train.timeout_s if it was only slow"
        )
        try:
            blame(ranks)
            self._folder.mkdir(parents=True, exist_ok=True)
            with file.open("w", encoding="utf-8") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
            self._keep_records()
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _keep_records(self) -> None:
        """The last collectives of this rank, beside the stacks."""
        self._recorder.read(self._poll_s)
        if self._recorder.records:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file(".json").write_text(json.dumps(self._recorder.records), encoding="utf-8")

    def _file(self, suffix: str) -> Path:
        return self._folder / f"rank_{self._dist.rank:05d}{suffix}"


def end_within(seconds: float, code: int) -> None:
    """End the process by then, whatever still waits."""
    last = threading.Timer(seconds, os._exit, [code])
    last.daemon = True
    last.start()
