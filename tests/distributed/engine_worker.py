"""One rank of several that does a list of jobs, one after the other: a start of a process costs more than most jobs.

    RANK=0 WORLD_SIZE=2 ... python -m tests.distributed.engine_worker jobs.json

A job is ``{"config": FILE, "overrides": [...]}``: a training run. With ``source``, ``step`` and ``dest`` an engine
starts from that checkpoint and saves what it then holds. With ``measure`` an engine's memory is written beside the run.
With ``dealt_out`` an engine is built on ranks that lie on two machines in turn, and its refusal is written there.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed.tensor import DTensor

from ig_dist.checkpoints.exchange import Loaded
from ig_dist.checkpoints.saving import Saver
from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.config.file import load_config
from ig_dist.data.index import read_index
from ig_dist.errors import ConfigError, NonFiniteError
from ig_dist.models.dit import DiT, initialize
from ig_dist.parallel.build import build_engine
from ig_dist.parallel.dist import Dist, init_distributed, patience_of, shut_down
from ig_dist.terminal import leave
from ig_dist.training import trainer
from ig_dist.training.learner import EMA, build_learner, state_pieces
from ig_dist.training.phases import Phases


def reload(job: dict[str, Any], dist: Dist) -> None:
    config = load_config(job["config"], job["overrides"])
    index = read_index(config.data.index)
    config = config.with_data(index.info.latent.shape, len(index.info.classes))
    checkpoint = CheckpointStore(job["source"]).find(dist, job["step"], keep=True)
    with torch.device("meta"):  # everything must come from the checkpoint
        model = DiT(config.model.to_dit())
    learner = build_learner(config, index, model, Loaded(checkpoint, dist), dist, Phases())
    held = state_pieces(learner, index, checkpoint.step, dist)
    saver = Saver(CheckpointStore(job["dest"]), dist)
    saver.save(checkpoint.step, *held)
    saver.wait()
    saver.close()


def measure(job: dict[str, Any], dist: Dist) -> None:
    """Bytes that an engine with its averages holds between a backward pass and its step, or the next micro-batch."""
    config = load_config(job["config"], job["overrides"])
    index = read_index(config.data.index)
    config = config.with_data(index.info.latent.shape, len(index.info.classes))
    before = live_bytes()
    model = DiT(config.model.to_dit())
    initialize(model, 0)
    engine = build_engine(model, config, None, dist)
    ema = EMA(engine.masters(), config.ema.decays)
    size, channels = model.config.input_size, model.config.in_channels
    for step in range(2):  # the moments come with the first step
        with engine.microbatch(last=step == 0 or config.train.accumulation == 1):
            output = engine.module(torch.randn(2, channels, size, size), torch.rand(2), torch.zeros(2).long())
            engine.backward(sum(v.float().square().mean() for v in output if v is not None))
        if step == 0:
            ema.update(engine.step(1e-4).finite)
    del output
    if dist.is_main:
        Path(f"{config.run.dir}.bytes").write_text(str(live_bytes() - before))


def deal_out(job: dict[str, Any], dist: Dist) -> None:
    config = load_config(job["config"], job["overrides"]).with_data((1, 8, 8), 10)
    with torch.device("meta"):
        model = DiT(config.model.to_dit())
    try:
        build_engine(model, config, None, replace(dist, local_world_size=2, local_rank=dist.rank // 2))
    except ConfigError as error:
        Path(f"{config.run.dir}.{dist.rank}.refusal").write_text(str(error))


def live_bytes() -> int:
    """Memory of all tensors that Python knows of, and of their gradients; of sharded ones what this rank has."""
    gc.collect()
    sizes = {}
    for tensor in [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]:
        for held in (tensor, tensor.grad if tensor.is_leaf else None):
            if held is not None and not held.is_meta:
                storage = (held.to_local() if isinstance(held, DTensor) else held).untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


OTHERS = {"source": reload, "measure": measure, "dealt_out": deal_out}


def main() -> None:
    torch.set_num_threads(1)
    dist = init_distributed(120, 120)
    trainer.init_distributed = lambda *_: dist
    trainer.shut_down = lambda: None
    for job in json.loads(Path(sys.argv[1]).read_text()):
        kind = next((kind for kind in OTHERS if kind in job), None)
        if kind is not None:
            OTHERS[kind](job, dist)
            continue
        try:
            trainer.train(load_config(job["config"], job["overrides"]))
        except NonFiniteError:
            assert job.get("blows_up")
        patience = {patience_of(group, dist.device) for group in torch_dist.distributed_c10d._world.pg_map}
        assert dist.world_size == 1 or patience == {
            timedelta(seconds=120)
        }  # the watchdog comes first, in the groups of engines too
    shut_down()


if __name__ == "__main__":
    main()
    leave(0)
