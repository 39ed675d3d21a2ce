"""Training: the loop, and what a run goes on from. It knows engines by their protocol only.

Run the same command again to resume: the step of the newest whole checkpoint is all that position, order and
randomness depend on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from ig_dist.beginning import checkpoint_store, find_checkpoint, load_weights
from ig_dist.checkpoint import Checkpoint, Piece
from ig_dist.config import Config
from ig_dist.data.index import ShardIndex, read_index
from ig_dist.data.latents import check_latents
from ig_dist.data.order import SampleOrder
from ig_dist.data.reader import ShardReader
from ig_dist.data.stream import Batch, BatchStream, check_window_memory
from ig_dist.ema import EMA
from ig_dist.errors import ConfigError, DataError, Ending, NonFiniteError, Preempted
from ig_dist.export import export_checkpoint
from ig_dist.metrics import RunLog, model_flops_utilisation
from ig_dist.models.dit import DiT, count_parameters, initialize
from ig_dist.models.presets import forward_flops
from ig_dist.monitor import grid_tokenizer, sample_grid, validate
from ig_dist.objective import open_reader, training_loss
from ig_dist.optim import learning_rate
from ig_dist.parallel.agreement import Awaited
from ig_dist.parallel.build import build_engine, check_engine
from ig_dist.parallel.dist import (
    Dist,
    StopFlag,
    from_main,
    init_distributed,
    lost_peers_explained,
    shut_down,
    sum_over_ranks,
)
from ig_dist.parallel.engine import Engine, StepResult
from ig_dist.run_dir import claim
from ig_dist.saving import Saver
from ig_dist.terminal import console


def train(config: Config, *, force: bool = False) -> None:
    """Train to the configured length, from the newest whole checkpoint on. COLLECTIVE.

    Args:
        config: the config; shapes that only the data knows may be open.
        force: go on in a run directory that belongs to another config.

    Raises:
        ConfigError: the config does not fit the data, the run directory or the number of processes.
        NonFiniteError: too many non-finite steps in a row.
        DataError: damaged data, or no whole checkpoint.
        Preempted: asked to stop by a signal, after a save.
    """
    dist = init_distributed(config.train.timeout_s)
    with ExitStack() as cleanup:
        cleanup.callback(shut_down)
        cleanup.enter_context(lost_peers_explained(dist))
        check_engine(config)
        index = read_index(config.data.index)
        config = config.with_data(index.info.latent.shape, len(index.info.classes))
        if config.log.sample_every_steps:
            grid_tokenizer(index, config, dist.device)  # one that is missing ends the run now, not at the first grid
        order = build_order(config, index, dist)
        model = DiT(config.model.to_dit())
        initialize(model, config.run.seed)
        store = checkpoint_store(config)
        seen = store.agreed_steps(dist)
        checkpoint = find_checkpoint(store, config, index, dist)
        if checkpoint is None and config.train.init_from:
            load_weights(model, config.train.init_from)
        path = cleanup.enter_context(_claimed_by_main(config, dist, force))
        if store.agreed_steps(dist) != seen:  # whoever held the run until now has saved once more
            checkpoint = find_checkpoint(store, config, index, dist)
        start, total = checkpoint.step if checkpoint else 0, config.total_steps(order.num_samples)
        if dist.is_main:
            console.print(f"{config.run.dir}: {'resume at' if start else 'start from'} step {start} of {total}")
        if start >= total:
            return
        if dist.is_main:
            store.abort_orphans()
        saver = Saver(store, dist)
        cleanup.callback(saver.close)
        stop_flag = StopFlag()
        if dist.is_main:
            console.print(f"{count_parameters(model):,} parameters on {dist.world_size} x {dist.device.type}")
        engine = build_engine(model, config, checkpoint, dist)
        ema = _build_ema(engine, config, checkpoint)
        stream = BatchStream(
            index,
            order,
            rank=dist.rank,
            world_size=dist.world_size,
            start=start,
            workers=config.data.workers,
            reader=open_reader(index, config),
            flip=config.data.flip,
        )
        cleanup.callback(stream.close)
        run_log = cleanup.enter_context(RunLog(path if dist.is_main else None, start=start, total=total, name="train"))
        meter = _Meter(config, model, dist)

        def save(step: int, *, exported: bool = False) -> None:
            with meter.saving():
                pieces, meta = _snapshot(engine, ema, model, config, index, step, dist)
                saver.save(step, pieces, meta, partial(export_checkpoint, config=config) if exported else None)

        batches = Awaited(stream.get, stop_flag, dist)
        done = saved = start
        try:
            for step in range(start + 1, total + 1):  # step: batches consumed once this one is
                last = step == total
                lr = learning_rate(step - 1, config.optimizer, total)
                with meter.waiting():
                    batch = batches.next(final=last)
                losses, result = _train_step(engine, batch, config, index, lr, dist)
                ema.update(result.finite)
                meter.count(result)
                done = step
                if last or step % config.log.every_steps == 0:
                    measured = meter.read(losses, result, batch, step, stream.reader)
                    saves = {"checkpoint_write_s": saver.write_s, "failed_saves": saver.failed_saves}
                    run_log.write({"step": step, **measured, **saves, "lr": lr})
                if _due(step, config.log.validate_every_steps, last):
                    run_log.add(step, validate(model, ema, index, config, stream.reader, dist, stop_flag))
                    meter.pause()
                if _due(step, config.log.sample_every_steps, last):
                    run_log.add_picture(step, sample_grid(model, ema, index, config, dist.device))
                    meter.pause()
                if last or step % config.checkpoint.every_steps == 0:
                    every = config.checkpoint.every_steps * config.checkpoint.export_every
                    save(step, exported=last or _due(step, every, last))
                    saved = step
                run_log.advance(step)
            saver.wait()
        except Ending as ending:
            if done > saved:
                save(done, exported=done == total)
            _end(ending, saver, done, total)


def _end(ending: Ending, saver: Saver, done: int, total: int) -> NoReturn:
    """The error that says why the run ends before its last step, once what it has done is saved. COLLECTIVE."""
    try:
        saver.wait()
        where = f"saved at step {done} of {total}" if done else "before the first step"
    except DataError as problem:
        if ending.error is None:
            raise
        where = str(problem)
    if ending.error is None:
        raise Preempted(f"{where}; run the same command again to go on")
    error = type(ending.error)(f"{ending.error} ({where})")
    error.everywhere = True
    raise error from None


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


def _train_step(
    engine: Engine, batch: Batch, config: Config, index: ShardIndex, lr: float, dist: Dist
) -> tuple[Tensor, StepResult]:
    """One optimizer step; the step's losses (total, final, aux) averaged over this rank's rows, on the device."""
    accumulation = config.train.accumulation
    losses = []
    for i, micro in enumerate(batch.split(accumulation)):
        with engine.microbatch(last=i == accumulation - 1):
            loss = training_loss(engine.module, micro, config, index.info, dist.device).mean(dim=1)
            engine.backward(loss[0] / accumulation)
        losses.append(loss.detach())
    return torch.stack(losses).mean(dim=0), engine.step(lr)


def build_order(config: Config, index: ShardIndex, dist: Dist) -> SampleOrder:
    """The order of the run's training samples.

    Raises:
        ConfigError: streams, processes, memory or held-out shards do not fit the data.
    """
    config.check_world_size(dist.world_size)
    check_latents(index.info.latent, config.data.posterior, config.data.flip)
    check_window_memory(
        index,
        streams=config.data.streams,
        window_samples=config.data.window_samples,
        window_bytes=config.data.window_bytes,
        nodes=dist.nodes,
    )
    shards = len(index.shard_sizes) - config.data.validation_shards
    if shards < 1:
        raise ConfigError(
            f"data.validation_shards {config.data.validation_shards} leaves nothing to train on: the index has"
            f" {len(index.shard_sizes)} shards; hold out fewer, or encode into more shards"
        )
    return SampleOrder(
        index.shard_sizes[:shards],
        streams=config.data.streams,
        global_batch_size=config.train.global_batch_size,
        window_samples=config.data.window_samples,
        seed=config.run.seed,
    )


@contextmanager
def _claimed_by_main(config: Config, dist: Dist, force: bool) -> Iterator[Any]:
    """Rank 0 holds the run directory; a refusal ends every rank."""
    with ExitStack() as held:
        refusal = path = None
        if dist.is_main:
            try:
                path = held.enter_context(claim(config, force=force))
            except ConfigError as error:
                refusal = str(error)
        refusal = from_main(refusal, dist)
        if refusal is not None:
            raise ConfigError(refusal)
        yield path


def _build_ema(engine: Engine, config: Config, checkpoint: Checkpoint | None) -> EMA:
    ema = EMA(engine.masters(), config.ema.decays, engine.masters_written)
    if checkpoint is not None:
        for decay in config.ema.decays:
            ema.load(decay, engine.shard(lambda name, decay=decay: checkpoint.read(f"ema/{decay}/{name}")))  # type: ignore[misc]
    return ema


def _snapshot(
    engine: Engine, ema: EMA, model: DiT, config: Config, index: ShardIndex, step: int, dist: Dist
) -> tuple[dict[str, Piece], dict[str, Any]]:
    """The pieces that this rank writes, and what stands beside them in the manifest. COLLECTIVE."""
    averages = {f"ema/{decay}": shards for decay, shards in ema.averages.items()}
    pieces = engine.canonical({"model": engine.masters(), **averages, **engine.moments()})
    if dist.is_main:  # buffers are not trained: every rank has them whole
        for name, buffer in model.named_buffers():
            pieces[f"model/{name}"] = Piece(tuple(buffer.shape), 0, buffer)
    meta = {
        "images_seen": step * config.train.global_batch_size,
        "optimizer_steps": engine.optimizer_steps(),
        "config": config.model_dump(mode="json"),
        "index_sha256": index.sha256,
    }
    return pieces, meta


class _Meter:
    """Throughput, waiting and non-finite steps since the last line of metrics."""

    def __init__(self, config: Config, model: DiT, dist: Dist) -> None:
        self._config, self._dist = config, dist
        self._train_flops = 3 * forward_flops(model.config)  # backward costs twice the forward
        self._streak = torch.zeros((), device=dist.device)
        self._skipped = torch.zeros((), device=dist.device)
        self._stall: float | None = None
        self.pause()

    def pause(self) -> None:
        """Begin to count anew: what lies behind (a save, the start) is not throughput."""
        self._began, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The loop stands still for a save."""
        began = time.perf_counter()
        yield
        self._stall = time.perf_counter() - began
        self.pause()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def count(self, result: StepResult) -> None:
        """Count a step, on the device."""
        self._steps += 1
        self._skipped += 1 - result.finite
        self._streak = (self._streak + 1) * (1 - result.finite)

    def read(
        self, losses: Tensor, result: StepResult, batch: Batch, step: int, reader: ShardReader
    ) -> dict[str, float | int | None]:
        """The line of metrics. Waits for the device. COLLECTIVE."""
        means = sum_over_ranks(losses.double() / self._dist.world_size, self._dist).tolist()
        counts = [batch_fingerprint(batch), len(reader.quarantined), reader.patience.faults]
        fingerprint, quarantined, faults = sum_over_ranks(torch.tensor(counts), self._dist).tolist()
        skipped, streak = int(self._skipped), int(self._streak)
        if streak >= self._config.train.max_nonfinite_steps:
            raise NonFiniteError(
                f"the last {streak} steps up to step {step} had a non-finite gradient: lower optimizer.lr or use"
                " train.precision=fp32; the last checkpoint is from before or equal to it"
            )
        batch_size = self._config.train.global_batch_size
        images_per_s = self._steps * batch_size / (time.perf_counter() - self._began)
        line = {
            "images_seen": step * batch_size,
            "loss": means[0],
            "loss_final": means[1],
            "loss_aux": means[2],
            "grad_norm": float(result.grad_norm),
            "images_per_s": images_per_s,
            "mfu": model_flops_utilisation(
                self._train_flops,
                images_per_s,
                self._dist.world_size,
                self._dist.device,
                self._config.train.peak_tflops,
            ),
            "data_wait_s": self._waited / self._steps,
            "nonfinite_steps": skipped,
            "quarantined": quarantined,
            "storage_faults": faults,
            "checkpoint_stall_s": self._stall,
            "batch_fingerprint": fingerprint,
        }
        self.pause()
        return line


def batch_fingerprint(batch: Batch) -> int:
    """A number that says which sample stood at which position; the sum over ranks names the global batch.

    Equal lines of two runs prove equal batches, whatever the number of processes.
    """
    mixed = (batch.ids * 0x9E3779B1 + batch.positions * 0x85EBCA77) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
    return int((mixed ^ (mixed >> 12)).sum())
