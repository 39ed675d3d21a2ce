"""DDP: every rank holds the whole model; gradients are averaged over ranks while backward runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ig_dist.checkpoint import Piece
from ig_dist.config import OptimizerConfig
from ig_dist.models.dit import DiT
from ig_dist.optim import build_optimizer
from ig_dist.parallel.dist import Dist
from ig_dist.parallel.engine import LoadedState, StepResult

MOMENTS = ("exp_avg", "exp_avg_sq")


class DDPEngine:
    """See ``Engine``. The masters are the fp32 parameters themselves, whole on every rank."""

    def __init__(self, model: DiT, config: OptimizerConfig, state: LoadedState | None, dist: Dist) -> None:
        self._dist, self._grad_clip = dist, config.grad_clip
        self._parameters = dict(model.named_parameters())
        self.module: nn.Module = model
        self._ddp: DistributedDataParallel | None = None
        if dist.world_size > 1:
            devices = [dist.device.index] if dist.device.type == "cuda" else None
            # The buffers are constant: no broadcast in every forward. torch 2.13 renamed the option.
            renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
            no_broadcast: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            self._ddp = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **no_broadcast)
            self.module = self._ddp
        self._optimizer = build_optimizer(list(self._parameters.values()), config)
        if state is not None and state.optimizer_steps:
            for name, parameter in self._parameters.items():
                step = torch.tensor(float(state.optimizer_steps), device=dist.device)
                moments = {m: state.read(f"{m}/{name}").to(dist.device) for m in MOMENTS}
                self._optimizer.state[parameter] = {"step": step, **moments}

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        if self._ddp is None or last:
            yield
        else:
            with self._ddp.no_sync():
                yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> StepResult:
        parameters = list(self._parameters.values())
        grads = [p.grad for p in parameters if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(grads)
        finite = grad_norm.isfinite().float()
        if self._grad_clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._grad_clip, grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # The fused kernels read this flag on the device and then change nothing, Adam's step count included: the
        # gate costs no synchronisation. The norm is the same on all ranks, so all ranks decide alike.
        self._optimizer.found_inf = 1.0 - finite  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepResult(grad_norm, finite)

    def masters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        state = self._optimizer.state
        return {
            moment: {
                name: state[p][moment] if p in state else torch.zeros_like(p) for name, p in self._parameters.items()
            }
            for moment in MOMENTS
        }

    def optimizer_steps(self) -> int:
        states = list(self._optimizer.state.values())
        return int(states[0]["step"]) if states else 0

    def shard(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        return {name: read(name).to(self._dist.device) for name in self._parameters}

    def canonical(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Piece]:
        """Every rank holds everything: each writes about 1 / world_size of the bytes."""
        tensors = {f"{group}/{name}": tensor for group, members in groups.items() for name, tensor in members.items()}
        load = [0] * self._dist.world_size
        pieces = {}
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
            writer = load.index(min(load))
            load[writer] += tensor.numel()
            if writer == self._dist.rank:
                pieces[name] = Piece(tuple(tensor.shape), 0, tensor.detach())
        return pieces
