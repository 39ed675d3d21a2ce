"""Scores and sweeps as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ig_dist.evaluation.catalogue import best_row, lower_is_better
from ig_dist.evaluation.referee import Verdict
from ig_dist.terminal import console


def print_result(result: dict[str, Any]) -> None:
    """Scores, then their protocol."""
    table = Table("what", "value", show_header=False)
    spread = result.get("spread", {})
    for name, value in result["scores"].items():
        table.add_row(name, f"{value:.4f}" + (f" +- {spread[name]:.4f}" if name in spread else ""), style="bold")
    table.add_section()
    for key, value in result["protocol"].items():
        table.add_row(key, str(value))
    console.print(table)


def print_sweep(result: dict[str, Any]) -> None:
    """A row per point; the best one stands out, and what is as good within the noise."""
    rows, target = result["rows"], result["target"]
    names = list(rows[0]["scores"])
    shown = [
        key for key in ("auto_scale", "cfg_interval", "ema", "step", "num") if len({str(row[key]) for row in rows}) > 1
    ]
    heads = {"auto_scale": "autoguidance", "cfg_interval": "CFG interval", "num": "images"}
    extra = [heads.get(key, key) for key in shown]
    table = Table("IG scale", "CFG scale", *extra, "IG interval", *names, f"{target} / first")
    best = best_row(rows, target)
    for row in rows:
        scores, deviations = row["scores"], row.get("std", {})
        cells = [f"{row['ig_scale']:g}", f"{row['cfg_scale']:g}", *(_cell(row[key]) for key in shown)]
        cells.append(_cell(row["ig_interval"]))
        cells += [f"{scores[n]:.4f}" + (f" +- {deviations[n]:.4f}" if n in deviations else "") for n in names]
        alike = row["num"] == rows[0]["num"]  # scores of other numbers of images cannot be compared
        first = rows[0]["scores"][target]
        ratio = f"{scores[target] / first:.2f}" if alike and first else ""
        table.add_row(*cells, ratio, style="bold green" if row is best else None)
    console.print(table)
    better = "lower" if lower_is_better(target) else "higher"
    alike = [rows[i] for i in result["flat"] or []]
    if result["flat"] is None:
        console.print(f"{target}: {better} is better; --seeds 3 would tell differences from noise")
    elif len(alike) > 1:
        where = ", ".join(f"IG {row['ig_scale']:g} CFG {row['cfg_scale']:g}" for row in alike)
        console.print(f"{target} is flat within its noise over: {where}")


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """What ADM published beside what was found."""
    table = Table("images", "score", "published", "found", "")
    for verdict in verdicts:
        numbers = (f"{verdict.published:.5f}", f"{verdict.found:.5f}")
        table.add_row(
            verdict.case, verdict.score, *numbers, "equal" if verdict.passed else "[bold red]DIFFERS[/bold red]"
        )
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "{:g} to {:g}".format(*value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if value is not None else ""
