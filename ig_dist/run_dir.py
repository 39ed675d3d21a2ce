"""The run directory: who may use it, and whether it belongs to this config."""

import contextlib
import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError

from ig_dist.config import Config
from ig_dist.config.file import flat, read_groups
from ig_dist.config.paths import absolute_paths, moved_paths
from ig_dist.errors import ConfigError, listed
from ig_dist.storage.files import write_whole
from ig_dist.storage.urls import LOCAL
from ig_dist.terminal import console
from ig_dist.this_process import LOCK_WAIT_VARIABLE, host

CONFIG_NAME = "config.yaml"
IDENTITY_NAME = "run.json"
LOCK_NAME = ".lock"
FILES = ("metrics.jsonl", "goodput.jsonl", "provenance.jsonl")
FOLDERS = ("tensorboard", "checkpoints", "export", "samples", "hang")
MOST_IDENTITY_BYTES = 4096

# What may change when a run goes on: it does not enter the weights (beyond the order of float sums).
FREE_GROUPS = {"log", "engine", "guidance", "sample", "evaluate"}
FREE_KEYS = {
    "run.dir",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "checkpoint.export_every",
    "checkpoint.retry_s",
    "data.index",  # its content is compared by hash
    "data.workers",
    "data.window_bytes",
    "data.on_corrupt",
    "data.cache_dir",
    "data.cache_bytes",
    "data.stall_s",
    "data.retry_s",
    "optimizer.implementation",
    "train.accumulation",
    "train.compile",
    "train.deterministic",
    "train.activation_checkpointing",
    "train.max_nonfinite_steps",
    "train.peak_tflops",
    "train.preflight",
    "train.preflight_min_speed",
    "train.timeout_s",
}


class Identity(NamedTuple):
    """Which run a folder or a checkpoint is of, wherever it lies and whatever it is called."""

    id: str  # drawn at the first start; empty: of a version that drew none
    parent: str = ""  # of the run that it was forked from


def new_identity() -> Identity:
    """That of a run that begins."""
    return Identity(uuid.uuid4().hex[:16])


def read_identity(path: Path) -> Identity:
    """That of the run in a folder; empty where none can be read."""
    with contextlib.suppress(OSError, ValidationError):
        if (path / IDENTITY_NAME).is_file():
            return TypeAdapter(Identity).validate_json((path / IDENTITY_NAME).read_bytes()[:MOST_IDENTITY_BYTES])
    return Identity("")


@contextmanager
def claim(config: Config, identity: Identity | None = None, *, force: bool = False) -> Iterator[Path]:
    """Hold the run directory for this process: check, create, lock and write ``config.yaml``. Rank 0 only.

    The identity is written beside it unless one is there; None: a new one. With ``force`` the run goes on under a
    config that differs; what differs is printed.

    Raises:
        ConfigError: another process holds it, it belongs to another config, or it cannot be written.
    """
    path = Path(config.run.dir)
    if differ := changed_keys(path, config):
        refuse_other_config(f"run.dir {path}", differ, force=force)
    for change in differ:
        console.print(f"changed by --force-config: {change}")
    _check_kinds(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / LOCK_NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise ConfigError(f"run.dir {path}: {error.strerror}: choose a folder that can be written") from None
    with open(descriptor, "r+b", buffering=0) as lock:  # noqa: PTH123  (a descriptor; a buffer would fail at the end)
        try:
            if not _locked(lock, float(os.environ.get(LOCK_WAIT_VARIABLE, "0"))):
                holder = os.pread(descriptor, 99, 0).decode(errors="replace").strip()
                raise ConfigError(f"run.dir {path} is in use by process {holder}: wait for it or stop it")
        except OSError as error:
            raise ConfigError(
                f"run.dir {path}: no file locks there ({error.strerror}): use another file system"
            ) from None
        kept = absolute_paths(config.model_dump(mode="json"))  # they hold from any folder
        try:
            lock.truncate(0)
            lock.write(f"{os.getpid()} on {host()}\n".encode())
            replace_text(path / CONFIG_NAME, yaml.safe_dump(kept, sort_keys=False))
            if not read_identity(path).id:
                replace_text(path / IDENTITY_NAME, json.dumps((identity or new_identity())._asdict()) + "\n")
        except OSError as error:
            raise ConfigError(f"run.dir {path}: {error.strerror}: see that it has space and can be written") from None
        yield path


def _check_kinds(path: Path) -> None:
    """Refuse a run directory in which something else stands where a run writes.

    Raises:
        ConfigError: a folder, a device or a pipe where a file is written, a file where a folder is, or a link for the
            lock, which would be written over.
    """
    for name in (CONFIG_NAME, IDENTITY_NAME, LOCK_NAME, *FILES):
        if (path / name).exists() and not (path / name).is_file():
            raise ConfigError(f"run.dir: {path / name} is not a file: move it away")
    for name in FOLDERS:
        if (path / name).exists() and not (path / name).is_dir():
            raise ConfigError(f"run.dir: {path / name} is not a folder: move it away")
    if (path / LOCK_NAME).is_symlink():
        raise ConfigError(f"run.dir: {path / LOCK_NAME} is a link, whose target would be written over: remove it")


def _locked(lock: IO[bytes], wait_s: float) -> bool:
    """Take the lock, which the kernel lets go of however a process ends; False: somebody else holds it."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
        time.sleep(min(0.5, wait_s))


def changed_keys(path: Path, config: Config) -> list[str]:
    """Keys of the run in ``path`` that ``config`` changes and that enter the weights, as ``key (old -> new)``.

    Raises:
        ConfigError: ``path`` is a file, or its config is none.
    """
    file = path / CONFIG_NAME
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run.dir {path} is a file: choose another run.dir")
    if not file.exists():
        return []
    try:
        tree = moved_paths(read_groups(file), path)
    except ConfigError as error:
        raise ConfigError(f"the run's own {error}; move it away to go on: the checkpoints know its settings") from None
    return differences(tree, config)


def differences(tree: dict[str, Any], config: Config) -> list[str]:
    """Keys of a stored config that ``config`` changes and that enter the weights, as ``key (old -> new)``."""
    with contextlib.suppress(ValidationError):  # of a key that is gone since: it differs
        tree = Config.model_validate(tree).model_dump(mode="json")  # a key that was not there yet had its default
    old = flat(absolute_paths(tree))
    new = flat(absolute_paths(config.model_dump(mode="json")))
    free = FREE_KEYS | ({"train.steps", "train.epochs"} if config.optimizer.schedule == "constant" else set())
    return [
        f"{key} ({old.get(key)} -> {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in free and key.split(".")[0] not in FREE_GROUPS
    ]


def refuse_other_config(what: str, differ: Sequence[str], *, force: bool) -> None:
    """Raise ConfigError unless it is to be gone on with under the new config."""
    if not force:
        raise ConfigError(
            f"{what} belongs to another config: {listed(differ)};"
            " choose another run.dir, or go on under the new config with --force-config"
        )


def replace_text(path: Path, text: str) -> None:
    """Write a local file whole or not at all."""
    write_whole(LOCAL, str(path), text.encode())
