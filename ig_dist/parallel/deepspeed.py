"""DeepSpeed's ZeRO: averages and moments (stage 1), gradients (2) and weights (3) are cut over the ranks.

DeepSpeed is told nothing of bf16: its own bf16 would round the t and the residual stream that autocast keeps in fp32.
The forward runs under the same autocast as DDP's (`apply` in build.py), and all that is communicated is fp32.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ig_dist.config import Config
from ig_dist.models.dit import DiT
from ig_dist.optim.optimizer import MOMENTS, build_optimizer, moments_of, set_learning_rate, set_state
from ig_dist.parallel.dist import Dist, ensure_process_group
from ig_dist.parallel.engine import Engine, LoadedState, Piece, StepResult, clip_and_gate, norm_over_ranks

BUCKET_ELEMENTS = 50_000_000  # DeepSpeed allocates a buffer of this many fp32 numbers; its default would be 2 GB


class DeepSpeedEngine(Engine):
    """The masters are this rank's ranges of the weights in one flat buffer, which Adam works on.

    Clipping and gate are not DeepSpeed's but those of the other engines, in a hook before Adam's step: DeepSpeed's
    would wait for the device, and stages 1 and 2 would take a non-finite step.
    """

    def __init__(self, model: DiT, config: Config, dist: Dist) -> None:
        self._dist, self._grad_clip, self._stage = dist, config.optimizer.grad_clip, config.engine.zero_stage or 2
        self.optimizer = build_optimizer(list(model.to(dist.device).parameters()), config.optimizer)
        self._engine = initialize(model, self.optimizer, self._stage, config.micro_batch(dist.world_size), dist)
        self.module = self._engine
        self.forward_alone = self._stage < 3
        self.optimizer.register_step_pre_hook(self._clip_and_gate)
        self._result: StepResult | None = None
        zero = self._engine.optimizer
        if self._stage == 3:
            self._flat: Tensor = zero.fp32_partitioned_groups_flat[0]
            self._gathered_from: Tensor = zero.fp16_partitioned_groups_flat[0]  # fp32 too, whatever it is called
            self.held = stage3_shards(model, self._flat, self._gathered_from, dist)
        else:
            self._flat = zero.single_partition_of_fp32_groups[0]
            self.held = stage12_shards(model)
        self.optimizer.state.clear()

    def load_moments(self, state: LoadedState) -> None:
        flat = {moment: torch.zeros_like(self._flat, requires_grad=False) for moment in MOMENTS}
        for moment in MOMENTS:
            for name, part in state.parts(moment, self.held).items():
                self._range(flat[moment], name).copy_(part)
        set_state(self.optimizer, self._flat, state.optimizer_steps, flat)

    def _range(self, flat: Tensor, name: str) -> Tensor:
        """What belongs to a weight in a tensor that is laid out like the flat buffer."""
        own = self.held[name].data
        return flat.detach().narrow(0, own.storage_offset() - self._flat.storage_offset(), own.numel())

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, lr: float) -> StepResult:
        set_learning_rate(self.optimizer, lr)
        self._result = None
        self._engine.step()
        if self._result is None:  # stage 3 looks at its norm by itself, the same on all ranks, and made no step
            nothing = torch.zeros((), device=self._dist.device)
            return StepResult(nothing + float("nan"), nothing)
        return self._result

    @torch.no_grad()
    def _clip_and_gate(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        grad_norm = norm_over_ranks(grads, self._dist)
        self._result = StepResult(grad_norm, clip_and_gate(optimizer, grad_norm, self._grad_clip))

    def masters_written(self) -> None:
        if self._stage == 3:
            self._gathered_from.copy_(self._flat.detach())
            self._engine.empty_partition_cache()  # of weights that were kept after a forward, for the backward
        else:
            self._engine.optimizer.update_lp_params()

    def moments(self) -> dict[str, dict[str, Tensor]]:
        flat = moments_of(self.optimizer, self._flat)
        return {moment: {name: self._range(flat[moment], name) for name in self.held} for moment in MOMENTS}


def initialize(model: DiT, optimizer: Optimizer, stage: int, batch_size: int, dist: Dist) -> Any:
    """DeepSpeed's own engine, in our process group, in silence."""
    os.environ.setdefault("DS_ACCELERATOR", dist.device.type)  # or it says that it looked for one
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    deepspeed.utils.logger.setLevel(logging.ERROR)  # of skipped steps the run's own metrics tell
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)  # DeepSpeed's to mend
    ensure_process_group(dist)
    # it takes LOCAL_RANK for the number of the device, which is 0 for each rank that sees its own GPU alone
    os.environ["LOCAL_RANK"] = str(dist.local_rank if dist.device.index is None else dist.device.index)
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)  # or it insists that the two be equal
    # On CPUs DeepSpeed would compile a shared-memory all-reduce when first used, for a minute: gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if stage == 3:
        # A block's weights are gathered at once, in hooks outside of what is compiled or computed again. Not so the
        # embedders: DeepSpeed learns the end of such a module's backward from the gradient of its inputs.
        for block in model.blocks:
            set_z3_leaf_module(block, True)
    zero = {
        "stage": stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "stage3_param_persistence_threshold": 0,  # no weight is kept whole
        "sub_group_size": 10**15,  # one flat buffer, and so one norm
    }
    if stage < 3:
        zero["compute_grad_norm"] = False  # ours is enough
    config = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,  # we say where a step ends
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # it knows torch's AdamW, not what is derived from it
        "gradient_clipping": 0.0,  # ours; the default would clip
        "steps_per_print": None,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def stage12_shards(model: DiT) -> dict[str, Piece]:
    """This rank's range of each weight: its part of all weights laid end to end."""
    shards = {}
    for name, parameter in model.named_parameters():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            shards[name] = Piece(
                tuple(parameter.shape), mapping.lp_fragment_address.start, mapping.hp_fragment.detach()
            )
    return shards


def stage3_shards(model: DiT, flat: Tensor, gathered_from: Tensor, dist: Dist) -> dict[str, Piece]:
    """This rank's range of each weight: each is cut into parts of equal, rounded up, length, the last ones padded.

    The parameters know their part of ``gathered_from``, like which ``flat``, what Adam works on, is laid out.
    """
    shards = {}
    for name, parameter in model.named_parameters():
        part, numel = parameter.ds_tensor, parameter.ds_numel  # type: ignore[attr-defined]
        assert part.untyped_storage().data_ptr() == gathered_from.untyped_storage().data_ptr()
        start, offset = part.numel() * dist.rank, part.storage_offset() - gathered_from.storage_offset()
        if start < numel:
            data = flat.detach().narrow(0, offset, min(part.numel(), numel - start))
            shards[name] = Piece(tuple(parameter.ds_shape), start, data)  # type: ignore[attr-defined]
    return shards
