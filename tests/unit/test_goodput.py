"""The ledger: what each start spent, what was done again, and a file that survives kills."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ig_dist.training.goodput import NAME, Ledger, Line, add_up, read_goodput
from ig_dist.training.phases import Phases


def line(began: float, from_step: int, at: int, **seconds: float) -> Line:
    return Line(began=began, from_step=from_step, step=at, seconds=seconds)


def test_work_beyond_the_checkpoint_is_lost() -> None:
    found = add_up(
        [
            line(100, 0, 0, **{"start-up": 5.0}),
            line(100, 0, 10, **{"start-up": 5.0, "compile": 1.0, "step": 9.0, "data": 1.0}),
            line(100, 0, 20, **{"start-up": 5.0, "compile": 1.0, "step": 19.0, "data": 2.0}),
            # killed after step 20, up to 25 s later; the checkpoint is of step 15
            line(150, 15, 15, **{"start-up": 4.0}),
            line(150, 15, 30, **{"start-up": 4.0, "step": 15.0, "checkpoint": 1.0}),
        ]
    )
    assert found.starts == 2 and found.lost_steps == 5
    assert found.seconds["lost"] == pytest.approx(5.0)  # half of the ten seconds from step 10 to 20
    assert found.seconds["step"] == pytest.approx(14.0 + 15.0)
    assert found.running_s == pytest.approx(27.0 + 20.0)
    assert found.between_s == pytest.approx(150 - 127)
    assert found.percent("step") == pytest.approx(100 * 29 / 47)
    assert str(found).startswith("goodput 61.7% of 47 s in 2 starts: training 61.7%, lost work 10.6%, start-up 19.1%")


def test_a_start_that_goes_further_back_loses_what_two_before_it_did() -> None:
    """The newest checkpoint was damaged, and the one before it is gone on from."""
    first = [line(0, 0, at, step=float(at)) for at in (0, 5, 10)]
    second = [line(100, 10, at, step=float(at - 10)) for at in (10, 20)]
    third = [line(200, 5, at, step=float(at - 5)) for at in (5, 20)]
    found = add_up([*first, *second, *third])
    assert found.lost_steps == 5 + 10
    assert (found.seconds["step"], found.seconds["lost"]) == (5.0 + 15.0, 5.0 + 10.0)


def test_what_is_written_is_what_was_spent(tmp_path: Path) -> None:
    began = time.monotonic()
    for start in (0, 2):
        phases = Phases()
        phases.began_at += 60 * start  # another process
        ledger = Ledger(tmp_path, phases, start)
        phases.last_warm_up = start + 1
        for step in range(start + 1, start + 5):
            phases.enter("data", step)
            phases.enter("forward")
            time.sleep(0.02)
            ledger.note(step)
        phases.enter("checkpoint")
        time.sleep(0.05)
        ledger.close()
        with (tmp_path / NAME).open("a") as file:
            file.write('{"began": 12, "from_st')  # a kill
    spent = time.monotonic() - began - 0.26
    found = read_goodput(tmp_path)
    assert found is not None and (found.starts, found.lost_steps) == (2, 2)
    assert found.seconds["compile"] >= 0.04  # the first step of each
    assert found.seconds["step"] >= 4 * 0.02 and found.seconds["lost"] >= 2 * 0.02
    assert found.seconds["checkpoint"] >= 0.1
    others = sum(seconds for kind, seconds in found.seconds.items() if kind != "start-up")
    assert 0.26 <= others < 0.26 + spent  # nothing is counted twice
    assert found.running_s == pytest.approx(sum(found.seconds.values()))
    lines = (tmp_path / NAME).read_text().splitlines()
    assert sum(json.loads(text)["step"] == 4 for text in lines if text.endswith("}")) == 2 + 1
    assert found.seconds["start-up"] > 0.5  # the process began before Python and torch were there


def test_ranks_but_the_first_write_nothing(tmp_path: Path) -> None:
    Ledger(None, Phases(), 0).close()
    assert read_goodput(tmp_path) is None and not list(tmp_path.iterdir())
