"""Muon's orthogonalisation shared out: each matrix is one rank's work, which all of them would else do again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as torch_dist
from torch import Tensor

from ig_dist.optim.muon import orthogonalise_each, orthogonalised
from ig_dist.parallel.dist import Dist


def orthogonalise_replicas(matrices: Sequence[Tensor], dist: Dist) -> None:
    """Replace matrices that every rank holds whole by orthogonal ones. COLLECTIVE."""
    if dist.world_size == 1:
        return orthogonalise_each(matrices)
    pending = []
    for turn, matrix in enumerate(sorted(matrices, key=lambda matrix: -matrix.numel())):  # like beside like
        if turn % dist.world_size == dist.rank:
            orthogonalise_each([matrix])
        pending.append(torch_dist.broadcast(matrix, src=turn % dist.world_size, async_op=True))
    for work in pending:
        assert work is not None
        work.wait()
    return None


def orthogonalise_shards(shards: Sequence[Tensor], shapes: Sequence[Sequence[int]], dist: Dist) -> None:
    """Replace the rows that this rank holds by those of the orthogonal whole. COLLECTIVE.

    As many matrices as there are ranks are made whole at a time, each on another rank.

    Args:
        shards: of those matrices of which this rank has rows, in the order of ``shapes``.
        shapes: of all matrices.
        dist: this process.
    """
    if dist.world_size == 1:
        return orthogonalise_each(shards)
    ranks, left = range(dist.world_size), iter(shards)
    counts = [[_rows(shape[0], rank, dist.world_size) * math.prod(shape[1:]) for rank in ranks] for shape in shapes]
    held = [next(left).view(-1) if count[dist.rank] else shards[0].new_empty(0) for count in counts]
    order = sorted(range(len(shapes)), key=lambda number: -math.prod(shapes[number]))
    for first in range(0, len(order), dist.world_size):
        group = order[first : first + dist.world_size]
        own = group[dist.rank] if dist.rank < len(group) else None
        sent = [counts[number][dist.rank] for number in group] + [0] * (dist.world_size - len(group))
        received = [0] * dist.world_size if own is None else counts[own]
        parts = torch.cat([held[number] for number in group])
        whole = parts.new_empty(sum(received))
        torch_dist.all_to_all_single(whole, parts, received, sent)
        if own is not None:
            whole = orthogonalised(whole.view(shapes[own][0], -1)).flatten()
        torch_dist.all_to_all_single(parts, whole, sent, received)
        for number, part in zip(group, torch.split(parts, sent[: len(group)]), strict=True):
            held[number].copy_(part)
    return None


def _rows(rows: int, rank: int, world_size: int) -> int:
    """Of a matrix of ``rows`` rows, how many are a rank's: parts of equal, rounded up, length."""
    part = -(-rows // world_size)
    return max(0, min(part, rows - rank * part))
