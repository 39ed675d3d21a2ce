"""Saving in the background: the loop stands still for the snapshot only, and no failure is lost.

1. The loop copies the tensors to host memory (``Saver.save``, ``Snapshot.take``) and goes on.
2. A thread of each rank writes its file (``_write_file``); of rank 0, after it has deleted what was cut off.
3. The others write a small record beside it, of the file or of why there is none (``_write_part``).
4. Rank 0's thread waits for the records (``_records``), looks at the sizes of the files, and writes the manifest: now
   the checkpoint exists (``_write_main``). It deletes the records.
5. It deletes what retention does not keep, and does what follows, such as an export (``_run``).

The threads speak through the storage alone: collectives belong to the training loop.
"""

import concurrent.futures
import errno
import json
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from ig_dist.checkpoints.manifest import MANIFEST, folder_name, make_manifest, sealed, unsealed
from ig_dist.checkpoints.reading import Checkpoint
from ig_dist.checkpoints.snapshot import Snapshot
from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.errors import DataError, IgDistError, StorageError
from ig_dist.parallel.agreement import meet
from ig_dist.parallel.dist import Dist, from_main
from ig_dist.parallel.engine import Piece
from ig_dist.storage.background import in_background, in_parallel
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import list_sizes, read_file, write_whole
from ig_dist.storage.urls import is_local
from ig_dist.storage.writes import create_file, write_hashed
from ig_dist.terminal import console

CLOSE_S = 5.0  # less than a launcher gives the other ranks when one has failed
_LAST_WORD_S = 10.0  # how long a rank that failed tries to tell rank 0
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_POLL_S = (0.02, 1.0)  # the first and the longest pause between looks for the records
_AT_ONCE = 16  # requests for what the ranks said: one after the other, those of 512 would take longer than the save

Then = Callable[[Checkpoint], object]


@dataclass(frozen=True)
class _Save:
    step: int
    token: str
    """Drawn anew for each save: tells its records from those of one that was cut off."""
    meta: Mapping[str, Any]
    then: Then | None


class Saver:
    """Saves the checkpoints of a run.

    Args:
        store: where they go.
        dist: this process; every rank has a saver.
        beat: called while a save to a storage is waited for. Its requests have deadlines, and may be many; a disk that
            hangs is left to the watchdog.
    """

    def __init__(self, store: CheckpointStore, dist: Dist, beat: Callable[[], None] = lambda: None) -> None:
        self._store, self._dist = store, dist
        self._beat = (lambda: None) if is_local(store.fs) else beat
        self._snapshot = Snapshot()
        self._under_way: Future[DataError | None] | None = None
        self.write_s: float | None = None
        """Seconds that the last save took in the background, until its manifest was written; None: none has."""
        self.failed_saves = 0
        """Saves of this start that failed, as rank 0 knows them."""

    def save(self, step: int, pieces: Mapping[str, Piece], meta: Mapping[str, Any], then: Then | None = None) -> None:
        """Begin a save of what this rank writes. COLLECTIVE. The tensors may change as soon as this returns.

        Waits for the save before it, if that is not done. A failed one is logged and counted, nothing more. ``then`` is
        called with the checkpoint on rank 0, in the background, before the next save.
        """
        self._settle()
        token = from_main(uuid.uuid4().hex[:12], self._dist)
        self._snapshot.take(pieces)
        save = _Save(step, token, meta, then)
        self._under_way = in_background(partial(self._run, save))

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._under_way is not None and not self._under_way.done()

    def wait(self) -> None:
        """Return when the last save is done, what follows it included; a DataError says why it failed. COLLECTIVE."""
        problem: DataError | None = from_main(self._settle(), self._dist)
        if problem is not None:
            raise type(problem)(f"{problem}; run the same command again to go on from the one before")

    def close(self) -> None:
        """Leave a save under way after a moment: for runs that end with an error."""
        if self._under_way is not None:
            concurrent.futures.wait([self._under_way], timeout=CLOSE_S)
            self._store.patience.stop.set()

    def _settle(self) -> DataError | None:
        """Wait for the save under way on all ranks; why it failed, as this rank knows it."""
        if self._under_way is None:
            return None
        meet(self._under_way, self._dist, self._beat)
        return self._under_way.result()

    def _run(self, save: _Save) -> DataError | None:
        """The whole of a save on this rank; why it failed."""
        began = time.monotonic()
        try:
            if not self._dist.is_main:
                self._write_part(save)
                return None
            checkpoint, folders = self._write_main(save)
        except (OSError, IgDistError) as error:
            problem = f"the checkpoint of step {save.step} was not saved: {self._explained(error)}"
            if self._dist.is_main:
                self.failed_saves += 1
                console.print(f"{problem}; what was saved before is untouched")
                if is_local(self._store.fs):  # for the space; a storage may be out of reach: the next save tidies up
                    self._attempt("what is left of it was not deleted", partial(self._undo, save))
            return StorageError(problem) if isinstance(error, StorageError) else DataError(problem)
        finally:
            self.write_s = time.monotonic() - began
        where = f"{checkpoint.url} is saved, but"
        self._attempt(f"{where} older ones were not deleted", partial(self._store.retain, save.step, folders))
        if save.then is not None:
            self._attempt(f"{where} not exported (`ig-dist export` does it)", partial(save.then, checkpoint))
        return None

    def _write_part(self, save: _Save) -> None:
        """This rank's file, then the record of it; where there is no file, the record tells rank 0 why."""
        fs, patience, path = self._store.fs, self._store.patience, self._record_path(save, self._dist.rank)
        try:
            write_whole(fs, path, json.dumps(sealed(self._write_file(save))).encode())
        except (OSError, IgDistError) as error:
            problem = {"problem": self._explained(error), "away": isinstance(error, StorageError)}
            soon = Patience(patience.stall_s, min(patience.deadline_s, _LAST_WORD_S), patience.stop)
            try:
                write_whole(fs, path, json.dumps(sealed(problem)).encode(), soon)
            except (OSError, IgDistError):
                console.print(f"rank {self._dist.rank}: {problem['problem']}")
            raise

    def _write_main(self, save: _Save) -> tuple[Checkpoint, dict[int, bool]]:
        """Rank 0's file, and the manifest of all; the folders that there are now."""
        store, began = self._store, time.monotonic()
        folder = store.folder(save.step)
        folders = store.folders()
        self._attempt("saves that were cut off were not deleted", partial(store.delete_torn, save.step, folders))
        if save.step in store.damaged and folders.get(save.step):
            store.remove(f"{folder}/{MANIFEST}")
        own = self._write_file(save)
        # the others may be as slow as this rank was, and give up their last request this much later
        patience = store.patience
        patience_s = time.monotonic() - began + patience.deadline_s + patience.stall_s + _LAST_WORD_S
        manifest = make_manifest(save.step, [own, *self._records(save, patience_s)], save.meta)
        sizes = list_sizes(store.fs, folder)
        for file in manifest["files"]:
            if sizes.get(file["name"]) != file["bytes"]:
                raise DataError(f"{store.url}/{folder_name(save.step)}/{file['name']} has disappeared or is cut short")
        data = json.dumps(manifest).encode()
        if not create_file(store.fs, f"{folder}/{MANIFEST}", data):
            self._attempt("what is left of it was not deleted", partial(self._undo, save))
            raise DataError(
                f"{store.url}/{folder_name(save.step)} was saved by another run meanwhile: give each run its own"
                " checkpoint.url"
            )
        # records, and files of a cut-off save
        left = sizes.keys() - {file["name"] for file in manifest["files"]} - {MANIFEST}
        in_parallel(store.remove, [f"{folder}/{name}" for name in left], _AT_ONCE)
        folders[save.step] = True
        store.damaged.discard(save.step)
        return Checkpoint(f"{store.url}/{folder_name(save.step)}", manifest, store.patience), folders

    def _write_file(self, save: _Save) -> dict[str, Any]:
        """Write this rank's file; the record of it."""
        store = self._store
        folder = store.folder(save.step)
        if is_local(store.fs):
            store.fs.makedirs(folder, exist_ok=True)
        described = in_background(self._snapshot.described)
        chunks = self._snapshot.chunks()
        file = write_hashed(store.fs, folder, f"rank_{self._dist.rank:05d}", chunks)
        return {"file": {**file, "header": self._snapshot.header()}, "tensors": described.result()}

    def _records(self, save: _Save, patience_s: float) -> list[dict[str, Any]]:
        """What the other ranks say of their files, in rank order; a DataError, where one failed or says nothing."""
        store = self._store
        records: dict[int, dict[str, Any]] = {}
        missing = set(range(1, self._dist.world_size))
        give_up, pause = time.monotonic() + patience_s, _POLL_S[0]
        while missing:
            store.fs.invalidate_cache()
            names = list_sizes(store.fs, store.folder(save.step))
            come = [rank for rank in sorted(missing) if self._record_path(save, rank).rpartition("/")[2] in names]
            for rank, record in zip(come, in_parallel(partial(self._record, save), come, _AT_ONCE), strict=True):
                if record is not None:  # else it suffered on the way: the next look reads it again
                    records[rank] = record
            missing -= records.keys()
            if missing and (time.monotonic() > give_up or store.patience.stop.wait(pause)):
                ranks = ", ".join(map(str, sorted(missing)))
                raise DataError(f"no word from rank {ranks} for {patience_s:.0f} s: its own output says why")
            pause = min(1.5 * pause, _POLL_S[1])
        return [records[rank] for rank in sorted(records)]

    def _record(self, save: _Save, rank: int) -> dict[str, Any] | None:
        """What a rank says of its file; None when that is not as it was written."""
        store = self._store
        record = unsealed(read_file(store.fs, self._record_path(save, rank)))
        if record is not None and "problem" in record:
            kind = StorageError if record.get("away") else DataError
            raise kind(f"rank {rank}: {record['problem']}")
        return record

    def _record_path(self, save: _Save, rank: int) -> str:
        return f"{self._store.folder(save.step)}/rank_{rank:05d}.{save.token}.json"

    def _undo(self, save: _Save) -> None:
        """Delete what a failed save left; not what another run saved there."""
        store, folder = self._store, self._store.folder(save.step)
        names = list_sizes(store.fs, folder)
        kept: set[str] = set()
        if MANIFEST in names:
            manifest = unsealed(read_file(store.fs, f"{folder}/{MANIFEST}"))
            if manifest is None:
                raise DataError(f"{folder}/{MANIFEST} cannot be trusted: see which of the files there are needed")
            kept = {MANIFEST, *(file["name"] for file in manifest["files"])}
        in_parallel(store.remove, [f"{folder}/{name}" for name in names.keys() - kept], _AT_ONCE)

    def _attempt(self, failure: str, action: Callable[[], object]) -> None:
        """Do what may fail without harm; then one line says so."""
        try:
            action()
        except (OSError, IgDistError) as error:
            console.print(f"{failure}: {self._explained(error)}")

    def _explained(self, error: Exception) -> str:
        """What is wrong, where, and how to mend it, while the run goes on."""
        if not isinstance(error, OSError):
            return str(error).removesuffix(", then run the same command again")
        remedy = "free some space" if error.errno in _FULL else "see that it can be written"
        return f"{self._store.url}: {error.strerror or error}: {remedy}"
