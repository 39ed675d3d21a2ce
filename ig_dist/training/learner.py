"""One optimizer step of a run, and what it changes. It knows engines by their protocol only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ig_dist.config import Config
from ig_dist.data.index import ShardIndex
from ig_dist.data.stream import Batch
from ig_dist.diffusion.loss import head_difference
from ig_dist.models.dit import DiT
from ig_dist.optim.fused import move
from ig_dist.parallel.build import build_engine
from ig_dist.parallel.dist import Dist
from ig_dist.parallel.engine import Engine, LoadedState, Piece, StepResult
from ig_dist.training.meter import Meter
from ig_dist.training.objective import Model, Task, TaskMaker, accelerates, training_loss
from ig_dist.training.phases import Phases


class EMA:
    """One average per decay: average <- average + (1 - decay) (weights - average); it starts as a copy of them.

    ``masters_written`` is called after an average was written into the weights, and after they were put back.
    """

    def __init__(
        self, masters: Mapping[str, Tensor], decays: Sequence[float], masters_written: Callable[[], None] = lambda: None
    ) -> None:
        self._masters = dict(masters)
        self._masters_written = masters_written
        self.averages = {decay: {name: w.clone() for name, w in masters.items()} for decay in decays}

    def load(self, decay: float, shards: Mapping[str, Tensor]) -> None:
        """Replace one average."""
        for name, tensor in shards.items():
            self.averages[decay][name].copy_(tensor)

    @contextmanager
    def swapped_in(self, decay: float) -> Iterator[None]:
        """The weights are those of an average inside the context, and bitwise their own again after it."""
        self._swap(decay)
        try:
            yield
        finally:
            self._swap(decay)

    @torch.no_grad()
    def _swap(self, decay: float) -> None:
        for name, average in self.averages[decay].items():
            kept = self._masters[name].clone()
            self._masters[name].copy_(average)
            average.copy_(kept)
        self._masters_written()

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Move every average towards the weights; not at all when ``finite`` (a device scalar) is 0."""
        weights, void = list(self._masters.values()), 1 - finite
        for decay, average in self.averages.items():
            move([average[name] for name in self._masters], weights, 1 - decay, void)


class Learner(NamedTuple):
    """What learns on this rank."""

    config: Config
    model: DiT
    engine: Engine  # holds the model, its optimizer, and how both are spread over the ranks
    ema: EMA
    to_task: TaskMaker
    meter: Meter


def build_learner(
    config: Config, index: ShardIndex, model: DiT, state: LoadedState | None, dist: Dist, phases: Phases
) -> Learner:
    """From the initial weights or a checkpoint. COLLECTIVE."""
    engine = build_engine(model, config, state, dist)
    ema = EMA(engine.masters(), config.ema.decays, engine.masters_written)
    if state is not None:
        for decay in config.ema.decays:
            ema.load(decay, state.parts(f"ema/{decay}", engine.held))
    return Learner(
        config, model, engine, ema, TaskMaker(config, index.info, dist.device), Meter(config, model, dist, phases)
    )


def train_step(learner: Learner, batch: Batch, step: int, lr: float) -> tuple[Tensor, StepResult]:
    """The optimizer step with that number, of this rank's part of a global batch. COLLECTIVE.

    Returns:
        The losses of its rows, (losses, rows) on the device, and what the optimizer says.
    """
    config, engine, meter = learner.config, learner.engine, learner.meter
    accumulation, phases = config.train.accumulation, meter.phases
    phases.enter("forward")
    tasks = [learner.to_task(micro) for micro in batch.split(accumulation)]
    differences = ema_differences(learner.model, learner.ema, tasks, config, step=step - 1)
    losses = []
    for i, (task, difference) in enumerate(zip(tasks, differences, strict=True)):
        phases.enter("forward")
        with engine.microbatch(last=i == accumulation - 1):
            with meter.own.timed() if engine.forward_alone else nullcontext():
                loss = training_loss(engine.module, task, config, step=step - 1, difference=difference)
            phases.enter("backward")
            engine.backward(loss[0].mean() / accumulation)
        losses.append(loss.detach())
    phases.enter("optimizer")
    result, rows = engine.step(lr), torch.cat(losses, dim=1)
    with meter.own.timed():
        learner.ema.update(result.finite)
    meter.count(result, batch, rows, step)
    return rows, result


@torch.no_grad()
def ema_differences(model: Model, ema: EMA, tasks: Sequence[Task], config: Config, *, step: int) -> list[Tensor | None]:
    """v_final - v_aux of the first EMA for each micro-batch; None where the step needs no such thing. COLLECTIVE.

    Before any forward pass of the step: the weights may not change between a forward and its backward. ``model`` is
    called past the engine's own forward, which would wait for a backward pass.
    """
    if not accelerates(config, step) or config.loss.acceleration.source != "ema":
        return [None] * len(tasks)
    with ema.swapped_in(config.ema.decays[0]):
        return [head_difference(model(task.x_t, task.t, task.labels)) for task in tasks]


def state_pieces(learner: Learner, index: ShardIndex, step: int, dist: Dist) -> tuple[dict[str, Piece], dict[str, Any]]:
    """The pieces that this rank writes, and what stands beside them in the manifest. COLLECTIVE.

    Weights, averages, moments and constant buffers; images, the optimizer's steps, the config and the index's hash.
    """
    engine = learner.engine
    averages = {f"ema/{decay}": shards for decay, shards in learner.ema.averages.items()}
    masters = engine.masters()
    pieces = engine.canonical({"model": masters, **averages, **engine.moments()})
    if dist.is_main:  # buffers are constant but for those among the masters: every rank has them whole
        for name, buffer in learner.model.named_buffers():
            if name not in masters:
                pieces[f"model/{name}"] = Piece(tuple(buffer.shape), 0, buffer)
    meta = {
        "images_seen": step * learner.config.train.global_batch_size,
        "optimizer_steps": engine.optimizer_steps(),
        "config": learner.config.model_dump(mode="json"),
        "index_sha256": index.sha256,
    }
    return pieces, meta
