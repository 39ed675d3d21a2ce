"""FSDP2: weights, gradients, moments and averages are cut over the ranks; a block is whole only while it is at work."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ig_dist.checkpoints.store import Piece
from ig_dist.config.training import OptimizerConfig
from ig_dist.models.dit import DiT
from ig_dist.optim.optimizer import build_optimizer, steps_of
from ig_dist.parallel.dist import Dist, ensure_process_group
from ig_dist.parallel.engine import LoadedState, StepResult
from ig_dist.parallel.orthogonalise import orthogonalise_shards
from ig_dist.parallel.sharded import Shards, load_moments, moments_by_name, norm_over_ranks, to_pieces, update


class FSDP2Engine:
    """See ``Engine``. The masters are the local tensors of the sharded fp32 parameters.

    The optimizer works on those local tensors, not on DTensors: nothing in a step then goes through DTensor's
    dispatch, and the finite gate is the one of DDP. A weight of which this rank holds no row does not appear.

    Args:
        model: on the CPU.
        config: the optimizer's.
        precision: of the forward, which runs under autocast (``apply_precision``).
        reshard_after_forward: free a block's weights after its forward and gather them again for its backward.
        state: what to start from; its weights are in the model already.
        dist: this process.
    """

    def __init__(
        self,
        model: DiT,
        config: OptimizerConfig,
        precision: Literal["fp32", "bf16"],
        reshard_after_forward: bool,
        state: LoadedState | None,
        dist: Dist,
    ) -> None:
        self._dist, self._grad_clip = dist, config.grad_clip
        self.module: nn.Module = model
        self.forward_alone = False  # it gathers the weights of each block
        self._root = shard_blocks(model, precision, reshard_after_forward, dist)
        self._shards = local_shards(model, dist)
        self._sharded = {name: p for name, p in model.named_parameters() if name in self._shards}
        self._parameters = {name: nn.Parameter(shard.data) for name, shard in self._shards.items()}
        matrices = [p.shape for p in model.parameters() if p.ndim >= 2]
        shapes = [shard.shape for shard in self._shards.values()]
        shared_out = partial(orthogonalise_shards, shapes=matrices, dist=dist)
        self._optimizer = build_optimizer(list(self._parameters.values()), config, shapes, shared_out)
        load_moments(self._optimizer, self._parameters, self._shards, state)

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        self._root.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> StepResult:
        for name, parameter in self._parameters.items():
            grad = self._sharded[name].grad
            assert isinstance(grad, DTensor)
            parameter.grad = grad.to_local()
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        result = update(self._optimizer, norm_over_ranks(grads, self._dist), self._grad_clip, lr)
        self.module.zero_grad()
        return result

    def masters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def masters_written(self) -> None:
        # The root and, without reshard_after_forward, the blocks stay whole after a forward that no backward follows:
        # the next forward would use those copies.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def moments(self) -> dict[str, dict[str, Tensor]]:
        return moments_by_name(self._optimizer, self._parameters)

    def optimizer_steps(self) -> int:
        return steps_of(self._optimizer)

    def parts(self, state: LoadedState, group: str) -> dict[str, Tensor]:
        return state.parts(group, self._shards)

    def canonical(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Piece]:
        return to_pieces(groups, self._shards)


def shard_blocks(model: DiT, precision: Literal["fp32", "bf16"], reshard_after_forward: bool, dist: Dist) -> FSDPModule:
    """Shard each block, and what is left with the root.

    Weights of blocks are gathered in bf16 where autocast would round them to bf16 anyway: forward and backward are
    then those of DDP under autocast. The root keeps fp32, because the label table does not pass through autocast, and
    it is about one percent of the weights. No input is cast: t and the residual stream stay fp32.
    """
    # the velocities may be views of the last layer's output; nobody writes into them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    ensure_process_group(dist)
    mesh = init_device_mesh(dist.device.type, (dist.world_size,))
    gathered = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    root_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    # the root's backward begins where its forward ends: no use in freeing it in between
    return fully_shard(model, mesh=mesh, mp_policy=root_policy, reshard_after_forward=False)


def local_shards(model: DiT, dist: Dist) -> Shards:
    """This rank's rows of each sharded weight: FSDP2 cuts dimension 0 into parts of equal, rounded up, length."""
    shards = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        with torch.no_grad():
            local = parameter.to_local().detach()
        rows = -(-parameter.shape[0] // dist.world_size)
        first = min(dist.rank * rows, parameter.shape[0])
        assert local.shape[0] == min(rows, parameter.shape[0] - first), name
        if local.numel():
            shards[name] = Piece(tuple(parameter.shape), first * local[0].numel(), local)
    return shards
