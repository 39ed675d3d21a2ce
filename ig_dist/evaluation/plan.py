"""A sampling plan: everything that the images depend on. Its hash names the folder that holds them."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ig_dist.config import Config, GuidanceConfig
from ig_dist.diffusion.guidance import GuidanceTerm
from ig_dist.diffusion.samplers import evaluations
from ig_dist.errors import ConfigError
from ig_dist.export import ModelInfo
from ig_dist.rng import Purpose, integers


class Plan(BaseModel):
    """N images of one model. Image i depends on (plan, i); how units are shared out changes nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num: int
    labels: Literal["balanced", "random"]
    num_classes: int
    seed: int
    solver: Literal["euler", "heun", "euler_maruyama"]
    steps: int
    guidance: tuple[GuidanceConfig, ...]
    precision: Literal["fp32", "bf16"]
    unit_size: int
    batch_size: int
    weights_sha256: str

    @property
    def digest(self) -> str:
        """The first 16 hex digits of the hash of all fields."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @property
    def num_units(self) -> int:
        """Units of ``unit_size`` images; the last one may be smaller."""
        return -(-self.num // self.unit_size)

    @property
    def evaluations(self) -> int:
        """Velocity evaluations per image."""
        return evaluations(self.solver, self.steps)

    def terms(self) -> list[GuidanceTerm]:
        """Guidance as the samplers take it."""
        return [GuidanceTerm(term.kind, term.scale, term.interval) for term in self.guidance]

    def unit(self, number: int) -> range:
        """Image numbers of a unit."""
        return range(number * self.unit_size, min((number + 1) * self.unit_size, self.num))

    def image_labels(self, images: Tensor) -> Tensor:
        """Class of each image, (B,) int64, from image numbers (B,)."""
        if self.labels == "balanced":
            return images % self.num_classes
        words = integers(self.seed, Purpose.SAMPLE_LABEL, images, 1)[:, 0]
        return words * self.num_classes >> 32


def make_plan(config: Config, info: ModelInfo, weights_sha256: str) -> Plan:
    """The plan of the config's ``sample`` and ``guidance`` groups for weights of that hash.

    Raises:
        ConfigError: guidance that the model cannot give.
    """
    guidance = [term for term in config.guidance if term.scale != 1]  # a term of scale 1 is no guidance
    if any(term.kind == "ig" for term in guidance) and info.model.aux_depth is None:
        raise ConfigError("guidance asks for ig, but the model has no auxiliary head: train with model.aux_depth")
    if any(term.kind == "cfg" for term in guidance) and not info.trained_with_null_label:
        raise ConfigError(
            "guidance asks for cfg, but the model never saw the null label: train with loss.label_drop=0.1"
        )
    sample = config.sample
    return Plan(
        num=sample.num,
        labels=sample.labels,
        num_classes=len(info.classes),
        seed=sample.seed,
        solver=sample.solver,
        steps=sample.steps,
        guidance=tuple(guidance),
        precision=sample.precision,
        unit_size=sample.unit_size,
        batch_size=sample.batch_size,
        weights_sha256=weights_sha256,
    )


def image_numbers(numbers: range, device: torch.device) -> Tensor:
    """(B,) int64."""
    return torch.arange(numbers.start, numbers.stop, device=device)
