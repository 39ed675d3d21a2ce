"""From a plan's image numbers to images: its models in the plan's arithmetic, its solver, its decoder.

Nothing here waits for the device: a GPU's queue stays full over the steps of a batch, and from one batch to the next.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ig_dist.arithmetic import Precision, arithmetic, compiled
from ig_dist.autoencoders.tokenizers import Tokenizer, index_tokenizer
from ig_dist.config import Config
from ig_dist.data.index import IndexFile
from ig_dist.data.latents import Affine, normalisation, tokenizer_latents
from ig_dist.diffusion.guidance import guided_velocity
from ig_dist.diffusion.path import Path
from ig_dist.diffusion.samplers import SOLVERS
from ig_dist.errors import ConfigError
from ig_dist.export import ExportInfo, ModelInfo, find_weights, load_export
from ig_dist.models.dit import DiT, DiTOutput, load_model
from ig_dist.models.presets import forward_flops
from ig_dist.plans.plan import Plan, SolvedBatch
from ig_dist.rng import Draws, Purpose, normal, to_normal

DECODED_PIXELS = 16 * 256**2  # at once: an autoencoder's activations are far larger than the model's
WORTH_COMPILING = 1e17  # FLOPs of a plan, minutes of one GPU: compiling saves half of them and takes about one
STATES = {"fp64": torch.float64, "fp32": torch.float32}


class Models(NamedTuple):
    """What makes the images of a plan, on its device and in eval mode."""

    model: DiT
    info: ModelInfo  # what stands beside the weights
    tokenizer: Tokenizer  # decodes the latents
    weak: DiT | None = None  # the second model of auto guidance


def decoder(config: Config, data: ModelInfo | IndexFile, device: torch.device) -> Tokenizer:
    """What decodes the latents of a model or an index, as the config's ``sample`` group says; loaded once."""
    place, precision = config.sample.tokenizer, config.sample.decode_precision
    return index_tokenizer(data.tokenizer, data.latent, place, device=device, precision=precision)


def autoguided(config: Config) -> bool:
    """Whether a second model guides."""
    return any(term.kind == "auto" and term.scale != 1 for term in config.guidance)


def load_second(config: Config, device: torch.device) -> tuple[DiT, ExportInfo]:
    """The second model of autoguidance."""
    try:
        export = find_weights(config.sample.weak_model).export
    except ConfigError as error:
        raise ConfigError(f"sample.weak_model {error}") from None
    return load_export(export, device)


class Sampler:
    """Makes the images of a plan; what its batches share is made once."""

    def __init__(self, models: Models, plan: Plan) -> None:
        self.plan, self.device = plan, models.model.pos_embed.device
        self._info, self._tokenizer = models.info, models.tokenizer
        self._compiling = compiling = compiles(plan, models.model)
        self._model = as_planned(models.model, plan.precision, compiling=compiling)
        self._weak = None if models.weak is None else as_planned(models.weak, plan.precision, compiling=compiling)
        self._affine = normalisation(models.info.latent, self.device)
        self._words = Draws(plan.seed, {Purpose.SAMPLE_STEP: math.prod(models.info.latent.shape)}, self.device)
        self._noise = compiled(self._draw, dynamic=False) if compiling else self._draw

    def batches(self, number: int) -> list[SolvedBatch]:
        """Those of a unit; of one size where blocks are compiled for it."""
        return self.plan.batches(number, one_size=self._compiling)

    @torch.no_grad()
    def solve(self, numbers: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Latents (B, C, H, W) of the plan's image numbers (B,), given on the CPU, and the work of each."""
        plan = self.plan
        ids, labels = (column.to(self.device, non_blocking=True) for column in (numbers, plan.image_labels(numbers)))
        counted, weak = _Counted(self._model), None if self._weak is None else _Counted(self._weak)
        velocity = guided_velocity(counted, labels, plan.guidance, weak)

        def noise(step: int, x: Tensor) -> Tensor:
            return self._noise(ids, torch.full((), step, device=self.device))

        x = normal(plan.seed, Purpose.SAMPLE_NOISE, ids, self._info.latent.shape).to(STATES[plan.state])
        with arithmetic(plan.precision, self.device):
            x = SOLVERS[plan.solver].solve(velocity, x, Path(self._info.path), noise, **plan.solver_settings)
        weak_rows = 0 if weak is None else weak.rows
        return x, (counted.calls, counted.rows // len(numbers), weak_rows // len(numbers))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, H, W, channels) uint8 of the model's latents (B, C, H, W)."""
        return decode(self._tokenizer, latents, self._affine)

    def generate(self, numbers: Tensor) -> Tensor:
        """Images (B, H, W, channels) uint8 of the plan's image numbers (B,), given on the CPU."""
        return self.decode(self.solve(numbers)[0])

    def _draw(self, ids: Tensor, step: Tensor) -> Tensor:
        return to_normal(self._words(ids, step)[Purpose.SAMPLE_STEP], self._info.latent.shape)


def compiles(plan: Plan, model: DiT) -> bool:
    """Whether blocks are compiled: as the plan says; auto is on a GPU, for what takes longer than compiling does."""
    if plan.compile != "auto" or model.pos_embed.device.type != "cuda":
        return plan.compile is True
    return plan.num * plan.evaluations * forward_flops(model.config) >= WORTH_COMPILING


def as_planned(model: DiT, precision: Precision, *, compiling: bool) -> DiT:
    """The model as a plan computes with it: in bf16 with the weights that autocast would cast at each use cast once.

    The results are bitwise those under autocast, of which the rest is left to it: embeddings, tables and the residual
    stream are as they were. What is not cast is shared with the model. One in training stays as it is: an engine may
    hold its weights in pieces, autocast keeps the casts of weights with gradients, and blocks may be compiled already.
    """
    if any(weight.requires_grad for weight in model.parameters()) or not (compiling or precision == "bf16"):
        return model
    ready = load_model(model.config, model.state_dict()).requires_grad_(False)
    for module in ready.modules() if precision == "bf16" else ():
        for weight in () if isinstance(module, nn.Embedding) else module.parameters(recurse=False):
            weight.data = weight.to(torch.bfloat16)
    for part in (*ready.blocks, ready.final_layer, ready.aux_layer) if compiling else ():
        if isinstance(part, nn.Module):
            part.forward = compiled(part.forward, dynamic=False)
    return ready


@torch.no_grad()
def decode(tokenizer: Tokenizer, latents: Tensor, affine: Affine) -> Tensor:
    """Images (B, H, W, channels) uint8 of the model's latents (B, C, H, W), so many at a time as memory is made for."""
    pixels = latents.shape[2] * latents.shape[3] * tokenizer.downsample**2
    parts = torch.split(tokenizer_latents(latents, affine), max(1, DECODED_PIXELS // pixels))
    return torch.cat([tokenizer.decode(part) for part in parts])


class _Counted:
    """A model, how often it was called (once for each velocity), and the rows that went through it."""

    def __init__(self, model: DiT) -> None:
        self._model, self.calls, self.rows = model, 0, 0
        self.null_label, self.has_aux_head = model.null_label, model.has_aux_head

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, *, with_aux: bool = True) -> DiTOutput:
        self.calls, self.rows = self.calls + 1, self.rows + len(labels)
        output: DiTOutput = self._model(x_t, t, labels, with_aux=with_aux)
        return output
