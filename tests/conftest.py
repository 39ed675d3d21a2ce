"""What the tiers share: encoded digits, a tiny config, and running commands as a user would."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ig_dist.terminal import console
from tests import forked
from tests import object_store as object_stores
from tests import slurm_cluster as slurm_clusters
from tests.fault_proxy import FaultProxy
from tests.object_store import ObjectStore
from tests.slurm_cluster import SlurmCluster

# Small tensors gain nothing from threads, and tests that share the cores lose a lot. Also for the processes they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background ignores SIGINT, in all that comes of it: Ctrl-C could not be tried.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]

TINY: dict[str, Any] = {
    "model": {"depth": 3, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "aux_depth": 1},
    "data": {"streams": 8, "window_samples": 32, "workers": 1},
    "train": {"steps": 50, "global_batch_size": 32, "precision": "fp32"},
    "optimizer": {"lr": 2e-3, "warmup_steps": 5},
    "ema": {"decays": [0.99, 0.9]},
    "checkpoint": {"every_steps": 20, "keep_last": 3},
    "sample": {"num": 40, "steps": 4, "batch_size": 8, "unit_size": 16},
    "log": {"every_steps": 1},
}


def run_command(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout with this interpreter; ``ig-dist`` and ``python`` mean this one's.

    They are forked from a process that has imported everything: the imports alone would take a third of CI. Those with
    an environment of their own, and the measurement of a start, start as a user would start them.
    """
    script = str(command[1])
    ours = command[0] == "ig-dist" or (
        script.startswith(("launchers/", "data_prep/", "benchmarks/")) and "startup" not in script
    )
    if ours and options.keys() <= {"cwd", "timeout"}:
        head = forked.CLI if command[0] == "ig-dist" else ()
        return forked.run([*head, *command[1:]], options.get("cwd", ROOT), options.get("timeout", 300))
    python = [sys.executable, *(forked.CLI if command[0] == "ig-dist" else ())]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300, **options}
    return subprocess.run([*python, *map(str, command[1:])], check=False, **options)


def succeed(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that must end well."""
    done = run_command(command, **options)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session", autouse=True)
def feature_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The features of real images go here, also from processes that a test starts; never into the developer's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IG_DIST_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def console_as_at_first() -> Iterator[None]:
    """A command with --json that runs in a test's process leaves the console on stderr."""
    yield
    console.stderr = False


@pytest.fixture(scope="session")
def digits_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, encoded."""
    dest = tmp_path_factory.mktemp("digits")
    succeed(["python", "data_prep/encode_latents.py", "--source", "digits", "--dest", dest, "--tokenizer", "pixel"])
    return dest


@pytest.fixture
def tiny_config(tmp_path: Path, digits_index: Path) -> Callable[..., Path]:
    """Writes a tiny config; keyword groups are merged into it."""
    return functools.partial(write_tiny_config, tmp_path, digits_index)


def write_tiny_config(folder: Path, index: Path | str, name: str = "tiny", **groups: dict[str, Any]) -> Path:
    """A tiny config ``folder/NAME.yaml``, of the run ``folder/runs/NAME``; groups are merged into it."""
    tree: dict[str, Any] = {key: dict(value) for key, value in TINY.items()}
    tree["data"]["index"] = str(index)
    tree["run"] = {"dir": str(folder / "runs" / name)}
    for group, values in groups.items():
        tree.setdefault(group, {}).update(values)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An S3 server on loopback, in memory."""
    require_object_store()
    with ObjectStore(tmp_path_factory.mktemp("object-store")) as store:
        yield store


def require_object_store() -> None:
    """Skip a user's test where there can be no store; CI has one."""
    _require(object_stores.available())


def _require(missing: str | None) -> None:
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A SLURM cluster of two nodes on this machine."""
    _require(slurm_clusters.available())
    with SlurmCluster(nodes=2) as cluster:
        yield cluster


@pytest.fixture
def bucket(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a new bucket, and an environment in which s3fs finds it, here and in processes that a test starts."""
    import fsspec.config
    import s3fs

    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    for protocol in ("s3", "s3a"):
        monkeypatch.delitem(fsspec.config.conf, protocol, raising=False)
    s3fs.S3FileSystem.clear_instance_cache()  # one made by another test has another address, and remembers listings
    name = f"test-{uuid.uuid4().hex}"
    object_store.create_bucket(name)
    yield name
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def fault_proxy(bucket: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the bucket's store, which s3fs now reaches through it."""
    with FaultProxy(object_store.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def pytest_sessionfinish() -> None:
    """What a failed test left running would be waited for."""
    for process in multiprocessing.active_children():
        process.kill()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long forms run when the -m expression names them."""
    if "full" not in (config.option.markexpr or ""):
        for item in items:
            if "full" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long form: make test-full"))
