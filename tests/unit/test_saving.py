"""Saving in the background: what the loop may rely on, and what happens when a save fails."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ig_dist.checkpoints import saving, snapshot
from ig_dist.checkpoints.manifest import check_tensor
from ig_dist.checkpoints.reading import Checkpoint
from ig_dist.checkpoints.saving import Saver
from ig_dist.checkpoints.snapshot import DTYPES, Snapshot
from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.errors import DataError
from ig_dist.export import ALONE
from ig_dist.parallel.engine import Piece
from tests.unit.test_checkpoint import data_file, folder, truncate
from tests.unit.test_reader import file_size_limit

META = {"optimizer_steps": 1}


def pieces(value: float, count: int = 1000) -> dict[str, Piece]:
    return {"model/w": Piece((count,), 0, torch.full((count,), value))}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "checkpoints"), keep_last=2)


def newest(store: CheckpointStore) -> tuple[int, float]:
    checkpoint = store.find(ALONE)
    assert checkpoint is not None
    (value,) = checkpoint.read("model/w").unique().tolist()
    return checkpoint.step, value


def test_what_all_ranks_say_is_read_and_deleted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of many ranks would else send hundreds of small requests one after the other, each a round trip."""
    ranks, latency_s = 17, 0.2
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    save = saving._Save(1, "token", META, None)
    for rank in reversed(range(ranks)):
        saver = Saver(store, replace(ALONE, rank=rank, world_size=ranks))
        saver._snapshot.take({"model/w": Piece((ranks,), rank, torch.tensor([float(rank)]))})
        if rank == 0:
            for owner, name in ((saving, "read_file"), (store, "remove")):
                slow = partial(_after, latency_s, getattr(owner, name))
                monkeypatch.setattr(owner, name, slow)
            began = time.monotonic()
        assert saver._run(save) is None
    assert time.monotonic() - began < ranks * latency_s
    checkpoint = store.find(ALONE, 1)
    assert torch.equal(checkpoint.read("model/w"), torch.arange(float(ranks)))
    assert len(list(folder(tmp_path, 1).iterdir())) == ranks + 1


def _after(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    time.sleep(seconds)
    return function(*arguments)


@pytest.mark.parametrize("chunk", [64, 2**25])
def test_a_snapshot_is_a_safetensors_file(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(snapshot, "CHUNK_BYTES", chunk)
    tensors = {str(dtype): (torch.arange(33) % 2).view(3, 11).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "turned": torch.arange(6.0).view(2, 3).T}
    taken = Snapshot()
    for offset in (0, 1):  # the second time in the same buffers
        changed = {name: t + offset if t.dtype != torch.bool else t for name, t in tensors.items()}
        taken.take({name: Piece(tuple(t.shape), 0, t) for name, t in changed.items()})
        read = safetensors.torch.load(b"".join(taken.chunks()))
        assert read.keys() == changed.keys()
        for name, tensor in changed.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    taken.take({})
    assert safetensors.torch.load(b"".join(taken.chunks())) == {}


def test_the_loop_goes_on_while_it_is_written_and_may_change_the_tensors(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), saving.write_hashed

    def slowly(*arguments: Any) -> dict[str, Any]:
        may_write.wait()
        return write(*arguments)

    monkeypatch.setattr(saving, "write_hashed", slowly)
    saver, first = Saver(store, ALONE), pieces(1)
    saver.save(1, first, META)
    first["model/w"].data.fill_(9)
    assert store.steps() == [] and saver.write_s is None
    threading.Timer(0.3, may_write.set).start()
    saver.save(2, pieces(2), META)  # waits for the first, whose buffers it takes
    assert store.steps()[0] == 1 and saver.write_s is not None and saver.write_s > 0.2
    saver.wait()
    assert newest(store) == (2, 2.0)
    assert Checkpoint(f"{store.url}/step_0000000001", json.loads(manifest(store, 1))).read("model/w").unique() == 1


def manifest(store: CheckpointStore, step: int) -> str:
    return (Path(store.folder(step)) / "manifest.json").read_text()


def test_a_full_disk_costs_that_save_only(
    store: CheckpointStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = Saver(store, ALONE)
    saver.save(1, pieces(1), META)
    saver.wait()
    with file_size_limit(2000):
        saver.save(2, pieces(2), META)
        with pytest.raises(DataError) as caught:
            saver.wait()
    problem = f"the checkpoint of step 2 was not saved: {store.url}: File too large: free some space"
    assert str(caught.value) == f"{problem}; run the same command again to go on from the one before"
    assert capsys.readouterr().out == f"{problem}; what was saved before is untouched\n"
    assert saver.failed_saves == 1 and newest(store) == (1, 1.0)
    assert not list(folder(tmp_path, 2).iterdir())
    saver.save(3, pieces(3), META)
    saver.wait()
    assert newest(store) == (3, 3.0) and store.steps() == [1, 3] and not folder(tmp_path, 2).exists()


def test_saves_that_fail_never_cost_a_whole_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "checkpoints"), keep_last=1)
    saver = Saver(store, ALONE)
    saver.save(1, pieces(1), META)
    saver.wait()
    with file_size_limit(2000):
        for step in range(2, 6):
            saver.save(step, pieces(step), META)
            with pytest.raises(DataError):
                saver.wait()
            assert newest(store) == (1, 1.0)
    assert saver.failed_saves == 4


def test_what_follows_a_save_may_fail(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store, "retain", fail)
    saver = Saver(store, ALONE)
    saver.save(1, pieces(1), META, fail)
    saver.wait()
    assert newest(store) == (1, 1.0) and saver.failed_saves == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "older ones were not deleted" in said[0] and "not exported" in said[1]


def test_a_bug_in_the_background_is_not_a_failed_save(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "make_manifest", lambda *_: 1 / 0)
    saver = Saver(store, ALONE)
    saver.save(1, pieces(1), META)
    with pytest.raises(ZeroDivisionError):
        saver.save(2, pieces(2), META)


def test_what_was_found_damaged_is_written_over(store: CheckpointStore, tmp_path: Path) -> None:
    saver = Saver(store, ALONE)
    for step in (1, 2):
        saver.save(step, pieces(step), META)
    saver.wait()
    truncate(data_file(folder(tmp_path, 2)))
    assert newest(store) == (1, 1.0)
    saver.save(2, pieces(7), META)
    saver.wait()
    assert newest(store) == (2, 7.0) and len(list(folder(tmp_path, 2).iterdir())) == 2


def test_a_second_writer_of_a_step_is_refused_unless_it_writes_the_same(store: CheckpointStore, tmp_path: Path) -> None:
    for value, refused in ((1, False), (1, False), (2, True)):
        saver = Saver(store, ALONE)
        saver.save(5, pieces(value), META)
        if refused:
            with pytest.raises(DataError, match="was saved by another run meanwhile: give each run its own checkpoint"):
                saver.wait()
        saver.wait() if not refused else None
        assert newest(store) == (5, 1.0)
    assert len(list(folder(tmp_path, 5).iterdir())) == 2  # nothing is left of the one refused


def test_a_tensor_that_is_not_whole_is_neither_saved_nor_read(store: CheckpointStore, tmp_path: Path) -> None:
    saver = Saver(store, ALONE)
    saver.save(1, {"model/w": Piece((10,), 3, torch.ones(7))}, META)
    with pytest.raises(DataError, match=r"tensor 'model/w' of shape \[10\] is not whole: element 0 is in no piece"):
        saver.wait()
    entry = {"shape": [10], "dtype": "float32", "pieces": [[0, 0, 4], [0, 5, 10]]}
    with pytest.raises(DataError, match="element 4 is in no piece"):
        check_tensor("w", entry)
    with pytest.raises(DataError, match="unknown dtype 'load'"):
        check_tensor("w", {**entry, "dtype": "load"})


def test_a_run_that_fails_does_not_wait_long_for_a_save(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "CLOSE_S", 0.1)
    never = threading.Event()
    monkeypatch.setattr(saving, "write_hashed", lambda *_: never.wait())
    saver = Saver(store, ALONE)
    saver.save(1, pieces(1), META)
    saver.close()
    assert store.patience.stop.is_set()
    never.set()
