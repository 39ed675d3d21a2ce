"""A campaign of faults: what a user starts is hurt at seeded moments until it ends, and must end as if nothing was.

    python tests/soak.py --minutes 30 --seed 7      # or --faults 1000; `make soak`

Each round is one command in a folder of its own, started again until it ends well. Afterwards the promises are held:
the same weights bit for bit, each step and shard and image exactly once, no traceback, the exit codes that
docs/running.md names. A table of faults, failures and lost seconds is written with ``--out``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ig_dist.json_lines import read_lines
from tests import forked
from tests.conftest import write_tiny_config
from tests.distributed.test_training import final_tensors
from tests.fault_proxy import Fault, FaultProxy
from tests.integration.test_damage import CASES
from tests.object_store import ObjectStore, available

STEPS = 60
ENDS_S = 90.0  # by which a command that was hurt has ended
WELL = {0}
PREEMPTED = 75
ENGINES: dict[str, tuple[int, dict[str, dict[str, object]]]] = {
    "ddp, 1": (1, {}),
    "ddp, 2": (2, {}),
    "fsdp2, 2": (2, {"engine": {"kind": "fsdp2"}}),
    "hsdp, 4": (4, {"engine": {"kind": "fsdp2", "replicate": 2}}),
    "deepspeed, 2": (2, {"engine": {"kind": "deepspeed"}}),
    "muon, 2": (2, {"optimizer": {"kind": "muon"}}),
}
DAMAGES = [
    name
    for name, (_, wanted) in CASES.items()
    if wanted == "before" and name.startswith(("data cut", "data flip", "manifest"))
]


@dataclass
class Tally:
    """Of one kind of fault."""

    faults: int = 0
    failures: list[str] = field(default_factory=list)
    lost_s: float = 0.0
    """By which its rounds took longer than without faults, shared out among these."""


@dataclass
class Campaign:
    """What is drawn, where it happens, and what came of it."""

    folder: Path
    index: Path
    draw: random.Random
    tallies: dict[str, Tally] = field(default_factory=dict)
    whole: dict[str, Path] = field(default_factory=dict)
    """Runs that nothing happened to."""
    seconds: dict[str, float] = field(default_factory=dict)
    """That a round's command takes when nothing happens to it."""
    rounds: int = 0

    @property
    def faults(self) -> int:
        return sum(tally.faults for tally in self.tallies.values())

    def count(self, kind: str) -> str:
        self.tallies.setdefault(kind, Tally()).faults += 1
        return kind

    def failed(self, kinds: Sequence[str], what: str) -> None:
        print(f"FAILED {', '.join(kinds)}: {what}", flush=True)
        self.tallies.setdefault(kinds[-1] if kinds else "none", Tally()).failures.append(what)


class Broken(Exception):  # noqa: N818  (a promise)
    """A promise that did not hold."""


def moment(campaign: Campaign, process: forked.Process, longest_s: float) -> bool:
    """Wait for a moment that is drawn; whether the command is still there."""
    deadline = time.monotonic() + campaign.draw.uniform(0.02, 0.7 * longest_s)
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    return process.poll() is None


def family(pid: int) -> list[int]:
    """A process and all that came from it."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for member in found:
        found += parents.get(member, [])
    return found


def kill_all(campaign: Campaign, process: forked.Process) -> None:
    for pid in family(process.pid or 0):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_one(campaign: Campaign, process: forked.Process) -> None:
    members = family(process.pid or 0)
    with suppress(ProcessLookupError):
        os.kill(campaign.draw.choice(members[1:] or members), signal.SIGKILL)


def stand_still(campaign: Campaign, process: forked.Process) -> None:
    """SIGSTOP of one process, and later SIGCONT: nothing ends by it."""
    pid = campaign.draw.choice(family(process.pid or 0))
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(campaign.draw.uniform(0.05, 0.6))
        os.kill(pid, signal.SIGCONT)


def ask(number: int, campaign: Campaign, process: forked.Process) -> None:
    process.send_signal(number)


ENDING: dict[str, tuple[Callable[[Campaign, forked.Process], None], set[int] | None]] = {
    "SIGKILL of all": (kill_all, None),
    "SIGKILL of one": (kill_one, None),
    "SIGTERM": (partial(ask, signal.SIGTERM), {0, PREEMPTED, -signal.SIGTERM}),
    "SIGUSR2": (partial(ask, signal.SIGUSR2), {0, PREEMPTED, -signal.SIGUSR2}),
}
STILL = "SIGSTOP and SIGCONT"
FOR_ANY = ("SIGKILL of all", "SIGKILL of one", STILL)


def under_faults(
    campaign: Campaign,
    start: Callable[[], forked.Process],
    kinds: Sequence[str],
    longest_s: float,
    between: Callable[[], str | None] = lambda: None,
) -> list[str]:
    """Start a command until it ends well, hurt a few times on the way; the faults.

    Raises:
        Broken: it says a traceback, hangs, or ends with a code that it must not.
    """
    suffered: list[str] = []
    most = campaign.draw.randrange(3, 9)
    while True:
        process = start()
        codes: set[int] | None = WELL
        while len(suffered) < most and moment(campaign, process, longest_s):
            kind = campaign.draw.choice(kinds)
            if kind == STILL:
                stand_still(campaign, process)
            else:
                act, codes = ENDING[kind]
                act(campaign, process)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(ENDS_S)
            suffered.append(campaign.count(kind))
            if kind != STILL:
                break
        try:
            out, err = process.communicate(ENDS_S)
        except FileNotFoundError:  # it was killed before it had a file to write to
            out = err = ""
        except subprocess.TimeoutExpired:
            kill_all(campaign, process)
            raise Broken(f"hangs after {suffered}") from None
        code = process.wait()
        if "Traceback" in out + err:
            raise Broken(f"traceback after {suffered}: {(out + err)[-1500:]}")
        if codes is not None and code not in codes:
            raise Broken(f"exit code {code} after {suffered}: {err[-600:]}")
        if code == 0:
            return suffered
        if between() is not None:
            suffered.append(campaign.count("damaged checkpoint"))


def launched(config: Path, processes: int) -> forked.Process:
    command = ["launch", "--processes", processes, config] if processes > 1 else ["train", config]
    return forked.Process([*forked.CLI, *command], new_session=True)


def train(campaign: Campaign, folder: Path, name: str) -> list[str]:
    """Training under an engine; between starts a checkpoint may be damaged."""
    processes, groups = ENGINES[name]
    settings = {"train": {"steps": STEPS}, "checkpoint": {"every_steps": 5, "keep_last": 3}, **groups}
    if name not in campaign.whole:
        whole = write_tiny_config(campaign.folder / "whole", campaign.index, re.sub(r"\W+", "", name), **settings)
        began = time.monotonic()
        process = launched(whole, processes)
        assert process.wait(ENDS_S) == 0, process.communicate()
        campaign.seconds[f"train {name}"] = time.monotonic() - began
        campaign.whole[name] = campaign.folder / "whole" / "runs" / whole.stem
    config = write_tiny_config(folder, campaign.index, "hurt", **settings)
    run = folder / "runs" / "hurt"

    def damage() -> str | None:
        saved = sorted(run.glob("checkpoints/*/manifest.json"))
        if len(saved) < 2 or campaign.draw.random() < 0.5:
            return None
        chosen = campaign.draw.choice(DAMAGES)
        newest = saved[-1].parent
        # the cases speak of step 2 of a run
        (as_two := run / "checkpoints" / "step_0000000002").symlink_to(newest)
        try:
            CASES[chosen][0](run)
        except ValueError:  # several files of data: nothing is damaged
            return None
        finally:
            as_two.unlink()
        return chosen

    suffered = under_faults(
        campaign, partial(launched, config, processes), [*ENDING, STILL], campaign.seconds[f"train {name}"], damage
    )
    expected, found = final_tensors(campaign.whole[name], STEPS), final_tensors(run, STEPS)
    if expected.keys() != found.keys() or not all(expected[key].equal(found[key]) for key in expected):
        raise Broken(f"{name}: other weights after {suffered}")
    if batches(run) != batches(campaign.whole[name]):
        raise Broken(f"{name}: other batches, or a step twice, after {suffered}")
    return suffered


def batches(run: Path) -> list[tuple[int, int]]:
    """Each step that was logged, and what it was fed."""
    return [(line["step"], line["batch_fingerprint"]) for line in read_lines(run / "metrics.jsonl")]


def content(folder: Path, pattern: str) -> dict[str, str]:
    """Hash of each file below a folder."""
    files = [file for file in sorted(folder.rglob(pattern)) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def encode(campaign: Campaign, folder: Path) -> list[str]:
    """Encoding: the same shards and index."""
    command = [*forked.CLI, "encode", "--source", "digits", "--dest", folder / "shards", "--tokenizer", "pixel"]
    suffered = under_faults(
        campaign, lambda: forked.Process(command, new_session=True), FOR_ANY, campaign.seconds["encode"]
    )
    if content(folder / "shards", "*") != content(campaign.index, "*"):
        raise Broken(f"other shards after {suffered}")
    return suffered


def sample(campaign: Campaign, folder: Path) -> list[str]:
    """Sampling with features and scores: the same npz and the same scores."""
    run = campaign.whole.get("ddp, 1")
    if run is None:
        return train(campaign, folder, "ddp, 1")
    options = [
        "--num",
        96,
        "--ig-scale",
        1.5,
        "--steps",
        4,
        "--evaluate",
        "sample.unit_size=16",
        "sample.batch_size=16",
    ]

    def start(out: Path) -> forked.Process:
        return forked.Process([*forked.CLI, "sample", run, *options, "--out", out], new_session=True)

    whole = campaign.folder / "samples"
    if not whole.exists():
        began, process = time.monotonic(), start(whole)
        assert process.wait(ENDS_S) == 0, process.communicate()
        campaign.seconds["sample"] = time.monotonic() - began
    suffered = under_faults(campaign, lambda: start(folder / "samples"), FOR_ANY, campaign.seconds["sample"])
    for pattern in ("samples.npz", "unit_*.safetensors"):  # a kill may leave a temporary file
        if content(folder / "samples", pattern) != content(whole, pattern):
            raise Broken(f"other {pattern} after {suffered}")
    return suffered


def two_at_once(campaign: Campaign, folder: Path) -> list[str]:
    """A second command in the same run directory is refused, and the first goes on."""
    config = write_tiny_config(folder, campaign.index, "hurt", train={"steps": STEPS}, checkpoint={"every_steps": 5})
    first = launched(config, 1)
    while not (folder / "runs" / "hurt" / "metrics.jsonl").exists() and first.poll() is None:
        time.sleep(0.01)
    second = forked.run([*forked.CLI, "train", config])
    campaign.count("two commands in one folder")
    if first.poll() is None and (second.returncode != 2 or "in use by process" not in second.stderr):
        raise Broken(f"a second command: exit code {second.returncode}: {second.stderr[-500:]}")
    if first.wait(ENDS_S) or "Traceback" in second.stderr:
        raise Broken("the first of two commands did not end well")
    return ["two commands in one folder"]


def jumping_clock(seed: int) -> None:
    """In the process itself: the wall clock steps to and fro by hours; the monotonic one does not."""
    draw, real, offset = random.Random(seed), time.time, 0.0

    def jumps() -> float:
        nonlocal offset
        if draw.random() < 0.05:
            offset = draw.uniform(-7200, 7200)
        return real() + offset

    time.time = jumps


def clock(campaign: Campaign, folder: Path) -> list[str]:
    """A training whose clock steps ends with the same weights."""
    settings = {"train": {"steps": STEPS}, "checkpoint": {"every_steps": 5, "keep_last": 3}}
    if "ddp, 1" not in campaign.whole:
        return train(campaign, folder, "ddp, 1")
    config = write_tiny_config(folder, campaign.index, "hurt", **settings)
    before = partial(jumping_clock, campaign.draw.randrange(2**32))
    process = forked.Process([*forked.CLI, "train", config], before=before)
    out, err = process.communicate(ENDS_S)
    campaign.count("clock steps")
    if process.wait() or "Traceback" in out + err:
        raise Broken(f"clock: exit code {process.wait()}: {err[-800:]}")
    expected, found = final_tensors(campaign.whole["ddp, 1"], STEPS), final_tensors(folder / "runs" / "hurt", STEPS)
    if not all(expected[key].equal(found[key]) for key in expected):
        raise Broken("clock: other weights")
    return ["clock steps"]


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def full_disk(campaign: Campaign, folder: Path) -> list[str]:
    """The run's disk fills up now and then: the run goes on, or ends with a line and goes on when there is space."""
    if "ddp, 1" not in campaign.whole:
        return train(campaign, folder, "ddp, 1")
    suffered: list[str] = []
    with disk(folder / "disk", "8m") as small:
        settings = {"train": {"steps": STEPS}, "checkpoint": {"every_steps": 5, "keep_last": 3}}
        config = write_tiny_config(small, campaign.index, "hurt", **settings)
        while True:
            process = launched(config, 1)
            while moment(campaign, process, 1.5) and len(suffered) < 6:
                with suppress(OSError), (small / "filler").open("wb", buffering=0) as filler:
                    while True:
                        filler.write(bytes(4096))
                time.sleep(campaign.draw.uniform(0.05, 0.6))
                (small / "filler").unlink()
                suffered.append(campaign.count("full disk"))
            out, err = process.communicate(ENDS_S)
            if "Traceback" in out + err:
                raise Broken(f"full disk: {(out + err)[-1500:]}")
            if process.wait() == 0:
                break
            if process.wait() not in (2, 4, 8):
                raise Broken(f"full disk: exit code {process.wait()}: {err[-500:]}")
        expected, found = final_tensors(campaign.whole["ddp, 1"], STEPS), final_tensors(small / "runs" / "hurt", STEPS)
        if expected.keys() != found.keys() or not all(expected[key].equal(found[key]) for key in expected):
            raise Broken("full disk: other weights")
    return suffered


STORAGE = [
    Fault("status503", share=0.05),
    Fault("status500", share=0.03),
    Fault("reset", share=0.04),
    Fault("lost", share=0.02),
    Fault("cut", share=0.05, after_bytes=2000),
    Fault("flip", share=0.02, after_bytes=300),
    Fault("short", share=0.02, after_bytes=500),
]


def storage(campaign: Campaign, folder: Path, store: ObjectStore, bucket: str) -> list[str]:
    """Training from and to an object store that fails: 503, resets, lost answers, cut and flipped bodies, an outage."""
    if "ddp, 1" not in campaign.whole:
        return train(campaign, folder, "ddp, 1")
    settings = {"train": {"steps": STEPS}, "checkpoint": {"every_steps": 5, "keep_last": 3}}
    name = folder.name
    settings["checkpoint"] |= {"url": f"s3://{bucket}/{name}"}
    config = write_tiny_config(folder, campaign.index, "hurt", **settings)
    with FaultProxy(store.endpoint, seed=campaign.draw.randrange(2**32)) as proxy:
        proxy.add(*campaign.draw.sample(STORAGE, 4))
        environment = {**os.environ, **store.environment(), "AWS_ENDPOINT_URL": proxy.endpoint}

        def start() -> forked.Process:
            return forked.Process([*forked.CLI, "train", config], env=environment, new_session=True)

        suffered = under_faults(campaign, start, ["SIGKILL of all", STILL], 4.0)
        suffered += [campaign.count(f"storage: {event.kind}") for event in proxy.log]
    client = store.client
    prefix = f"{name}/step_{STEPS:010d}/"
    local = folder / "runs" / "hurt" / "checkpoints" / f"step_{STEPS:010d}"
    local.mkdir(parents=True)
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]:
        body = client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
        (local / Path(entry["Key"]).name).write_bytes(body)
    expected, found = final_tensors(campaign.whole["ddp, 1"], STEPS), final_tensors(folder / "runs" / "hurt", STEPS)
    if expected.keys() != found.keys() or not all(expected[key].equal(found[key]) for key in expected):
        raise Broken(f"storage: other weights after {suffered}")
    return suffered


def table(campaign: Campaign) -> str:
    """Of the faults, as Markdown."""
    lines = ["| fault | times | promises broken | seconds lost, each |", "|---|---|---|---|"]
    for kind, tally in sorted(campaign.tallies.items()):
        lines.append(
            f"| {kind} | {tally.faults:,} | {len(tally.failures)} | {tally.lost_s / max(tally.faults, 1):.2f} |"
        )
    broken = sum(len(tally.failures) for tally in campaign.tallies.values())
    return "\n".join([*lines, f"| **all** | {campaign.faults:,} | {broken} | |"])


def soak(faults: int, minutes: float, seed: int, folder: Path, only: str = "") -> Campaign:
    """Rounds until there were so many faults, or the time is over."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks that share cores slow each other down otherwise
    index = folder / "digits"
    command = [*forked.CLI, "encode", "--source", "digits", "--dest", index, "--tokenizer", "pixel"]
    forked.run([*forked.CLI, "--help"])  # the server of forks begins
    campaign, began = Campaign(folder, index, random.Random(seed)), time.monotonic()
    assert forked.run(command).returncode == 0
    campaign.seconds["encode"] = time.monotonic() - began
    (folder / "whole").mkdir()
    rounds: dict[str, Callable[[Campaign, Path], list[str]]] = {
        **{f"train {name}": partial(train, name=name) for name in ENGINES},
        "encode": encode, "sample": sample, "two": two_at_once, "clock": clock,
    }  # fmt: skip
    if os.geteuid() == 0:
        rounds["disk"] = full_disk
    deadline = time.monotonic() + 60 * minutes
    store = None
    if available() is None:
        store = ObjectStore(folder / "store").start()
        store.create_bucket("soak")
        rounds["storage"] = partial(storage, store=store, bucket="soak")
    try:
        names = [name for name in rounds if only in name]
        while campaign.faults < faults and time.monotonic() < deadline:
            name = names[campaign.rounds % len(names)]
            campaign.rounds += 1
            place = folder / f"round{campaign.rounds}"
            place.mkdir()
            began = time.monotonic()
            try:
                suffered = rounds[name](campaign, place)
            except Broken as broken:
                campaign.failed([name], str(broken))
                continue  # its folder stays, to be looked at
            lost_s = time.monotonic() - began - campaign.seconds.get(name, campaign.seconds["train ddp, 1"])
            for kind in suffered:
                campaign.tallies[kind].lost_s += max(0.0, lost_s) / len(suffered)
            print(f"round {campaign.rounds}, {name}: {len(suffered)} faults, {campaign.faults} in all", flush=True)
            shutil.rmtree(place)
    finally:
        if store is not None:
            store.stop()
    return campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rounds whose name holds this")
    parser.add_argument("--out", type=Path, help="file for the table")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    campaign = soak(asked.faults, asked.minutes, asked.seed, folder, asked.only)
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
