"""The run directory: who may use it, and whether it belongs to this config."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import ValidationError

from ig_dist.config import Config
from ig_dist.endings import LOCK_WAIT_VARIABLE
from ig_dist.errors import ConfigError
from ig_dist.run_paths import absolute_paths, moved_paths
from ig_dist.terminal import console

CONFIG_NAME = "config.yaml"

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


@contextmanager
def claim(config: Config, *, force: bool = False) -> Iterator[Path]:
    """Hold the run directory for this process: check, create, lock and write ``config.yaml``. Rank 0 only.

    Args:
        config: the resolved config.
        force: go on under a config that differs; what differs is printed.

    Raises:
        ConfigError: another process holds it, or it belongs to another config.
    """
    path = Path(config.run.dir)
    differ = changed_keys(path, config)
    if differ and not force:
        raise ConfigError(
            f"run.dir {path} belongs to another config: {', '.join(differ)};"
            " choose another run.dir, or go on under the new config with --force-config"
        )
    for change in differ:
        console.print(f"changed by --force-config: {change}")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(f"run.dir {path}: {error.strerror}: choose a folder that can be written") from None
    with lock:
        try:
            if not _locked(lock, float(os.environ.get(LOCK_WAIT_VARIABLE, "0"))):
                lock.seek(0)
                raise ConfigError(f"run.dir {path} is in use by process {lock.read().strip()}: wait for it or stop it")
        except OSError as error:
            raise ConfigError(
                f"run.dir {path}: no file locks there ({error.strerror}): use another file system"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        kept = absolute_paths(config.model_dump(mode="json"))  # they hold from any folder
        replace_text(path / CONFIG_NAME, yaml.safe_dump(kept, sort_keys=False))
        yield path


def _locked(lock: IO[str], wait_s: float) -> bool:
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
        ConfigError: ``path`` is a file.
    """
    file = path / CONFIG_NAME
    if not file.exists():
        if path.exists() and not path.is_dir():
            raise ConfigError(f"run.dir {path} is a file: choose another run.dir")
        return []
    tree = absolute_paths(moved_paths(yaml.safe_load(file.read_text(encoding="utf-8")) or {}, path))
    with contextlib.suppress(ValidationError):  # of a key that is gone since: it differs
        tree = Config.model_validate(tree).model_dump(mode="json")  # a key that was not there yet had its default
    old = _flatten(tree)
    new = _flatten(absolute_paths(config.model_dump(mode="json")))
    free = FREE_KEYS | ({"train.steps", "train.epochs"} if config.optimizer.schedule == "constant" else set())
    return [
        f"{key} ({old.get(key)} -> {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in free and key.split(".")[0] not in FREE_GROUPS
    ]


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
