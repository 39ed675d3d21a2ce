"""Checkpoints: whole or not there, the one before when damaged, and never code."""

import json
import pickle
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ig_dist.checkpoints.manifest import sealed
from ig_dist.checkpoints.reading import Checkpoint
from ig_dist.checkpoints.saving import Saver
from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.errors import ConfigError, DataError
from ig_dist.export import ALONE
from ig_dist.parallel.engine import Piece

TENSORS = {
    "model/a": torch.arange(12.0).view(3, 4),
    "ema/0.9/a": torch.ones(3, 4),
    "model/scalar": torch.tensor(3.5),
}


def save(store: CheckpointStore, step: int) -> None:
    pieces = {name: Piece(tuple(t.shape), 0, t + step) for name, t in TENSORS.items()}
    saver = Saver(store, ALONE)
    saver.save(step, pieces, {"optimizer_steps": step, "images_seen": 8 * step})
    saver.wait()


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "checkpoints"), keep_last=3)


def folder(tmp_path: Path, step: int) -> Path:
    return tmp_path / "checkpoints" / f"step_{step:010d}"


def data_file(folder: Path) -> Path:
    (file,) = folder.glob("rank_00000.*.safetensors")
    return file


def test_what_is_saved_is_read(store: CheckpointStore) -> None:
    save(store, 7)
    checkpoint = store.find(ALONE)
    assert checkpoint is not None and checkpoint.step == 7 and checkpoint.optimizer_steps == 7
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.read(name), tensor + 7)
    assert checkpoint.names("model") == ["a", "scalar"] and checkpoint.names("ema/0.9") == ["a"]
    with pytest.raises(DataError, match="no tensor 'exp_avg/a'"):
        checkpoint.read("exp_avg/a")


def test_a_tensor_in_pieces_of_several_files_is_read_whole(tmp_path: Path) -> None:
    whole = torch.arange(10.0).view(5, 2)
    files, pieces = [], []
    for number, (start, stop) in enumerate([(0, 3), (3, 10)]):
        data = safetensors.torch.save({"model/w": whole.view(-1)[start:stop].clone()})
        first = 8 + int.from_bytes(data[:8], "little")
        header = [first, zlib.crc32(data[:first])]
        files.append({"name": f"rank_{number:05d}.safetensors", "bytes": len(data), "header": header})
        (tmp_path / f"rank_{number:05d}.safetensors").write_bytes(data)
        pieces.append([number, start, stop, first, [zlib.crc32(data[first:])]])
    manifest = {"files": files, "tensors": {"model/w": {"shape": [5, 2], "dtype": "float32", "pieces": pieces}}}
    assert torch.equal(Checkpoint(str(tmp_path), manifest).read("model/w"), whole)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[random.Random(0).randrange(len(data) // 2, len(data))] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, empty, remove])
@pytest.mark.parametrize("name", ["rank_*.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    store: CheckpointStore, tmp_path: Path, harm: object, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1)
    save(store, 2)
    harm(next(folder(tmp_path, 2).glob(name)))  # type: ignore[operator]
    checkpoint = store.find(ALONE)
    assert checkpoint is not None and checkpoint.step == 1
    if not (name == "manifest.json" and harm is remove):  # what has no manifest was never there
        assert "step_0000000002 is damaged" in caplog.text


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, empty, remove])
def test_damage_that_comes_after_the_look_at_all_files_is_noticed_too(
    store: CheckpointStore, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    save(store, 1)
    checkpoint = store.find(ALONE)
    assert checkpoint is not None
    harm(data_file(folder(tmp_path, 1)))
    problems = []
    for name in TENSORS:
        try:
            assert torch.equal(checkpoint.read(name), TENSORS[name] + 1)
        except DataError as error:
            problems.append(str(error))
    assert problems and len(problems) < len(TENSORS) + (harm is not flip_a_bit)
    for problem in problems:
        assert "restore" in problem and data_file_name(problem) and "\n" not in problem


def data_file_name(problem: str) -> bool:
    return re.search(r"step_0000000001/rank_00000\.[0-9a-f]{16}\.safetensors", problem) is not None


def test_an_edited_manifest_is_damage(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 1)
    save(store, 2)
    file = folder(tmp_path, 2) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["meta"]["images_seen"] += 1
    file.write_text(json.dumps(manifest))
    checkpoint = store.find(ALONE)
    assert checkpoint is not None and checkpoint.step == 1


def test_a_checkpoint_of_a_later_format_is_refused_and_stays(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 1)
    save(store, 2)
    file = folder(tmp_path, 2) / "manifest.json"
    file.write_text(json.dumps(sealed(json.loads(file.read_text()) | {"format": "ig-dist-checkpoint/4"})))
    for look in (lambda: store.find(ALONE), lambda: store.find(ALONE, 2)):
        with pytest.raises(ConfigError, match=r"step_0000000002 is of format ig-dist-checkpoint/4, .* use the version"):
            look()
    assert not store.damaged and store.find(ALONE, 1).step == 1


def test_none_whole_is_said(store: CheckpointStore, tmp_path: Path) -> None:
    assert store.find(ALONE) is None
    save(store, 1)
    truncate(data_file(folder(tmp_path, 1)))
    with pytest.raises(DataError, match="none of the 1 checkpoints .* is whole"):
        store.find(ALONE)


def test_a_save_that_was_cut_off_is_not_there_and_is_written_over(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 1)
    folder(tmp_path, 2).mkdir()
    (folder(tmp_path, 2) / "rank_00000.safetensors").write_bytes(b"half a fi")
    (folder(tmp_path, 2) / "rank_00007.safetensors").write_bytes(b"of a run with more ranks")
    assert store.steps() == [1]
    save(store, 2)
    checkpoint = store.find(ALONE)
    assert checkpoint is not None and checkpoint.step == 2
    assert not (folder(tmp_path, 2) / "rank_00007.safetensors").exists()


def test_retention_keeps_the_last_and_every_mth(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "checkpoints"), keep_last=2, keep_every=30)
    folder(tmp_path, 5).mkdir(parents=True)  # left by a save that was cut off long ago
    for step in range(10, 80, 10):
        save(store, step)
    assert store.steps() == [30, 60, 70]
    assert not folder(tmp_path, 5).exists()


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_damaged_newer_checkpoint_never_costs_a_whole_one(tmp_path: Path, keep_last: int) -> None:
    store = CheckpointStore(str(tmp_path / "checkpoints"), keep_last=keep_last, keep_every=100)
    save(store, 100)
    save(store, 200)
    truncate(data_file(folder(tmp_path, 200)))
    save(store, 150)  # the run went on from 100 and was stopped before it came to 200 again
    checkpoint = store.find(ALONE)
    assert checkpoint is not None and checkpoint.step == 150
    assert folder(tmp_path, 100).exists()


def test_an_object_store_is_read_by_few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    large = torch.arange(2**22)  # 32 MiB: two requests; what else there is is in two blocks of 1 MiB
    small = {f"model/{i}": torch.arange(100 * i, dtype=torch.float32) for i in range(60)}
    tensors = {**TENSORS, **small, "model/large": large, "model/empty": torch.zeros(0, 3)}
    store = CheckpointStore("memory://run/checkpoints")
    saver = Saver(store, ALONE)
    saver.save(3, {name: Piece(tuple(t.shape), 0, t) for name, t in tensors.items()}, {"optimizer_steps": 3})
    saver.wait()
    checkpoint = store.find(ALONE)
    assert checkpoint is not None
    read = MemoryFileSystem.cat_file
    lengths = []

    def count(self: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        lengths.append(end - start)
        return bytes(read(self, path, start, end))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", count)
    found = checkpoint.tensors(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert len(lengths) <= 5 and sum(lengths) <= large.nbytes + 2 * 2**20


class Hostile:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize(
    "name", ["rank_*.safetensors", "manifest.json", "rank_00001.0123456789ab.json", ".metadata", "data.pt"]
)
def test_a_hostile_pickle_is_never_executed(store: CheckpointStore, tmp_path: Path, name: str) -> None:
    proof = tmp_path / "executed"
    save(store, 1)
    save(store, 2)
    hostile = next(folder(tmp_path, 2).glob(name), folder(tmp_path, 2) / name)
    hostile.write_bytes(pickle.dumps(Hostile(proof)))
    checkpoint = store.find(ALONE)
    assert checkpoint is not None
    for tensor in TENSORS:
        checkpoint.read(tensor)
    assert not proof.exists()
    pickle.loads(hostile.read_bytes())  # the pickle does work: the test could have failed
    assert proof.exists()
