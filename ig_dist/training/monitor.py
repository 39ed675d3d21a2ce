"""What a run shows of itself while it trains: sample grids and the validation loss, both of the first EMA.

Neither touches the data order or any other random number: both are functions of the weights alone. Every rank does
the same forward passes, so this works however the model is spread over them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ig_dist.autoencoders.tokenizer import Tokenizer
from ig_dist.config import Config
from ig_dist.data.index import ShardIndex
from ig_dist.data.reader import ShardReader
from ig_dist.export import ModelInfo, model_info
from ig_dist.models.dit import DiT
from ig_dist.parallel.dist import Dist, StopFlag
from ig_dist.plans.plan import Plan, make_plan
from ig_dist.sampling.solving import Models, Sampler, decoder
from ig_dist.training.ema import EMA
from ig_dist.training.objective import validation_loss

COLUMNS = 10


def validate(
    model: DiT, ema: EMA, index: ShardIndex, config: Config, reader: ShardReader, dist: Dist, stop: StopFlag
) -> dict[str, float]:
    """The validation losses of the first EMA, by name. COLLECTIVE; raises as ``validation_loss``."""
    batch_size = config.train.global_batch_size // dist.world_size // config.train.accumulation
    with ema.swapped_in(config.ema.decays[0]):
        losses = validation_loss(model, index, config, reader, batch_size, dist, stop)
    named = dict(zip(("val_loss", "val_loss_final", "val_loss_aux", "val_loss_cosine"), losses, strict=True))
    return {name: value for name, value in named.items() if name != "val_loss_cosine" or config.loss.cosine_weight}


def sample_grid(model: DiT, ema: EMA, index: ShardIndex, config: Config, device: torch.device) -> NDArray[np.uint8]:
    """Images of the first EMA, (H, W, channels) uint8: unguided, then with the config's guidance. COLLECTIVE.

    The same noise in each column and at every step of the run. Autoguidance is left out: its second model is not here.
    """
    info = model_info(config, index)
    plans = [_plan(config.model_copy(update={"guidance": []}), info)]
    guidance = [term for term in config.guidance if term.kind != "auto"]
    if guidance:
        plans.append(_plan(config.model_copy(update={"guidance": guidance}), info))
    numbers, models = torch.arange(COLUMNS), Models(model, info, grid_tokenizer(index, config, device))
    with ema.swapped_in(config.ema.decays[0]):
        rows = [Sampler(models, plan).generate(numbers).cpu().numpy() for plan in plans]
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)


def grid_tokenizer(index: ShardIndex, config: Config, device: torch.device) -> Tokenizer:
    """What decodes the grids, see ``decoder``."""
    return decoder(config, index.info, device)


def _plan(config: Config, info: ModelInfo) -> Plan:
    update = {"num": COLUMNS, "labels": "balanced", "precision": config.train.precision}  # as the blocks compute
    sample = config.sample.model_copy(update=update)
    return make_plan(config.model_copy(update={"sample": sample}), info, weights_sha256="of a run in progress")
