"""Tars are read whole: in any dialect, in pieces, and no damage is a crash."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from ig_dist.data import shard_files
from ig_dist.data.shard_files import FileReader, in_pieces
from ig_dist.data.shards import scan_shard
from ig_dist.data.tar import DamagedTar, read_tar
from ig_dist.errors import ConfigError
from ig_dist.storage.background import in_parallel
from ig_dist.storage.faults import Patience
from ig_dist.storage.urls import LOCAL
from tests.foreign_shards import write_foreign


@pytest.mark.parametrize("piece", [1, 511, 4096])
def test_a_shard_is_read_in_pieces(digits_index: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    file = digits_index / "shard-000000.tar"
    data = file.read_bytes()[: 40_960 if piece == 1 else None]
    size, done = len(data), []
    monkeypatch.setattr(shard_files, "_PIECE", piece)
    digest = hashlib.sha256()
    passing = (digest.update, lambda part: done.append(len(part)))
    shard = in_pieces(FileReader(LOCAL, str(file), size, Patience(), *passing))
    rng = random.Random(piece)
    parts = []
    while part := shard.read(rng.randrange(1, 2000)):
        parts.append(part)
    assert b"".join(parts) == data and digest.digest() == hashlib.sha256(data).digest()
    assert sum(done) == size and max(done) <= max(piece, 2000)


def test_the_first_error_ends_the_others() -> None:
    patience, ended = Patience(), []

    def work(number: int) -> None:
        if number == 3:
            raise ConfigError("three")
        ended.append(patience.stop.wait(30))

    began = time.monotonic()
    with pytest.raises(ConfigError, match="three"):
        in_parallel(work, range(50), 4, patience.stop)
    while len(ended) < 3 and time.monotonic() - began < 10:  # nobody waits for them
        time.sleep(0.01)
    assert ended == [True] * 3


def test_every_dialect_of_tar_is_read_as_the_standard_library_does() -> None:
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=dialect) as tar:
            for name in (
                "a.npy",
                "d" * 90 + "/" + "x" * 95 + ".npy",
                "ü.npy",
                "link",
                "folder",
                "empty.npy",
                "end.cls",
            ):
                entry = tarfile.TarInfo(name)
                entry.mtime = 1.5 if dialect == tarfile.PAX_FORMAT else 1  # a fraction takes an extended header
                entry.type = {"link": tarfile.SYMTYPE, "folder": tarfile.DIRTYPE}.get(name, tarfile.REGTYPE)
                entry.linkname = "a.npy" * 30 if name == "link" and dialect != tarfile.USTAR_FORMAT else ""
                entry.size = 700 if entry.isreg() and name != "empty.npy" else 0
                tar.addfile(entry, io.BytesIO(name[-1].encode() * 700))
        with tarfile.open(fileobj=io.BytesIO(packed.getvalue())) as tar:
            truth = [(m.name, m.offset_data, m.size, tar.extractfile(m).read()) for m in tar if m.isreg()]  # type: ignore[union-attr]
        assert [tuple(member) for member in read_tar(io.BytesIO(packed.getvalue()))] == truth
        skipped = read_tar(io.BytesIO(packed.getvalue()), end=len(packed.getvalue()), most=0)
        assert [member[:3] for member in skipped] == [member[:3] for member in truth]
        assert len(truth) == 5


def test_no_damage_to_a_shard_is_a_crash(tmp_path: Path) -> None:
    write_foreign(str(tmp_path), keys=("latent.npy", None, "cls"))
    data = (tmp_path / "part-00.tar").read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        damaged = damaged[: rng.choice([len(data), rng.randrange(len(data))])]
        try:
            scan_shard(io.BytesIO(damaged), np.dtype(np.float32), (4, 3, 3))
        except (ConfigError, DamagedTar) as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200
