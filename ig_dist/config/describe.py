"""Guidance and sampling plans in words, for all that name one: plans, tables, charts, the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from ig_dist.diffusion.samplers import SOLVERS
from ig_dist.errors import listed

KINDS = {"ig": "IG", "cfg": "CFG", "auto": "autoguidance"}


def interval_text(interval: Sequence[float] | None) -> str:
    """Times, e.g. ``[0.2, 1]``."""
    return "none" if interval is None else "[{:g}, {:g}]".format(*interval)


def guidance_name(terms: Sequence[Mapping[str, Any]]) -> str:
    """Guidance in words, e.g. ``IG 1.4 for t in [0.2, 1], CFG 1.5``; of files of others too."""
    names = []
    for term in terms:
        interval, channels = tuple(term.get("interval", (0, 1))), term.get("channels")
        on = "" if interval == (0, 1) else f" for t in {interval_text(interval)}"
        on += f" on the first {channels} channel{'s' * (channels > 1)}" if channels else ""
        branch = f" on the {term['branches']} branch" if term.get("branches", "both") != "both" else ""
        names.append(f"{KINDS.get(term['kind'], str(term['kind']).upper())} {term['scale']:g}{on}{branch}")
    return ", ".join(names) or "unguided"


def plan_name(digest: str, plan: Mapping[str, Any], step: int | None = None) -> str:
    """A sampling plan in words, but for values as usual; its hash is the last, so that no two plans are named alike."""
    classes, compiled = plan.get("classes") or (), plan.get("compile", "auto")
    usual = {"precision": ("", "fp32"), "state": ("state in ", "fp64"), "decode_precision": ("decoded in ", "fp32")}
    parts = [
        guidance_name(plan["guidance"]),
        f"{plan['solver']} {plan['steps']}" if "steps" in SOLVERS[plan["solver"]].settings else plan["solver"],
        f"time shift {plan['time_shift']:.3g}" if plan.get("time_shift", 1) != 1 else "",
        "" if plan.get("correct_last_step", True) else "last step not corrected",
        f"classes {listed(list(map(str, classes)), 6)}" if classes else "",
        "random labels" if plan["labels"] == "random" else "",
        f"seed {plan['seed']}",
        *(f"{word}{plan[key]}" for key, (word, value) in usual.items() if plan.get(key, value) != value),
        "" if compiled == "auto" else "compiled" if compiled else "not compiled",
        f"step {step:,} of the run" if step is not None else "",
    ]
    return f"{', '.join(filter(None, parts))}; plan {digest[:8]}"
