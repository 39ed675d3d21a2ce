"""Guidance as data: a list of terms, and the one guided velocity function that they make.

IG extrapolates from the auxiliary head to the final head (arXiv 2512.24176), autoguidance from a second, weaker model
to the model (arXiv 2406.02507), and CFG from the null label to the label (arXiv 2207.12598), here between predictions
that the other two have guided already. Each acts in an interval of times (arXiv 2404.07724).
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Annotated, Any, Literal, Protocol, Self

import torch
from pydantic import ConfigDict, Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from ig_dist.models.dit import DiTOutput

Kind = Literal["ig", "cfg", "auto"]
Branch = Literal["conditional", "null"]
Fraction = Annotated[float, Field(ge=0, le=1)]
BRANCHES: tuple[Branch, ...] = ("conditional", "null")


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True))
class GuidanceTerm:
    """One guidance term: weak + scale * (strong - weak)."""

    kind: Kind
    """ig: Internal Guidance (weak head to final head). cfg: classifier-free guidance (null label to label). auto:
    autoguidance (the second model ``sample.weak_model`` to the model)."""
    scale: float
    """Extrapolation scale; 1 is no guidance."""
    interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Times t at which the term is on, both ends included (t = 1 is noise)."""
    branches: Literal["both", "conditional", "null"] = "both"
    """Of ig and auto: guide the prediction for the label, the one for the null label that cfg needs, or both."""
    channels: PositiveInt | None = None
    """Guide so many leading channels of the latents, and leave the others as they are: the original SiT guides 3 of 4,
    the original LightningDiT 3 of 32. null: all."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"{self.kind} interval is {list(self.interval)}; write low <= high")
        if self.kind == "cfg" and self.branches != "both":
            raise ValueError("cfg leads from one branch to the other: leave its branches out")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans from before there was a choice of channels keep their hash."""
        told: dict[str, Any] = fields(self)
        return told if self.channels else {key: value for key, value in told.items() if key != "channels"}

    def acts(self, kind: Kind, branch: Branch, t: float) -> bool:
        """Whether this is a term of that kind which is on at t in that branch."""
        return self.kind == kind and self.branches in ("both", branch) and self.interval[0] <= t <= self.interval[1]

    def guide(self, guided: Tensor, strong: Tensor, weak: Tensor) -> Tensor:
        """``guided`` + (scale - 1) (strong - weak), each (B, C, H, W), in the channels of this term."""
        if self.channels is None or self.channels >= guided.shape[1]:
            return guided + (self.scale - 1.0) * (strong - weak)
        these = slice(self.channels)
        ahead = guided[:, these] + (self.scale - 1.0) * (strong[:, these] - weak[:, these])
        return torch.cat([ahead, guided[:, self.channels :]], dim=1)


class GuidableModel(Protocol):
    """What guidance asks of a model; `DiT` has it."""

    @property
    def null_label(self) -> int: ...  # noqa: D102

    @property
    def has_aux_head(self) -> bool: ...  # noqa: D102

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, *, with_aux: bool = True) -> DiTOutput: ...  # noqa: D102


def guided_velocity(
    model: GuidableModel,
    labels: Tensor,
    guidance: Sequence[GuidanceTerm],
    weak_model: GuidableModel | None = None,
) -> Callable[[Tensor, float], Tensor]:
    """Return the function (x, t) -> velocity of a model under guidance.

    In each branch v + (w_ig - 1)(v - v_aux) + (w_auto - 1)(v - v_weak); between the branches v_c + (w_cfg - 1)(v_c -
    v_null); each in the channels of its term. The models see float32; the combination is made in the dtype of x, or in
    float32 where that is coarser. The time is a Python float, so intervals are tested exactly and without waiting for
    the device. What has no effect at t is not evaluated: with scale 1 the result is bitwise the unguided one, the null
    label is run (as a second half of the batch) inside the CFG interval only, the auxiliary head inside that of IG, and
    the second model inside its own, on its branches.

    Args:
        model: predicts the velocity from (x_t, t, labels).
        labels: (B,) int64, on the device of x.
        guidance: the terms, at most one of a kind at any time in a branch.
        weak_model: the second model of "auto" terms.

    Raises:
        ValueError: two terms of a kind overlap, or a term asks for what is not there.
    """
    terms = [term for term in guidance if term.scale != 1.0]
    check_overlap(terms)
    if any(term.kind == "ig" for term in terms) and not model.has_aux_head:
        raise ValueError(
            "guidance asks for 'ig' but the model has no auxiliary head; remove the term, or train with model.aux_depth"
        )
    if any(term.kind == "auto" for term in terms) and weak_model is None:
        raise ValueError("guidance asks for 'auto' but there is no second model; give one, or remove the term")
    labels_of: dict[Branch, Tensor] = {"conditional": labels, "null": torch.full_like(labels, model.null_label)}
    choices = (BRANCHES[:1], BRANCHES[1:], BRANCHES)
    batches = {chosen: torch.cat([labels_of[branch] for branch in chosen]) for chosen in choices}

    def acting(kind: Kind, branches: tuple[Branch, ...], t: float) -> dict[Branch, GuidanceTerm]:
        return {branch: term for branch in branches for term in terms if term.acts(kind, branch, t)}

    def predict(asked: GuidableModel, x: Tensor, t: float, branches: tuple[Branch, ...], with_aux: bool) -> DiTOutput:
        many = torch.cat([x.float()] * len(branches)) if len(branches) > 1 else x.float()
        times = torch.full((len(many),), t, dtype=torch.float32, device=x.device)
        return asked(many, times, batches[branches], with_aux=with_aux)

    def velocity(x: Tensor, t: float) -> Tensor:
        cfg = acting("cfg", BRANCHES[:1], t).get("conditional")
        branches = BRANCHES if cfg else BRANCHES[:1]
        ig, auto = acting("ig", branches, t), acting("auto", branches, t)
        output = predict(model, x, t, branches, bool(ig))
        dtype = torch.promote_types(x.dtype, torch.float32)
        strong = dict(zip(branches, output.velocity.to(dtype).chunk(len(branches)), strict=True))
        guided = dict(strong)
        if ig and output.aux_velocity is not None:
            weak = dict(zip(branches, output.aux_velocity.to(dtype).chunk(len(branches)), strict=True))
            for branch, term in ig.items():
                guided[branch] = term.guide(guided[branch], strong[branch], weak[branch])
        if auto and weak_model is not None:
            second = predict(weak_model, x, t, tuple(auto), False).velocity.to(dtype)
            for (branch, term), other in zip(auto.items(), second.chunk(len(auto)), strict=True):
                guided[branch] = term.guide(guided[branch], strong[branch], other)
        if cfg is None:
            return guided["conditional"]
        return cfg.guide(guided["conditional"], guided["conditional"], guided["null"])

    return velocity


def check_overlap(terms: Sequence[GuidanceTerm]) -> None:
    """Raise ValueError when two terms of one kind are on at the same time in the same branch."""
    for a, b in combinations(terms, 2):
        low, high = max(a.interval[0], b.interval[0]), min(a.interval[1], b.interval[1])
        same_branch = a.branches == b.branches or "both" in (a.branches, b.branches)
        if a.kind == b.kind and low <= high and same_branch:
            raise ValueError(
                f"two {a.kind!r} guidance terms are both active on [{low}, {high}], ends included; "
                "make their intervals disjoint, or keep one term"
            )
