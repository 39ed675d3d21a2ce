"""FSDP2: weights, gradients, moments and averages are cut over the ranks; a block is whole only while it is at work.

With ``engine.replicate`` (HSDP) they are cut over the ranks of a group, neighbours that share a machine, and each group
holds them once more: weights are gathered within a group, and only gradients, 1/size of them a rank, cross the network.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ig_dist.config import Config
from ig_dist.errors import ConfigError
from ig_dist.models.dit import DiT
from ig_dist.optim.optimizer import build_optimizer
from ig_dist.parallel.dist import Dist, ensure_process_group
from ig_dist.parallel.engine import (
    Engine,
    LoadedState,
    Piece,
    StepResult,
    decayed_buffers,
    norm_over_ranks,
    update,
    whole,
)
from ig_dist.parallel.orthogonalise import orthogonalise_shards


class FSDP2Engine(Engine):
    """The masters are the local tensors of the sharded fp32 parameters.

    The optimizer works on those local tensors, not on DTensors: nothing in a step then goes through DTensor's
    dispatch, and the finite gate is the one of DDP. A weight of which this rank holds no row does not appear.

    With a state to start from the model has no memory at first, and gets this rank's part of the weights.
    """

    forward_alone = False  # it gathers the weights of each block

    def __init__(self, model: DiT, config: Config, state: LoadedState | None, dist: Dist) -> None:
        self._dist, self._grad_clip, self._replicate = dist, config.optimizer.grad_clip, config.engine.replicate
        self.module = model
        mesh = build_mesh(self._replicate, dist)
        ranks = mesh["shard"].size()
        _check_rows(model, ranks)
        self._first = mesh.get_local_rank("shard") == 0
        self.copy = dist.rank // ranks, self._replicate
        self._root = shard_blocks(model, config, mesh)
        if state is not None:
            model.to_empty(device=dist.device)
        shards = local_shards(model, mesh)
        self._sharded = {name: p for name, p in model.named_parameters() if name in shards}
        self.parameters = {name: nn.Parameter(shard.data) for name, shard in shards.items()}
        matrices = [p.shape for p in model.parameters() if p.ndim >= 2]
        shapes = [shard.shape for shard in shards.values()]
        across = mesh.get_group("replicate") if self._replicate > 1 else None
        orthogonalise = partial(orthogonalise_shards, shapes=matrices, within=mesh.get_group("shard"), across=across)
        self._decayed = decayed_buffers(model, config.optimizer)
        self.held = shards | whole(self._decayed)
        self.optimizer = build_optimizer(
            list(self.parameters.values()), config.optimizer, shapes, orthogonalise, list(self._decayed.values())
        )
        if state is not None:
            wanted = shards | whole(dict(model.named_buffers()))
            for name, part in state.parts("model", wanted).items():
                wanted[name].data.copy_(part)

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        if self._replicate > 1:  # within the group, which is fast, after each micro-batch: none is kept whole
            self._root.set_requires_all_reduce(last)
        else:
            self._root.set_requires_gradient_sync(last)
        yield

    @torch.no_grad()  # to_local is then no operation of autograd
    def step(self, lr: float) -> StepResult:
        for name, parameter in self.parameters.items():
            grad = self._sharded[name].grad
            assert isinstance(grad, DTensor)
            parameter.grad = grad.to_local()
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        result = update(self.optimizer, norm_over_ranks(grads, self._dist, self._replicate), self._grad_clip, lr)
        self.module.zero_grad()
        return result

    def masters_written(self) -> None:
        # The root and, without reshard_after_forward, the blocks stay whole after a forward that no backward follows:
        # the next forward would use those copies.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def canonical(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Piece]:
        """Of what all ranks of a group hold, the first one writes."""
        if not self._first:
            groups = {group: {n: t for n, t in m.items() if n not in self._decayed} for group, m in groups.items()}
        return super().canonical(groups)


def _check_rows(model: DiT, shards: int) -> None:
    """Raise ConfigError where the last rank of a group would hold nothing, of any weight."""
    if not any(-(-len(p) // shards) * (shards - 1) < len(p) for p in model.parameters()):
        raise ConfigError(
            f"{shards} ranks are too many to cut this model's rows into: keep groups of fewer, with engine.replicate"
        )


def build_mesh(replicate: int, dist: Dist) -> DeviceMesh:
    """The ranks, cut into ``replicate`` groups of neighbours. COLLECTIVE."""
    ensure_process_group(dist)
    if replicate == 1:
        return init_device_mesh(dist.device.type, (dist.world_size,), mesh_dim_names=("shard",))
    sides = (replicate, dist.world_size // replicate)
    return init_device_mesh(dist.device.type, sides, mesh_dim_names=("replicate", "shard"))


def shard_blocks(model: DiT, config: Config, mesh: DeviceMesh) -> FSDPModule:
    """Shard each block, and what is left with the root.

    Weights of blocks are gathered in bf16 where autocast would round them to bf16 anyway: forward and backward are
    then those of DDP under autocast. The root keeps fp32, because the label table does not pass through autocast, and
    it is about one percent of the weights. No input is cast: t and the residual stream stay fp32.
    """
    # the velocities may be views of the last layer's output; nobody writes into them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    gathered = torch.bfloat16 if config.train.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    *others, last = model.blocks
    reshard = config.engine.reshard_after_forward is not False
    for block in others:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(last, mesh=mesh, mp_policy=policy, reshard_after_forward=False)  # its backward comes at once
    root_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    # the root's backward begins where its forward ends: no use in freeing it in between
    return fully_shard(model, mesh=mesh, mp_policy=root_policy, reshard_after_forward=False)


def local_shards(model: DiT, mesh: DeviceMesh) -> dict[str, Piece]:
    """This rank's rows of each sharded weight: FSDP2 cuts dimension 0 into parts of equal, rounded up, length."""
    rank, size = mesh.get_local_rank("shard"), mesh["shard"].size()
    shards = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        with torch.no_grad():
            local = parameter.to_local().detach()
        rows = -(-parameter.shape[0] // size)
        first = min(rank * rows, parameter.shape[0])
        assert local.shape[0] == min(rows, parameter.shape[0] - first), name
        if local.numel():
            shards[name] = Piece(tuple(parameter.shape), first * local[0].numel(), local)
    return shards
