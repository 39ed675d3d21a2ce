"""Scores while training: all ranks make images with the first EMA, the first one holds their features to a reference.

Neither the weights nor the order of the data are touched. Every rank does the same forward passes, so this works
however the model is spread over them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.config import Config
from ig_dist.config.catalogue import METRICS, extractors_of
from ig_dist.data.index import ShardIndex
from ig_dist.errors import Ending, IgDistError
from ig_dist.evaluation.references import open_reference
from ig_dist.evaluation.scores import Scores, plan_protocol, write_result
from ig_dist.export import model_info
from ig_dist.features.extractors.extractor import Extractor
from ig_dist.features.features import HeldFeatures
from ig_dist.models.dit import DiT
from ig_dist.parallel.dist import Dist, StopFlag, begin_any, from_main, gather_rows
from ig_dist.plans.plan import Plan, image_numbers, make_plan
from ig_dist.sampling.run import config_extractor
from ig_dist.sampling.solving import Models, Sampler, decoder
from ig_dist.training.ema import EMA


class TrainingScores:
    """Scores of ``evaluate.training_num`` images, by Heun with ``evaluate.training_steps`` and the config's guidance.

    Autoguidance is left out: its second model is not here. What is missing, weights of an extractor or a reference,
    ends the run now, not at the first scores. COLLECTIVE, as is ``score``.

    Args:
        config: the run's.
        index: its data.
        dist: the ranks.
        stop: asks the run to stop.
        beat: gives a sign of life.

    Raises:
        ConfigError: an extractor or the reference is missing, or lacks what a score needs.
    """

    def __init__(self, config: Config, index: ShardIndex, dist: Dist, stop: StopFlag, beat: Callable[[], None]) -> None:
        self._config, self._dist, self._stop, self._beat = config, dist, stop, beat
        self._metrics, device = config.evaluate.metrics, dist.device
        self._extractors: dict[str, Extractor] = {
            name: config_extractor(config, name, device) for name in extractors_of(self._metrics)
        }
        self._info = model_info(config, index)
        self._tokenizer = decoder(config, index.info, device)
        self._plan = _plan(config, index)
        self._wanted = dict.fromkeys(METRICS[name][1:] for name in self._metrics)
        self._reference = open_reference(
            config.evaluate.reference or config.data.index,
            self._metrics,
            self._extractors.__getitem__,
            tokenizer=config.sample.tokenizer,
            side=index.info.tokenizer.image_size,
        )

    def score(self, model: DiT, ema: EMA, step: int, run: Path | None) -> dict[str, float]:
        """The scores, by name; ``score_num`` is the number of images.

        Args:
            model: the model in training.
            ema: its averages.
            step: batches consumed.
            run: run directory, on the first rank: scores and protocol are written to ``evaluations/training/``.

        Raises:
            Ending: asked to stop.
            IgDistError: the reference does not fit.
        """
        with ema.swapped_in(self._config.ema.decays[0]):
            tensors = self._features(Models(model, self._info, self._tokenizer))
        result: dict[str, Any] | IgDistError | None = None
        if tensors is not None:
            try:
                result = self._scored(tensors, step, run)
            except IgDistError as error:  # of the first rank: all of them end with it
                result = error
        found = from_main(result, self._dist)
        if isinstance(found, IgDistError):
            raise found
        return {**{f"score_{name}": value for name, value in found["scores"].items()}, "score_num": self._plan.num}

    def _features(self, models: Models) -> dict[tuple[str, str], NDArray[Any]] | None:
        """Features of all images in their order, on the first rank. The ranks take turns, a batch each."""
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
            return None
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


def _plan(config: Config, index: ShardIndex) -> Plan:
    evaluate = config.evaluate
    fast = {"solver": "heun", "steps": evaluate.training_steps, "correct_last_step": True, "num": evaluate.training_num}
    fast |= {"classes": [], "precision": config.train.precision}  # of all classes; as the blocks compute
    guidance = [term for term in config.guidance if term.kind != "auto"]
    sample = config.sample.model_copy(update=fast)
    chosen = config.model_copy(update={"sample": sample, "guidance": guidance})
    return make_plan(chosen, model_info(config, index), weights_sha256="of a run in progress")
