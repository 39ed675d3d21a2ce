"""Whatever is wrong with shards is found and named."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ig_dist.data.index import read_index, write_index
from ig_dist.data.shards import scan_shard
from tests.foreign_shards import write_foreign
from tests.unit.conftest import Run

PIXEL = ["--tokenizer", "pixel"]
NPY = ["--latent-key", "npy"]


# what is done to the digits' shards -> the shards that are damaged then, and what is said of them


def flip_bit(folder: Path, shard: int, at: int) -> None:
    file = folder / f"shard-{shard:06d}.tar"
    data = bytearray(file.read_bytes())
    data[at] ^= 0x01
    file.write_bytes(data)


def name_at(folder: Path, shard: int, sample: int, suffix: str) -> tarfile.TarInfo:
    with tarfile.open(folder / f"shard-{shard:06d}.tar") as tar:
        return [member for member in tar if member.name.endswith(suffix)][sample]


def in_a_latent(folder: Path) -> None:
    flip_bit(folder, 2, int(read_index(str(folder)).table.offset[2 * 256 + 7]) + 31)


def in_a_header(folder: Path) -> None:
    flip_bit(folder, 3, name_at(folder, 3, 100, ".latent.npy").offset + 3)


def zeros_for_a_header(folder: Path) -> None:
    file, at = folder / "shard-000003.tar", name_at(folder, 3, 100, ".latent.npy").offset
    data = file.read_bytes()
    file.write_bytes(data[:at] + bytes(512) + data[at + 512 :])


def in_an_npy_header(folder: Path) -> None:
    flip_bit(folder, 3, name_at(folder, 3, 100, ".latent.npy").offset_data + 10)


def in_a_label(folder: Path) -> None:
    flip_bit(folder, 4, name_at(folder, 4, 10, ".cls").offset_data)


def truncated(folder: Path) -> None:
    file = folder / "shard-000005.tar"
    file.write_bytes(file.read_bytes()[:50_000])


def missing(folder: Path) -> None:
    (folder / "shard-000006.tar").unlink()


def swapped(folder: Path) -> None:
    (folder / "shard-000001.tar").rename(folder / "x")
    (folder / "shard-000004.tar").rename(folder / "shard-000001.tar")
    (folder / "x").rename(folder / "shard-000004.tar")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change ``index.json``."""
    file = folder / "index.json"
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))


def wrong_counts(folder: Path) -> None:
    def change(info: dict[str, Any]) -> None:
        info["shards"][1]["samples"] += 1
        info["shards"][2]["samples"] -= 1

    rewrite(folder, change)


def wrong_sum_of_counts(folder: Path) -> None:
    rewrite(folder, lambda info: info["shards"][1].update(samples=255))


def wrong_statistics(folder: Path) -> None:
    rewrite(folder, lambda info: info["statistics"].update(mean=[-0.388]))


def table_of_another(folder: Path) -> None:
    file = folder / "index.samples.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")


def no_table(folder: Path) -> None:
    (folder / "index.samples.safetensors").unlink()


def nan_that_the_index_knows(folder: Path) -> None:
    """As an encoder writes it that does not look."""
    index = read_index(str(folder))
    file = folder / "shard-000005.tar"
    data = bytearray(file.read_bytes())
    at = int(index.table.offset[5 * 256 + 3])
    data[at : at + 2] = np.float16(np.nan).tobytes()
    file.write_bytes(data)
    rows = scan_shard(io.BytesIO(data), np.dtype(np.float16), (1, 8, 8))
    index.table.crc32[5 * 256 : 6 * 256] = [row.crc32 for row in rows]
    info = index.info.model_dump(exclude={"format", "table_sha256"})
    info["shards"][5]["sha256"] = hashlib.sha256(data).hexdigest()
    write_index(str(folder), info, index.table)


CASES: list[tuple[Callable[[Path], None], list[int], list[str]]] = [
    (in_a_latent, [2], ["sha256 is", "1 sample with another CRC (the first: 519)"]),
    (in_a_header, [3], ["sha256 is", "the header at byte", "is damaged (bad checksum)"]),
    (zeros_for_a_header, [3], ["sha256 is", "goes on at byte", "after its end"]),
    (in_an_npy_header, [3], ["sha256 is", "is not an .npy file"]),
    (in_a_label, [4], ["sha256 is", "1 sample with another label (the first: 1034)"]),
    (truncated, [5], ["has 50000 bytes, the index says", "is cut off at byte 50000"]),
    (missing, [6], ["is missing"]),
    (swapped, [1, 4], ["shard-000001.tar: holds the bytes of shard-000004.tar", "bytes of shard-000001.tar"]),
    (wrong_counts, [1, 2], ["holds 256 samples, the index says 257", "the index says 255"]),
    (wrong_sum_of_counts, [1], ["holds 256 samples, the index says 255", "index.json another number"]),
    (wrong_statistics, [], ["index.json: its statistics are not those of the latents", "tolerance 0.0001"]),
    (table_of_another, [], ["index.samples.safetensors does not match index.json"]),
    (no_table, [], ["index.samples.safetensors is missing"]),
    (nan_that_the_index_knows, [5], ["1 sample with NaN or infinity (the first: "]),
]


@pytest.mark.parametrize(("damage", "shards", "words"), CASES, ids=[case[0].__name__ for case in CASES])
def test_damage_is_found_and_named(
    digits_index: Path, tmp_path: Path, run: Run, damage: Callable[[Path], None], shards: list[int], words: list[str]
) -> None:
    folder = tmp_path / "digits"
    shutil.copytree(digits_index, folder)
    damage(folder)
    ran = run("verify_shards", folder)
    assert ran.code == 4 and ran.err.count("\n") == 1, ran
    named = [f"shard-{number:06d}.tar" for number in shards]
    for word in words:
        assert word in ran.out, ran.out
    for name in named:
        (line,) = [line for line in ran.out.splitlines() if line.startswith(f"damaged: {folder}/{name}: ")]
        assert line.endswith("delete this shard and index.json, then run the same encoding command again")
        assert name in ran.err
    assert ("index.json, then run the same encoding command again" in ran.err) and str(folder) in ran.err
    result = json.loads(run("verify_shards", folder, "--json").out)
    assert not result["good"] and list(result["damaged"]) == named
    if damage in (truncated, missing):
        ran = run("verify_shards", folder, "--fast")
        assert ran.code == 4 and named[0] in ran.err


def test_the_remedy_mends(digits_index: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "digits"
    shutil.copytree(digits_index, folder)
    in_a_latent(folder)
    assert run("verify_shards", folder).code == 4
    for name in ("shard-000002.tar", "index.json"):
        (folder / name).unlink()
    assert run("encode_latents", "--source", "digits", "--dest", folder, *PIXEL, "--workers", "0").code == 0
    assert run("verify_shards", folder).code == 0
    assert read_index(str(folder)).sha256 == read_index(str(digits_index)).sha256


def test_sound_shards(digits_index: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "digits"
    shutil.copytree(digits_index, folder)
    (folder / "shard-000008.tar").write_bytes(b"left behind")
    rewrite(folder, lambda info: info["classes"].append("no such digit"))
    ran = run("verify_shards", folder, "--picture", tmp_path / "samples.png", "--decode", "11")
    assert ran.code == 0 and "shard-000008.tar" in ran.out and (tmp_path / "samples.png").stat().st_size > 2000
    assert "8, 0 of them damaged" in ran.out and "no such digit" in ran.out
    ran = run("verify_shards", folder / "index.json", "--json", "--workers", "1")
    result = json.loads(ran.out)
    assert result["good"] and result["samples"] == 1797 and result["orphans"] == ["shard-000008.tar"]
    assert (result["samples_per_class"], result["empty_classes"]) == ([0, 183], ["no such digit"])
    assert max(result["drift"]["mean"], result["drift"]["std"]) < 1e-9
    assert result["bytes_read"] == sum(shard.bytes for shard in read_index(str(folder)).info.shards)
    ran = run("verify_shards", folder, "--fast", "--json")
    assert ran.code == 0 and json.loads(ran.out)["bytes_read"] == 8 * 128


def test_fast_reads_a_sample_of_each_shard(tmp_path: Path, run: Run) -> None:
    write_foreign(str(tmp_path))
    assert run("index_shards", "--shards", tmp_path, *PIXEL, *NPY, "--flip-key", "flip.npy").code == 0
    file = tmp_path / "part-01.tar"  # of one sample
    data = bytearray(file.read_bytes())
    table = read_index(str(tmp_path)).table
    assert table.flip_offset is not None
    data[int(table.flip_offset[9]) + 5] ^= 0x10
    file.write_bytes(data)
    ran = run("verify_shards", tmp_path, "--fast")
    assert ran.code == 4 and "part-01.tar: sample 9 has another CRC: restore it from where" in ran.out, ran


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_no_index(tmp_path: Path, run: Run, where: str) -> None:
    ran = run("verify_shards", tmp_path / where)
    assert ran.code == 2 and "ig-dist index" in ran.err
