"""A sampling plan: everything that the images depend on. Its hash names the folder that holds them."""

import hashlib
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from ig_dist.arithmetic import Precision
from ig_dist.config import Config
from ig_dist.config.describe import plan_name
from ig_dist.data.classes import class_words, find_classes
from ig_dist.data.index import read_index_file
from ig_dist.diffusion.guidance import GuidanceTerm
from ig_dist.diffusion.path import resolve_shift
from ig_dist.diffusion.samplers import SOLVERS, SolverName
from ig_dist.errors import ConfigError, IgDistError
from ig_dist.export import ExportInfo, ModelInfo
from ig_dist.rng import Purpose, integers


class SolvedBatch(NamedTuple):
    """Images that are solved at once."""

    solved: range  # their numbers; of a plan in one size also those of images that would come after its last one
    kept: range  # those that the batch is made for


class Plan(BaseModel):
    """N images of one model. Image i depends on (plan, i); how units are shared out changes nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num: Annotated[int, Field(ge=1, le=10**9)]
    labels: Literal["balanced", "random"]
    num_classes: Annotated[int, Field(ge=1)]
    seed: int
    solver: SolverName
    steps: int
    time_shift: float = 1.0
    correct_last_step: bool = True
    rtol: float = 1e-3
    atol: float = 1e-6
    guidance: tuple[GuidanceTerm, ...]
    precision: Precision
    unit_size: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    weights_sha256: str
    weak_sha256: str | None = None  # hash of the weights of the second model, of plans with auto guidance
    classes: tuple[int, ...] = ()  # the only classes, in their order; empty: all
    state: Literal["fp64", "fp32"] = "fp64"
    decode_precision: Precision = "fp32"
    compile: bool | Literal["auto"] = "auto"

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans that were made before there was a choice of these keep their hash."""
        without = {"classes": (), "state": "fp64", "decode_precision": "fp32", "compile": "auto"}
        same = {key for key, value in without.items() if getattr(self, key) == value}
        return {key: value for key, value in fields(self).items() if key not in same}

    @property
    def digest(self) -> str:
        """The first 16 hex digits of the hash of all fields."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @property
    def num_units(self) -> int:
        """Units of ``unit_size`` images; the last one may be smaller."""
        return -(-self.num // self.unit_size)

    def unit(self, number: int) -> range:
        """Image numbers of a unit."""
        return range(number * self.unit_size, min((number + 1) * self.unit_size, self.num))

    def batches(self, number: int, *, one_size: bool) -> list[SolvedBatch]:
        """Those of a unit, as few as may be and of about one size; ``one_size``: of just that, in all units."""
        unit = self.unit(number)
        images = min(self.unit_size, self.num) if one_size else len(unit)
        rows = -(-images // -(-images // self.batch_size))
        kept = [range(start, min(start + rows, unit.stop)) for start in range(unit.start, unit.stop, rows)]
        return [SolvedBatch(range(part.start, part.start + rows) if one_size else part, part) for part in kept]

    @property
    def solver_settings(self) -> dict[str, Any]:
        """The fields that its solver takes."""
        return {name: getattr(self, name) for name in SOLVERS[self.solver].settings}

    @property
    def evaluations(self) -> int:
        """Of the velocity, for an image; of a solver that chooses its steps, about so many."""
        return SOLVERS[self.solver].evaluations(**self.solver_settings)

    def image_labels(self, images: Tensor) -> Tensor:
        """Class of each image, (B,) int64, from image numbers (B,)."""
        count = len(self.classes) or self.num_classes
        if self.labels == "balanced":
            chosen = images % count
        else:
            chosen = integers(self.seed, Purpose.SAMPLE_LABEL, images, 1)[:, 0] * count >> 32
        return torch.tensor(self.classes, device=images.device)[chosen] if self.classes else chosen

    def unit_labels(self, number: int) -> NDArray[np.int64]:
        """Class of each image of a unit."""
        labels: NDArray[np.int64] = self.image_labels(image_numbers(self.unit(number))).numpy()
        return labels

    def describe(self) -> str:
        """The plan in a few words; the last one names it, so that no two plans are described alike."""
        return plan_name(self.digest, self.model_dump(mode="json"))


def make_plan(config: Config, info: ModelInfo, weights_sha256: str, weak: ExportInfo | None = None) -> Plan:
    """The plan of the config's ``sample`` and ``guidance`` groups for weights of that hash.

    ``weak`` is the second model's, where guidance has an auto term.

    Raises:
        ConfigError: guidance that the models cannot give.
    """
    guidance = [term for term in config.guidance if term.scale != 1]  # a term of scale 1 is no guidance
    if any(term.kind == "ig" for term in guidance) and info.model.aux_depth is None:
        raise ConfigError("guidance asks for ig, but the model has no auxiliary head: train with model.aux_depth")
    if any(term.kind == "cfg" for term in guidance) and not info.trained_with_null_label:
        raise ConfigError(
            "guidance asks for cfg, but the model never saw the null label: train with loss.label_drop=0.1"
        )
    for term in guidance:
        if term.channels is not None and term.channels > info.latent.shape[0]:
            raise ConfigError(
                f"guidance asks for {term.kind} on {term.channels} channels, but the latents have"
                f" {info.latent.shape[0]}: leave channels out to guide all"
            )
    auto = [term for term in guidance if term.kind == "auto"]
    if auto and weak is not None:
        _check_weak(weak, info, config)
        cfg = any(term.kind == "cfg" for term in guidance)
        if cfg and not weak.trained_with_null_label and any(term.branches != "conditional" for term in auto):
            raise ConfigError(
                f"sample.weak_model {config.sample.weak_model}: it never saw the null label, which cfg asks of it:"
                " give its auto term branches=conditional"
            )
    sample = config.sample
    try:
        classes = find_classes(sample.classes, info.classes, _words(config, info)) if sample.classes else []
    except ConfigError as error:
        raise ConfigError(f"sample.classes: {error}") from None
    return Plan(
        **sample.model_dump(include=Plan.model_fields.keys() - {"time_shift", "classes"}),
        num_classes=len(info.classes),
        time_shift=resolve_shift(sample.time_shift, info.latent.shape),
        guidance=tuple(guidance),
        weights_sha256=weights_sha256,
        weak_sha256=weak.weights_sha256 if auto and weak is not None else None,
        classes=tuple(classes),
    )


def class_names(config: Config, info: ModelInfo) -> list[str]:
    """What people call each class: its first word, or its name in the index."""
    return [text.split(",")[0] for text in _words(config, info) or info.classes]


def _words(config: Config, info: ModelInfo) -> list[str] | None:
    words = class_words(info.classes)
    if words is not None:
        return words
    try:
        return read_index_file(config.data.index)[1].class_names
    except IgDistError:  # names will do
        return None


def _check_weak(weak: ExportInfo, info: ModelInfo, config: Config) -> None:
    """Both models must speak of the same latents, classes and path; sizes and heads may differ."""
    pairs = {
        "latents": (weak.latent, info.latent),
        "tokenizer": (weak.tokenizer.sha256, info.tokenizer.sha256),
        "classes": (weak.classes, info.classes),
        "loss.path": (weak.path, info.path),
    }
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ConfigError(
                f"sample.weak_model {config.sample.weak_model} was trained with other {name} than the model: give one"
                " that was trained on the same index with the same loss.path"
            )


def image_numbers(numbers: range) -> Tensor:
    """(B,) int64."""
    return torch.arange(numbers.start, numbers.stop)
