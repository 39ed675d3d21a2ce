"""Training on 1, 2 and 4 processes: the same batches, the same losses; killed at any moment, the same weights."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ig_dist.config.file import load_config
from ig_dist.data.index import read_index
from ig_dist.export import ALONE
from ig_dist.training.goodput import read_goodput
from ig_dist.training.trainer import build_order
from tests import forked
from tests.conftest import run_command, succeed
from tests.runs import faulty, final_tensors, last_step, local, metrics
from tests.waiting import children, wait_until

STEPS = 50
Write = Callable[..., Path]


def test_world_size_and_accumulation_change_neither_batches_nor_losses(tiny_config: Write, tmp_path: Path) -> None:
    curves = {}
    for processes, accumulation in [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)]:
        name, steps = f"p{processes}a{accumulation}", STEPS if (processes, accumulation) == (1, 1) else STEPS // 2
        train = {"accumulation": accumulation, "steps": steps}
        config = tiny_config(name, train=train, data={"workers": processes % 3})
        succeed(local(config, processes))
        curves[name] = metrics(tmp_path / "runs" / name)
    one = curves.pop("p1a1")
    assert [line["step"] for line in one] == list(range(1, STEPS + 1))
    assert len({line["batch_fingerprint"] for line in one}) == STEPS
    for name, curve in curves.items():
        for mine, theirs in zip(one[: STEPS // 2], curve, strict=True):
            assert theirs["batch_fingerprint"] == mine["batch_fingerprint"], (name, mine["step"])
            for key in ("loss", "loss_final", "loss_aux"):
                assert theirs[key] == pytest.approx(mine[key], rel=1e-5), (name, mine["step"], key)
    assert one[-1]["loss"] < 0.9 * one[0]["loss"]  # it learns: equal curves are not equal for being flat


KILLS = {1: 4, 2: 3, 4: 3}


@pytest.mark.parametrize("processes", KILLS)
def test_sigkill_at_random_moments_leaves_no_trace_in_the_weights(
    tiny_config: Write, tmp_path: Path, processes: int
) -> None:
    settings = {"checkpoint": {"every_steps": 7}}
    whole, killed = (tiny_config(f"{kind}{processes}", **settings) for kind in ("whole", "killed"))
    succeed(local(whole, processes))
    run = tmp_path / "runs" / f"killed{processes}"
    moments = random.Random(100 + processes)
    # one kill is before the first checkpoint, the others spread over the run
    targets = sorted([moments.randrange(1, 7), *moments.sample(range(8, STEPS - 1), KILLS[processes] - 1)])
    lost = []
    for target in targets:
        kill_at(local(killed, processes), run, target, extra_s=moments.uniform(0, 0.05))
        saved = [int(file.parent.name[5:]) for file in run.glob("checkpoints/*/manifest.json")]
        lost.append(last_step(run) - max(saved, default=0))
    done = succeed(local(killed, processes))

    expected, found = final_tensors(tmp_path / "runs" / f"whole{processes}", STEPS), final_tensors(run, STEPS)
    groups = {name.split("/")[0] for name in expected}
    assert groups == {"model", "ema", "exp_avg", "exp_avg_sq"}
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    curve = metrics(run)
    assert [line["step"] for line in curve] == list(range(1, STEPS + 1))  # cut back at every restart
    for mine, theirs in zip(metrics(tmp_path / "runs" / f"whole{processes}"), curve, strict=True):
        assert mine["loss"] == theirs["loss"] and mine["batch_fingerprint"] == theirs["batch_fingerprint"]

    # the ledger is not cut back: it says what was done again, from the last line before each kill
    goodput, whole_goodput = read_goodput(run), read_goodput(tmp_path / "runs" / f"whole{processes}")
    assert goodput is not None and whole_goodput is not None
    assert (goodput.starts, whole_goodput.starts) == (KILLS[processes] + 1, 1)
    assert sum(lost) - KILLS[processes] <= goodput.lost_steps <= sum(lost)  # a kill may fall between the two files
    assert goodput.seconds["lost"] > 0 and whole_goodput.seconds["lost"] == pytest.approx(0, abs=0.05)
    assert str(goodput) in done.stdout and "lost work" in str(goodput)


def kill_at(command: list[str], run: Path, step: int, extra_s: float) -> None:
    """Start the command and SIGKILL launcher and ranks once the run has logged ``step``."""
    process = forked.Process(command[1:], new_session=True)
    wait_until(lambda: last_step(run) >= step, process, every_s=0.002)
    time.sleep(extra_s)
    assert process.poll() is None, "the run ended before it was killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_and_exits_75_and_the_same_command_goes_on(
    tiny_config: Write, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "runs" / "term"
    config = tiny_config("term", train={"steps": 3000}, checkpoint={"every_steps": 5000})
    process = forked.Process(local(config, 2)[1:])
    wait_until(lambda: last_step(run) >= 10, process)
    # `timeout` and systemd signal the launcher and its ranks, and the launcher passes the signal on: it is still one
    for pid in [*children(process), process.pid]:
        os.kill(pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "run the same command again" in errors
    saved = max(int(p.name[5:]) for p in (run / "checkpoints").iterdir())
    assert 10 <= saved < 3000 and metrics(run)[-1]["step"] <= saved
    done = run_command(local(config, 2, f"train.steps={saved + 5}"))
    assert done.returncode == 0 and f"resume at step {saved}" in done.stdout
    assert metrics(run)[-1]["step"] == saved + 5


def test_a_signal_to_one_rank_stops_all(tiny_config: Write, tmp_path: Path) -> None:
    """SLURM's ``--signal`` may reach one task only."""
    run = tmp_path / "runs" / "one"
    config = tiny_config("one", train={"steps": 3000}, checkpoint={"every_steps": 5000})
    process = forked.Process(local(config, 2)[1:])
    wait_until(lambda: last_step(run) >= 10, process)
    os.kill(children(process)[1], signal.SIGUSR2)
    assert process.wait(timeout=60) == 75
    assert len(list((run / "checkpoints").iterdir())) == 1


def test_one_dead_rank_ends_the_others(tiny_config: Write, tmp_path: Path) -> None:
    config = tiny_config("dead", train={"steps": 100000})
    process = forked.Process(local(config, 2)[1:])
    wait_until(lambda: last_step(tmp_path / "runs" / "dead") >= 5, process)
    ranks = children(process)
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "error: rank 0: another of the 2 processes ended" in errors and "Traceback" not in errors
    assert "error: rank 1 was killed by signal 9 (SIGKILL: out of memory?)\n" in errors
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_a_rank_that_loses_its_peer_says_so_before_it_closes_what_takes_long(tiny_config: Write) -> None:
    """Rank 1 is killed, and the threads of rank 0 do not end: the launcher kills rank 0 too, but it has spoken."""
    done = faulty(tiny_config("stuck"), "die", rank=1, steps="7")
    assert done.returncode == 128 + signal.SIGKILL
    said = done.stderr.splitlines()
    assert said[0] == "error: rank 0: another of the 2 processes ended; its message says why"
    assert said[1].startswith("error: rank 1 was killed by signal 9")
    assert said[1].endswith("rank 0 did not end within 3 s of the first failure and was killed")
    assert len(said) == 2


def test_a_peer_may_be_lost_as_soon_as_the_group_is_there(tiny_config: Write) -> None:
    done = faulty(tiny_config("early"), "early", rank=1, steps="0")
    assert done.returncode == 128 + signal.SIGKILL and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: rank 0: another of the 2 processes ended; its message says why\n")


def test_a_run_directory_in_use_is_refused(tiny_config: Write, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "busy"
    config = tiny_config("busy", train={"steps": 100000})
    process = forked.Process([*forked.CLI, "train", config])
    try:
        wait_until(lambda: last_step(run) >= 2, process)
        done = run_command(["ig-dist", "train", config])
        assert done.returncode == 2 and f"in use by process {process.pid}" in done.stderr
    finally:
        process.kill()
        process.wait()


def test_non_finite_steps_change_nothing_and_end_the_run_with_exit_code_3(tiny_config: Write, tmp_path: Path) -> None:
    """A learning rate that blows the weights up: the steps after that are skipped on all ranks alike."""
    overrides = {"optimizer": {"lr": 1e30, "warmup_steps": 0}, "train": {"max_nonfinite_steps": 5}}
    config = tiny_config("blown", **overrides, checkpoint={"every_steps": 2, "keep_last": 9})
    done = run_command(local(config, 2))
    assert done.returncode == 3, done.stderr
    assert "non-finite gradient" in done.stderr and "optimizer.lr" in done.stderr and "Traceback" not in done.stderr
    skipped = [line["step"] for line in metrics(tmp_path / "runs" / "blown") if line["nonfinite_steps"]]
    first = skipped[0]
    saves = [
        step
        for step in range(2, 40, 2)
        if step >= first and (tmp_path / f"runs/blown/checkpoints/step_{step:010d}").exists()
    ]
    before, after = (final_tensors(tmp_path / "runs" / "blown", step) for step in saves[:2])
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_a_loss_that_is_not_a_number_on_one_rank_is_skipped_by_all(tiny_config: Write, tmp_path: Path) -> None:
    """Steps 5 and 6 go wrong on rank 1 only: all skip them, the sample is named, and the run goes on."""
    config = tiny_config("nan", train={"steps": 10}, checkpoint={"every_steps": 4, "keep_last": 9})
    done = faulty(config, "nan", rank=1, steps="5,6")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "nan"
    lines = metrics(run)
    assert [line["nonfinite_steps"] for line in lines] == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2]
    order = build_order(load_config(config, []), read_index(load_config(config, []).data.index), ALONE)
    for step in (5, 6):
        ids = order.batch(step - 1)[0]
        guilty = int(ids[len(ids) // 2])  # the first one of rank 1
        assert lines[step - 1]["nonfinite_samples"] == [guilty]
        line = (
            f"skipped for a non-finite gradient: step {step} (samples with a non-finite loss: {guilty} (step {step}))"
        )
        assert line in done.stdout
    assert not any("nonfinite_samples" in line for line in lines if line["step"] not in (5, 6))
    before, after = final_tensors(run, 4), final_tensors(run, 8)
    assert all(tensor.isfinite().all() for tensor in after.values())
    steps = [json.loads((run / f"checkpoints/step_{n:010d}/manifest.json").read_text()) for n in (4, 8)]
    assert [manifest["meta"]["optimizer_steps"] for manifest in steps] == [4, 6]
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_too_many_of_them_end_both_ranks(tiny_config: Write, tmp_path: Path) -> None:
    config = tiny_config("nans", train={"steps": 30, "max_nonfinite_steps": 3})
    done = faulty(config, "nan", rank=1, steps="5,6,7,8,9")
    assert done.returncode == 3, done.stderr
    assert metrics(tmp_path / "runs" / "nans")[-1]["step"] == 6  # steps 5, 6 and 7: the third one ends the run
    assert re.findall(
        r"error: rank (\d): the last 3 steps up to step 7 had a non-finite gradient \(samples", done.stderr
    )
    assert "Traceback" not in done.stderr
