"""The time convention and the interpolation path, written down once.

t = 0 is data and t = 1 is noise. With latents x and noise eps,

    x_t = alpha(t) x + sigma(t) eps,        velocity = alpha'(t) x + sigma'(t) eps.

    linear:  alpha = 1 - t,           sigma = t            (so velocity = eps - x)
    cosine:  alpha = cos(pi t / 2),   sigma = sin(pi t / 2)

The SiT models of REPA and IG run this way. The original SiT and LightningDiT run the other way
(t' = 1 - t, velocity' = -velocity); nothing here does, such weights are converted at import.
Source: SiT, arXiv 2401.08740, section 2, with the time as stated above.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

_Time = TypeVar("_Time", float, Tensor)

SHIFT_FREE_DIMENSION = 4096
"""Numbers of an SD-VAE latent of 256 x 256 pixels, 4 x 32 x 32: what needs no shift by dimension."""


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives by t: floats for a float t, tensors of t's shape for a tensor."""

    alpha: float | Tensor
    sigma: float | Tensor
    alpha_dot: float | Tensor
    sigma_dot: float | Tensor


@dataclass(frozen=True)
class Path:
    """An interpolation between data and noise."""

    kind: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "cosine"):
            raise ValueError(f"path kind is {self.kind!r}; write 'linear' or 'cosine'")

    def coefficients(self, t: float | Tensor) -> Coefficients:
        """Return alpha, sigma, alpha' and sigma' at t, computed in t's own precision."""
        if self.kind == "linear":
            one = torch.ones_like(t) if isinstance(t, Tensor) else 1.0
            return Coefficients(1.0 - t, t, -one, one)
        of: Any = torch if isinstance(t, Tensor) else math
        cos, sin = of.cos(t * (math.pi / 2)), of.sin(t * (math.pi / 2))
        return Coefficients(cos, sin, -math.pi / 2 * sin, math.pi / 2 * cos)

    def interpolate(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x_t, velocity), the model's input and target: of normalised latents and noise (B, ...), at t (B,)."""
        alpha, sigma, alpha_dot, sigma_dot = self._broadcast(t, latents)
        return alpha * latents + sigma * noise, alpha_dot * latents + sigma_dot * noise

    def score(self, velocity: Tensor, x_t: Tensor, t: float | Tensor) -> Tensor:
        """Return the score, grad log p_t(x_t), from the velocity (SiT, arXiv 2401.08740, section 2).

        Numerator and denominator are multiplied by alpha', which is 0 at t = 0 on the cosine path. The score
        itself is undefined at t = 0, where sigma is 0. t is one float for all samples, or (B,).
        """
        alpha, sigma, alpha_dot, sigma_dot = self._broadcast(t, x_t)
        return (alpha * velocity - alpha_dot * x_t) / (sigma * (alpha_dot * sigma - alpha * sigma_dot))

    def _broadcast(self, t: float | Tensor, like: Tensor) -> Coefficients:
        """The coefficients, shaped (B, 1, 1, ...) and in the dtype of `like` where t is a tensor."""
        coefficients = self.coefficients(t)
        if not isinstance(t, Tensor):
            return coefficients
        shape = (-1, *[1] * (like.dim() - 1))
        return Coefficients(*(torch.as_tensor(c).to(like.dtype).reshape(shape) for c in coefficients))


def shift_time(u: _Time, shift: float) -> _Time:
    """Return t = S u / (1 + (S - 1) u), for u in [0, 1]; S > 1 spends more time near noise (t = 1).

    Written so that 0 and 1 stay exactly where they are, and that S = 1 changes no bit.
    """
    if shift <= 0:
        raise ValueError(f"shift is {shift}; it must be positive (1 for no shift)")
    return u if shift == 1 else u / (u + (1 - u) / shift)


def dimension_shift(latent_shape: Sequence[int]) -> float:
    """Return S = sqrt(C H W / 4096): the more numbers a latent has, the more noise hides as much of it.

    Source: arXiv 2403.03206, section 5.3.2, for resolutions; arXiv 2510.11690 for the dimension of the latents.
    """
    return math.sqrt(math.prod(latent_shape) / SHIFT_FREE_DIMENSION)


def resolve_shift(shift: float | Literal["latent_dimension"], latent_shape: Sequence[int]) -> float:
    """Return S: the number itself, or `dimension_shift`."""
    return dimension_shift(latent_shape) if shift == "latent_dimension" else shift


def logit_normal(normal: Tensor, mean: float, std: float) -> Tensor:
    """Return t = sigmoid(mean + std * normal) in float64, of standard normal draws (arXiv 2403.03206, section 3.1).

    A mean above 0 spends more time near noise (t = 1).
    """
    return torch.sigmoid(mean + std * normal.double())
