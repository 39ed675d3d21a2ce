"""DDP: every rank holds the whole model; gradients are averaged over ranks while backward runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ig_dist.config.training import OptimizerConfig
from ig_dist.models.dit import DiT
from ig_dist.optim.optimizer import build_optimizer, steps_of
from ig_dist.parallel.dist import Dist
from ig_dist.parallel.engine import LoadedState, Piece, StepResult
from ig_dist.parallel.orthogonalise import orthogonalise_replicas
from ig_dist.parallel.sharded import decayed_buffers, load_moments, moments_by_name, shared_out, total_norm, update


class DDPEngine:
    """See ``Engine``. The masters are the fp32 parameters themselves, whole on every rank."""

    def __init__(self, model: DiT, config: OptimizerConfig, state: LoadedState | None, dist: Dist) -> None:
        self._dist, self._grad_clip = dist, config.grad_clip
        model.to(dist.device)
        self._parameters = dict(model.named_parameters())
        self.module: nn.Module = model
        self.forward_alone = True
        self._ddp: DistributedDataParallel | None = None
        if torch_dist.is_initialized():
            devices = [dist.device.index] if dist.device.type == "cuda" else None
            # The buffers are alike on all ranks: no broadcast in every forward. torch 2.13 renamed the option.
            renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
            no_broadcast: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            self._ddp = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **no_broadcast)
            self.module = self._ddp
        self._decayed = decayed_buffers(model, config)
        self._whole = {name: Piece(tuple(held.shape), 0, held) for name, held in self.masters().items()}
        orthogonalise = partial(orthogonalise_replicas, dist=dist)
        self._optimizer = build_optimizer(
            list(self._parameters.values()), config, None, orthogonalise, list(self._decayed.values())
        )
        load_moments(self._optimizer, self._parameters, self._whole, state)

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        if self._ddp is None or last:
            yield
        else:
            with self._ddp.no_sync():
                yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        return update(self._optimizer, total_norm(grads), self._grad_clip, lr)

    def masters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters.items()} | self._decayed

    def masters_written(self) -> None:
        pass  # forward uses the masters themselves

    def moments(self) -> dict[str, dict[str, Tensor]]:
        return moments_by_name(self._optimizer, self._parameters)

    def optimizer_steps(self) -> int:
        return steps_of(self._optimizer)

    def parts(self, state: LoadedState, group: str) -> dict[str, Tensor]:
        return state.parts(group, self._whole)

    def canonical(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Piece]:
        """Every rank holds everything: each writes about 1 / world_size of the bytes."""
        tensors = {f"{group}/{name}": tensor for group, members in groups.items() for name, tensor in members.items()}
        mine = shared_out(tensors, self._dist.rank, self._dist.world_size)
        return {name: Piece(tuple(tensors[name].shape), 0, tensors[name].detach()) for name in mine}
