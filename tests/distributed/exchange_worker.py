"""One rank that saves tensors cut in one way, and goes on from them cut in each of several ways.

    RANK=0 WORLD_SIZE=4 ... python -m tests.distributed.exchange_worker FOLDER

Writes ``RANK.json``: of each pair of ways whether every bit was right, the bytes that this rank sent, and those
that it wants.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from ig_dist.checkpoints import exchange
from ig_dist.checkpoints.saving import Saver
from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.parallel.dist import Dist, init_distributed, shut_down
from ig_dist.parallel.engine import Piece, shared_out
from ig_dist.terminal import leave

SHAPES = {"table": (1001, 1100), "square": (700, 700), "bias": (701,), "one": (1, 9)}
Cut = Callable[[Dist], dict[str, tuple[int, int]]]


def tensor(name: str) -> torch.Tensor:
    return torch.arange(torch.Size(SHAPES[name]).numel(), dtype=torch.float32).mul_(0.5).add_(len(name))


def whole(dist: Dist) -> dict[str, tuple[int, int]]:
    return {name: (0, torch.Size(shape).numel()) for name, shape in SHAPES.items()}


def one_each(dist: Dist) -> dict[str, tuple[int, int]]:
    """As DDP saves: whole tensors, shared out."""
    tensors = {name: tensor(name) for name in SHAPES}
    return {name: whole(dist)[name] for name in shared_out(tensors, dist.rank, dist.world_size)}


def rows(dist: Dist) -> dict[str, tuple[int, int]]:
    """As FSDP2 has it; some ranks have nothing of a tensor."""
    cut = {}
    for name, (count, *rest) in SHAPES.items():
        most, width = -(-count // dist.world_size), torch.Size(rest).numel()
        first, last = min(dist.rank * most, count), min((dist.rank + 1) * most, count)
        if first < last:
            cut[name] = first * width, last * width
    return cut


def end_to_end(dist: Dist) -> dict[str, tuple[int, int]]:
    """As ZeRO has it: all tensors laid end to end, and cut anywhere."""
    total, at, cut = sum(end for _, end in whole(dist).values()), 0, {}
    first, last = (total * rank // dist.world_size for rank in (dist.rank, dist.rank + 1))
    for name, (_, end) in whole(dist).items():
        if at < last and at + end > first:
            cut[name] = max(first - at, 0), min(last - at, end)
        at += end
    return cut


WAYS: dict[str, Cut] = {"one_each": one_each, "rows": rows, "end_to_end": end_to_end, "whole": whole}


def main() -> None:
    torch.set_num_threads(1)
    folder, dist = Path(sys.argv[1]), init_distributed(60, 60)
    exchange._ROUND_BYTES = 4 * 2**20
    sent: list[int] = []
    real = torch_dist.all_to_all_single

    def counted(came: torch.Tensor, packed: torch.Tensor, *sizes: Any) -> None:
        sent.append(len(packed))
        assert max(len(came), len(packed)) <= exchange._ROUND_BYTES
        real(came, packed, *sizes)

    torch_dist.all_to_all_single = counted
    found = {}
    for saved in ("one_each", "rows", "end_to_end"):
        store = CheckpointStore(str(folder / saved))
        saver, cut = Saver(store, dist), WAYS[saved](dist)
        pieces = {f"ema/{n}": Piece(SHAPES[n], first, tensor(n)[first:last]) for n, (first, last) in cut.items()}
        saver.save(1, pieces, {"optimizer_steps": 1})
        saver.wait()
        checkpoint = store.find(dist, keep=True)
        assert checkpoint is not None
        loaded = exchange.Loaded(checkpoint, dist)
        for wanted, way in WAYS.items():
            sent.clear()
            cut = way(dist)
            parts = loaded.parts("ema", {n: Piece(SHAPES[n], a, tensor(n)[a:b]) for n, (a, b) in cut.items()})
            right = all(torch.equal(parts[n], tensor(n)[a:b]) for n, (a, b) in cut.items()) and len(parts) == len(cut)
            found[f"{saved} {wanted}"] = right, sum(sent), 4 * sum(b - a for a, b in cut.values())
    (folder / f"{dist.rank}.json").write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
    leave(0)
