"""The groups `sample` and `evaluate`: how images are made, and how they are scored."""

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from ig_dist.config.catalogue import check_metrics, check_weights
from ig_dist.config.types import Group, Seed, Url
from ig_dist.diffusion.samplers import SOLVERS, SolverName


class SampleConfig(Group):
    """How images are made: the plan."""

    num: PositiveInt = 50_000
    """Number of images."""
    labels: Literal["balanced", "random"] = "balanced"
    """balanced: image i has class i mod num_classes; random: drawn uniformly."""
    classes: list[int | str] = Field(default_factory=list)
    """Only these classes, in this order: by number, name or words (``[207, n02099601, golden_retriever]``). Empty: all
    of them."""
    seed: Seed = 0
    """Image i depends on (this seed, i) only."""
    solver: SolverName = "heun"
    """euler_maruyama solves the SDE, the others the ODE; dopri5 is adaptive."""
    steps: PositiveInt = 32
    """Steps of the solver (n + 1 points in time); dopri5 chooses its own."""
    time_shift: PositiveFloat | Literal["latent_dimension"] = 1.0
    """Of euler and heun: S > 1 makes shorter steps near noise, S < 1 near data, as ``loss.time_shift`` does with times
    of training."""
    correct_last_step: bool = True
    """Of heun: false makes the last step an Euler step, as in the published SiT sampler."""
    rtol: PositiveFloat = 1e-3
    """Of dopri5: tolerance relative to the state."""
    atol: PositiveFloat = 1e-6
    """Of dopri5: absolute tolerance."""
    weak_model: str = ""
    """Second model of ``auto`` guidance: a run (RUN, or RUN@STEP for an earlier checkpoint) or an export folder."""
    batch_size: PositiveInt = 64
    """Images at a time, at most: a unit is cut into equal batches. Where blocks are compiled the last batch of a plan
    is filled up with images that would come next, and are not kept."""
    unit_size: PositiveInt = 512
    """Images per unit, the piece of work that one worker claims and writes whole."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the model. tf32 (of GPUs; fp32 elsewhere) is that of the published samplers."""
    state: Literal["fp64", "fp32"] = "fp64"
    """The solver's state, and guidance: fp64 as SiT's published sampler, fp32 as LightningDiT's."""
    decode_precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the autoencoder that decodes the latents. On GPUs the published samplers' is tf32."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the model's blocks, and the solver's noise to the same bits. auto: on a GPU, where the plan takes
    longer than compiling; never on a CPU."""
    url: Url = ""
    """Folder of the plans' samples: a path or any fsspec URL. Empty: ``samples`` in the run directory."""
    tokenizer: str = ""
    """Folder, file or name of the tokenizer where it is not found under the name in the index."""
    keep_images: bool = True
    """false: a unit's features stand for its images, of which only the first unit keeps some to look at; no npz."""
    png: NonNegativeInt = 0
    """Write the first so many images as single PNG files too."""
    keys_of: ClassVar = {
        key: ("solver", *(name for name, solver in SOLVERS.items() if key in solver.settings))
        for key in ("time_shift", "correct_last_step", "rtol", "atol")
    }


class EvaluateConfig(Group):
    """How images are scored."""

    metrics: list[str] = Field(["fd_pixel"])
    """Names of scores. Of Inception's features: fid, sfid, inception_score, precision, recall, kid. Of other networks':
    fd_dinov2, precision_dinov2, recall_dinov2, fd_efficientnet, precision_efficientnet, recall_efficientnet. Of the
    pixels of small images: fd_pixel, and label_agreement, the share of images that a classifier trained on the
    reference puts into the class that was asked for."""
    reference: Url = ""
    """The real images: an npz of statistics (ADM's, or of `ig-dist reference`), an index, an npz or folder of pictures.
    Empty: ``data.index``."""
    weights: dict[str, str] = Field(default_factory=dict)
    """Where the weights of inception, dinov2 or efficientnet_lite0 are. Empty: they are looked for under that name, and
    downloaded once."""
    protocol: Literal["adm", "torch-fidelity"] = "adm"
    """Whose rules hold where evaluators differ: the inception score's blocks, and the distances of precision."""
    training_num: PositiveInt = 5000
    """Images of a score while training, see ``log.score_every_steps``."""
    training_steps: PositiveInt = 16
    """Steps of Heun that make them."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: list[str]) -> list[str]:
        return check_metrics(metrics, "evaluate.metrics")

    @field_validator("weights")
    @classmethod
    def _extractors(cls, weights: dict[str, str]) -> dict[str, str]:
        return check_weights(weights, "evaluate.weights")
