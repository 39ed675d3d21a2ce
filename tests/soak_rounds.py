"""Rounds of a campaign of faults: each is a command in a folder of its own, hurt until it ends well, and its promises.

A round returns the faults that it made; it raises `Broken` where a promise did not hold.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ig_dist.storage.json_lines import read_lines
from tests import forked
from tests.conftest import write_tiny_config
from tests.fault_proxy import Fault, FaultProxy
from tests.integration.test_damage import CASES
from tests.object_store import ObjectStore
from tests.runs import final_tensors
from tests.soak_campaign import ENDING, FOR_ANY, PASSING, STILL, Broken, Campaign, moment, under_faults

STEPS = 60
SETTINGS: dict[str, dict[str, object]] = {"train": {"steps": STEPS}, "checkpoint": {"every_steps": 5, "keep_last": 3}}
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
    if wanted == "before" and name.startswith(("data ", "manifest")) and "another run" not in name
]


def launched(config: Path, processes: int) -> forked.Process:
    command = ["launch", "--processes", processes, config] if processes > 1 else ["train", config]
    return forked.Process([*forked.CLI, *command], new_session=True)


def train(campaign: Campaign, folder: Path, name: str) -> list[str]:
    """Training under an engine; between starts a checkpoint may be damaged."""
    processes, groups = ENGINES[name]
    settings = {**SETTINGS, **groups}
    if name not in campaign.whole:
        whole = write_tiny_config(campaign.folder / "whole", campaign.index, re.sub(r"\W+", "", name), **settings)
        began = time.monotonic()
        process = launched(whole, processes)
        assert process.wait(campaign.ends_s) == 0, process.communicate()
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
        except (LookupError, OSError, TypeError, ValueError):  # it is damaged already, in another way
            return None
        finally:
            as_two.unlink()
        return chosen

    suffered = under_faults(
        campaign, partial(launched, config, processes), [*ENDING, STILL], campaign.seconds[f"train {name}"], damage
    )
    same_weights(campaign, run, suffered, name)
    if batches(run) != batches(campaign.whole[name]):
        raise Broken(f"{name}: other batches, or a step twice, after {suffered}")
    return suffered


def same_weights(campaign: Campaign, run: Path, suffered: list[str], name: str = "ddp, 1") -> None:
    """Weights, averages and moments are bit for bit those of the run that nothing happened to."""
    expected, found = final_tensors(campaign.whole[name], STEPS), final_tensors(run, STEPS)
    if expected.keys() != found.keys() or not all(expected[key].equal(found[key]) for key in expected):
        raise Broken(f"other weights after {suffered}")


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
        "96",
        "--ig-scale",
        "1.5",
        "--steps",
        "4",
        "--evaluate",
        "sample.unit_size=16",
        "sample.batch_size=16",
    ]

    def start(out: Path) -> forked.Process:
        return forked.Process([*forked.CLI, "sample", run, *options, "--out", out], new_session=True)

    whole = campaign.folder / "samples"
    if not whole.exists():
        began, process = time.monotonic(), start(whole)
        assert process.wait(campaign.ends_s) == 0, process.communicate()
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
    if first.wait(campaign.ends_s) or "Traceback" in second.stderr:
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
    if "ddp, 1" not in campaign.whole:
        return train(campaign, folder, "ddp, 1")
    config = write_tiny_config(folder, campaign.index, "hurt", **SETTINGS)
    before = partial(jumping_clock, campaign.draw.randrange(2**32))
    process = forked.Process([*forked.CLI, "train", config], before=before)
    out, err = process.communicate(campaign.ends_s)
    campaign.count("clock steps")
    if process.wait() or "Traceback" in out + err:
        raise Broken(f"clock: exit code {process.wait()}: {err[-800:]}")
    same_weights(campaign, folder / "runs" / "hurt", ["clock steps"])
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
        config = write_tiny_config(small, campaign.index, "hurt", **SETTINGS)
        while True:
            process = launched(config, 1)
            while moment(campaign, process, 1.5) and len(suffered) < 6:
                with suppress(OSError), (small / "filler").open("wb", buffering=0) as filler:
                    while True:
                        filler.write(bytes(4096))
                time.sleep(campaign.draw.uniform(0.05, 0.6))
                (small / "filler").unlink()
                suffered.append(campaign.count("full disk"))
            out, err = process.communicate(campaign.ends_s)
            if "Traceback" in out + err:
                raise Broken(f"full disk: {(out + err)[-1500:]}")
            if process.wait() == 0:
                break
            if process.wait() not in (2, 4, 8):
                raise Broken(f"full disk: exit code {process.wait()}: {err[-500:]}")
        same_weights(campaign, small / "runs" / "hurt", suffered)
    return suffered


CHECKED = r"/run/|\.tar|index\.samples"  # bytes with a sum: what suffers on the way is read again
STORAGE = [
    Fault("status503", share=0.05),
    Fault("status500", share=0.03),
    Fault("reset", share=0.04),
    Fault("lost", share=0.02),
    Fault("cut", share=0.05, after_bytes=2000),
    Fault("flip", share=0.02, after_bytes=300, path=CHECKED),
    Fault("short", share=0.02, after_bytes=500, path=CHECKED),
    Fault("stall", share=0.02, after_bytes=500, path="/digits/"),
]


def storage(campaign: Campaign, folder: Path, start_store: Callable[[], ObjectStore]) -> list[str]:
    """Training from and to an object store that fails: 503, resets, bodies that are cut, flipped or stall, outages."""
    if "ddp, 1" not in campaign.whole:
        return train(campaign, folder, "ddp, 1")
    store, bucket = start_store(), folder.name
    store.create_bucket(bucket)
    checkpoint = {**SETTINGS["checkpoint"], "url": f"s3://{bucket}/run"}
    for file in campaign.index.iterdir():
        store.client.put_object(Bucket=bucket, Key=f"digits/{file.name}", Body=file.read_bytes())
    groups = {**SETTINGS, "checkpoint": checkpoint, "data": {"stall_s": 2.0}}
    config = write_tiny_config(folder, f"s3://{bucket}/digits", "hurt", **groups)
    with FaultProxy(store.endpoint, seed=campaign.draw.randrange(2**32)) as proxy:
        proxy.add(*campaign.draw.sample(STORAGE, 4))
        environment = {**os.environ, **store.environment(), "AWS_ENDPOINT_URL": proxy.endpoint}

        def start() -> forked.Process:
            return forked.Process([*forked.CLI, "train", config], env=environment, new_session=True)

        def outage(campaign: Campaign, process: forked.Process) -> None:
            store.kill_gateway()
            time.sleep(campaign.draw.uniform(0.1, 2.0))
            store.restart_gateway()

        passing = {**PASSING, "storage: outage": outage}
        suffered = under_faults(campaign, start, ["SIGKILL of all", *passing], 4.0, passing=passing)
        suffered += [campaign.count(f"storage: {event.kind}") for event in proxy.log]
    client = store.client
    prefix = f"run/step_{STEPS:010d}/"
    local = folder / "runs" / "hurt" / "checkpoints" / f"step_{STEPS:010d}"
    local.mkdir(parents=True)
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]:
        body = client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
        (local / Path(entry["Key"]).name).write_bytes(body)
    same_weights(campaign, folder / "runs" / "hurt", suffered)
    return suffered
