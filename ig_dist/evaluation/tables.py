"""Scores, sweeps and plans as tables on the terminal: nothing is cut, at 80 columns either."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ig_dist.config.catalogue import best_row, better
from ig_dist.config.describe import KINDS, guidance_name
from ig_dist.evaluation.evaluate import Verdict
from ig_dist.plans.samples import Listed
from ig_dist.terminal import console

SHORT = {"inception_score": "IS", "precision": "prec", "recall": "rec"}
SHORT |= {"label_agreement": "agree", "efficientnet": "effnet"}
AXES = {f"{kind}_scale": f"{name} scale" for kind, name in KINDS.items()}
AXES |= {f"{kind}_interval": f"{name} times" for kind, name in KINDS.items()}
AXES |= {"ema": "EMA", "step": "step", "num": "images"}


def print_result(result: dict[str, Any]) -> None:
    """Scores, then their protocol."""
    table = _table("what", "value", show_header=False)
    spread = result.get("spread", {})
    for name, value in result["scores"].items():
        table.add_row(name, _score(value, spread.get(name)), style="bold")
    table.add_section()
    for key, value in result["protocol"].items():
        told = guidance_name(value) if key == "guidance" else str(value)
        table.add_row(key, told)
    console.print(table)


def print_sweep(result: dict[str, Any]) -> None:
    """A row per point, a column for what varies; the best one stands out, and what is as good within the noise."""
    rows, target, flat = result["rows"], result["target"], result["flat"]
    names, first = list(rows[0]["scores"]), rows[0]
    varied = [key for key in AXES if key == "ig_scale" or len({str(row.get(key)) for row in rows}) > 1]
    heads = {name: name for name in names}
    for long, short in SHORT.items() if len(names) > 2 else ():
        heads = {name: head.replace(long, short) for name, head in heads.items()}
    table = _table(*(AXES[key] for key in varied), *heads.values(), f"{heads[target]} / first")
    best = best_row(rows, target)
    for row in rows:
        scores, deviations = row["scores"], row.get("std", {})
        cells = [_cell(row[key]) for key in varied]
        cells += [_score(scores[name], deviations.get(name), narrow=len(names) > 3) for name in names]
        alike = row["num"] == first["num"]  # scores of other numbers of images cannot be compared
        ratio = f"{scores[target] / first['scores'][target]:.2f}" if alike and first["scores"][target] else ""
        table.add_row(*cells, ratio, style="bold green" if row is best else None)
    console.print(table)
    if legend := [f"{head}: {name}" for name, head in heads.items() if head != name]:
        console.print("; ".join(legend))
    fixed = [
        key
        for key in AXES
        if key not in varied
        and first.get(key) is not None
        and any(row[key.replace("_interval", "_scale")] != 1 for row in rows)  # what is off is not told
    ]
    if fixed:
        console.print("in every row: " + ", ".join(f"{AXES[key]} {_cell(first[key])}" for key in fixed))
    if flat is None:
        way = "lower" if better(target) < 0 else "higher"
        console.print(f"{target}: {way} is better; --seeds 3 would tell differences from noise")
    elif len(flat) > 1:
        where = ", ".join(f"IG {rows[i]['ig_scale']:g} CFG {rows[i]['cfg_scale']:g}" for i in flat)
        console.print(f"{target} is flat within its noise over: {where}")


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """What ADM published beside what was found."""
    table = _table("images", "score", "published", "found", "")
    for verdict in verdicts:
        numbers = (f"{verdict.published:.5f}", f"{verdict.found:.5f}")
        said, style = ("equal", None) if verdict.passed else ("DIFFERS", "bold red")
        table.add_row(verdict.case, verdict.score, *numbers, said, style=style)
    console.print(table)


def print_plans(plans: Sequence[Listed]) -> None:
    """A run's plans: the folder's name, how many images, what they are, and the scores that are known."""
    table = _table("folder", "step", "images", "what", "scores")
    for listed in plans:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in listed.scores.items())
        what = listed.plan.describe().rpartition("; ")[0] if listed.plan else "not finished: sample again to go on"
        step, images = (f"{listed.step:,}", f"{listed.images:,}") if listed.step is not None else ("", "")
        table.add_row(listed.url.rsplit("/", 1)[-1], step, images, what, scores)
    console.print(table)


def _table(*heads: str, show_header: bool = True) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, show_header=show_header)
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def _score(value: float, deviation: float | None = None, *, narrow: bool = False) -> str:
    text = f"{value:.4f}" if abs(value) < 10 else f"{value:#.5g}" if abs(value) < 1e4 else f"{value:.0f}"
    if deviation is None:
        return text
    return f"{text}\n+-{deviation:.2g}" if narrow else f"{text} +- {deviation:.4f}"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "{:g}-{:g}".format(*value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if value is not None else ""
