"""What a run shows of itself while it trains, by its first EMA: validation losses, sample grids and scores.

None of it touches the weights, the data order or any other random number. Every rank does the same forward passes, so
this works however the model is spread over them. Autoguidance is left out: its second model is not here.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.autoencoders.tokenizers import Tokenizer
from ig_dist.config import Config
from ig_dist.config.catalogue import METRICS, extractors_of
from ig_dist.data.index import ShardIndex
from ig_dist.data.reader import ShardReader
from ig_dist.diffusion.guidance import GuidanceTerm
from ig_dist.errors import Ending
from ig_dist.evaluation.references import open_reference
from ig_dist.evaluation.scores import Scores, plan_protocol, write_result
from ig_dist.export import ModelInfo, model_info
from ig_dist.features.extractors.extractor import Extractor
from ig_dist.features.features import HeldFeatures
from ig_dist.models.dit import DiT
from ig_dist.parallel.dist import Dist, StopFlag, begin_any, gather_rows, on_main
from ig_dist.plans.plan import Plan, image_numbers, make_plan
from ig_dist.sampling.run import config_extractor
from ig_dist.sampling.solving import Models, Sampler, decoder
from ig_dist.training.learner import EMA
from ig_dist.training.objective import validation_loss

COLUMNS = 10


def validate(
    model: DiT, ema: EMA, index: ShardIndex, config: Config, reader: ShardReader, dist: Dist, stop: StopFlag
) -> dict[str, float]:
    """The validation losses, by name. COLLECTIVE; raises as ``validation_loss``."""
    with ema.swapped_in(config.ema.decays[0]):
        losses = validation_loss(model, index, config, reader, config.micro_batch(dist.world_size), dist, stop)
    names = ("val_loss", "val_loss_final", "val_loss_aux", "val_loss_cosine")
    return dict(zip(names if config.loss.cosine_weight else names[:-1], losses, strict=False))


def sample_grid(model: DiT, ema: EMA, index: ShardIndex, config: Config, device: torch.device) -> NDArray[np.uint8]:
    """Images, (H, W, channels) uint8: unguided, then with the config's guidance. COLLECTIVE.

    The same noise in each column and at every step of the run.
    """
    info, guidance = model_info(config, index), _guidance(config)
    rows = [[], guidance] if guidance else [[]]
    plans = [_plan(config, info, terms, num=COLUMNS, labels="balanced") for terms in rows]
    numbers, models = torch.arange(COLUMNS), Models(model, info, grid_tokenizer(index, config, device))
    with ema.swapped_in(config.ema.decays[0]):
        images = [Sampler(models, plan).generate(numbers).cpu().numpy() for plan in plans]
    return np.concatenate([np.concatenate(list(row), axis=1) for row in images], axis=0)


def grid_tokenizer(index: ShardIndex, config: Config, device: torch.device) -> Tokenizer:
    """What decodes the grids, see ``decoder``."""
    return decoder(config, index.info, device)


class TrainingScores:
    """Scores of ``evaluate.training_num`` images, by Heun with ``evaluate.training_steps`` and the config's guidance.

    COLLECTIVE, as is ``score``. Raises ConfigError where an extractor or the reference is missing, or lacks what a
    score needs: now, not at the first scores.
    """

    def __init__(self, config: Config, index: ShardIndex, dist: Dist, stop: StopFlag, beat: Callable[[], None]) -> None:
        self._config, self._dist, self._stop, self._beat = config, dist, stop, beat
        self._metrics, device = config.evaluate.metrics, dist.device
        self._extractors: dict[str, Extractor] = {
            name: config_extractor(config, name, device) for name in extractors_of(self._metrics)
        }
        self._info = model_info(config, index)
        self._tokenizer = decoder(config, index.info, device)
        self._plan = _plan(
            config,
            self._info,
            _guidance(config),
            solver="heun",
            steps=config.evaluate.training_steps,
            correct_last_step=True,
            num=config.evaluate.training_num,
            classes=[],  # all of them
        )
        self._wanted = dict.fromkeys(METRICS[name][1:] for name in self._metrics)
        self._reference = open_reference(
            config.evaluate.reference or config.data.index,
            self._metrics,
            self._extractors.__getitem__,
            tokenizer=config.sample.tokenizer,
            side=index.info.tokenizer.image_size,
        )

    def score(self, model: DiT, ema: EMA, step: int, run: Path | None) -> dict[str, float]:
        """The scores, by name; ``score_num`` is the number of images. Ending, where the run is asked to stop.

        The first rank holds the features to the reference, and writes scores and protocol into the run directory.
        """
        with ema.swapped_in(self._config.ema.decays[0]):
            tensors = self._features(Models(model, self._info, self._tokenizer))
        found = on_main(partial(self._scored, tensors, step, run), self._dist)
        return {**{f"score_{name}": value for name, value in found["scores"].items()}, "score_num": self._plan.num}

    def _features(self, models: Models) -> dict[tuple[str, str], NDArray[Any]]:
        """Features of all images in their order, on the first rank only. The ranks take turns, a batch each."""
        plan, dist, sampler = self._plan, self._dist, Sampler(models, self._plan)
        rows: defaultdict[tuple[str, str], list[Tensor]] = defaultdict(list)
        for first in range(0, plan.num, dist.world_size * plan.batch_size):
            stopping = begin_any([self._stop.asked], dist)
            mine = first + dist.rank * plan.batch_size  # past the end images that would come next, and are left out
            images = sampler.generate(image_numbers(range(mine, mine + plan.batch_size)))
            for extractor in self._extractors.values():
                for name, values in extractor(images).items():
                    if (key := (extractor.name.partition("-")[0], name)) in self._wanted:
                        rows[key] += gather_rows(values.cpu(), dist) or []
            self._beat()
            if any(stopping()):
                raise Ending
        if not dist.is_main:
            return {}
        labels = plan.image_labels(torch.arange(plan.num)).numpy()
        held = {key: torch.cat(parts)[: plan.num].numpy() for key, parts in rows.items()}
        return {**held, **{(name, "labels"): labels for name in self._extractors}}

    def _scored(self, tensors: dict[tuple[str, str], NDArray[Any]], step: int, run: Path | None) -> dict[str, Any]:
        held = HeldFeatures(f"step {step}", self._plan.num, self._extractors, tensors)
        rules = self._config.evaluate.protocol
        result = Scores(held, self._reference, protocol=rules, device=self._dist.device).score(self._metrics)
        made = plan_protocol(self._plan, self._info, self._tokenizer.uint8_rule)
        result["protocol"] |= {**made, "ema": self._config.ema.decays[0], "step": step}
        if run is not None:
            write_result(result, run / "evaluations" / "training" / f"step_{step:010d}.json")
        return result


def _guidance(config: Config) -> list[GuidanceTerm]:
    return [term for term in config.guidance if term.kind != "auto"]


def _plan(config: Config, info: ModelInfo, guidance: list[GuidanceTerm], **sample: Any) -> Plan:
    sample["precision"] = config.train.precision  # as the blocks compute
    update = {"sample": config.sample.model_copy(update=sample), "guidance": guidance}
    return make_plan(config.model_copy(update=update), info, weights_sha256="of a run in progress")
