"""What a user sees while a run trains, at its end, and after Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

from tests import forked
from tests.conftest import run_command, succeed
from tests.waiting import wait_until


def interrupted(process: forked.Process, log: Path, word: str) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr of a command that gets a Ctrl-C once it has said ``word``."""
    wait_until(lambda: log.exists() and word in log.read_text(), process)
    process.send_signal(signal.SIGINT)
    process.join(60)
    return process.exitcode, log.read_text(), log.with_name(f"{log.name}.err").read_text()


def test_ctrl_c_saves_and_every_end_says_how_to_go_on(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config, run = tiny_config("a run"), tmp_path / "runs" / "a run"
    log = tmp_path / "train"
    training = forked.start(["train", config, "train.steps=1000000", "log.every_steps=5"], log)
    code, said, errors = interrupted(training, log, "saved step 20\n")
    assert code == 75 and "Traceback" not in errors, errors
    assert "stopping: saves first; Ctrl-C once more ends at once" in errors
    stopped = re.search(r"stopped: saved at step (\d+) of 1000000; run the same command again to go on\n$", errors)
    assert stopped and f"saved step {stopped[1]}\n" in said
    assert re.search(r"^step 10/1000000  loss [\d.]+  \d+ images/s  .*\d:\d\d:\d\d left$", said, re.MULTILINE), said

    steps = int(stopped[1]) + 1
    for begins in ("resume at", "finished at"):
        done = run_command(["ig-dist", "train", config, f"train.steps={steps}"])
        assert done.returncode == 0 and f"{run}: {begins} step " in done.stdout, done.stderr
        assert done.stdout.splitlines()[-3:] == [
            f"next: ig-dist sample '{run}' --num 64",
            f"next: ig-dist sweep '{run}'",
            f"next: ig-dist report '{run}'",
        ]

    none = run_command(["ig-dist", "plans", run])
    assert none.returncode == 0 and f"no samples yet; make some with: ig-dist sample '{run}'" in none.stdout
    log = tmp_path / "sample"
    code, _, errors = interrupted(forked.start(["sample", run, "--num", "1000000"], log), log, "0 of them are there")
    assert code == 130
    assert errors == "\nstopped: Ctrl-C; what is finished stays, run the same command again to go on\n"
    succeed(["ig-dist", "sample", run, "--num", "16"])
    done, as_json = run_command(["ig-dist", "plans", run]), run_command(["ig-dist", "plans", run, "--json"])
    assert done.returncode == as_json.returncode == 0, done.stderr + as_json.stderr
    (listed,) = [
        plan for plan in json.loads(as_json.stdout)["plans"] if plan["finished"]
    ]  # the other was begun, or not
    assert listed["images"] == listed["plan"]["num"] == 16
    assert Path(listed["folder"]).name in done.stdout
