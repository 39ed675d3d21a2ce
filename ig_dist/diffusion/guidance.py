"""Internal Guidance and classifier-free guidance, as one guided velocity function.

IG extrapolates from the auxiliary head to the final head (arXiv 2512.24176); CFG from the null label to the
label (arXiv 2207.12598), here between predictions that IG has guided already. Each acts in an interval of
times (arXiv 2404.07724).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Protocol

import torch
from torch import Tensor

from ig_dist.models.dit import DiTOutput


@dataclass(frozen=True)
class GuidanceTerm:
    """One guidance: weak + scale * (strong - weak) for times in `interval`.

    Attributes:
        kind: "ig" (weak: auxiliary head) or "cfg" (weak: null label).
        scale: 1 switches the term off.
        interval: (low, high) in time, both ends included; t = 0 is data, t = 1 is noise.
    """

    kind: Literal["ig", "cfg"]
    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.kind not in ("ig", "cfg"):
            raise ValueError(f"guidance kind is {self.kind!r}; write 'ig' or 'cfg'")
        if not math.isfinite(self.scale):
            raise ValueError(f"{self.kind} scale is {self.scale}; write a finite number (1 switches it off)")
        low, high = self.interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"{self.kind} interval is [{low}, {high}]; write 0 <= low <= high <= 1")


class GuidableModel(Protocol):
    """What guidance asks of a model; `DiT` has it."""

    @property
    def null_label(self) -> int: ...  # noqa: D102

    @property
    def has_aux_head(self) -> bool: ...  # noqa: D102

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> DiTOutput: ...  # noqa: D102


def guided_velocity(
    model: GuidableModel, labels: Tensor, guidance: Sequence[GuidanceTerm]
) -> Callable[[Tensor, float], Tensor]:
    """Return the function (x, t) -> velocity of a model under guidance.

    The model sees float32; the combination is made in the dtype of x, or in float32 where that is coarser.
    The time is a Python float, so intervals are tested exactly and without waiting for the device. What has
    no effect at t is not evaluated: with scale 1 the result is bitwise the unguided one, and the null label
    is run (as a second half of the batch) inside the CFG interval only.

    Args:
        model: predicts the velocity from (x_t, t, labels).
        labels: (B,) int64, on the device of x.
        guidance: the terms, at most one of a kind at any time.

    Raises:
        ValueError: two terms of a kind overlap, or IG is asked of a model without auxiliary head.
    """
    terms = [term for term in guidance if term.scale != 1.0]
    check_overlap(terms)
    if any(term.kind == "ig" for term in terms) and not model.has_aux_head:
        raise ValueError(
            "guidance asks for 'ig' but the model has no auxiliary head; remove the term, or train with model.aux_depth"
        )
    with_null = torch.cat([labels, torch.full_like(labels, model.null_label)])

    def velocity(x: Tensor, t: float) -> Tensor:
        ig_scale, cfg_scale = _scale_at(terms, "ig", t), _scale_at(terms, "cfg", t)
        model_input, model_labels = x.float(), labels
        if cfg_scale != 1.0:
            model_input, model_labels = torch.cat([model_input, model_input]), with_null
        times = torch.full((len(model_input),), t, dtype=torch.float32, device=x.device)
        output = model(model_input, times, model_labels)

        dtype = torch.promote_types(x.dtype, torch.float32)
        guided = output.velocity.to(dtype)
        if ig_scale != 1.0 and output.aux_velocity is not None:
            guided = guided + (ig_scale - 1.0) * (guided - output.aux_velocity.to(dtype))
        if cfg_scale != 1.0:
            conditional, unconditional = guided.chunk(2)
            guided = conditional + (cfg_scale - 1.0) * (conditional - unconditional)
        return guided

    return velocity


def _scale_at(terms: Sequence[GuidanceTerm], kind: str, t: float) -> float:
    for term in terms:
        if term.kind == kind and term.interval[0] <= t <= term.interval[1]:
            return term.scale
    return 1.0


def check_overlap(terms: Sequence[GuidanceTerm]) -> None:
    """Raise ValueError when two terms of one kind are on at the same time."""
    for a, b in combinations(terms, 2):
        low, high = max(a.interval[0], b.interval[0]), min(a.interval[1], b.interval[1])
        if a.kind == b.kind and low <= high:
            raise ValueError(
                f"two {a.kind!r} guidance terms are both active on [{low}, {high}], ends included; "
                "make their intervals disjoint, or keep one term"
            )
