"""Weights in Python: ``pipe = ig_dist.load("runs/digits")``, and ``pipe(labels=[3, 7])`` are pictures.

The same functions as `ig-dist sample` make the images, in the same batches: they are bitwise the same.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ig_dist.arithmetic import arithmetic
from ig_dist.config import Config
from ig_dist.data.latents import normalisation
from ig_dist.diffusion.guidance import GuidanceTerm, guided_velocity
from ig_dist.errors import ConfigError
from ig_dist.export import ExportInfo, Weights, load_export
from ig_dist.models.dit import DiT, count_parameters
from ig_dist.plans.asking import Asked, sample_config
from ig_dist.plans.plan import class_names, image_numbers, make_plan
from ig_dist.rng import Purpose, normal
from ig_dist.sampling.pictures import Images, pil_images
from ig_dist.sampling.solving import Models, Sampler, autoguided, decode, decoder, load_second
from ig_dist.terminal.progress import progress

Labels = Sequence[int | str] | int | str | NDArray[np.integer[Any]] | Tensor
Output = Literal["pil", "numpy", "torch", "latents"]


class Pipeline:
    """A trained model with its tokenizer, ready to sample; made by ``ig_dist.load``.

    Attributes:
        model: the network, in eval mode on ``device``: ``model(x_t, t, labels)`` gives ``velocity`` and
            ``aux_velocity``, (B, C, H, W) each, from x_t (B, C, H, W) and t (B,) float32, labels (B,) int64.
        config: the run's; what a call leaves out is as it says.
        info: what the export says: step, average, latents, tokenizer, hashes.
        classes: name of each class, in words where they are known.
        device: where the model is.
    """

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self.config, self.export, self.run = weights
        self.device = device
        self.model: DiT
        self.info: ExportInfo
        self.model, self.info = load_export(self.export, device)
        self.classes = class_names(self.config, self.info)
        self._weak: dict[str, tuple[DiT, ExportInfo]] = {}

    @overload
    def __call__(
        self, labels: Labels | None = None, *, output: Literal["pil"] = "pil", **asked: Unpack[Asked]
    ) -> Images: ...
    @overload
    def __call__(
        self, labels: Labels | None = None, *, output: Literal["numpy"], **asked: Unpack[Asked]
    ) -> NDArray[np.uint8]: ...
    @overload
    def __call__(
        self, labels: Labels | None = None, *, output: Literal["torch", "latents"], **asked: Unpack[Asked]
    ) -> Tensor: ...
    def __call__(
        self,
        labels: Labels | None = None,
        *,
        num: int | None = None,
        output: Output = "pil",
        **asked: Any,
    ) -> Images | NDArray[np.uint8] | Tensor:
        """Make images: bitwise those that `ig-dist sample` makes with the same options. None: as the run's config.

        Args:
            labels: classes by number, name or words, one for each image; with ``num`` image i has class
                ``labels[i % len(labels)]``. "balanced" and "random" are as on the command line.
            num: number of images; None: one for each label.
            output: "pil": a list of PIL images; "numpy": (N, H, W, channels) uint8; "torch": the same as a tensor on
                ``device``; "latents": (N, C, h, w) float64 for ``decode``.
            **asked:
                seed: image i depends on (seed, i) only.
                solver: euler, heun, euler_maruyama or dopri5.
                steps: of the solver.
                preset: "paper" or "paper-ig": as published for a model of this size; "fast": "paper" in bf16.
                ig_scale, cfg_scale, auto_scale: of Internal Guidance, classifier-free guidance, and autoguidance by
                    ``weak``; 1: off.
                ig_interval, cfg_interval, auto_interval: times (low, high) at which each is on; t = 1 is noise.
                weak: the second model of autoguidance: all that ``ig_dist.load`` takes.
                time_shift, precision, batch_size, ...: other keys of the config's ``sample`` group.

        Raises:
            ConfigError: what is asked for does not fit; the message says how to mend it.
        """
        if output not in ("pil", "numpy", "torch", "latents"):
            raise ConfigError(f"output={output!r}: use 'pil', 'numpy', 'torch' or 'latents'")
        if isinstance(labels, str) and labels in ("balanced", "random"):
            asked["labels"] = labels
        elif labels is not None:
            asked["classes"] = _listed(labels)
            num = len(asked["classes"]) if num is None else num
        if num is None:
            raise ConfigError("say how many images: e.g. pipe(num=8), or name their classes: pipe(labels=[0, 1, 2])")
        config = sample_config(self.config, num=num, **asked)
        weak_model, weak = self._second(config) if autoguided(config) else (None, None)
        plan = make_plan(config, self.info, self.info.weights_sha256, weak)
        models = Models(self.model, self.info, decoder(config, self.info, self.device), weak_model)
        sampler, made = Sampler(models, plan), list[Tensor]()
        with progress("sample", plan.num, "images") as advance:
            for batch in chain.from_iterable(map(sampler.batches, range(plan.num_units))):
                latents = sampler.solve(image_numbers(batch.solved))[0][: len(batch.kept)]
                made.append(latents if output == "latents" else sampler.decode(latents))
                advance(len(batch.kept))
        return _shown(torch.cat(made), output, plan.image_labels(image_numbers(range(plan.num))).tolist())

    def _second(self, config: Config) -> tuple[DiT, ExportInfo]:
        """The second model of autoguidance; read once."""
        source = config.sample.weak_model
        if source not in self._weak:
            self._weak = {source: load_second(config, self.device)}
        return self._weak[source]

    @torch.no_grad()
    def velocity(
        self,
        x: Tensor,
        t: float,
        labels: Labels,
        *,
        ig_scale: float = 1.0,
        cfg_scale: float = 1.0,
    ) -> Tensor:
        """The velocity dx/dt that a solver follows at time t, from noise (t = 1) to data (t = 0).

        Args:
            x: (B, C, h, w), on any device: noise, latents, or between them.
            t: the time, in [0, 1].
            labels: classes, by number or name; one for all of x, or B; ``len(pipe.classes)`` is the null label.
            ig_scale: of Internal Guidance; 1: off, 0: the auxiliary head alone.
            cfg_scale: of classifier-free guidance; 1: off.

        Returns:
            (B, C, h, w) on ``device``, in the dtype of x, float32 at least.

        Raises:
            ConfigError: no such class, or guidance that the model cannot give.
        """
        x = x.to(self.device)
        wanted = torch.tensor(self._numbers(_listed(labels)), device=self.device)
        if len(wanted) not in (1, len(x)):
            raise ConfigError(f"{len(wanted)} labels for {len(x)} rows of x: give one, or one for each row")
        wanted = wanted.expand(len(x))
        terms = [GuidanceTerm("ig", ig_scale), GuidanceTerm("cfg", cfg_scale)]
        try:
            function = guided_velocity(self.model, wanted, terms)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        with arithmetic(self.config.sample.precision, self.device):
            return function(x, float(t))

    def _numbers(self, labels: list[int | str]) -> list[int]:
        """Of classes; the null label, which is no class, has its number already."""
        null = len(self.classes)
        named = [label for label in labels if label != null]
        config = sample_config(self.config, classes=named)
        found = iter(make_plan(config, self.info, self.info.weights_sha256).classes)
        return [null if label == null else next(found) for label in labels]

    def noise(self, num: int, seed: int | None = None) -> Tensor:
        """The noise (num, C, h, w) float64 that images 0 to num - 1 of a seed begin with, at t = 1."""
        numbers = image_numbers(range(num)).to(self.device)
        seed = self.config.sample.seed if seed is None else seed
        return normal(seed, Purpose.SAMPLE_NOISE, numbers, self.info.latent.shape).double()

    @overload
    def decode(self, latents: Tensor, *, output: Literal["pil"] = "pil") -> Images: ...
    @overload
    def decode(self, latents: Tensor, *, output: Literal["numpy"]) -> NDArray[np.uint8]: ...
    @overload
    def decode(self, latents: Tensor, *, output: Literal["torch"]) -> Tensor: ...
    def decode(
        self, latents: Tensor, *, output: Literal["pil", "numpy", "torch"] = "pil"
    ) -> Images | NDArray[np.uint8] | Tensor:
        """Images of latents (N, C, h, w) as the model sees them; ``output`` as of a call."""
        latents = latents.to(self.device)
        tokenizer = decoder(self.config, self.info, self.device)
        return _shown(decode(tokenizer, latents, normalisation(self.info.latent, self.device)), output)

    def __repr__(self) -> str:
        info, dit, sample = self.info, self.info.model, self.config.sample
        weights = "raw weights" if info.ema is None else f"EMA {info.ema:g}"
        head = "no auxiliary head" if dit.aux_depth is None else f"auxiliary head after block {dit.aux_depth}"
        size = count_parameters(self.model)
        guidance = ", ".join(f"{term.kind} {term.scale:g}" for term in self.config.guidance if term.scale != 1)
        shape = "x".join(map(str, info.latent.shape))
        return (
            f"Pipeline of {self.run or self.export}, step {info.step}, {weights}\n"
            f"  model: {dit.depth} blocks x {dit.hidden_size}, {size:,} parameters, {head}\n"
            f"  data: {len(self.classes)} classes, latents {shape}, tokenizer {info.tokenizer.name}\n"
            f"  by default: {sample.solver}, {sample.steps} steps, {guidance or 'unguided'}, seed {sample.seed},"
            f" {sample.precision} on {self.device}"
        )


def _shown(images: Tensor, output: Output, labels: Sequence[int] = ()) -> Images | NDArray[np.uint8] | Tensor:
    if output in ("torch", "latents"):
        return images
    pixels = images.cpu().numpy()
    return Images(pil_images(pixels), labels) if output == "pil" else pixels


def _listed(labels: Labels) -> list[int | str]:
    given = labels.tolist() if isinstance(labels, np.ndarray | np.generic | Tensor) else labels
    return [given] if isinstance(given, int | str) else list(given)
