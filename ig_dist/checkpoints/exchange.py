"""What a rank goes on from: its parts of a checkpoint's tensors, out of the shares that all ranks have read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from ig_dist.checkpoints.reading import Part, owners, parts_of
from ig_dist.checkpoints.snapshot import DTYPE_NAMES, PART_BYTES, Piece
from ig_dist.checkpoints.store import Checkpoint
from ig_dist.parallel.dist import Dist

# torch 2.13 renamed it
_gather: Any = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor
_ROUND_BYTES = 256 * 2**20  # on each device, of what all ranks send at a time


@dataclass(frozen=True)
class Loaded:
    """A checkpoint whose bytes the ranks hold in memory, each its share (``CheckpointStore.latest(keep=True)``)."""

    checkpoint: Checkpoint
    dist: Dist

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer had made."""
        return self.checkpoint.optimizer_steps

    def whole(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, whole, on the CPU. COLLECTIVE."""
        shapes = {name: self.checkpoint.entry(f"{group}/{name}")["shape"] for name in self.checkpoint.names(group)}
        whole = {name: Piece(tuple(shape), 0, torch.empty(shape, device="meta")) for name, shape in shapes.items()}
        return self.parts(group, whole)

    def parts(self, group: str, shards: Mapping[str, Piece]) -> dict[str, Tensor]:
        """This rank's parts of a group's tensors, each like the ``data`` of its shard. COLLECTIVE.

        Args:
            group: ``exp_avg``, ``ema/0.9999``, ...
            shards: what is wanted of each.

        Raises:
            DataError: the checkpoint has no such tensor.
        """
        outs, flat = {}, {}
        for name, (_, first, data) in shards.items():
            entry = self.checkpoint.entry(f"{group}/{name}")
            dtype, device = DTYPE_NAMES[entry["dtype"]], torch.device("cpu") if data.is_meta else data.device
            outs[name] = torch.empty(data.shape, dtype=dtype, device=device)
            flat[f"{group}/{name}"] = first * dtype.itemsize, outs[name].view(-1).view(torch.uint8)
        for part, data in self._all_parts(group):
            if part.tensor in flat:
                start, out = flat[part.tensor]
                first, last = max(part.at, start), min(part.at + len(data), start + len(out))
                if first < last:
                    out[first - start : last - start].copy_(data[first - part.at : last - part.at])
        return outs

    @cached_property
    def _plan(self) -> tuple[list[Part], list[int]]:
        """All parts, and the rank that holds each."""
        parts = parts_of(self.checkpoint.manifest)
        return parts, owners(parts, self.dist.world_size)

    def _all_parts(self, group: str) -> Iterator[tuple[Part, Tensor]]:
        """Every part of a group with its bytes, on all ranks in the same order. COLLECTIVE."""
        share, world = self.checkpoint.share, self.dist.world_size
        parts, ranks = self._plan
        queues: list[list[int]] = [[] for _ in range(world)]
        for number, owner in enumerate(ranks):
            if parts[number].tensor.startswith(f"{group}/"):
                queues[owner].append(number)
        if world == 1:
            for number in queues[0]:
                yield parts[number], torch.frombuffer(share[number], dtype=torch.uint8)
            return
        while any(queues):
            sent = [_take(queue, parts, max(PART_BYTES, _ROUND_BYTES // world)) for queue in queues]
            width = max(sum(parts[n].end - parts[n].begin for n in numbers) for numbers in sent)
            mine = torch.empty(width, dtype=torch.uint8, device=self.dist.device)
            at = 0
            for number in sent[self.dist.rank]:
                at += len(mine[at : at + len(share[number])].copy_(torch.frombuffer(share[number], dtype=torch.uint8)))
            gathered = torch.empty(world * width, dtype=torch.uint8, device=self.dist.device)
            _gather(gathered, mine)  # into a list it would need this memory twice
            for rank, numbers in enumerate(sent):
                at = rank * width
                for number in numbers:
                    size = parts[number].end - parts[number].begin
                    yield parts[number], gathered[at : at + size]
                    at += size


def _take(queue: list[int], parts: list[Part], most: int) -> list[int]:
    """Take parts from the front, up to so many bytes, one at least."""
    taken: list[int] = []
    size = 0
    while queue and (not taken or size + parts[queue[0]].end - parts[queue[0]].begin <= most):
        taken.append(queue.pop(0))
        size += parts[taken[-1]].end - parts[taken[-1]].begin
    return taken
