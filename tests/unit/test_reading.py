"""A checkpoint that many ranks read: each byte once, in large requests, checked; and what each gets of it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from ig_dist.checkpoints.exchange import Loaded
from ig_dist.checkpoints.manifest import make_manifest
from ig_dist.checkpoints.reading import owners, parts_of, requests
from ig_dist.checkpoints.saving import Saver
from ig_dist.checkpoints.snapshot import PART_BYTES, described, layout
from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.errors import DamagedError
from ig_dist.export import ALONE
from ig_dist.parallel.engine import Piece
from ig_dist.storage.files import REQUEST_BYTES

META = {"optimizer_steps": 3}
LARGE = torch.arange(5 * 2**20, dtype=torch.float32).view(5, -1)  # 20 MiB
TENSORS = {
    "model/large": LARGE,
    "model/small": torch.arange(7.0),
    "model/empty": torch.zeros(0, 3),
    "exp_avg/small": torch.arange(7.0) + 1,
    "exp_avg/odd": torch.arange(3, dtype=torch.int8),
}


def saved(url: str) -> CheckpointStore:
    store = CheckpointStore(url)
    saver = Saver(store, ALONE)
    saver.save(3, {name: Piece(tuple(t.shape), 0, t) for name, t in TENSORS.items()}, META)
    saver.wait()
    return store


def test_each_byte_is_read_once_by_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved("memory://reading/checkpoints").find(ALONE)
    assert checkpoint is not None
    read, seen = MemoryFileSystem.cat_file, Counter[int]()
    sizes: list[int] = []

    def count(self: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        seen.update(range(start // 1000, -(-end // 1000)))
        sizes.append(end - start)
        return bytes(read(self, path, start, end))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", count)
    (file,) = checkpoint.manifest["files"]
    for world in (1, 2, 4):
        seen.clear()
        sizes.clear()
        for rank in range(world):
            share = checkpoint.read_share(rank, world, keep=True)
            assert sum(map(len, share.values())) <= file["bytes"] / world + PART_BYTES
        assert sum(sizes) == file["bytes"] and len(sizes) == world
        assert sum(times > 1 for times in seen.values()) < world  # where two requests meet


@given(
    engine=st.sampled_from(["rows", "whole"]),
    saved_by=st.integers(1, 9),
    world=st.integers(1, 40),
    rows=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_shares_are_even_and_requests_few(engine: str, saved_by: int, world: int, rows: list[int]) -> None:
    records = []
    for rank in range(saved_by):
        pieces = {}
        for i, count in enumerate(rows):
            tensor = torch.empty(count, 1152, device="meta")
            if engine == "whole" and i % saved_by == rank:
                pieces[f"model/{i}"] = Piece((count, 1152), 0, tensor)
            cut = -(-count // saved_by)
            if engine == "rows" and rank * cut < count:
                pieces[f"model/{i}"] = Piece((count, 1152), rank * cut * 1152, tensor[rank * cut : (rank + 1) * cut])
        first, places = layout(pieces)
        told = {name: described(pieces[name], *place, lambda *_: 0) for name, place in places.items()}
        size = max((end for _, end in places.values()), default=len(first))
        records.append({"file": {"name": f"{rank}", "bytes": size, "header": [len(first), 0]}, "tensors": told})
    manifest = make_manifest(0, records, {})
    parts = parts_of(manifest)
    whole = [(number, file["bytes"]) for number, file in enumerate(manifest["files"])]
    ends = dict.fromkeys(range(saved_by), 0)
    for part in parts:  # no byte is left out, none is there twice
        assert (part.begin == ends[part.file] and 0 < part.end - part.begin <= PART_BYTES) or not part.tensor
        ends[part.file] = part.end
    assert list(ends.items()) == whole
    ranks, total = owners(parts, world), sum(size for _, size in whole)
    assert ranks == sorted(ranks)
    for rank in range(world):
        mine = [part for part, owner in zip(parts, ranks, strict=True) if owner == rank]
        size = sum(part.size for part in mine)
        assert size <= total / world + PART_BYTES
        runs = requests(mine)
        assert [part for run in runs for part in run] == mine
        assert len(runs) <= size / (REQUEST_BYTES / 2) + len({part.file for part in mine})


def test_a_rank_gets_its_ranges(tmp_path: Path) -> None:
    checkpoint = saved(str(tmp_path)).find(ALONE, keep=True)
    assert checkpoint is not None
    loaded = Loaded(checkpoint, ALONE)
    assert loaded.optimizer_steps == 3
    for name, tensor in loaded.whole("model").items():
        assert torch.equal(tensor, TENSORS[f"model/{name}"])
    read = {memory.data_ptr(): len(memory) for memory, _ in checkpoint.share.values()}
    large = loaded.whole("model")["large"]  # is where it was read to, as torch would align it
    assert any(at <= large.data_ptr() < at + size for at, size in read.items()) and large.data_ptr() % 64 == 0
    assert large.untyped_storage().nbytes() == LARGE.nbytes
    begin = PART_BYTES // 4 - 3  # across the end of a part
    shards = {"large": Piece((5, 2**20), begin, torch.empty(2, 3)), "small": Piece((7,), 6, torch.empty(1))}
    found = loaded.parts("model", shards)
    assert torch.equal(found["large"], LARGE.view(-1)[begin : begin + 6].view(2, 3))
    assert torch.equal(found["small"], torch.tensor([6.0]))


@pytest.mark.parametrize("where", ["header", "small", "large"])
def test_damage_anywhere_is_found(tmp_path: Path, where: str) -> None:
    store = saved(str(tmp_path))
    checkpoint = store.find(ALONE)
    assert checkpoint is not None
    (file,) = tmp_path.glob("step_*/rank_*")
    data = bytearray(file.read_bytes())
    begin = {name: entry["pieces"][0][3] for name, entry in checkpoint.manifest["tensors"].items()}
    at = {"header": 20, "small": begin["model/small"] + 5, "large": begin["model/large"] + 3 * PART_BYTES}[where]
    data[at] ^= 4
    file.write_bytes(data)
    named = "its header" if where == "header" else f"tensor 'model/{where}'"
    parts, found = checkpoint.parts, 0
    for rank in range(2):
        share = partial(checkpoint.read_share, rank, 2, keep=False)
        if any(o == rank and part.begin <= at < part.end for part, o in zip(parts, owners(parts, 2), strict=True)):
            with pytest.raises(DamagedError, match=named):
                share()
            found += 1
        else:
            share()
    assert found == 1
