"""What a checkpoint costs: until it is whole on the disk, until it is restored, and the stall of the training loop.

    python benchmarks/checkpoint.py --folder DISK    # 600 MB; to S3 too where Ceph's radosgw is installed

Saving is held against ``torch.save`` with fsync, and restoring (found, read, each byte checked) against ``torch.load``,
in turn. The stall is that of a save behind the loop, which computes meanwhile, against that of one at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the S3 server of the tests

import torch
import typer

from benchmarks.side_by_side import Claim, Record, Rounds, interleaved, seconds, show
from ig_dist.checkpoints.exchange import Loaded
from ig_dist.checkpoints.saving import Saver
from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.export import ALONE
from ig_dist.parallel.engine import Piece
from ig_dist.terminal import run_app


def state(megabytes: int) -> dict[str, Piece]:
    """Tensors of 4 MB each."""
    tensors = {f"model/{i}": torch.randn(10**6) for i in range(megabytes // 4)}
    return {name: Piece(tuple(tensor.shape), 0, tensor) for name, tensor in tensors.items()}


class Ours:
    """Saves and restores at a URL, each in one call."""

    def __init__(self, url: str, pieces: Mapping[str, Piece]) -> None:
        self.store = CheckpointStore(url, keep_last=1)
        self.saver, self.pieces, self.step = Saver(self.store, ALONE), pieces, 0

    def begin(self) -> None:
        """Save behind the loop."""
        self.step += 1
        self.saver.save(self.step, self.pieces, {"optimizer_steps": self.step})

    def save(self) -> None:
        """Save, and wait until it is whole and the one before is gone."""
        self.begin()
        self.saver.wait()

    def stall(self) -> float:
        """Of a loop that goes on at once, and takes its share of the cores."""
        stalled, weights = seconds(self.begin), torch.randn(512, 512)
        while self.saver.busy:
            weights = torch.tanh(weights @ weights.T / 512)
        return stalled

    def restore(self) -> None:
        """As a start does."""
        checkpoint = self.store.find(ALONE, keep=True)
        assert checkpoint is not None and len(Loaded(checkpoint, ALONE).whole("model")) == len(self.pieces)


def measure_disk(folder: Path, pieces: Mapping[str, Piece], rounds: int, *, record: bool) -> None:
    """All claims."""
    ours, file = Ours(f"{folder}/checkpoints", pieces), folder / "state.pt"
    tensors = {name: piece.data for name, piece in pieces.items()}

    def torch_save() -> None:
        with (folder / "next.pt").open("wb") as stream:
            torch.save(tensors, stream)
            stream.flush()
            os.fsync(stream.fileno())
        (folder / "next.pt").replace(file)

    ways = {
        "save": ours.save,
        "torch.save, fsync": torch_save,
        "restore": ours.restore,
        "torch.load": lambda: torch.load(file),
        "stall behind the loop": ours.stall,
    }
    claims = [
        Claim("checkpoint whole on disk / torch.save with fsync", "save", "torch.save, fsync", "<= 1.0"),
        Claim("restore from disk, checked / torch.load", "restore", "torch.load", "<= 1.0"),
        Claim("stall of the loop for a save to disk / save at once", "stall behind the loop", "save", "<= 0.2"),
    ]
    ours.save()
    torch_save()
    show(
        interleaved(ways, rounds),
        claims,
        title=f"{sum(t.nbytes for t in tensors.values()) / 1e6:.0f} MB, disk",
        record=record,
    )


@contextmanager
def object_store(kind: Literal["memstore", "bluestore"] = "memstore") -> Iterator[str]:
    """A folder on a real S3 server, in this process's environment; empty where there can be none."""
    from tests.object_store import ObjectStore, available

    if reason := available():
        print(f"no S3: {reason}")
        yield ""
        return
    with tempfile.TemporaryDirectory() as folder, ObjectStore(Path(folder), kind) as store:
        os.environ.update(store.environment())
        store.create_bucket("benchmark")
        yield "s3://benchmark/checkpoints"


def main(
    rounds: Rounds = 7,
    record: Record = False,
    megabytes: Annotated[int, typer.Option(help="Size of the state.")] = 600,
    folder: Annotated[str, typer.Option(help="A folder on the disk to write to; default: a temporary one.")] = "",
) -> None:
    """Measure."""
    pieces = state(megabytes)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder or None) as temporary:
        measure_disk(Path(temporary), pieces, rounds, record=record)
    with object_store() as url:
        if url:
            ours = Ours(url, pieces)
            claim = Claim(
                "stall of the loop for a save to S3 / save at once", "stall behind the loop", "save", "<= 0.2"
            )
            times = interleaved({"save": ours.save, "stall behind the loop": ours.stall}, rounds)
            show(times, [claim], title="S3 on loopback", record=record)


if __name__ == "__main__":
    run_app(main)
