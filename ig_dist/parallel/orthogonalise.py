"""Muon's orthogonalisation shared out: each matrix is one rank's work, which all of them would else do again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed import ProcessGroup

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


def orthogonalise_shards(
    shards: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    within: ProcessGroup,
    across: ProcessGroup | None = None,
) -> None:
    """Replace the rows that this rank holds by those of the orthogonal whole. COLLECTIVE.

    As many matrices as a group has ranks are made whole at a time, each on another rank. Where several groups hold the
    same, they take turns and send each other the rows: two machines need not compute the same bits.

    Args:
        shards: of those matrices of which this rank has rows, in the order of ``shapes``.
        shapes: of all matrices.
        within: ranks that hold all rows together.
        across: ranks that hold the same rows; None: nobody does.
    """
    rank, size = torch_dist.get_rank(within), torch_dist.get_world_size(within)
    if size == 1 and across is None:
        return orthogonalise_each(shards)
    left = iter(shards)
    counts = [[_rows(shape[0], other, size) * math.prod(shape[1:]) for other in range(size)] for shape in shapes]
    held = [next(left).view(-1) if count[rank] else shards[0].new_empty(0) for count in counts]
    order = sorted(range(len(shapes)), key=lambda number: -math.prod(shapes[number]))
    done = []
    for turn, first in enumerate(range(0, len(order), size)):
        numbers = order[first : first + size]
        parts, sent = torch.cat([held[number] for number in numbers]), [counts[number][rank] for number in numbers]
        whose = 0 if across is None else turn % torch_dist.get_world_size(across)
        if across is None or whose == torch_dist.get_rank(across):
            own = numbers[rank] if rank < len(numbers) else None
            received = [0] * size if own is None else counts[own]
            padded = sent + [0] * (size - len(numbers))
            whole = parts.new_empty(sum(received))
            torch_dist.all_to_all_single(whole, parts, received, padded, group=within)
            if own is not None:
                whole = orthogonalised(whole.view(shapes[own][0], -1)).flatten()
            torch_dist.all_to_all_single(parts, whole, padded, received, group=within)
        work = None
        if across is not None:
            work = torch_dist.broadcast(parts, torch_dist.get_global_rank(across, whose), across, async_op=True)
        done.append((work, [held[number] for number in numbers], torch.split(parts, sent)))
    for work, rows, results in done:
        if work is not None:
            work.wait()
        for row, result in zip(rows, results, strict=True):
            row.copy_(result)
    return None


def _rows(rows: int, rank: int, world_size: int) -> int:
    """Of a matrix of ``rows`` rows, how many are a rank's: parts of equal, rounded up, length."""
    part = -(-rows // world_size)
    return max(0, min(part, rows - rank * part))
