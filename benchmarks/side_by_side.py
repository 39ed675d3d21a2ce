"""What the benchmarks share: ways timed in turn in one process, ratios of them as claims, a row of results.csv each.

    times = interleaved({"ours": step, "published": their_step}, rounds=7)
    show(times, [Claim("training step, published / ours", "published", "ours", ">= 1.0")], record=record)

A machine whose speed drifts slows neighbours alike, so what counts is the ratio within a round.
"""

from __future__ import annotations

import csv
import io
import operator
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from rich.table import Table

from ig_dist.terminal import console

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = ("date", "command", "claim", "ratio", "low", "high", "limit", "machine", "torch")
Times = dict[str, list[float]]
"""Seconds of each way, round by round."""
Record = Annotated[bool, typer.Option("--record", help="Append the claims to benchmarks/results.csv.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds after a first one that does not count; medians are shown.")]
_HOLDS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class Claim(NamedTuple):
    """A ratio of the times of two ways: ``over`` / ``under``."""

    name: str
    over: str
    under: str
    limit: str = ""
    """Such as ">= 1.0", of the median, or ">= 1.0, low > 0.95", of the lower end of its interval too."""


class Result(NamedTuple):
    """What was found of a claim: also of one that is no ratio of times."""

    claim: str
    ratio: float
    low: float | None = None
    """Ends of the 95% interval; None where the ratio was counted, not measured."""
    high: float | None = None
    limit: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether it keeps its limit; None: there is none."""
        values = {"": self.ratio, "low": self.low, "high": self.high}
        found = re.findall(r"(low|high|)\s*([<>]=?)\s*([\d.]+)", self.limit)
        kept = [_HOLDS[sign](value, float(bound)) for end, sign, bound in found if (value := values[end]) is not None]
        return all(kept) if kept else None


def seconds(way: Callable[[], object]) -> float:
    """Wall time of a call, the device waited for; what the call says itself where it returns a float."""
    wait_for_device()
    began = time.perf_counter()
    told = way()
    wait_for_device()
    return told if isinstance(told, float) else time.perf_counter() - began


def wait_for_device() -> None:
    """Until the GPU has done what it was given, where one is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int = 7, *, warm: int = 1) -> Times:
    """Time each way once a round, forwards and backwards by turns, so that none is always the first."""
    times: Times = {name: [] for name in ways}
    for number in range(warm + rounds):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            took = seconds(ways[name])
            if number >= warm:
                times[name].append(took)
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Median of the ratios within a round, and the ends of its 95% interval by bootstrap."""
    ratios = np.asarray(over) / np.asarray(under)
    drawn = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def profiled(call: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Milliseconds and calls of a GPU's kernels, or on a CPU of operations without those that they call."""
    import torch

    cuda = torch.cuda.is_available()
    with torch.profiler.profile() as profile:
        call()
        wait_for_device()
    spent = {}
    for event in profile.key_averages():
        if not cuda:
            spent[event.key] = event.self_cpu_time_total / 1e3, event.count
        elif event.device_type.name == "CUDA" and not event.is_user_annotation:
            spent[event.key] = event.self_device_time_total / 1e3, event.count
    return spent


def show(times: Times, claims: Sequence[Claim], *, title: str = "", record: bool = False) -> list[Result]:
    """Print the ways and the claims, and record these where asked."""
    table = Table("way", "ms, median", "lowest", "highest", title=title, title_justify="left")
    for name, measured in times.items():
        table.add_row(name, *(f"{1e3 * v:.4g}" for v in (statistics.median(measured), min(measured), max(measured))))
    console.print(table)
    results = [Result(c.name, *ratio(times[c.over], times[c.under]), c.limit) for c in claims]
    show_results(results, record=record)
    return results


def show_results(results: Sequence[Result], *, record: bool = False) -> None:
    """Print what was found of claims, and append it to results.csv where asked."""
    if not results:
        return
    table = Table("claim", "ratio", "95%", "limit", "holds")
    for found in results:
        interval = "" if found.low is None or found.high is None else f"{found.low:.3g} to {found.high:.3g}"
        said = {True: "yes", False: "no", None: ""}[found.holds]
        table.add_row(found.claim, f"{found.ratio:.4g}", interval, found.limit, said)
    console.print(table)
    if record:
        append(results)


def append(results: Sequence[Result], file: Path = RESULTS) -> None:
    """A row of results.csv for each, in one write: other benchmarks may append at the same time."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not file.exists():
        writer.writerow(COLUMNS)
    numbers = [["" if v is None else f"{v:.5g}" for v in (r.ratio, r.low, r.high)] for r in results]
    for found, values in zip(results, numbers, strict=True):
        date = f"{datetime.now(UTC):%Y-%m-%d}"
        writer.writerow([date, command(), found.claim, *values, found.limit, machine(), version("torch")])
    with file.open("a", encoding="utf-8") as out:
        out.write(text.getvalue())


def command() -> str:
    """What was typed, without this machine's paths."""
    words = ["DIR" if word.startswith("/") else word for word in sys.argv[1:] if word != "--record"]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def machine() -> str:
    """What the numbers are of."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} core{'s' * (cores != 1)} of {found[1] if found else platform.machine()}"
