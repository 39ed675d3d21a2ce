"""DDP: every rank holds the whole model; gradients are averaged over ranks while backward runs."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.nn.parallel import DistributedDataParallel

from ig_dist.config import Config
from ig_dist.models.dit import DiT
from ig_dist.optim.optimizer import build_optimizer
from ig_dist.parallel.dist import Dist
from ig_dist.parallel.engine import Engine, StepResult, decayed_buffers, total_norm, update, whole
from ig_dist.parallel.orthogonalise import orthogonalise_replicas


class DDPEngine(Engine):
    """The masters are the fp32 parameters themselves, whole on every rank."""

    forward_alone = True

    def __init__(self, model: DiT, config: Config, dist: Dist) -> None:
        self._grad_clip = config.optimizer.grad_clip
        self.module = model.to(dist.device)
        self.parameters = dict(model.named_parameters())
        self._ddp: DistributedDataParallel | None = None
        if torch_dist.is_initialized():
            devices = [dist.device.index] if dist.device.type == "cuda" else None
            # The buffers are alike on all ranks: no broadcast in every forward. torch 2.13 renamed the option.
            renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
            no_broadcast: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            self._ddp = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **no_broadcast)
            self.module = self._ddp
        decayed = decayed_buffers(model, config.optimizer)
        self.held = whole(self.parameters) | whole(decayed)
        self.copy = dist.rank, dist.world_size
        orthogonalise = partial(orthogonalise_replicas, dist=dist)
        self.optimizer = build_optimizer(
            list(self.parameters.values()), config.optimizer, None, orthogonalise, list(decayed.values())
        )

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        if self._ddp is None or last:
            yield
        else:
            with self._ddp.no_sync():
                yield

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        return update(self.optimizer, total_norm(grads), self._grad_clip, lr)
