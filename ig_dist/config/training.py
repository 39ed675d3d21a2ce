"""Groups that say how a run trains."""

from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from ig_dist.config.types import Decay, Fraction, Group, Interval, Seed, Url


class RunConfig(Group):
    """Where a run lives and the seed of all its randomness."""

    dir: str = ""
    """Run directory, a local path. Empty: ``runs/<name of the config file>``."""
    seed: Seed = 0
    """Seed of weights, data order, noise, times and label drop."""
    fork_from: str = ""
    """``RUN`` or ``RUN@STEP``: a new run begins with everything of that checkpoint of another run."""


class AccelerationConfig(Group):
    """Training acceleration (arXiv 2512.24176, section 6): the final head learns v + weight sg(v_final - v_aux)."""

    weight: NonNegativeFloat = 0.0
    """w; 0: off."""
    source: Literal["same_forward", "ema"] = "same_forward"
    """Whose difference of the heads: the forward pass that is trained, or the first EMA, which costs a forward more."""
    start_step: NonNegativeInt = 0
    """Steps of the run before it begins."""
    interval: Interval = (0.0, 1.0)
    """Times t at which it acts, both ends included (t = 1 is noise)."""


class LossConfig(Group):
    """The training objective (docs/decisions/mathematics.md)."""

    path: Literal["linear", "cosine"] = "linear"
    """Interpolation between data (t = 0) and noise (t = 1)."""
    aux_weight: NonNegativeFloat = 0.5
    """Weight of the auxiliary head's loss."""
    cosine_weight: NonNegativeFloat = 0.0
    """Weight of 1 - cos(v_final, v) over channels, of the final head; LightningDiT has 1."""
    time: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the training times: uniform, or sigmoid(``time_mean`` + ``time_std`` n) for n normal."""
    time_mean: float = 0.0
    """Of logit_normal: above 0 more of the times are near noise (t = 1)."""
    time_std: PositiveFloat = 1.0
    """Of logit_normal."""
    time_shift: PositiveFloat | Literal["latent_dimension"] = 1.0
    """S > 1 moves times u towards noise: t = S u / (1 + (S - 1) u). latent_dimension: S = sqrt(C H W / 4096)."""
    acceleration: AccelerationConfig = AccelerationConfig()
    """Training acceleration."""
    label_drop: Fraction = 0.1
    """Share of labels replaced by the null label, for classifier-free guidance."""
    keys_of: ClassVar = dict.fromkeys(("time_mean", "time_std"), ("time", "logit_normal"))


class DataConfig(Group):
    """The latents, and the order in which they are seen."""

    index: Url = ""
    """``index.json`` of the latent shards, or its folder: a path or any fsspec URL."""
    streams: PositiveInt = 32
    """Independent streams of samples. The world size must divide it: it fixes the order for every world size."""
    window_samples: PositiveInt = 1024
    """Samples are shuffled within windows of this many consecutive ones (shards are shuffled globally)."""
    window_bytes: PositiveInt = 16 * 2**30
    """Bound on the memory of all windows of one node, in bytes."""
    workers: NonNegativeInt = 2
    """Reader threads per process; 0: the thread that assembles batches reads too. The order does not depend on it."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """A damaged sample ends the run, or is replaced by the next good one of its window and counted."""
    validation_shards: NonNegativeInt = 0
    """The last shards of the index are never trained on: the validation loss is measured on them."""
    posterior: Literal["draw", "stored_sample", "mean"] | None = None
    """Of shards that store mean and std: a fresh ``draw`` at every access, or the ``mean``; of others the
    ``stored_sample``. null: draw or stored_sample, whichever the shards hold."""
    flip: bool = False
    """Mirror half of the images, anew in every epoch; for shards encoded with --flips."""
    cache_dir: str = ""
    """Folder on a local disk of the node that keeps shards once read, shared by its processes. Empty: none."""
    cache_bytes: PositiveInt = 64 * 2**30
    """Bound on what is kept in ``cache_dir``, in bytes."""
    stall_s: PositiveFloat = 60.0
    """A request to the storage (32 MiB at most) that takes longer is made again."""
    retry_s: PositiveFloat = 600.0
    """Requests that fail are made again for this long; then the run ends with exit code 8."""


class TrainConfig(Group):
    """Length, batch and precision."""

    steps: PositiveInt | None = None
    """Optimizer steps of the whole run. Give exactly one of ``steps`` and ``epochs``."""
    epochs: PositiveFloat | None = None
    """Passes over the data of the whole run."""
    global_batch_size: PositiveInt = 256
    """Images a step, over all ranks and micro-batches."""
    accumulation: PositiveInt = 1
    """Micro-batches a step on each rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of forward and backward; weights, moments and EMAs are fp32 always, and fp32 is never TF32."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Of precision=bf16: the tokens between blocks, forward and backward. bf16 moves an
    eighth fewer bytes (docs/speed.md)."""
    deterministic: bool = False
    """On GPUs: the same bits in each run of the same job, also of attention, weight gradients and sums over GPUs, which
    costs speed. CPUs give them in any case."""
    compile: bool = False
    """torch.compile each block, and the draws of a micro-batch, to the same bits."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each block and compute it again in backward: less memory, a third more work."""
    max_nonfinite_steps: PositiveInt = 20
    """End the run (exit code 3) after this many non-finite steps in a row; each is skipped and counted."""
    init_from: str = ""
    """Export folder or safetensors file whose weights a new run begins with; a missing auxiliary head is added."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device for MFU, in TFLOP/s; null: known GPUs are looked up, others report no MFU."""
    timeout_s: PositiveInt = 600
    """A rank that makes no progress for this long ends the run (exit code 5). The first step of a start, and what is
    seldom done, may take three times as long; a wait for a storage has the storage's own deadline on top."""

    preflight: bool = True
    """Try every rank before the first step: a matrix product, the links, a read of the data. One that fails where
    others do not is named and ends the run (exit code 6); one that is slow is named."""
    preflight_min_speed: Fraction = 0.0
    """A rank slower in one of these than this share of the median rank ends the run too (exit code 6)."""
    keys_of: ClassVar = {"residual": ("precision", "bf16")}

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs (set the other to null)")
        return self


class OptimizerConfig(Group):
    """The optimizer and its learning rate."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon as published with IG, on matrices, and Adam on vectors. With muon the defaults are those of
    the published run: lr 2e-4, betas (0.9, 0.95), weight_decay 0.01."""
    implementation: Literal["fused", "apex"] = "fused"
    """Kernels of adamw: torch's fused ones, or FusedAdam of NVIDIA's apex (built from source; ddp and fsdp2)."""
    lr: PositiveFloat = 1e-4
    """Learning rate after warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay: of adamw on every parameter, of muon on matrices."""
    decay_pos_embed: bool = False
    """Of muon: ``weight_decay`` shrinks the table of positions too, which no gradient reaches, as in the published run
    (of whose table 0.1% is left after 680 epochs, beside RoPE). false: the table is constant."""
    grad_clip: PositiveFloat | None = 1.0
    """Global gradient norm is clipped to this; null: no clipping."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up."""
    min_lr: NonNegativeFloat = 0.0
    """End of the cosine schedule."""
    keys_of: ClassVar = {"decay_pos_embed": ("kind", "muon")}

    @model_validator(mode="before")
    @classmethod
    def _published_muon(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("kind") == "muon":
            return {"lr": 2e-4, "betas": (0.9, 0.95), "weight_decay": 0.01, **given}
        return given


class EMAConfig(Group):
    """Exponential moving averages of the weights."""

    decays: list[Decay] = Field([0.9999], min_length=1)
    """One average per decay, fp32. The first one is sampled from by default."""

    @field_validator("decays")
    @classmethod
    def _distinct(cls, decays: list[float]) -> list[float]:
        if len(set(decays)) != len(decays):
            raise ValueError(f"the decays {decays} must differ from each other")
        return decays


class EngineConfig(Group):
    """How the model is spread over the ranks."""

    kind: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    """ddp: every rank holds the whole model. fsdp2, deepspeed: the state is cut over the ranks, for what does not fit.
    It may change whenever a run goes on."""
    reshard_after_forward: bool | None = None
    """Of fsdp2: free a block's weights after its forward and gather them again for its backward (null: true); false
    keeps them, which costs memory and saves communication."""
    replicate: PositiveInt = 1
    """Of fsdp2 (HSDP): cut the state over the ranks of a group only, and hold it in so many groups of neighbours;
    typically the number of machines. More memory than 1, and weights no longer cross the network."""
    zero_stage: Literal[1, 2, 3] | None = None
    """Of deepspeed: cut averages and moments (1), gradients too (2), weights too (3). null: 2."""
    keys_of: ClassVar = {
        "reshard_after_forward": ("kind", "fsdp2"),
        "replicate": ("kind", "fsdp2"),
        "zero_stage": ("kind", "deepspeed"),
    }


class CheckpointConfig(Group):
    """When and where checkpoints are written."""

    url: Url = ""
    """Folder of the checkpoints: a path or any fsspec URL. Empty: ``checkpoints`` in the run directory."""
    every_steps: PositiveInt = 5000
    """Steps between checkpoints; one is always written at the end."""
    keep_last: PositiveInt = 2
    """The newest checkpoints that are kept."""
    keep_every: NonNegativeInt = 0
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""
    export_every: NonNegativeInt = 0
    """Export every so many checkpoints, as ``ig-dist export`` does; 0: only the one at the end of the run."""
    retry_s: PositiveFloat = 600.0
    """Requests to the storage that fail are made again for this long. Then that save is given up and the run goes on;
    at the start and at the end of a run it ends with exit code 8."""


class LogConfig(Group):
    """What is written while training."""

    every_steps: PositiveInt = 100
    """Steps between lines of ``metrics.jsonl``, TensorBoard points and progress."""
    sample_every_steps: NonNegativeInt = 0
    """Steps between sample grids of the first EMA in TensorBoard; 0: none."""
    score_every_steps: NonNegativeInt = 0
    """Steps between scores of the first EMA, of ``evaluate.training_num`` images by ``evaluate.metrics``; 0: none."""
    validate_every_steps: NonNegativeInt = 0
    """Steps between validation losses of the first EMA on ``data.validation_shards``; 0: none."""
