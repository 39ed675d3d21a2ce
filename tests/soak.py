"""A campaign of faults: what a user starts is hurt at seeded moments until it ends, and must end as if nothing was.

    python tests/soak.py --minutes 30 --seed 7      # or --faults 1000; `make soak`

Each round (soak_rounds.py, soak_slurm.py) is one command in a folder of its own, started again until it ends well.
Afterwards the promises are held: the same weights bit for bit, each step and shard and image exactly once, no
traceback, the exit codes that docs/running.md names. A table of faults, failures and lost seconds is written with
``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import forked, object_store, slurm_cluster
from tests.soak_campaign import Broken, Campaign
from tests.soak_rounds import ENGINES, clock, encode, full_disk, sample, storage, train, two_at_once
from tests.soak_slurm import slurm


def table(campaign: Campaign) -> str:
    """Of the faults, as Markdown."""
    lines = ["| fault | times | promises broken | seconds lost, each |", "|---|---|---|---|"]
    for kind, tally in sorted(campaign.tallies.items()):
        lines.append(
            f"| {kind} | {tally.faults:,} | {len(tally.failures)} | {tally.lost_s / max(tally.faults, 1):.2f} |"
        )
    broken = sum(len(tally.failures) for tally in campaign.tallies.values())
    return "\n".join([*lines, f"| **all** | {campaign.faults:,} | {broken} | |"])


def soak(
    faults: int,
    minutes: float,
    seed: int,
    folder: Path,
    *,
    only: str = "",
    ends_s: float = Campaign.ends_s,
    out: Path | None = None,
) -> Campaign:
    """Rounds until there were so many faults, or the time is over; the table is written after each."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks that share cores slow each other down otherwise
    index = folder / "digits"
    command = [*forked.CLI, "encode", "--source", "digits", "--dest", index, "--tokenizer", "pixel"]
    forked.run([*forked.CLI, "--help"])  # the server of forks begins
    campaign, began = Campaign(folder, index, random.Random(seed), ends_s), time.monotonic()
    assert forked.run(command).returncode == 0
    campaign.seconds["encode"] = time.monotonic() - began
    (folder / "whole").mkdir()
    with ExitStack() as servers:
        rounds = {name: act for name, act in all_rounds(folder, servers).items() if re.search(only, name)}
        deadline = time.monotonic() + 60 * minutes
        while campaign.faults < faults and time.monotonic() < deadline:
            name = [*rounds][campaign.rounds % len(rounds)]
            campaign.rounds += 1
            place = folder / f"round{campaign.rounds}"
            place.mkdir()
            began = time.monotonic()
            try:
                suffered = rounds[name](campaign, place)
            except Broken as broken:
                campaign.failed([name], str(broken))
                continue  # its folder stays, to be looked at
            finally:
                if out:
                    out.write_text(table(campaign) + "\n")
            lost_s = time.monotonic() - began - campaign.seconds.get(name, campaign.seconds.get("train ddp, 1", 0.0))
            for kind in suffered:
                campaign.tallies[kind].lost_s += max(0.0, lost_s) / len(suffered)
            print(f"round {campaign.rounds}, {name}: {len(suffered)} faults, {campaign.faults} in all", flush=True)
            shutil.rmtree(place)
    return campaign


def all_rounds(folder: Path, servers: ExitStack) -> dict[str, Callable[[Campaign, Path], list[str]]]:
    """Those that this machine can do, by name; servers start with the first round that needs them."""
    rounds: dict[str, Callable[[Campaign, Path], list[str]]] = {
        **{f"train {name}": partial(train, name=name) for name in ENGINES},
        "encode": encode, "sample": sample, "two": two_at_once, "clock": clock,
    }  # fmt: skip
    if os.geteuid() == 0:
        rounds["disk"] = full_disk
    if object_store.available() is None:
        store = cache(lambda: servers.enter_context(object_store.ObjectStore(folder / "store")))
        rounds["storage"] = partial(storage, start_store=store)
    if slurm_cluster.available() is None:
        cluster = cache(lambda: servers.enter_context(slurm_cluster.SlurmCluster(nodes=2)))
        rounds["slurm"] = partial(slurm, start_cluster=cluster)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rounds whose name holds this regular expression")
    parser.add_argument("--patience", type=float, default=Campaign.ends_s, help="seconds until a command hangs")
    parser.add_argument("--out", type=Path, help="file for the table")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    campaign = soak(
        asked.faults, asked.minutes, asked.seed, folder, only=asked.only, ends_s=asked.patience, out=asked.out
    )
    print(table(campaign))
    if asked.out:
        asked.out.write_text(table(campaign) + "\n")
    failures = {kind: tally.failures for kind, tally in campaign.tallies.items() if tally.failures}
    if failures:
        print(json.dumps(failures, indent=1), f"\nlook into {folder}")
    else:
        shutil.rmtree(folder)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
