"""Paths in a run's config: they are the run's, whatever folder it is used from, and wherever it was moved or copied to.

``RUN/config.yaml`` holds absolute ones. One that is not there any more, and a relative one of an older run, is looked
for at the same place relative to the run; what lies in the run directory is always the run's own.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

MADE = {"run.dir", "checkpoint.url", "sample.url", "data.cache_dir"}
READ = {"run.fork_from", "train.init_from", "data.index", "sample.weak_model", "sample.tokenizer", "evaluate.reference"}


def absolute_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """A config with absolute paths, as the run directory keeps it; what may be a name is left where it is no file."""

    def absolute(key: str, value: str) -> str:
        return str(Path(value).absolute()) if key in MADE or _is_there(value) else value

    return _each_path(tree, absolute)


def moved_paths(tree: dict[str, Any], run: Path) -> dict[str, Any]:
    """The config of a run that now lies in ``run``, with its paths as they are now."""
    run_group = tree.get("run")
    old = run_group.get("dir") if isinstance(run_group, dict) else None
    return _each_path(tree, lambda key, value: moved_path(value, old, run)) if isinstance(old, str) and old else tree


def moved_path(path: str, old: str, run: Path) -> str:
    """Where a path is now.

    Args:
        path: as it was written; also RUN@STEP, a name or a URL, which stay.
        old: the run directory, as it was written beside it.
        run: the run directory now.
    """
    if not path or "://" in path or Path(old).absolute() == run.absolute():
        return path
    if Path(path).is_absolute() != Path(old).is_absolute():
        return path
    relative = os.path.relpath(path, old)
    beside = os.path.normpath(run.absolute() / relative)
    if not relative.startswith(".."):
        return beside
    candidates = [path, beside] if Path(path).is_absolute() else [beside, path]
    return next(filter(_is_there, candidates), path)


def _is_there(path: str) -> bool:
    run, at, _ = path.rpartition("@")  # of RUN@STEP
    return Path(path).exists() or bool(at and Path(run).exists())


def _each_path(tree: dict[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """A copy of a config in which every local path is replaced."""

    def changed(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {name: changed(value, f"{key}.{name}" if key else name) for name, value in node.items()}
        is_path = key in MADE | READ or key.startswith("evaluate.weights.")
        plain = is_path and isinstance(node, str) and node and "://" not in node
        varies = key == "data.cache_dir" and "$" in str(node)  # $SLURM_TMPDIR is each node's own
        return change(key, node) if plain and not varies else node

    found: dict[str, Any] = changed(tree, "")
    return found
