"""What a restart reads: requests and bytes of each rank, for checkpoints of other engines and numbers of ranks.

    python benchmarks/restart.py                 # SiT-XL/2 with one average, 8 to 512 ranks; about three minutes
    python benchmarks/restart.py sit_b2_ig --ranks 8,64

Nothing is saved or read: the files are laid out as ``Snapshot`` does and shared out as ``read_share`` does. Held
against the limits: bytes at most 1.1 times an even share, requests at most one for 16 MiB and one for each file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import MARKDOWN
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ig_dist.checkpoints.manifest import make_manifest
from ig_dist.checkpoints.reading import Part, owners, parts_of, requests
from ig_dist.checkpoints.snapshot import described, layout
from ig_dist.config.file import load_config
from ig_dist.models.dit import DiT
from ig_dist.parallel.engine import Piece, shared_out
from ig_dist.terminal import console, run_app
from ig_dist.training.dry_run import IMAGENET_CLASSES, SD_LATENT

MIB = 2**20
MOST_BYTES, REQUEST_MIB = 1.1, 16


def state_shapes(name: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without memory."""
    config = load_config(name).with_data(SD_LATENT, IMAGENET_CLASSES)
    with torch.device("meta"):
        model = DiT(config.model.to_dit())
    groups = ["model", "exp_avg", "exp_avg_sq", *(f"ema/{decay}" for decay in config.ema.decays)]
    return {f"{group}/{key}": p for group in groups for key, p in model.named_parameters()}


def saved_by(engine: str, ranks: int, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Piece]]:
    """What each rank writes."""
    for rank in range(ranks):
        if engine == "ddp":
            mine = shared_out(tensors, rank, ranks)
            yield {name: Piece(tuple(tensors[name].shape), 0, tensors[name]) for name in mine}
            continue
        yield cut_by_rows(tensors, rank, ranks)


def cut_by_rows(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Piece]:
    """A rank's pieces under FSDP2: rows of each tensor, their number rounded up."""
    pieces = {}
    for name, tensor in tensors.items():
        rows = -(-tensor.shape[0] // ranks)
        first = min(rank * rows, tensor.shape[0])
        if first < tensor.shape[0]:
            part = tensor[first : first + rows]
            pieces[name] = Piece(tuple(tensor.shape), first * tensor[0].numel(), part)
    return pieces


def manifest(engine: str, ranks: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of such a checkpoint, with zeros for its CRCs."""
    records = []
    for rank, pieces in enumerate(saved_by(engine, ranks, tensors)):
        first, places = layout(pieces)
        size = max((end for _, end in places.values()), default=len(first))
        told = {name: described(pieces[name], begin, end, lambda *_: 0) for name, (begin, end) in places.items()}
        file = {"name": f"rank_{rank:05d}", "bytes": size, "header": [len(first), 0]}
        records.append({"file": file, "tensors": told})
    return make_manifest(0, records, {})


def main(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Whose model.")] = "sit_xl2_ig",
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, comma separated.")] = "8,64,128,512",
) -> None:
    """Count, and hold against the limits."""
    worlds = [int(part) for part in ranks.split(",")]
    tensors = state_shapes(config)
    table = Table("saved by", "read by", "MB a rank, even", "most MB", "most requests", "allowed", box=MARKDOWN)
    bad = []
    for engine in ("ddp", "fsdp2"):
        for saved in worlds:
            parts = parts_of(manifest(engine, saved, tensors))
            total = sum(part.end - part.begin for part in parts)
            for world in worlds:
                mine: list[list[Part]] = [[] for _ in range(world)]
                for part, owner in zip(parts, owners(parts, world), strict=True):
                    mine[owner].append(part)
                read = [sum(part.size for part in share) for share in mine]
                counts = [len(requests(share)) for share in mine]
                allowed = [
                    size / (REQUEST_MIB * MIB) + len({part.file for part in share})
                    for size, share in zip(read, mine, strict=True)
                ]
                worst = max(range(world), key=lambda rank: counts[rank] - allowed[rank])
                row = (f"{engine}, {saved}", f"{world}", f"{total / world / 1e6:.1f}", f"{max(read) / 1e6:.1f}")
                table.add_row(*row, f"{counts[worst]}", f"{allowed[worst]:.1f}")
                if max(read) > MOST_BYTES * total / world or counts[worst] > allowed[worst]:
                    bad.append(row)
    console.print(table)
    console.print("all within the limits" if not bad else f"beyond the limits: {bad}")
    raise typer.Exit(1 if bad else 0)


if __name__ == "__main__":
    run_app(main)
