"""RESULTS.md and results.svg from results.csv: the newest row of each claim that has a limit or an interval.

    python benchmarks/plots.py

The last column of the page, what is left to do, is written by hand and kept from the page before. All rows, older ones
too, stay in results.csv.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import typer
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.side_by_side import RESULTS, Result
from ig_dist.run_dir import replace_text
from ig_dist.terminal import console, run_app

HEAD = """# Results

Made by `python benchmarks/plots.py` from [results.csv](results.csv), which holds all that was ever measured. A ratio
is of variants that ran in turn in one process: the median of the rounds, and its 95% interval where it was timed; of
rows from "shared" machines, which are older, the lowest and highest round. `--record` appends a run.
What `python benchmarks/gpu.py` found on an H100 stands in [gpu.md](gpu.md).

![Each claim against its limit](results.svg)

How costs grow with model, batch, classes, shards, units and ranks, and the exponent of each:

![Growth](growth.svg)

| claim | command | found | limit | date, machine | what is left |
|---|---|---|---|---|---|
"""
Row = dict[str, str]


def newest(rows: list[Row]) -> dict[str, list[Row]]:
    """The last row of each claim that has a limit, or is a ratio with an interval, by benchmark."""
    last = {row["claim"].partition(", the highest")[0]: row for row in rows}  # growth: of what, may change
    groups: dict[str, list[Row]] = {}
    for row in last.values():
        if row["limit"] or (" / " in row["claim"] and row["low"] and row["high"]):
            found = re.search(r"(\w+)\.py", row["command"])
            groups.setdefault(found[1] if found else "others", []).append(row)
    return dict(sorted(groups.items()))


def result(row: Row) -> Result:
    """The row as it was recorded."""
    low, high = (float(row[end]) if row[end] else None for end in ("low", "high"))
    return Result(row["claim"], float(row["ratio"]), low, high, row["limit"])


def page(groups: dict[str, list[Row]], left: dict[str, str]) -> str:
    """RESULTS.md."""
    lines = []
    for rows in groups.values():
        for row in rows:
            found = result(row)
            value = f"{found.ratio:.4g}" + (f" ({row['low']} to {row['high']})" if row["low"] and row["high"] else "")
            held = " **missed**" if found.holds is False else ""
            where = f"{row['date']}, {row['machine']}"
            cells = (row["claim"], f"`{row['command']}`", value + held, row["limit"], where, left.get(row["claim"], ""))
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |\n")
    return HEAD + "".join(lines)


def kept(text: str) -> dict[str, str]:
    """What is left, by claim, as the page has it."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[5] for row in rows if len(row) == 6}


def plot(groups: dict[str, list[Row]], file: Path) -> None:
    """A panel for each benchmark: found over limit, or found where there is none, with its interval; red: missed."""
    mpl.rcParams.update({"svg.hashsalt": "results", "svg.fonttype": "none", "font.size": 7})
    heights = [len(rows) + 1.5 for rows in groups.values()]
    figure, panels = pyplot.subplots(
        len(groups), 1, figsize=(8, 0.19 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for (name, rows), panel in zip(groups.items(), panels[:, 0], strict=True):
        for place, row in enumerate(rows):
            found, limit = result(row), re.match(r"([<>])=? ([\d.]+)", row["limit"])
            bound = float(limit[2]) if limit else 1.0
            ends = [(v or found.ratio) / bound for v in (found.low, found.high)]
            panel.plot(ends, [place] * 2, color="0.6", linewidth=2, zorder=1)
            colour = {True: "tab:blue", False: "tab:red", None: "0.4"}[found.holds]
            marker = {">": ">", "<": "<", "": "o"}[limit[1] if limit else ""]
            panel.scatter([found.ratio / bound], [place], s=14, color=colour, marker=marker, zorder=2)
        panel.axvline(1, color="black", linewidth=0.6)
        low, high = panel.get_xlim()
        panel.set_xscale("log" if high > 3 * max(low, 1e-9) else "linear")
        panel.set_yticks(range(len(rows)), [f"{row['claim'][:78]}  {row['limit']}" for row in rows])
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.set_title(f"{name}.py: found / limit", loc="left", fontsize=8)
        panel.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        panel.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main(
    rows: Annotated[Path, typer.Option(help="The recorded rows.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="Folder of the page and the picture.")] = RESULTS.parent,
) -> None:
    """Write the page and the picture."""
    with rows.open(encoding="utf-8") as file:
        groups = newest(list(csv.DictReader(file)))
    written = out / "RESULTS.md"
    left = kept(written.read_text(encoding="utf-8")) if written.exists() else {}
    replace_text(written, page(groups, left))
    plot(groups, out / "results.svg")
    console.print(f"{written}: {sum(map(len, groups.values()))} claims")


if __name__ == "__main__":
    run_app(main)
