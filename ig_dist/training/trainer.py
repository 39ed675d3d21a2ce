"""Training: the loop, and what a run goes on from. It knows engines by their protocol only.

Run the same command again to resume: the step of the newest whole checkpoint is all that position, order and
randomness depend on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor

from ig_dist.arithmetic import switches
from ig_dist.checkpoints.saving import Saver
from ig_dist.checkpoints.store import Checkpoint, Piece
from ig_dist.config import Config
from ig_dist.data.index import ShardIndex, read_index
from ig_dist.data.latents import check_latents
from ig_dist.data.order import SampleOrder
from ig_dist.data.stream import Batch, BatchStream, check_window_memory
from ig_dist.errors import ConfigError, DataError, Ending, Preempted
from ig_dist.export import export_checkpoint
from ig_dist.models.dit import DiT, count_parameters, initialize
from ig_dist.optim.optimizer import learning_rate
from ig_dist.parallel.agreement import Awaited
from ig_dist.parallel.build import build_engine, check_engine
from ig_dist.parallel.dist import (
    Dist,
    StopFlag,
    from_main,
    init_distributed,
    lost_peers_explained,
    shut_down,
)
from ig_dist.parallel.engine import Engine, LoadedState, StepResult
from ig_dist.provenance import note_start
from ig_dist.run_dir import Identity, claim, read_identity
from ig_dist.terminal import console
from ig_dist.training.beginning import checkpoint_store, find_checkpoint, load_weights
from ig_dist.training.ema import EMA
from ig_dist.training.failing import failures_told
from ig_dist.training.goodput import Ledger
from ig_dist.training.meter import Meter
from ig_dist.training.metrics import RunLog
from ig_dist.training.monitor import grid_tokenizer, sample_grid, validate
from ig_dist.training.objective import TaskMaker, ema_differences, open_reader, training_loss
from ig_dist.training.phases import Phases
from ig_dist.training.preflight import preflight, read_everywhere
from ig_dist.training.scoring import TrainingScores
from ig_dist.training.watchdog import longest_wait_s, watched


def train(config: Config, *, force: bool = False, lives_on: bool = False) -> None:
    """Train to the configured length, from the newest whole checkpoint on. COLLECTIVE.

    Args:
        config: the config; shapes that only the data knows may be open.
        force: go on in a run directory that belongs to another config.
        lives_on: this process does other things before and after: it gets its signals back, a hang does not end it
            where it has no peers, and its age is not the run's.

    Raises:
        ConfigError: the config does not fit the data, the run directory or the number of processes.
        NonFiniteError: too many non-finite steps in a row.
        HangError: the other processes do not come (one that hangs later ends the process at once, by the watchdog).
        DataError: damaged data, or no whole checkpoint.
        Preempted: asked to stop by a signal, after a save.
        OutOfMemoryError: too little memory.
        RankError: another error, of one of several processes.
    """
    phases = Phases(0.0 if lives_on else None)
    with ExitStack() as cleanup:
        cleanup.enter_context(switches(config.train.precision, deterministic=config.train.deterministic))
        dist = init_distributed(config.train.timeout_s, longest_wait_s(config))
        watchdog = cleanup.enter_context(watched(phases, config, dist, lives_on=lives_on))
        # After an error the groups stay as they are: NCCL's end of one waits for peers that may never come.
        cleanup.push(lambda kind, *_: shut_down() if kind is None or dist.world_size == 1 else None)
        cleanup.enter_context(failures_told(config, dist, phases, watchdog))
        cleanup.enter_context(lost_peers_explained(dist))
        check_engine(config)
        index = read_everywhere(partial(read_index, config.data.index), attrgetter("sha256"), dist)
        config = config.with_data(index.info.latent.shape, len(index.info.classes))
        if config.log.sample_every_steps:
            grid_tokenizer(index, config, dist.device)  # one that is missing ends the run now, not at the first grid
        order = build_order(config, index, dist)
        store = checkpoint_store(config)
        seen = store.agreed_steps(dist)
        state, identity = find_checkpoint(store, config, index, dist, phases.beat, force=force)
        model = _first_model(config, state is not None)
        path = cleanup.enter_context(_claimed_by_main(config, identity, dist, force))
        identity = from_main(path and read_identity(path), dist)  # whoever held it until now may have begun it
        if store.agreed_steps(dist) != seen:  # whoever held the run until now has saved once more
            state, _ = find_checkpoint(store, config, index, dist, phases.beat)
            model = _first_model(config, state is not None)
        start, total = state.checkpoint.step if state else 0, config.total_steps(order.num_samples)
        if dist.is_main:
            doing = "finished at" if start >= total else "resume at" if start else "start from"
            console.print(f"{config.run.dir}: {doing} step {start} of {total}", markup=False)
        if start >= total:
            return
        if dist.is_main:
            note_start(path, step=start)
            store.abort_orphans()
        saver = Saver(store, dist, phases.beat)
        cleanup.callback(saver.close)
        stop_flag = StopFlag()
        if lives_on:
            cleanup.callback(stop_flag.restore)
        if dist.is_main:
            console.print(f"{count_parameters(model):,} parameters on {dist.world_size} x {dist.device.type}")
        preflight(index, config, dist, stop_flag, phases.beat)
        scores = TrainingScores(config, index, dist, stop_flag, phases.beat) if config.log.score_every_steps else None
        phases.enter("compile")
        engine = build_engine(model, config, state, dist)
        phases.enter("start-up")
        ema = _build_ema(engine, config, state)
        del state  # what this rank holds of the checkpoint
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
        to_task, meter = TaskMaker(config, index.info, dist.device), Meter(config, model, dist, phases)
        ledger = Ledger(path, phases, start)
        cleanup.callback(ledger.close)
        phases.last_warm_up = start + 1
        cleanup.enter_context(failures_told(config, dist, phases, watchdog))  # again: to say so before all this
        cleanup.enter_context(lost_peers_explained(dist))  # is closed
        cleanup.enter_context(watchdog.has_the_last_word())

        def save(step: int, *, exported: bool = False) -> None:
            phases.enter("checkpoint")
            with meter.saving():
                pieces, meta = _snapshot(engine, ema, model, config, index, step, dist)
                meta["run"] = identity._asdict()
                saver.save(step, pieces, meta, partial(_saved, export=config if exported else None))
            ledger.note(step)

        batches = Awaited(stream.get, stop_flag, dist, beat=phases.beat)
        done = saved = start
        try:
            for step in range(start + 1, total + 1):  # step: batches consumed once this one is
                last = step == total
                lr = learning_rate(step - 1, config.optimizer, total)
                phases.enter("data", step)
                batch = batches.next(final=last)
                losses, result = _train_step(engine, ema, model, batch, to_task, config, lr, step - 1, meter)
                with meter.own.timed():
                    ema.update(result.finite)
                meter.count(result, batch, losses, step)
                done = step
                if last or step % config.log.every_steps == 0:
                    phases.enter("log")
                    measured = meter.read(losses, result, batch, step, stream.reader)
                    saves = {"checkpoint_write_s": saver.write_s, "failed_saves": saver.failed_saves}
                    run_log.write({"step": step, **measured, **saves, "lr": lr})
                    ledger.note(step)
                if _due(step, config.log.validate_every_steps, last):
                    phases.enter("validation")
                    run_log.add(step, validate(model, ema, index, config, stream.reader, dist, stop_flag))
                    meter.pause()
                if _due(step, config.log.sample_every_steps, last):
                    phases.enter("sampling")
                    run_log.add_picture(step, sample_grid(model, ema, index, config, dist.device))
                    meter.pause()
                if scores is not None and _due(step, config.log.score_every_steps, last):
                    phases.enter("scoring")
                    run_log.add(step, scores.score(model, ema, step, path), "scores")
                    meter.pause()
                if last or step % config.checkpoint.every_steps == 0:
                    every = config.checkpoint.every_steps * config.checkpoint.export_every
                    save(step, exported=last or _due(step, every, last))
                    saved = step
                    phases.enter("log")  # what follows is not the save
                run_log.advance(step)
            phases.enter("checkpoint")
            saver.wait()
        except Ending as ending:
            if done > saved:
                save(done, exported=done == total)
            _end(ending, saver, done, total)


def _first_model(config: Config, saved: bool) -> DiT:
    """The model as a run begins; without memory for its weights where a checkpoint has them.

    Raises:
        ConfigError: ``train.init_from`` is no such weights.
    """
    with torch.device("meta" if saved else "cpu"):
        model = DiT(config.model.to_dit())
    if not saved:
        initialize(model, config.run.seed)
        if config.train.init_from:
            load_weights(model, config.train.init_from)
    return model


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


def _saved(checkpoint: Checkpoint, *, export: Config | None) -> None:
    """What follows a save, on rank 0."""
    console.print(f"saved step {checkpoint.step}")
    if export is not None:
        export_checkpoint(checkpoint, config=export)


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


def _train_step(
    engine: Engine,
    ema: EMA,
    model: DiT,
    batch: Batch,
    to_task: TaskMaker,
    config: Config,
    lr: float,
    step: int,
    meter: Meter,
) -> tuple[Tensor, StepResult]:
    """One optimizer step, after ``step`` others; the losses of this rank's rows, (losses, rows) on the device."""
    accumulation, phases = config.train.accumulation, meter.phases
    phases.enter("forward")
    tasks = [to_task(micro) for micro in batch.split(accumulation)]
    differences = ema_differences(model, ema, tasks, config, step=step)
    losses = []
    for i, (task, difference) in enumerate(zip(tasks, differences, strict=True)):
        phases.enter("forward")
        with engine.microbatch(last=i == accumulation - 1):
            with meter.own.timed() if engine.forward_alone else nullcontext():
                loss = training_loss(engine.module, task, config, step=step, difference=difference)
            phases.enter("backward")
            engine.backward(loss[0].mean() / accumulation)
        losses.append(loss.detach())
    phases.enter("optimizer")
    return torch.cat(losses, dim=1), engine.step(lr)


def build_order(config: Config, index: ShardIndex, dist: Dist) -> SampleOrder:
    """The order of the run's training samples.

    Raises:
        ConfigError: streams, processes, memory or held-out shards do not fit the data.
    """
    config.check_world_size(dist.world_size, dist.local_world_size)
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
def _claimed_by_main(config: Config, identity: Identity, dist: Dist, force: bool) -> Iterator[Any]:
    """Rank 0 holds the run directory; a refusal ends every rank."""
    with ExitStack() as held:
        refusal = path = None
        if dist.is_main:
            try:
                path = held.enter_context(claim(config, identity, force=force))
            except ConfigError as error:
                refusal = str(error)
        refusal = from_main(refusal, dist)
        if refusal is not None:
            raise ConfigError(refusal)
        yield path


def _build_ema(engine: Engine, config: Config, state: LoadedState | None) -> EMA:
    ema = EMA(engine.masters(), config.ema.decays, engine.masters_written)
    if state is not None:
        for decay in config.ema.decays:
            ema.load(decay, engine.parts(state, f"ema/{decay}"))
    return ema


def _snapshot(
    engine: Engine, ema: EMA, model: DiT, config: Config, index: ShardIndex, step: int, dist: Dist
) -> tuple[dict[str, Piece], dict[str, Any]]:
    """The pieces that this rank writes, and what stands beside them in the manifest. COLLECTIVE."""
    averages = {f"ema/{decay}": shards for decay, shards in ema.averages.items()}
    masters = engine.masters()
    pieces = engine.canonical({"model": masters, **averages, **engine.moments()})
    if dist.is_main:  # buffers are constant but for those among the masters: every rank has them whole
        for name, buffer in model.named_buffers():
            if name not in masters:
                pieces[f"model/{name}"] = Piece(tuple(buffer.shape), 0, buffer)
    meta = {
        "images_seen": step * config.train.global_batch_size,
        "optimizer_steps": engine.optimizer_steps(),
        "config": config.model_dump(mode="json"),
        "index_sha256": index.sha256,
    }
    return pieces, meta
