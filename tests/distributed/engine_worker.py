"""One rank of several that does a list of jobs, one after the other: a start of a process costs more than most jobs.

    RANK=0 WORLD_SIZE=2 ... python -m tests.distributed.engine_worker jobs.json

A job is ``{"config": FILE, "overrides": [...]}``: a training run. With ``source``, ``step`` and ``dest`` an engine
starts from that checkpoint and saves what it then holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ig_dist.checkpoints.exchange import Loaded
from ig_dist.checkpoints.saving import Saver
from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.config_file import load_config
from ig_dist.data.index import read_index
from ig_dist.errors import NonFiniteError
from ig_dist.models.dit import DiT
from ig_dist.parallel.build import build_engine
from ig_dist.parallel.dist import Dist, init_distributed, shut_down
from ig_dist.terminal import leave
from ig_dist.training import trainer


def reload(job: dict[str, Any], dist: Dist) -> None:
    config = load_config(job["config"], job["overrides"])
    index = read_index(config.data.index)
    config = config.with_data(index.info.latent.shape, len(index.info.classes))
    checkpoint = CheckpointStore(job["source"]).at(job["step"], dist, keep=True)
    with torch.device("meta"):  # everything must come from the checkpoint
        model = DiT(config.model.to_dit())
    engine = build_engine(model, config, Loaded(checkpoint, dist), dist)
    ema = trainer._build_ema(engine, config, Loaded(checkpoint, dist))
    held = trainer._snapshot(engine, ema, model, config, index, checkpoint.step, dist)
    saver = Saver(CheckpointStore(job["dest"]), dist)
    saver.save(checkpoint.step, *held)
    saver.wait()
    saver.close()


def main() -> None:
    torch.set_num_threads(1)
    dist = init_distributed(120, 120)
    trainer.init_distributed = lambda *_: dist
    trainer.shut_down = lambda: None
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "source" in job:
            reload(job, dist)
            continue
        try:
            trainer.train(load_config(job["config"], job["overrides"]))
        except NonFiniteError:
            assert job.get("blows_up")
    shut_down()


if __name__ == "__main__":
    main()
    leave(0)
