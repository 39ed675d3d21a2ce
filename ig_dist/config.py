"""The configuration: typed groups with a description per field, and what two fields say together.

How files and overrides become a ``Config`` is in ``config_file.py``.
"""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, Literal, Self

import fsspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from ig_dist.diffusion.guidance import GuidanceTerm, check_overlap
from ig_dist.errors import ConfigError
from ig_dist.models.dit import DiTConfig
from ig_dist.models.presets import PRESETS, Preset

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _known_protocol(url: str) -> str:
    try:
        fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))
    except (ValueError, ImportError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    return url


def _ascending(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError(f"interval is {list(interval)}; write low <= high")
    return interval


Interval = Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]
Url = Annotated[str, AfterValidator(_known_protocol)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class RunConfig(_Group):
    """Where a run lives and the seed of all its randomness."""

    dir: str = ""
    """Run directory, a local path. Empty: ``runs/<name of the config file>``."""
    seed: Seed = 0
    """Seed of weights, data order, noise, times and label drop."""
    fork_from: str = ""
    """``RUN`` or ``RUN@STEP``: a new run begins with everything of that checkpoint of another run."""


class ModelConfig(_Group):
    """The diffusion transformer. What is null comes from the preset; without one, layers are SiT's."""

    preset: str | None = None
    """One of the published sizes, e.g. ``SiT-XL/2`` or ``LightningDiT-XL/1``."""
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
    norm: Literal["layernorm", "rmsnorm"] | None = None
    """LayerNorm without weights (SiT), or RMSNorm with weight (LightningDiT)."""
    mlp: Literal["gelu", "swiglu"] | None = None
    """Two matrices with GELU (SiT), or SwiGLU (LightningDiT)."""
    rope: bool | None = None
    """Queries and keys are turned by their position, beside the sine-cosine table (LightningDiT)."""
    qk_norm: bool = False
    """Norm queries and keys."""
    modulation_shift: bool = True
    """Blocks shift besides scaling (LightningDiT's ``wo_shift`` is false)."""
    learn_sigma: bool = False
    """Heads predict twice the channels, of which the first half is the velocity (the original SiT)."""
    aux_init: Literal["zero", "xavier"] | None = None
    """Initial weights of the auxiliary head: zero (SiT), or drawn (LightningDiT)."""
    input_size: Positive | None = None
    """Side of the latent. Taken from the data index when null."""
    in_channels: Positive | None = None
    """Channels of the latent. Taken from the data index when null."""
    num_classes: Positive | None = None
    """Number of classes. Taken from the data index when null."""

    @model_validator(mode="after")
    def _fill_from_preset(self) -> Self:
        preset: dict[str, Any] = Preset._field_defaults
        if self.preset is not None:
            if self.preset not in PRESETS:
                near = difflib.get_close_matches(self.preset, PRESETS, n=3, cutoff=0.0)
                raise ValueError(f"unknown preset {self.preset!r}; the nearest are {', '.join(near)}")
            preset = PRESETS[self.preset]._asdict()
        for name, value in preset.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        missing = [name for name in Preset._fields if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} not given: set model.preset (e.g. SiT-B/2) or each of them")
        self.to_dit(input_size=self.patch_size, in_channels=1, num_classes=1)  # its checks, before data is known
        return self

    def to_dit(self, **missing: int | None) -> DiTConfig:
        """What the model is built from; ``missing`` stands in for shapes that only the data index knows."""
        values = self.model_dump(exclude={"preset"})
        return DiTConfig(**{**values, **{k: v for k, v in missing.items() if values[k] is None}})


class AccelerationConfig(_Group):
    """Training acceleration (arXiv 2512.24176, section 6): the final head learns v + weight sg(v_final - v_aux)."""

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """w; 0: off."""
    source: Literal["same_forward", "ema"] = "same_forward"
    """Whose difference of the heads: the forward pass that is trained, or the first EMA, which costs a forward more."""
    start_step: NonNegative = 0
    """Steps of the run before it begins."""
    interval: Interval = (0.0, 1.0)
    """Times t at which it acts, both ends included (t = 1 is noise)."""


class LossConfig(_Group):
    """The training objective (docs/architecture.md, "The mathematics")."""

    path: Literal["linear", "cosine"] = "linear"
    """Interpolation between data (t = 0) and noise (t = 1)."""
    aux_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """Weight of the auxiliary head's loss."""
    cosine_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of 1 - cos(v_final, v) over channels, of the final head; LightningDiT has 1."""
    time: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the training times: uniform, or sigmoid(``time_mean`` + ``time_std`` n) for n normal."""
    time_mean: Finite = 0.0
    """Of logit_normal: above 0 more of the times are near noise (t = 1)."""
    time_std: PositiveFloat = 1.0
    """Of logit_normal."""
    time_shift: PositiveFloat | Literal["latent_dimension"] = 1.0
    """S > 1 moves times u towards noise: t = S u / (1 + (S - 1) u). latent_dimension: S = sqrt(C H W / 4096)."""
    acceleration: AccelerationConfig = AccelerationConfig()
    """Training acceleration."""
    label_drop: Fraction = 0.1
    """Share of labels replaced by the null label, for classifier-free guidance."""

    @model_validator(mode="after")
    def _keys_of_the_time(self) -> Self:
        if self.time == "uniform" and (self.time_mean, self.time_std) != (0.0, 1.0):
            raise ValueError("loss.time_mean and loss.time_std are for loss.time=logit_normal: set it, or remove them")
        return self


class DataConfig(_Group):
    """The latents, and the order in which they are seen."""

    index: Url = ""
    """``index.json`` of the latent shards, or its folder: a path or any fsspec URL."""
    streams: Positive = 32
    """Independent streams of samples. The world size must divide it: it fixes the order for every world size."""
    window_samples: Positive = 1024
    """Samples are shuffled within windows of this many consecutive ones (shards are shuffled globally)."""
    window_bytes: Positive = 16 * 2**30
    """Bound on the memory of all windows of one node, in bytes."""
    workers: NonNegative = 2
    """Reader threads per process; 0: the thread that assembles batches reads too. The order does not depend on it."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """A damaged sample ends the run, or is replaced by the next good one of its window and counted."""
    validation_shards: NonNegative = 0
    """The last shards of the index are never trained on: the validation loss is measured on them."""
    posterior: Literal["draw", "stored_sample", "mean"] | None = None
    """Of shards that store mean and std: a fresh ``draw`` at every access, or the ``mean``; of others the
    ``stored_sample``. null: draw or stored_sample, whichever the shards hold."""
    flip: bool = False
    """Mirror half of the images, anew in every epoch; for shards encoded with --flips."""
    cache_dir: str = ""
    """Folder on a local disk of the node that keeps shards once read, shared by its processes. Empty: none."""
    cache_bytes: Positive = 64 * 2**30
    """Bound on what is kept in ``cache_dir``, in bytes."""
    stall_s: PositiveFloat = 60.0
    """A request to the storage (32 MiB at most) that takes longer is made again."""
    retry_s: PositiveFloat = 600.0
    """Requests that fail are made again for this long; then the run ends with exit code 4."""


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
    activation_checkpointing: bool = False
    """Keep only the inputs of each block and compute it again in backward: less memory, a third more work."""
    max_nonfinite_steps: Positive = 20
    """End the run (exit code 3) after this many non-finite steps in a row; each is skipped and counted."""
    init_from: str = ""
    """Export folder or safetensors file whose weights a new run begins with; a missing auxiliary head is added."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device for MFU, in TFLOP/s; null: known GPUs are looked up, others report no MFU."""
    timeout_s: Positive = 600
    """A rank that makes no progress for this long ends the run (exit code 5). The first step of a start, and what is
    seldom done, may take three times as long; a wait for a storage has the storage's own deadline on top."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs (set the other to null)")
        return self


class OptimizerConfig(_Group):
    """The optimizer and its learning rate."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon as published with IG, on matrices, and Adam on vectors. With muon the defaults are those of
    the published run: lr 2e-4, betas (0.9, 0.95), weight_decay 0.01."""
    implementation: Literal["fused", "apex"] = "fused"
    """Kernels of adamw: torch's fused ones, or FusedAdam of NVIDIA's apex (built from source; ddp and fsdp2)."""
    lr: PositiveFloat = 1e-4
    """Learning rate after warm-up."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Decoupled weight decay: of adamw on every parameter, of muon on matrices."""
    grad_clip: PositiveFloat | None = 1.0
    """Global gradient norm is clipped to this; null: no clipping."""
    warmup_steps: NonNegative = 0
    """Linear warm-up from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up."""
    min_lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """End of the cosine schedule."""

    @model_validator(mode="before")
    @classmethod
    def _published_muon(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("kind") == "muon":
            return {"lr": 2e-4, "betas": (0.9, 0.95), "weight_decay": 0.01, **given}
        return given


class EMAConfig(_Group):
    """Exponential moving averages of the weights."""

    decays: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9999], min_length=1)
    """One average per decay, fp32. The first one is sampled from by default."""

    @field_validator("decays")
    @classmethod
    def _distinct(cls, decays: list[float]) -> list[float]:
        if len(set(decays)) != len(decays):
            raise ValueError(f"the decays {decays} must differ from each other")
        return decays


class EngineConfig(_Group):
    """How the model is spread over the ranks."""

    kind: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """ddp: every rank holds the whole model. fsdp2, deepspeed: the state is cut over the ranks, for what does not fit.
    It may change whenever a run goes on."""
    reshard_after_forward: bool | None = None
    """Of fsdp2: free a block's weights after its forward and gather them again for its backward (null: true); false
    keeps them, which costs memory and saves communication."""
    zero_stage: Literal[1, 2, 3] | None = None
    """Of deepspeed: cut averages and moments (1), gradients too (2), weights too (3). null: 2."""

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> Self:
        if self.zero_stage is not None and self.kind != "deepspeed":
            raise ValueError(
                f"engine.zero_stage is DeepSpeed's, engine.kind is {self.kind}: set engine.kind=deepspeed or"
                " engine.zero_stage=null"
            )
        if self.reshard_after_forward is not None and self.kind != "fsdp2":
            raise ValueError(
                f"engine.reshard_after_forward is FSDP2's, engine.kind is {self.kind}: set engine.kind=fsdp2 or"
                " engine.reshard_after_forward=null"
            )
        return self


class CheckpointConfig(_Group):
    """When and where checkpoints are written."""

    url: Url = ""
    """Folder of the checkpoints: a path or any fsspec URL. Empty: ``checkpoints`` in the run directory."""
    every_steps: Positive = 5000
    """Steps between checkpoints; one is always written at the end."""
    keep_last: Positive = 2
    """The newest checkpoints that are kept."""
    keep_every: NonNegative = 0
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""
    export_every: NonNegative = 0
    """Export every so many checkpoints, as ``ig-dist export`` does; 0: only the one at the end of the run."""
    retry_s: PositiveFloat = 600.0
    """Requests to the storage that fail are made again for this long. Then that save is given up and the run goes on;
    at the start and at the end of a run it ends with exit code 4."""


class GuidanceConfig(_Group):
    """One guidance term."""

    kind: Literal["ig", "cfg", "auto"]
    """ig: Internal Guidance (weak head to final head). cfg: classifier-free guidance (null label to label). auto:
    autoguidance (the second model ``sample.weak_model`` to the model)."""
    scale: Finite
    """Extrapolation scale; 1 is no guidance."""
    interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Times t at which the term is on, both ends included (t = 1 is noise)."""
    branches: Literal["both", "conditional", "null"] = "both"
    """Of ig and auto: guide the prediction for the label, the one for the null label that cfg needs, or both."""

    def to_term(self) -> GuidanceTerm:
        """The term as the samplers take it."""
        return GuidanceTerm(self.kind, self.scale, self.interval, self.branches)


class SampleConfig(_Group):
    """How images are made: the plan."""

    num: Positive = 50_000
    """Number of images."""
    labels: Literal["balanced", "random"] = "balanced"
    """balanced: image i has class i mod num_classes; random: drawn uniformly."""
    seed: Seed = 0
    """Image i depends on (this seed, i) only."""
    solver: Literal["euler", "heun", "euler_maruyama", "dopri5"] = "heun"
    """Euler, Heun and the adaptive dopri5 solve the ODE, Euler-Maruyama the SDE."""
    steps: Positive = 32
    """Steps of the solver (n + 1 points in time); dopri5 chooses its own."""
    time_shift: PositiveFloat | Literal["latent_dimension"] = 1.0
    """Of euler and heun: S > 1 makes shorter steps near data, as ``loss.time_shift`` does with training times."""
    correct_last_step: bool = True
    """Of heun: false makes the last step an Euler step, as in the published SiT sampler."""
    rtol: PositiveFloat = 1e-3
    """Of dopri5: tolerance relative to the state."""
    atol: PositiveFloat = 1e-6
    """Of dopri5: absolute tolerance."""
    weak_model: str = ""
    """Second model of ``auto`` guidance: a run (RUN, or RUN@STEP for an earlier checkpoint) or an export folder."""
    batch_size: Positive = 64
    """Images at a time; a batch never crosses a unit."""
    unit_size: Positive = 512
    """Images per unit, the piece of work that one worker claims and writes whole."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the model; the solver's state is float64."""
    url: Url = ""
    """Folder of the plans' samples: a path or any fsspec URL. Empty: ``samples`` in the run directory."""
    tokenizer: str = ""
    """Folder, file or name of the tokenizer where it is not found under the name in the index."""

    @model_validator(mode="after")
    def _keys_of_the_solver(self) -> Self:
        if self.time_shift != 1.0 and self.solver not in ("euler", "heun"):
            raise ValueError(
                f"sample.time_shift moves the steps of euler and heun, sample.solver is {self.solver}: set"
                " sample.time_shift=1"
            )
        if not self.correct_last_step and self.solver != "heun":
            raise ValueError(
                f"sample.correct_last_step is heun's, sample.solver is {self.solver}: set sample.correct_last_step=true"
            )
        return self


class EvaluateConfig(_Group):
    """How images are scored."""

    metrics: list[Literal["fd_pixel", "label_agreement"]] = Field(["fd_pixel"], min_length=1)
    """fd_pixel: Frechet distance on raw pixels. label_agreement: share of images that a classifier trained on the
    reference's pixels puts into the class that was asked for. Both are for small images."""
    reference: Url = ""
    """Index of the real images. Empty: ``data.index``."""


class LogConfig(_Group):
    """What is written while training."""

    every_steps: Positive = 100
    """Steps between lines of ``metrics.jsonl``, TensorBoard points and progress."""
    sample_every_steps: NonNegative = 0
    """Steps between sample grids of the first EMA in TensorBoard; 0: none."""
    validate_every_steps: NonNegative = 0
    """Steps between validation losses of the first EMA on ``data.validation_shards``; 0: none."""


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
        active = {term.kind for term in self.guidance if term.scale != 1}
        if "cfg" in active and not self.loss.label_drop:
            raise ValueError("guidance asks for cfg, but no label is ever dropped: set loss.label_drop=0.1")
        if self.run.fork_from and self.train.init_from:
            raise ValueError("run.fork_from and train.init_from both say where to begin: give one of them")
        if self.log.validate_every_steps and not self.data.validation_shards:
            raise ValueError("log.validate_every_steps needs held-out shards: set data.validation_shards=1 or more")
        if self.optimizer.kind == "muon" and self.engine.kind == "deepspeed":
            raise ValueError(
                "optimizer.kind=muon needs whole matrices, and DeepSpeed cuts them anywhere:"
                " use engine.kind=fsdp2 or ddp, or optimizer.kind=adamw"
            )
        if self.optimizer.implementation == "apex" and (
            self.optimizer.kind != "adamw" or self.engine.kind == "deepspeed"
        ):
            raise ValueError(
                f"optimizer.implementation=apex is for adamw under ddp and fsdp2, not for {self.optimizer.kind} under"
                f" {self.engine.kind}: use optimizer.implementation=fused"
            )
        if "auto" in active and not self.sample.weak_model:
            raise ValueError(
                "guidance asks for auto, but there is no second model: set sample.weak_model=RUN, or RUN@STEP of an"
                " earlier checkpoint"
            )
        if self.loss.acceleration.weight and self.model.aux_depth is None:
            raise ValueError(
                "loss.acceleration needs the auxiliary head: set model.aux_depth, or loss.acceleration.weight=0"
            )
        if "ig" in active and self.model.aux_depth is None:
            raise ValueError("guidance asks for ig, but the model has no auxiliary head: set model.aux_depth")
        return self

    def warnings(self) -> list[str]:
        """What is allowed, and likely a mistake; a line each."""
        aux, depth = self.model.aux_depth, self.model.depth
        assert depth is not None
        if aux is None or 2 * aux <= depth:
            return []
        return [
            f"model.aux_depth {aux} is beyond half of the {depth} blocks, where the paper found the auxiliary head"
            f" harmful (SiT-B/2 after block 8 of 12: FID 38.05 instead of 30.60): use {max(1, depth // 3)} or so"
        ]

    def guidance_terms(self) -> list[GuidanceTerm]:
        """The terms as the samplers take them."""
        return [term.to_term() for term in self.guidance]

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
        model = self.model.model_copy(update=found)
        try:
            model.to_dit()
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
        return self.model_copy(update={"model": model})

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
