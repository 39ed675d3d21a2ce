"""Checkpoints: one format for every engine and world size, whole or not there, and nothing in it is code.

    <url>/step_0000001200/rank_00000.1f0c....safetensors ...   the pieces that each rank wrote, named by their hash
    <url>/step_0000001200/rank_00001.<save>.json               what that rank says of them; gone after the save
    <url>/step_0000001200/manifest.json                        written last: names, shapes, pieces, CRCs, sizes, sha256

The unit is the global tensor; a piece is a range of its flattened elements, which is what every engine's shard is.
A folder without a manifest does not exist; one whose manifest or files do not match is reported and passed over.
Saving is in ``saving.py``, reading by many ranks in ``reading.py``: here is what is found, opened and deleted.
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ig_dist.checkpoints.manifest import MANIFEST, folder_name, inspect
from ig_dist.checkpoints.reading import Checkpoint
from ig_dist.config import Config
from ig_dist.errors import ConfigError, DamagedError, DataError, IgDistError
from ig_dist.parallel.agreement import meet
from ig_dist.parallel.dist import Dist, from_main, gather_objects
from ig_dist.storage.background import in_background
from ig_dist.storage.faults import Patience
from ig_dist.storage.files import list_sizes, open_url
from ig_dist.storage.s3 import abort_orphaned_uploads
from ig_dist.storage.urls import is_local

_TIDYING_S = 30.0  # how long is tried what need not succeed
log = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointStore:
    """The checkpoints in a folder: what there is, what is whole, what is deleted.

    Args:
        url: folder, a path or any fsspec URL.
        keep_last: the newest checkpoints that are kept.
        keep_every: also keep steps that are a multiple of this; 0: none.
        patience: how long faults of the storage are borne.
    """

    def __init__(self, url: str, *, keep_last: int = 2, keep_every: int = 0, patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        self.fs, self.path = open_url(url, "checkpoint.url", self.patience)
        self.url, self._keep_last, self._keep_every = url.rstrip("/"), keep_last, keep_every
        self.damaged: set[int] = set()
        """Steps whose checkpoints ``find`` found damaged: they may be written over."""

    def find(
        self,
        dist: Dist,
        step: int | None = None,
        *,
        keep: bool = False,
        fits: Callable[[Checkpoint], None] = lambda checkpoint: None,
        beat: Callable[[], None] = lambda: None,
    ) -> Checkpoint | None:
        """The checkpoint of a step, or the newest whole one, if there is any. COLLECTIVE.

        All processes share the reading, and ``keep`` what they read, for ``Loaded``. ``fits`` is called before that; it
        raises on all ranks alike if the checkpoint is not for this run (``DamagedError`` is a damage like others).
        ``beat`` is called now and then meanwhile. Damaged ones are passed over, and reported, unless the step is given.

        Raises:
            ConfigError: there is none of that step, it is damaged, or of a later format than this version knows.
            DataError: there are checkpoints and none of them is whole, or the storage fails beyond the deadline.
        """
        self.damaged.clear()
        while (chosen := step if step is not None else self._on_main(self._newest, dist)) is not None:
            url = f"{self.url}/{folder_name(chosen)}"
            try:
                look = partial(inspect, self.fs, self.folder(chosen), chosen)
                checkpoint = Checkpoint(url, self._on_main(look, dist), self.patience)
                fits(checkpoint)
                read = partial(checkpoint.read_share, dist.rank, dist.world_size, keep=keep)
                return replace(checkpoint, share=self._on_all(read, dist, beat))
            except DamagedError as error:
                if step is not None:
                    there = ", ".join(map(str, self.agreed_steps(dist))) or "none"
                    raise ConfigError(
                        f"{self.url} has no whole checkpoint of step {step} ({error}); there are: {there}"
                    ) from None
                self.damaged.add(chosen)
                if dist.is_main:
                    log.warning("checkpoint %s is damaged (%s): trying the one before", url, error)
        return None

    def agreed_steps(self, dist: Dist) -> list[int]:
        """``steps``, as rank 0 sees them. COLLECTIVE."""
        return self._on_main(self.steps, dist)

    def steps(self) -> list[int]:
        """Steps that have a manifest, ascending; they need not be whole."""
        return [step for step, whole in sorted(self.folders().items()) if whole]

    def folders(self) -> dict[int, bool]:
        """Step of each checkpoint folder, and whether it has a manifest."""
        self.fs.invalidate_cache()
        try:
            paths = self.fs.ls(self.path, detail=False)
        except (FileNotFoundError, NotADirectoryError):  # what is in the way is said when the run directory is claimed
            return {}
        steps = [int(match[1]) for p in paths if (match := re.fullmatch(r"step_(\d{10})", PurePosixPath(p).name))]
        if is_local(self.fs):  # it may be anything
            return {step: os.path.lexists(f"{self.folder(step)}/{MANIFEST}") for step in steps}
        return {step: MANIFEST in list_sizes(self.fs, self.folder(step)) for step in steps}

    def folder(self, step: int) -> str:
        """Path of a step's folder within the file system."""
        return f"{self.path}/{folder_name(step)}"

    def delete_torn(self, before: int, folders: dict[int, bool]) -> None:
        """Delete what older cut-off saves left, before a new one needs the space."""
        for step in [step for step, whole in folders.items() if not whole and step < before]:
            self._delete(step, folders.pop(step))

    def retain(self, newest: int, folders: dict[int, bool]) -> None:
        """Delete what the retention rule does not keep.

        What is newer than the checkpoint just written was found damaged: it does not count, and is written over.
        """
        whole = [step for step in sorted(folders) if folders[step] and step <= newest]
        keep = set(whole[-self._keep_last :])
        if self._keep_every:
            keep |= {step for step in whole if step % self._keep_every == 0}
        for step, has_manifest in folders.items():
            if step not in keep and step < newest:
                self._delete(step, has_manifest)

    def abort_orphans(self, path: str = "") -> None:
        """Abort uploads below a path (all) that killed processes left. Only while nobody saves there."""
        patience = Patience(self.patience.stall_s, min(self.patience.deadline_s, _TIDYING_S), self.patience.stop)
        try:
            abort_orphaned_uploads(self.fs, path or self.path, patience)
        except (OSError, DataError) as error:  # they cost money, not the run
            log.warning("uploads that were cut off in %s were not deleted: %s", self.url, error)

    def remove(self, path: str) -> None:
        """Delete a file, or what a damaged disk has in its place, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            if is_local(self.fs) and Path(path).is_dir() and not Path(path).is_symlink():
                shutil.rmtree(path)
            self.fs.rm_file(path)

    def _delete(self, step: int, has_manifest: bool) -> None:
        folder = self.folder(step)
        if has_manifest:
            self.remove(f"{folder}/{MANIFEST}")  # first: what is half deleted must not exist
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(folder, recursive=True)
        self.abort_orphans(folder)

    def _on_main(self, function: Callable[[], T], dist: Dist) -> T:
        """What a function finds on rank 0. COLLECTIVE; errors as ``_on_all``."""
        found: T = from_main(self._on_all(function if dist.is_main else lambda: None, dist), dist)
        return found

    def _on_all(self, function: Callable[[], T], dist: Dist, beat: Callable[[], None] = lambda: None) -> T:
        """What a function finds on this rank, once it has found it on all, however long it takes. COLLECTIVE.

        Raises:
            IgDistError: the function's own of some rank, on every rank; a ``DamagedError`` where there are no others.
        """
        work = in_background(function)
        meet(work, dist, beat)
        problem: IgDistError | None = None
        try:
            work.result()
        except IgDistError as error:
            problem = error
        except OSError as error:
            problem = DataError(f"{self.url}: {error.strerror or error}: see that the folder can be read")
        problems = [problem for problem in gather_objects(problem, dist) if problem is not None]
        if problems:
            first = min(problems, key=lambda problem: isinstance(problem, DamagedError))
            first.everywhere = True
            raise first
        return work.result()

    def _newest(self) -> int | None:
        """The newest step that has a manifest, but those that were found damaged."""
        left = [step for step in self.steps() if step not in self.damaged]
        if self.damaged and not left:
            raise DataError(
                f"none of the {len(self.damaged)} checkpoints in {self.url} is whole: restore one,"
                " or delete that folder to start from the beginning"
            )
        return max(left, default=None)


def checkpoint_store(config: Config) -> CheckpointStore:
    """The checkpoints of a run."""
    url = config.checkpoint.url or f"{config.run.dir}/checkpoints"
    settings = config.checkpoint
    patience = Patience(deadline_s=settings.retry_s)
    return CheckpointStore(url, keep_last=settings.keep_last, keep_every=settings.keep_every, patience=patience)
