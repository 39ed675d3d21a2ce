"""Training: what a run goes on from, and the loop.

Run the same command again to resume: the step of the newest whole checkpoint is all that position, order and
randomness depend on.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from ig_dist.arithmetic import switches
from ig_dist.checkpoints.reading import Checkpoint
from ig_dist.checkpoints.saving import Saver
from ig_dist.checkpoints.store import checkpoint_store
from ig_dist.config import Config
from ig_dist.config.provenance import note_start
from ig_dist.data.index import ShardIndex, read_index
from ig_dist.data.latents import check_latents
from ig_dist.data.order import SampleOrder
from ig_dist.data.stream import Batch, BatchStream, check_window_memory
from ig_dist.errors import ConfigError, DataError, Ending, Preempted
from ig_dist.export import export_checkpoint
from ig_dist.models.dit import DiT, count_parameters, initialize
from ig_dist.optim.optimizer import learning_rate
from ig_dist.parallel.agreement import Awaited
from ig_dist.parallel.build import check_engine
from ig_dist.parallel.dist import Dist, StopFlag, from_main, init_distributed, on_main, shut_down
from ig_dist.parallel.engine import StepResult
from ig_dist.run_dir import Identity, claim, read_identity
from ig_dist.terminal import console
from ig_dist.training.beginning import find_checkpoint, load_weights
from ig_dist.training.failing import failures_told
from ig_dist.training.goodput import Ledger
from ig_dist.training.learner import Learner, build_learner, state_pieces, train_step
from ig_dist.training.metrics import RunLog
from ig_dist.training.monitor import TrainingScores, grid_tokenizer, sample_grid, validate
from ig_dist.training.objective import open_reader
from ig_dist.training.phases import Phases
from ig_dist.training.preflight import preflight, read_everywhere
from ig_dist.training.watchdog import longest_wait_s, watched


def train(config: Config, *, force: bool = False, lives_on: bool = False) -> None:
    """Train to the configured length, from the newest whole checkpoint on. COLLECTIVE.

    Args:
        config: the config; shapes that only the data knows may be open.
        force: go on in a run directory that belongs to another config.
        lives_on: this process does other things before and after: it gets its signals back, a hang does not end it
            where it has no peers, and its age is not the run's.

    Raises:
        IgDistError: why the run ends before its last step, as the table of exit codes in docs/running.md has it.
    """
    phases = Phases(0.0 if lives_on else None)
    with ExitStack() as cleanup:
        cleanup.enter_context(switches(config.train.precision, deterministic=config.train.deterministic))
        dist = init_distributed(config.train.timeout_s, longest_wait_s(config))
        cleanup.enter_context(failures_told(config, dist, phases))
        watchdog = cleanup.enter_context(watched(phases, config, dist, lives_on=lives_on))
        # After an error the groups stay as they are: NCCL's end of one waits for peers that may never come.
        cleanup.push(lambda kind, *_: shut_down() if kind is None or dist.world_size == 1 else None)
        cleanup.enter_context(failures_told(config, dist, phases, watchdog))
        # Once more: an error is said before what was opened until then is closed, which may take long.
        with failures_told(config, dist, phases, watchdog), watchdog.has_the_last_word():
            if run := _begin(config, dist, phases, cleanup, force=force, lives_on=lives_on):
                _go_on(run)


@dataclass
class _Run:
    """A run that goes on, as a rank holds it."""

    config: Config
    index: ShardIndex
    identity: Identity
    path: Path | None  # the run directory that rank 0 holds; None on the others
    start: int
    total: int
    dist: Dist
    phases: Phases
    stop: StopFlag
    saver: Saver
    scores: TrainingScores | None
    learner: Learner
    stream: BatchStream
    log: RunLog
    ledger: Ledger


def _begin(
    config: Config, dist: Dist, phases: Phases, cleanup: ExitStack, *, force: bool, lives_on: bool
) -> _Run | None:
    """Find the data, the run directory and its newest checkpoint, and build the rest from them. COLLECTIVE.

    Returns:
        What the loop needs, which ``cleanup`` closes; None: the run is finished.
    """
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
    claimed = on_main(lambda: cleanup.enter_context(claim(config, identity, force=force)), dist)
    path = claimed if dist.is_main else None
    identity = from_main(path and read_identity(path), dist)  # whoever held it until now may have begun it
    if store.agreed_steps(dist) != seen:  # whoever held the run until now has saved once more
        state, _ = find_checkpoint(store, config, index, dist, phases.beat, force=force)
        model = _first_model(config, state is not None)
    start, total = state.checkpoint.step if state else 0, config.total_steps(order.num_samples)
    if dist.is_main:
        doing = "finished at" if start >= total else "resume at" if start else "start from"
        console.print(f"{config.run.dir}: {doing} step {start} of {total}")
    if start >= total:
        return None

    if path is not None:
        note_start(path, step=start)
        store.abort_orphans()
    saver, stop = Saver(store, dist, phases.beat), StopFlag()
    cleanup.callback(saver.close)
    if lives_on:
        cleanup.callback(stop.restore)
    if dist.is_main:
        console.print(f"{count_parameters(model):,} parameters on {dist.world_size} x {dist.device.type}")
    preflight(index, config, dist, stop, phases.beat)
    scores = TrainingScores(config, index, dist, stop, phases.beat) if config.log.score_every_steps else None
    phases.enter("compile")
    learner = build_learner(config, index, model, state, dist, phases)
    state = None  # the engine has it
    phases.enter("start-up")
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
    log = RunLog(path, start=start, total=total, name="train")
    cleanup.callback(log.close)
    ledger = Ledger(path, phases, start)
    cleanup.callback(ledger.close)
    phases.last_warm_up = start + 1
    return _Run(
        config, index, identity, path, start, total, dist, phases, stop, saver, scores, learner, stream, log, ledger
    )


def _go_on(run: _Run) -> None:
    """The loop. COLLECTIVE."""
    config, phases, total = run.config, run.phases, run.total
    batches = Awaited(run.stream.get, run.stop, run.dist, beat=phases.beat)
    done = saved = run.start
    try:
        for step in range(done + 1, total + 1):  # step: batches consumed once this one is
            last = step == total
            phases.enter("data", step)
            batch = batches.next(final=last)
            lr = learning_rate(step - 1, config.optimizer, total)
            losses, result = train_step(run.learner, batch, step, lr)
            done = step
            if _due(step, config.log.every_steps, last):
                _write_line(run, step, lr, batch, losses, result)
            _look(run, step, last)
            if _due(step, config.checkpoint.every_steps, last):
                every = config.checkpoint.every_steps * config.checkpoint.export_every
                _save(run, step, exported=last or _due(step, every, last))
                saved = step
                phases.enter("log")  # what follows is not the save
            run.log.advance(step)
        phases.enter("checkpoint")
        run.saver.wait()
    except Ending as ending:
        if done > saved:
            _save(run, done, exported=done == total)
        _end(ending, run.saver, done, total)


def _write_line(run: _Run, step: int, lr: float, batch: Batch, losses: Tensor, result: StepResult) -> None:
    """A line of metrics. COLLECTIVE."""
    run.phases.enter("log")
    measured = run.learner.meter.read(losses, result, batch, step, run.stream.reader)
    saves = {"checkpoint_write_s": run.saver.write_s, "failed_saves": run.saver.failed_saves}
    run.log.write({"step": step, **measured, **saves, "lr": lr})
    run.ledger.note(step)


def _look(run: _Run, step: int, last: bool) -> None:
    """What is due of validation, sample grid and scores. COLLECTIVE."""
    config, index, learner, phases = run.config, run.index, run.learner, run.phases
    shown = learner.model, learner.ema
    if _due(step, config.log.validate_every_steps, last):
        phases.enter("validation")
        run.log.add(step, validate(*shown, index, config, run.stream.reader, run.dist, run.stop))
        learner.meter.pause()
    if _due(step, config.log.sample_every_steps, last):
        phases.enter("sampling")
        run.log.add_picture(step, sample_grid(*shown, index, config, run.dist.device))
        learner.meter.pause()
    if run.scores is not None and _due(step, config.log.score_every_steps, last):
        phases.enter("scoring")
        run.log.add(step, run.scores.score(*shown, step, run.path), "scores")
        learner.meter.pause()


def _save(run: _Run, step: int, *, exported: bool) -> None:
    """Begin a save, which goes on beside the steps. COLLECTIVE."""
    config = run.config  # a thread that is left behind may not hold the run, and with it the model

    def saved(checkpoint: Checkpoint) -> None:  # on rank 0
        console.print(f"saved step {checkpoint.step}")
        if exported:
            export_checkpoint(checkpoint, config=config)

    run.phases.enter("checkpoint")
    with run.learner.meter.saving():
        pieces, meta = state_pieces(run.learner, run.index, step, run.dist)
        meta["run"] = run.identity._asdict()
        run.saver.save(step, pieces, meta, saved)
    run.ledger.note(step)


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


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


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
