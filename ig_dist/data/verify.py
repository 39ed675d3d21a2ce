"""Shards held against their index: what is not as it says, shard by shard."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ig_dist.data.index import TABLE_NAME, IndexFile, SampleTable, ShardIndex
from ig_dist.data.reader import ShardReader
from ig_dist.data.shard_files import ShardContent, read_shard
from ig_dist.data.statistics import ChannelSums, normalised, raw_statistics
from ig_dist.errors import first_line
from ig_dist.storage.background import in_parallel
from ig_dist.storage.faults import Patience, unreadable
from ig_dist.storage.files import list_sizes, open_url
from ig_dist.terminal.progress import progress

TOLERANCE = 1e-4
"""Of means (in standard deviations) and of standard deviations (relative): sums of the same numbers differ by less."""

_BESIDE = {"index.json", TABLE_NAME, "rejected.csv"}
_COLUMNS = {
    "offset": "place in the tar",
    "label": "label",
    "crc32": "CRC",
    "flip_offset": "place of the mirrored latent",
    "flip_crc32": "CRC of the mirrored latent",
}


@dataclass
class ShardCheck:
    """What was found of a shard."""

    name: str
    problems: list[str] = field(default_factory=list)
    sums: ChannelSums | None = None  # of its latents, if it was read to its end
    bytes_read: int = 0


class Drift(NamedTuple):
    """The largest differences of the latents' statistics from those of the index, over the channels."""

    mean: float  # in standard deviations
    std: float  # relative


@dataclass
class Verdict:
    """What was found of all shards."""

    shards: list[ShardCheck]
    orphans: list[str]  # files beside the index that it does not know
    drift: Drift | None  # None: not every shard was read
    index_problems: list[str]

    @property
    def damaged(self) -> list[ShardCheck]:
        """Shards with problems."""
        return [shard for shard in self.shards if shard.problems]


def verify_shards(
    folder: str, info: IndexFile, table: SampleTable | None, *, fast: bool, seed: int, workers: int
) -> Verdict:
    """Hold all shards against the index, and against its table, unless that is damaged (None).

    ``fast`` checks only the size of a shard, and one sample of it, which ``seed`` chooses.

    Raises:
        DataError: the storage fails.
    """
    patience = Patience()
    fs, path = open_url(folder, "data.index", patience)
    try:
        sizes = list_sizes(fs, path)
    except OSError as error:
        raise unreadable(fs, path, error) from None
    firsts = np.cumsum([0, *(shard.samples for shard in info.shards)])
    owners = {shard.sha256: shard.name for shard in info.shards}
    reader = None
    if fast and table is not None:
        reader = ShardReader(ShardIndex(folder, info, table, ""), "skip", patience=patience)
        chosen = firsts[:-1] + np.random.default_rng(seed).integers(np.diff(firsts))

    def read_whole(found: ShardCheck, number: int, hears: Callable[[int], None]) -> list[str]:
        shard, size = info.shards[number], sizes[found.name]
        try:
            content = read_shard(fs, f"{path}/{found.name}", size, info.latent, info.keys, patience, hears)
        except OSError as error:
            return [f"cannot be read ({error.strerror or first_line(error)})"]
        found.bytes_read, found.sums = size, None if content.problem else content.sums
        if content.sha256 == shard.sha256:
            return _differences(content, shard.samples, table, int(firsts[number]))
        if content.sha256 in owners:
            return [f"holds the bytes of {owners[content.sha256]}"]
        said = f"sha256 is {content.sha256[:12]}..., the index says {shard.sha256[:12]}..."
        return [said, *_differences(content, shard.samples, table, int(firsts[number]))]

    def check(number: int) -> ShardCheck:
        name, expected = info.shards[number].name, info.shards[number].bytes
        found, size = ShardCheck(name), sizes.get(name)
        if size is None:
            found.problems.append("is missing")
        elif size != expected:
            found.problems.append(f"has {size} bytes, the index says {expected}")
        if fast:
            if reader and not found.problems:
                _read_one(found, reader, int(chosen[number]), info.latent.flips)
            advance(1)
        elif size is not None:  # once more what is wrong: it may have suffered on the way
            found.problems += read_whole(found, number, advance) and read_whole(found, number, lambda _: None)
        return found

    total = len(info.shards) if fast else sum(sizes.get(shard.name, 0) for shard in info.shards)
    with progress("verify", total, "shards" if fast else "bytes") as advance:
        shards = in_parallel(check, range(len(info.shards)), workers, patience.stop)
    channels, drift, index_problems = info.latent.shape[0], None, list[str]()
    if {len(v) for v in (*vars(info.statistics).values(), info.latent.shift, info.latent.scale)} != {channels}:
        index_problems.append(f"statistics, shift and scale are not of {channels} channels")
    elif not fast and not any(shard.problems for shard in shards):
        drift = _drift(info, [shard.sums for shard in shards if shard.sums])
    orphans = sizes.keys() - {shard.name for shard in info.shards} - _BESIDE
    return Verdict(shards, sorted(orphans), drift, _index_problems(info, table, drift) + index_problems)


def _read_one(found: ShardCheck, reader: ShardReader, sample: int, flips: bool) -> None:
    """Check one sample of a shard."""
    for flipped in [False, True] if flips else [False]:
        stored, good = reader.read_ids(sample, sample + 1, flipped=flipped)
        found.bytes_read += stored.nbytes
        if not good[0]:
            found.problems.append(f"sample {sample} has another CRC")
        elif not np.isfinite(stored).all():
            found.problems.append(f"sample {sample} has NaN or infinity")


def _differences(content: ShardContent, samples: int, table: SampleTable | None, first: int) -> list[str]:
    """How the samples of a shard differ from the table, and what latents cannot be."""
    problems = []
    if content.problem:
        problems.append(str(content.problem))
    elif len(content.rows) != samples:
        problems.append(f"holds {len(content.rows)} samples, the index says {samples}")
    elif table is not None:
        expected = table[first : first + samples].columns
        for name, found in content.rows.columns.items():
            if name not in expected:
                continue
            bad = np.flatnonzero(found[:] != expected[name][:])
            if len(bad):
                problems.append(f"{_samples(len(bad))} with another {_COLUMNS[name]} (the first: {first + bad[0]})")
    for keys, what in ((content.sums.not_finite, "NaN or infinity"), (content.sums.negative_std, "a negative std")):
        if keys:
            problems.append(f"{_samples(len(keys))} with {what} (the first: {keys[0]})")
    return problems


def _samples(count: int) -> str:
    return f"{count} sample{'s' if count > 1 else ''}"


def _drift(info: IndexFile, parts: list[ChannelSums]) -> Drift:
    found, said = normalised(raw_statistics(parts), info.latent), info.statistics
    std = np.array(said.std)
    unit = np.where(std > 0, std, 1.0)
    return Drift(
        float(np.max(np.abs(np.array(found.mean) - said.mean) / unit)),
        float(np.max(np.abs(np.array(found.std) - std) / unit)),
    )


def _index_problems(info: IndexFile, table: SampleTable | None, drift: Drift | None) -> list[str]:
    problems = []
    if drift and not all(difference <= TOLERANCE for difference in drift):
        problems.append(
            f"its statistics are not those of the latents: means differ by up to {drift.mean:.2g} standard deviations,"
            f" standard deviations by up to {drift.std:.2g} of them (tolerance {TOLERANCE:g})"
        )
    if table is not None:
        lowest, highest = np.array([(labels.min(), labels.max()) for labels in table.labels()]).T
        if lowest.min() < 0 or highest.max() >= len(info.classes):
            problems.append(f"labels are {lowest.min()} to {highest.max()}, of {len(info.classes)} classes")
    return problems
