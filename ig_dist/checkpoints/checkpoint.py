"""A whole checkpoint, opened: its tensors, each byte checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ig_dist.checkpoints.reading import Share, parts_of, read_parts
from ig_dist.checkpoints.snapshot import DTYPE_NAMES
from ig_dist.errors import DamagedError, DataError
from ig_dist.storage.faults import Patience


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, opened for reading."""

    url: str
    manifest: dict[str, Any]
    patience: Patience = field(default_factory=Patience)
    share: Share = field(default_factory=dict, compare=False, repr=False)
    """What this rank has read of it for all of them; empty unless it was asked for."""

    @property
    def step(self) -> int:
        """Global batches consumed."""
        return int(self.manifest["step"])

    @property
    def meta(self) -> dict[str, Any]:
        """What the trainer stored beside the tensors."""
        return dict(self.manifest["meta"])

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer had made."""
        return int(self.meta["optimizer_steps"])

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which holds the hashes of all files."""
        return str(self.manifest["sha256"])

    def names(self, group: str) -> list[str]:
        """Names of the tensors of a group (``model``, ``exp_avg``, ``ema/0.9999``), without the group."""
        return [n.removeprefix(f"{group}/") for n in self.manifest["tensors"] if n.startswith(f"{group}/")]

    def entry(self, name: str) -> dict[str, Any]:
        """Shape, dtype and pieces of a tensor.

        Raises:
            DataError: the checkpoint has no such tensor.
        """
        entry: dict[str, Any] | None = self.manifest["tensors"].get(name)
        if entry is None:
            raise DataError(f"{self.url} holds no tensor {name!r}: it was saved by a run with other settings")
        return entry

    def read(self, name: str) -> Tensor:
        """A whole tensor, as ``tensors``."""
        return self.tensors([name])[name]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors, on the CPU.

        Raises:
            DataError: the checkpoint has no such tensor, or a damaged one, or the storage fails beyond the deadline.
        """
        entries = {name: self.entry(name) for name in names}
        whole = {name: torch.empty(e["shape"], dtype=DTYPE_NAMES[e["dtype"]]) for name, e in entries.items()}
        parts = parts_of(self.manifest)

        def put(found: Share) -> None:
            for part, (memory, at) in ((parts[number], place) for number, place in found.items()):
                into = whole[part.tensor].view(-1).view(torch.uint8)
                into[part.at : part.at + part.size] = memory[at : at + part.size]

        wanted = [number for number, part in enumerate(parts) if part.tensor in whole]
        try:
            read_parts(self.url, self.manifest, wanted, self.patience, put)
        except DamagedError as error:
            raise DataError(
                f"{self.url}/{error}: restore the file, or delete that checkpoint to go on from the one before"
            ) from None
        return whole
