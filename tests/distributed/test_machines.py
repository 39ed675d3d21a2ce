"""A rank on a broken or slow machine is named, before the first step and while training."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ig_dist.parallel.blame import VARIABLE, blamed
from tests.runs import faulty, last_step, metrics

Write = Callable[..., Path]
NODE = {"IG_DIST_NODE": "gpu07"}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("miscounts", "a matrix product is wrong"),
        ("unreadable", r"cannot read the data \(.*Input/output error\)\)"),
        ("unmounted", r"cannot read the data \(.*index.json cannot be read\)"),
        ("drags", r"matmul at 0\.\d\d of the median rank's speed"),
    ],
)
def test_a_rank_that_fails_before_the_first_step_is_named(
    tiny_config: Write, tmp_path: Path, fault: str, words: str
) -> None:
    config = tiny_config(fault, train={"preflight_min_speed": 0.3} if fault == "drags" else {})
    file = tmp_path / "blame"
    done = faulty(config, fault, rank=1, steps="0", FAULT_S="0.1", **NODE, **{VARIABLE: str(file)})
    assert done.returncode == 6, done.stderr
    assert re.fullmatch(rf"error: rank 1 on gpu07: {words}: mend that machine, or .*\n", done.stderr), done.stderr
    assert blamed(file) == {1}
    assert last_step(tmp_path / "runs" / fault) == 0


def test_ranks_that_read_two_indexes_do_not_begin(tiny_config: Write, tmp_path: Path) -> None:
    done = faulty(tiny_config("replaced"), "replaced", rank=1, steps="0")
    assert done.returncode == 2
    assert re.fullmatch(r"error: data.index was replaced while this run started, .*: start it again\n", done.stderr)
    assert last_step(tmp_path / "runs" / "replaced") == 0


def test_a_slow_rank_is_named_and_the_run_goes_on(tiny_config: Write, tmp_path: Path) -> None:
    config = tiny_config("drags", train={"steps": 2})
    done = faulty(config, "drags", rank=0, steps="0", FAULT_S="0.1", **NODE)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("pre-flight of 2 ranks: ")]
    assert re.search(r"matmul [\d.]+ ms \(slowest [4-9]\d\d\.\d+, rank 0 on gpu07\), link .* read ", line)
    assert re.search(r"^slow: rank 0 on gpu07: matmul at 0\.\d\d of the median rank's speed$", done.stdout, re.M)


def test_preflight_can_be_left_out(tiny_config: Write) -> None:
    done = faulty(tiny_config("off", train={"steps": 1, "preflight": False}), "miscounts", rank=1, steps="0")
    assert done.returncode == 0, done.stderr
    assert "pre-flight" not in done.stdout


@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_a_straggler_is_named_once_from_the_times_of_its_steps(tiny_config: Write, tmp_path: Path, engine: str) -> None:
    config = tiny_config(
        engine, train={"steps": 8, "preflight": False}, engine={"kind": engine}, log={"every_steps": 2}
    )
    done = faulty(config, "slow", rank=1, steps=",".join(map(str, range(1, 9))), FAULT_S="0.4", **NODE)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("slow: ")]
    assert len(said) == 1 and "rank 1 on gpu07 takes " in said[0], done.stdout
    lines = metrics(tmp_path / "runs" / engine)
    assert all(line["slowest_rank"] == 1 and line["slowest_rank_ratio"] > 3 for line in lines)
    before = done.stdout[: done.stdout.index("slow: ")]
    assert re.findall(r"^step (\d+)/", before, re.M)[-1] == "2"  # while the second line is made
