"""What a rank goes on from: its parts of a checkpoint's tensors, out of the shares that all ranks have read.

What all ranks want alike, as under DDP, goes to all of them at once. Otherwise each byte goes to those that want it,
between the CPUs: the bytes lie in host memory, and links between all pairs of GPUs would take memory of theirs for
good. A rank that has itself read what it wants, as when as many ranks go on with the same engine, is sent nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from ig_dist.checkpoints.reading import Checkpoint, Part, owners
from ig_dist.checkpoints.snapshot import ALIGNMENT, DTYPE_NAMES, PART_BYTES
from ig_dist.parallel.dist import Dist, gather_objects
from ig_dist.parallel.engine import Piece

# torch 2.13 renamed it
_gather: Any = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor
_ROUND_BYTES = 256 * 2**20  # of the checkpoint, that all ranks send at a time: none sends or gets more

Wanted = Mapping[str, tuple[int, int]]
"""First byte of a flattened tensor that a rank wants, and the one after the last."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint whose bytes the ranks hold in memory, each its share (``CheckpointStore.find(keep=True)``)."""

    checkpoint: Checkpoint
    dist: Dist

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer had made."""
        return self.checkpoint.optimizer_steps

    def whole(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, whole, on this rank's device. COLLECTIVE."""
        shapes = {name: self.checkpoint.entry(f"{group}/{name}")["shape"] for name in self.checkpoint.names(group)}
        whole = {name: Piece(tuple(shape), 0, torch.empty(shape, device="meta")) for name, shape in shapes.items()}
        return self.parts(group, whole)

    def parts(self, group: str, shards: Mapping[str, Piece]) -> dict[str, Tensor]:
        """This rank's shards of the tensors of a group (``exp_avg``, ``ema/0.9999``), on its device. COLLECTIVE."""
        dtypes = {name: DTYPE_NAMES[self.checkpoint.entry(f"{group}/{name}")["dtype"]] for name in shards}
        wanted = {}
        for name, (_, first, data) in shards.items():
            width = dtypes[name].itemsize
            wanted[f"{group}/{name}"] = first * width, (first + data.numel()) * width
        wants = gather_objects(wanted, self.dist)
        alike = self.dist.world_size > 1 and all(theirs == wants[0] for theirs in wants)
        found, flat = {}, {}
        for tensor, (begin, end) in wanted.items():
            held = None if alike else self._as_read(tensor, begin, end)
            if held is None:
                held = flat[tensor] = torch.empty(end - begin, dtype=torch.uint8, device=self.dist.device)
            found[tensor] = held
        for sent in self._rounds(group):
            for part, data in self._to_all(sent) if alike else self._to_each(sent, wants):
                if part.tensor in flat and (cut := _wanted_of(part, wanted)):
                    at = part.at + cut.start - wanted[part.tensor][0]
                    flat[part.tensor][at : at + len(cut)].copy_(data[cut.start : cut.stop] if alike else data)
        return {n: found[f"{group}/{n}"].view(dtypes[n]).view(shard.data.shape) for n, shard in shards.items()}

    def _rounds(self, group: str) -> Iterable[Sequence[list[Part]]]:
        """The parts of a group that each rank sends at a time; the same on all ranks."""
        parts, world = self.checkpoint.parts, self.dist.world_size
        queues: list[list[Part]] = [[] for _ in range(world)]
        for part, owner in zip(parts, owners(parts, world), strict=True):
            if part.tensor.startswith(f"{group}/"):
                queues[owner].append(part)
        # each rank begins elsewhere: else all might send to the same one first
        starts = [len(queue) * owner // world for owner, queue in enumerate(queues)]
        queues = [queue[start:] + queue[:start] for queue, start in zip(queues, starts, strict=True)]
        most = max(PART_BYTES, _ROUND_BYTES // world)
        return zip_longest(*(_in_turn(queue, most) for queue in queues), fillvalue=[])

    @cached_property
    def _own(self) -> dict[str, list[Part]]:
        """Parts that this rank holds, by tensor."""
        own: dict[str, list[Part]] = {}
        for part in sorted(self.checkpoint.share):
            own.setdefault(part.tensor, []).append(part)
        return own

    def _as_read(self, tensor: str, begin: int, end: int) -> Tensor | None:
        """These bytes where they were read to, if they lie there together and a CPU can use them as they lie."""
        own, share = self._own.get(tensor), self.checkpoint.share
        if not own or begin == end or self.dist.device.type != "cpu":
            return None
        first, last = own[0], own[-1]
        (memory, place), (other, last_place) = share[first], share[last]
        together = memory is other and last_place - place == last.at - first.at
        at = place + begin - first.at
        if not together or begin < first.at or end > last.at + last.size or (memory.data_ptr() + at) % ALIGNMENT:
            return None
        return torch.frombuffer(memory.numpy(), dtype=torch.uint8, count=end - begin, offset=at)  # a storage of its own

    def _bytes(self, part: Part) -> Tensor:
        memory, place = self.checkpoint.share[part]
        return memory[place : place + part.size]

    def _to_all(self, sent: Sequence[Sequence[Part]]) -> Iterator[tuple[Part, Tensor]]:
        """Each part that the ranks send, with its bytes on this device. COLLECTIVE."""
        width = max(sum(part.size for part in parts) for parts in sent)
        mine = torch.empty(width, dtype=torch.uint8, device=self.dist.device)
        at = 0
        for part in sent[self.dist.rank]:
            at += len(mine[at : at + part.size].copy_(self._bytes(part)))
        gathered = torch.empty(len(sent) * width, dtype=torch.uint8, device=self.dist.device)
        _gather(gathered, mine)  # into a list it would need this memory twice
        for rank, parts in enumerate(sent):
            at = rank * width
            for part in parts:
                yield part, gathered[at : at + part.size]
                at += part.size

    def _to_each(self, sent: Sequence[Sequence[Part]], wants: Sequence[Wanted]) -> Iterator[tuple[Part, Tensor]]:
        """Each part of which this rank wants something, with what it wants of its bytes. COLLECTIVE."""
        me = self.dist.rank
        going: list[list[Tensor]] = [[] for _ in wants]
        for part in sent[me]:
            for rank, wanted in enumerate(wants):
                if cut := _wanted_of(part, wanted):
                    data = self._bytes(part)[cut.start : cut.stop]
                    if rank == me:
                        yield part, data
                    else:
                        going[rank].append(data)
        if len(wants) == 1:
            return
        coming = [
            [(part, len(cut)) for part in parts if (cut := _wanted_of(part, wants[me]))]
            for parts in (*sent[:me], (), *sent[me + 1 :])
        ]
        sizes = [sum(size for _, size in one) for one in coming]
        came = torch.empty(sum(sizes), dtype=torch.uint8)
        packed = torch.cat([torch.empty(0, dtype=torch.uint8), *(data for one in going for data in one)])
        torch_dist.all_to_all_single(came, packed, sizes, [sum(map(len, one)) for one in going])
        at = 0
        for part, size in (pair for one in coming for pair in one):
            yield part, came[at : at + size]
            at += size


def _wanted_of(part: Part, wanted: Wanted) -> range:
    """Which bytes of a part are wanted; empty: none."""
    begin, end = wanted.get(part.tensor, (0, 0))
    return range(max(begin - part.at, 0), min(end - part.at, part.size))


def _in_turn(parts: Iterable[Part], most: int) -> Iterator[list[Part]]:
    """Parts, so many bytes at a time, one at least."""
    taken, size = list[Part](), 0
    for part in parts:
        if taken and size + part.size > most:
            yield taken
            taken, size = [], 0
        taken.append(part)
        size += part.size
    if taken:
        yield taken
