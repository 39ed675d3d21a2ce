"""The configuration: typed groups, YAML files, dotted overrides.

Precedence: the defaults here < the YAML file < ``a.b=c`` on the command line. Unknown keys are refused with the
nearest name; what two fields say together is checked here too, and the message names the fix.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ig_dist.diffusion.guidance import GuidanceTerm, check_overlap
from ig_dist.errors import ConfigError
from ig_dist.models.dit import DiTConfig
from ig_dist.models.presets import PRESETS

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class RunConfig(_Group):
    """Where a run lives and the seed of all its randomness."""

    dir: str = ""
    """Run directory, a local path. Empty: ``runs/<name of the config file>``."""
    seed: Seed = 0
    """Seed of weights, data order, noise, times and label drop."""


class ModelConfig(_Group):
    """The diffusion transformer. Widths come from the preset; a width given here replaces the preset's."""

    preset: str | None = None
    """One of the published sizes, e.g. ``SiT-XL/2``."""
    depth: Positive | None = None
    """Number of transformer blocks."""
    hidden_size: Positive | None = None
    """Width of the residual stream."""
    num_heads: Positive | None = None
    """Attention heads per block."""
    patch_size: Positive | None = None
    """Side of a patch, in latent pixels."""
    aux_depth: Positive | None = None
    """The auxiliary head reads the output of this many blocks; null: no auxiliary head, no Internal Guidance."""
    time_input: Literal["t", "one_minus_t"] = "t"
    """What enters the time embedding: our t (0 = data), or 1 - t for weights trained the other way round."""
    input_size: Positive | None = None
    """Side of the latent. Taken from the data index when null."""
    in_channels: Positive | None = None
    """Channels of the latent. Taken from the data index when null."""
    num_classes: Positive | None = None
    """Number of classes. Taken from the data index when null."""

    @model_validator(mode="after")
    def _fill_from_preset(self) -> Self:
        widths = ("depth", "hidden_size", "num_heads", "patch_size")
        if self.preset is not None:
            if self.preset not in PRESETS:
                near = difflib.get_close_matches(self.preset, PRESETS, n=3, cutoff=0.0)
                raise ValueError(f"unknown preset {self.preset!r}; the nearest are {', '.join(near)}")
            for name, value in zip(widths, PRESETS[self.preset], strict=True):
                if getattr(self, name) is None:
                    setattr(self, name, value)
        missing = [name for name in widths if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} not given: set model.preset (e.g. SiT-B/2) or each of them")
        self.to_dit(input_size=self.patch_size, in_channels=1, num_classes=1)  # its checks, before data is known
        return self

    def to_dit(self, **missing: int | None) -> DiTConfig:
        """What the model is built from; ``missing`` stands in for shapes that only the data index knows."""
        values = self.model_dump(exclude={"preset"})
        return DiTConfig(**{**values, **{k: v for k, v in missing.items() if values[k] is None}})


class LossConfig(_Group):
    """The training objective (docs/architecture.md, "The mathematics")."""

    path: Literal["linear", "cosine"] = "linear"
    """Interpolation between data (t = 0) and noise (t = 1)."""
    aux_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """Weight of the auxiliary head's loss."""
    time: Literal["uniform"] = "uniform"
    """Distribution of the training times."""
    label_drop: Fraction = 0.1
    """Share of labels replaced by the null label, for classifier-free guidance."""


class DataConfig(_Group):
    """The latents, and the order in which they are seen."""

    index: str = ""
    """``index.json`` of the latent shards, or its folder: a path or any fsspec URL."""
    streams: Positive = 32
    """Independent streams of samples. The world size must divide it: it fixes the order for every world size."""
    window_samples: Positive = 1024
    """Samples are shuffled within windows of this many consecutive ones (shards are shuffled globally)."""
    window_bytes: Positive = 16 * 2**30
    """Bound on the memory of all windows of one node, in bytes."""
    workers: NonNegative = 2
    """Background reader threads per process; 0 reads in the training loop. The order does not depend on it."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """A damaged sample ends the run, or is replaced by the next good one of its window and counted."""
    posterior: Literal["draw", "mean"] = "draw"
    """For shards that store mean and std: a fresh draw at every access, or the mean."""


class TrainConfig(_Group):
    """Length, batch and precision."""

    steps: Positive | None = None
    """Optimizer steps of the whole run. Give exactly one of ``steps`` and ``epochs``."""
    epochs: PositiveFloat | None = None
    """Passes over the data of the whole run."""
    global_batch_size: Positive = 256
    """Images a step, over all ranks and micro-batches."""
    accumulation: Positive = 1
    """Micro-batches a step on each rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of forward and backward; weights, moments and EMAs are fp32 always."""
    compile: bool = False
    """torch.compile each block."""
    max_nonfinite_steps: Positive = 20
    """End the run (exit code 3) after this many non-finite steps in a row; each is skipped and counted."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device for MFU, in TFLOP/s; null: known GPUs are looked up, others report no MFU."""
    timeout_s: Positive = 600
    """A collective that takes longer than this ends the run."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs (set the other to null)")
        return self


class OptimizerConfig(_Group):
    """The optimizer and its learning rate."""

    kind: Literal["adamw"] = "adamw"
    """Optimizer."""
    lr: PositiveFloat = 1e-4
    """Learning rate after warm-up."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Decoupled weight decay, on every parameter."""
    grad_clip: PositiveFloat | None = 1.0
    """Global gradient norm is clipped to this; null: no clipping."""
    warmup_steps: NonNegative = 0
    """Linear warm-up from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up."""
    min_lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """End of the cosine schedule."""


class EMAConfig(_Group):
    """Exponential moving averages of the weights."""

    decays: list[Annotated[float, Field(ge=0, lt=1)]] = [0.9999]
    """One average per decay, fp32. The first one is sampled from by default."""

    @field_validator("decays")
    @classmethod
    def _distinct(cls, decays: list[float]) -> list[float]:
        if len(set(decays)) != len(decays):
            raise ValueError(f"the decays {decays} must differ from each other")
        return decays


class EngineConfig(_Group):
    """How the model is spread over the ranks."""

    kind: Literal["ddp"] = "ddp"
    """ddp: every rank holds the whole model."""


class CheckpointConfig(_Group):
    """When and where checkpoints are written."""

    url: str = ""
    """Folder of the checkpoints: a path or any fsspec URL. Empty: ``checkpoints`` in the run directory."""
    every_steps: Positive = 5000
    """Steps between checkpoints; one is always written at the end."""
    keep_last: Positive = 2
    """The newest checkpoints that are kept."""
    keep_every: NonNegative = 0
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""


class GuidanceConfig(_Group):
    """One guidance term."""

    kind: Literal["ig", "cfg"]
    """Internal Guidance (weak head to final head) or classifier-free guidance (null label to label)."""
    scale: Finite
    """Extrapolation scale; 1 is no guidance."""
    interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Times t at which the term is on, both ends included (t = 1 is noise)."""


class SampleConfig(_Group):
    """How images are made: the plan."""

    num: Positive = 50_000
    """Number of images."""
    labels: Literal["balanced", "random"] = "balanced"
    """balanced: image i has class i mod num_classes; random: drawn uniformly."""
    seed: Seed = 0
    """Image i depends on (this seed, i) only."""
    solver: Literal["euler", "heun", "euler_maruyama"] = "heun"
    """Euler and Heun solve the ODE, Euler-Maruyama the SDE."""
    steps: Positive = 32
    """Steps of the solver."""
    batch_size: Positive = 64
    """Images at a time; a batch never crosses a unit."""
    unit_size: Positive = 512
    """Images per unit, the piece of work that one worker claims and writes whole."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the model; the solver's state is float64."""
    url: str = ""
    """Folder of the plans' samples: a path or any fsspec URL. Empty: ``samples`` in the run directory."""


class EvaluateConfig(_Group):
    """How images are scored."""

    metrics: list[Literal["fd_pixel"]] = ["fd_pixel"]
    """fd_pixel: Frechet distance on raw pixels."""
    reference: str = ""
    """Index of the real images. Empty: ``data.index``."""


class LogConfig(_Group):
    """What is written while training."""

    every_steps: Positive = 100
    """Steps between lines of ``metrics.jsonl``, TensorBoard points and progress."""


class Config(_Group):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guidance: list[GuidanceConfig] = []
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _cross_fields(self) -> Self:
        if not self.data.index:
            raise ValueError("data.index is empty: give the folder that data_prep/encode_latents.py wrote")
        batch, streams = self.train.global_batch_size, self.data.streams
        if batch % streams:
            raise ValueError(
                f"train.global_batch_size {batch} is not a multiple of data.streams {streams}:"
                f" use data.streams={math.gcd(batch, streams)}"
                f" or train.global_batch_size={math.ceil(batch / streams) * streams}"
            )
        check_overlap(self.guidance_terms())
        if any(term.kind == "ig" and term.scale != 1 for term in self.guidance) and self.model.aux_depth is None:
            raise ValueError("guidance asks for ig, but the model has no auxiliary head: set model.aux_depth")
        return self

    def guidance_terms(self) -> list[GuidanceTerm]:
        """The terms as the samplers take them."""
        return [GuidanceTerm(term.kind, term.scale, term.interval) for term in self.guidance]

    def with_data(self, latent_shape: tuple[int, int, int], num_classes: int) -> Config:
        """A copy whose model has the shapes of the data.

        Raises:
            ConfigError: the config asks for other shapes than the data has, or the patch does not fit.
        """
        channels, height, width = latent_shape
        found = {"in_channels": channels, "input_size": height, "num_classes": num_classes}
        for name, value in found.items():
            asked = getattr(self.model, name)
            if asked is not None and asked != value:
                raise ConfigError(f"model.{name} is {asked}, the data at {self.data.index} has {value}: remove the key")
        if height != width:
            raise ConfigError(f"the latents at {self.data.index} are {height}x{width}: only square ones are supported")
        config = with_values(self, model=found)
        try:
            config.model.to_dit()
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
        return config

    def total_steps(self, num_samples: int) -> int:
        """Steps of the whole run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.epochs is not None
        return math.ceil(self.train.epochs * num_samples / self.train.global_batch_size)

    def check_world_size(self, world_size: int) -> None:
        """Raise ConfigError unless ``world_size`` processes can share the streams and the batch."""
        streams, batch, accumulation = (
            self.data.streams,
            self.train.global_batch_size,
            self.train.accumulation,
        )
        if streams % world_size:
            allowed = [n for n in range(1, streams + 1) if streams % n == 0]
            raise ConfigError(
                f"{world_size} processes do not divide data.streams {streams}:"
                f" use {', '.join(map(str, allowed))} processes, or another data.streams in a new run"
            )
        if (batch // world_size) % accumulation:
            raise ConfigError(
                f"train.accumulation {accumulation} does not divide the {batch // world_size} images that each of"
                f" {world_size} processes has of train.global_batch_size {batch}:"
                f" use train.accumulation={math.gcd(batch // world_size, accumulation)}"
            )


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``a.b=c`` overrides, validate.

    Raises:
        ConfigError: with one line that names the key and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml")))
        raise ConfigError(f"no config file at {path}" + (f"; there are {known}" if known else ""))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of config groups, found {type(tree).__name__}")
    config = config_from_tree(apply_overrides(tree, overrides), source=str(path))
    return config if config.run.dir else with_values(config, run={"dir": f"runs/{path.stem}"})


def load_run(run: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """The resolved config of a run directory, with overrides.

    Raises:
        ConfigError: no run there.
    """
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run} is not a run directory (no config.yaml): give the run.dir of `ig-dist train`")
    return with_values(load_config(file, overrides), run={"dir": str(run)})


def with_scales(config: Config, *, ig_scale: float | None = None, cfg_scale: float | None = None) -> Config:
    """A copy with other guidance scales; a term that is there keeps its interval."""
    tree = config.model_dump(mode="json")
    for kind, scale in (("ig", ig_scale), ("cfg", cfg_scale)):
        terms = [term for term in tree["guidance"] if term["kind"] == kind]
        if scale is not None and not terms:
            tree["guidance"].append({"kind": kind, "scale": scale})
        elif scale is not None:
            for term in terms:
                term["scale"] = scale
    return config_from_tree(tree, source="guidance")


def config_from_tree(tree: dict[str, Any], source: str) -> Config:
    """Validate a parsed config; ``source`` names it in the error."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from None


def with_values(config: Config, **groups: dict[str, Any]) -> Config:
    """A validated copy of ``config`` with some values replaced, e.g. ``with_values(c, run={"dir": "x"})``."""
    tree = config.model_dump(mode="json")
    for group, values in groups.items():
        tree[group].update(values)
    return config_from_tree(tree, source="config")


def apply_overrides(tree: dict[str, Any], overrides: typing.Sequence[str]) -> dict[str, Any]:
    """Set ``a.b=c`` on a nested mapping (list items by number); values are YAML."""
    tree = yaml.safe_load(yaml.safe_dump(tree))  # an independent copy in plain types
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = key.split(".")
        if not separator or not all(parts):
            raise ConfigError(f"override {override!r} is not of the form group.key=value")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"override {key}: value {text!r} is not valid YAML: {_one_line(error)}") from None
        node: Any = tree
        for depth, part in enumerate(parts):
            last = depth == len(parts) - 1
            if isinstance(node, list):
                if not part.isdecimal() or int(part) >= len(node):
                    where = ".".join(parts[:depth])
                    raise ConfigError(f"override {key}: {where} has items 0 to {len(node) - 1}, not {part!r}")
                slot: Any = int(part)
            elif isinstance(node, dict):
                slot = part
            else:
                raise ConfigError(f"override {key}: {'.'.join(parts[:depth])} is a value, it has no key {part!r}")
            if last:
                node[slot] = value
            else:
                if isinstance(node, dict) and node.get(slot) is None:
                    node[slot] = {}
                node = node[slot]
    return tree


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, every field present."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(error: ValidationError) -> str:
    """The first problem in one line, with the nearest key for an unknown one."""
    problems = error.errors()
    # A missing group is often the echo of a misspelt one: report the misspelling first.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first, more = problems[0], len(problems) - 1
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        names = list(_group_at(first["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1, cutoff=0.0)
        text = f"unknown key {where!r}; did you mean {'.'.join([*map(str, first['loc'][:-1]), *near])!r}?"
    else:
        message = _one_line(ValueError(first["msg"].removeprefix("Value error, ")))
        given = first.get("input")
        shown = f" (got {given!r})" if where and isinstance(given, (str, int, float, bool, types.NoneType)) else ""
        text = f"{where}: {message}{shown}" if where else message
    return text + (f" (and {more} more)" if more else "")


def _group_at(location: typing.Sequence[str | int]) -> type[BaseModel]:
    group: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int):
            continue
        annotation = group.model_fields[part].annotation
        group = next((a for a in typing.get_args(annotation) if isinstance(a, type)), annotation)  # type: ignore[assignment]
    return group
