"""Muon's orthogonalisation shared out: each matrix is one rank's work, which all of them would else do again."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ig_dist.optim.muon import AT_ONCE, orthogonalise_each
from ig_dist.parallel.dist import Dist


def turns(shapes: Sequence[Sequence[int]], ranks: int, groups: int = 1) -> list[list[int]]:
    """Numbers of the matrices that ``ranks`` of a group do in a turn, like beside like, the largest first.

    A rank does every ``ranks``-th of a turn, as many as are iterated on at once; but no turn is so long that not each
    of ``groups`` gets one.
    """
    order = sorted(range(len(shapes)), key=lambda number: (-math.prod(shapes[number]), tuple(shapes[number])))
    most = -(-len(order) // (ranks * groups))
    found: list[list[int]] = []
    while order:
        count = ranks * max(1, min(most, AT_ONCE // math.prod(shapes[order[0]])))
        found.append(order[:count])
        order = order[count:]
    return found


def orthogonalise_replicas(matrices: Sequence[Tensor], dist: Dist) -> None:
    """Replace matrices that every rank holds whole by orthogonal ones. COLLECTIVE."""
    if dist.world_size == 1:
        return orthogonalise_each(matrices)
    pending = []
    for numbers in turns([matrix.shape for matrix in matrices], dist.world_size):
        orthogonalise_each([matrices[number] for number in numbers[dist.rank :: dist.world_size]])
        for place, number in enumerate(numbers):
            source = place % dist.world_size
            pending.append(torch_dist.broadcast(matrices[number], src=source, async_op=True))
    for work in pending:
        assert work is not None
        work.wait()
    return None


def orthogonalise_shards(
    shards: Sequence[Tensor], shapes: Sequence[Sequence[int]], within: ProcessGroup, across: ProcessGroup | None = None
) -> None:
    """Replace the rows that this rank holds by those of the orthogonal whole. COLLECTIVE.

    In a turn matrices are made whole, each on one rank. Where several groups hold the same, they take turns and send
    each other the rows: two machines need not compute the same bits.

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
    groups = 1 if across is None else torch_dist.get_world_size(across)
    done = []
    for turn, numbers in enumerate(turns(shapes, size, groups)):
        by_rank = [numbers[other::size] for other in range(size)]  # who makes which whole
        numbers = [number for whose in by_rank for number in whose]
        parts = torch.cat([held[number] for number in numbers])
        if across is None or turn % groups == torch_dist.get_rank(across):
            sent = [sum(counts[number][rank] for number in whose) for whose in by_rank]
            received = [sum(counts[number][other] for number in by_rank[rank]) for other in range(size)]
            whole = parts.new_empty(sum(received))
            torch_dist.all_to_all_single(whole, parts, received, sent, group=within)
            if own := by_rank[rank]:
                whole = _orthogonal(whole, [shapes[number] for number in own], [counts[number] for number in own])
            torch_dist.all_to_all_single(parts, whole, sent, received, group=within)
        work = None
        if across is not None:
            source = torch_dist.get_global_rank(across, turn % groups)
            work = torch_dist.broadcast(parts, source, across, async_op=True)
        done.append((work, [held[n] for n in numbers], torch.split(parts, [counts[n][rank] for n in numbers])))
    for work, rows, results in done:
        if work is not None:
            work.wait()
        torch._foreach_copy_(rows, list(results))
    return None


def _orthogonal(rows: Tensor, shapes: Sequence[Sequence[int]], counts: Sequence[Sequence[int]]) -> Tensor:
    """Whole matrices as they came, from one rank after the other its rows of each, made orthogonal."""
    pieces = torch.split(rows, [count for of_rank in zip(*counts, strict=True) for count in of_rank])
    wholes = [torch.cat(pieces[i :: len(shapes)]).view(*shape) for i, shape in enumerate(shapes)]
    orthogonalise_each(wholes)
    cut = [torch.split(whole.view(-1), list(count)) for whole, count in zip(wholes, counts, strict=True)]
    return torch.cat([part for of_rank in zip(*cut, strict=True) for part in of_rank])


def _rows(rows: int, rank: int, world_size: int) -> int:
    """Of a matrix of ``rows`` rows, how many are a rank's: parts of equal, rounded up, length."""
    part = -(-rows // world_size)
    return max(0, min(part, rows - rank * part))
