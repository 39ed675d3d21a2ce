"""`ig-dist launch`: which machine this is, what is started again, and that no process is left.

Ranks are plain Python here; tests/distributed/test_nodes.py has trainings.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ig_dist.errors import ConfigError
from ig_dist.launching import together
from ig_dist.launching.endings import explaining
from ig_dist.launching.node import Node, this_node
from ig_dist.launching.ranks import Asked
from ig_dist.launching.together import Line, free_port
from tests.waiting import alive, wait_until

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = """
import json, sys
from ig_dist import terminal
from ig_dist.launching import endings
from ig_dist.errors import IgDistError
from ig_dist.launching import node, ranks, supervisor, together
given = json.loads(sys.argv[1])
ranks.GRACE_S, ranks.HELPERS_S, endings.FIRST_PAUSE_S, together.JOIN_S = 0.5, 0.5, 0.2, given.pop("join_s", 60.0)
together.TWIN_S, together.PORT_S = 1.0, given.pop("port_s", 30.0)
body, where = given.pop("body"), node.Node(**given.pop("node"))
try:
    with ranks.signals_passed_on() as asked:
        sys.exit(supervisor.supervise(["-c", body], where, asked, **given))
except IgDistError as error:
    terminal.say(error)
    sys.exit(error.exit_code)
"""


def launched(folder: Path, body: str, **given: Any) -> subprocess.Popen[str]:
    """A launcher whose ranks run ``body`` in a folder."""
    body = "import os, signal, subprocess, sys, time; from pathlib import Path; RANK = int(os.environ['RANK'])\n" + body
    command = [sys.executable, "-c", LAUNCHER, json.dumps({"body": body, "node": {}, **given})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def machines(folder: Path, body: str, ranks: range, port: int, **given: Any) -> list[subprocess.Popen[str]]:
    nodes = max(2, ranks.stop)
    return [launched(folder, body, node={"nodes": nodes, "rank": rank, "port": port}, **given) for rank in ranks]


def until(folder: Path, *names: str) -> None:
    """Wait until ranks have made these files."""
    wait_until(lambda: all((folder / name).exists() for name in names))


FIRST_FAILS = """
count = Path("count")
count.write_text(count.read_text() + "x" if count.exists() else "x")
if count.read_text() == "x":
    os.kill(os.getpid(), 9) if CODE == 137 else sys.exit(CODE)
"""


def test_the_exit_code_says_whether_ranks_are_started_again(tmp_path: Path) -> None:
    again, final = (5, 8, 137), (2, 7, 75)
    begun = {}
    for code in (*again, *final):
        (folder := tmp_path / str(code)).mkdir()
        begun[code] = launched(folder, f"CODE = {code}\n{FIRST_FAILS}", restarts=2)
    for code, launcher in begun.items():
        errors = launcher.communicate(timeout=60)[1]
        started = len((tmp_path / str(code) / "count").read_text())
        assert (launcher.returncode, started) == ((0, 2) if code in again else (code, 1)), errors
        pause = " in 0 s" if code == 8 else ""  # 0.2 s: a storage that is away is given time
        assert (f"exit code {code}: started again{pause}, 1 of 2\n" in errors) == (code in again), errors


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        ([0, 0], 0),
        ([1, 75, 1], 75),
        ([1, -9, 2], -9),
        ([5, 2], 2),
        ([8, 75], 8),
        ([-6, 7, 1], 7),  # NCCL's threads abort a process whose peer has failed
        ([134, 5], 5),
        ([1, -6], -6),
        ([137, 2], 137),
    ],
)
def test_one_code_explains_the_others(ended: list[int], code: int) -> None:
    assert explaining(ended) == explaining(reversed(ended)) == code


def test_failures_in_a_row_are_bounded(tmp_path: Path) -> None:
    launcher = launched(tmp_path, "print('start', flush=True); sys.exit(5)", restarts=2)
    said, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 5 and said.count("start") == 3
    assert errors.endswith("exit code 5: not started again, 2 failures in a row\n")


def test_ranks_get_the_time_of_a_save_after_a_signal_and_no_more(tmp_path: Path) -> None:
    saves = (
        "signal.signal(15, lambda *_: (time.sleep(1.0 if RANK else 0), os._exit(75)))\n"  # longer than after a failure
    )
    wait = "Path(f'up{RANK}').touch(); time.sleep(60)"
    bodies = {"saves": saves + wait, "hangs": "signal.signal(15, signal.SIG_IGN)\n" + wait, "begins": wait}
    bodies["waits"] = "RANK and signal.signal(15, signal.SIG_IGN)\n" + wait  # for one that had no handler yet
    begun = {}
    for name, body in bodies.items():
        (folder := tmp_path / name).mkdir()
        begun[name] = launched(folder, body, node={"processes": 2}, restarts=2, grace_s=3 if name == "saves" else 1)
    for name, launcher in begun.items():
        until(tmp_path / name, "up0", "up1")
        launcher.terminate()
    ended = {name: (launcher.communicate(timeout=30)[1], launcher.returncode) for name, launcher in begun.items()}
    assert ended["saves"] == ("", 75)
    late = "rank {} did not end within 1 s of the signal (--grace) and was killed"
    assert ended["hangs"] == (f"error: {late.format(0)}; {late.format(1)}\n", 137)
    assert ended["begins"] == ("", 75)  # no rank was there that could have saved
    assert ended["waits"][1] == 75 and "rank 1 did not end within" in ended["waits"][0]


def test_a_killed_launcher_takes_its_ranks_along(tmp_path: Path) -> None:
    launcher = launched(tmp_path, "Path('up').write_text(str(os.getpid())); Path('pid').touch(); time.sleep(60)")
    until(tmp_path, "pid")
    launcher.kill()
    wait_until(lambda: not alive(int((tmp_path / "up").read_text())))
    launcher.communicate()


def test_what_ranks_leave_behind_is_ended_and_let_go_of(tmp_path: Path) -> None:
    """As the first process of a container must: also what has left its session, and what became its child."""
    helpers = (
        "subprocess.Popen(['sh', '-c', 'echo $$ > shell; sleep 60 & echo $! > sleep; wait'], start_new_session=True)"
    )
    orphan = "subprocess.run(['sh', '-c', '(sleep 0.1; exec true) & echo $! > orphan'])"
    body = f"{helpers}\n{orphan}\nPath('up').touch(); time.sleep(0.7); os.kill(os.getpid(), 9)"
    launcher = launched(tmp_path, body)
    until(tmp_path, "up", "shell", "sleep", "orphan")
    time.sleep(0.4)
    assert not Path(f"/proc/{(tmp_path / 'orphan').read_text().strip()}").exists()  # nor as a zombie
    assert "rank 0 was killed by signal 9" in launcher.communicate(timeout=30)[1] and launcher.returncode == 137
    assert not any(alive(int((tmp_path / name).read_text())) for name in ("shell", "sleep"))


def test_a_mistake_on_one_machine_ends_all(tmp_path: Path) -> None:
    """The ranks of the other do not find out by themselves, as in a collective of NCCL."""
    body = "sys.exit(2) if RANK else time.sleep(60)"
    for launcher in machines(tmp_path, body, range(2), free_port(), restarts=2):
        errors = launcher.communicate(timeout=20)[1]
        assert launcher.returncode == 2 and "again" not in errors, errors


@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_that_is_lost_may_come_back(tmp_path: Path, lost: int) -> None:
    body = "Path(f'up{RANK}').touch(); time.sleep(0 if Path('back').exists() else 60)"
    port = free_port()
    launchers = machines(tmp_path, body, range(2), port, restarts=1)
    until(tmp_path, "up0", "up1")
    launchers[lost].kill()
    launchers[lost].communicate()
    (tmp_path / "back").touch()
    (launchers[lost],) = machines(tmp_path, body, range(lost, lost + 1), port, restarts=1)
    for launcher in launchers:
        errors = launcher.communicate(timeout=30)[1]
        assert launcher.returncode == 0, errors
    assert "exit code 1: started again, 1 of 1\n" in errors or lost


def test_a_machine_may_be_replaced_before_it_is_known_to_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "TWIN_S", 60.0)
    port = free_port()

    def comes(rank: int) -> Line:
        line = Line(socket.create_connection(("127.0.0.1", port)))
        line.say(node=[3, rank, 1])
        return line

    first = together.First(Node(3, port=port), Asked(), 1.0, lambda code: together.Next(code, False, 0.0))
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(first.begin)
        while True:
            with suppress(ConnectionRefusedError):
                gone = comes(1)
                break
        time.sleep(0.2)
        new, other = comes(1), comes(2)
        time.sleep(0.5)
        assert not begun.done() and new.heard("refused") is None
        gone.close()  # as keepalive does
        assert new.heard("start") is None and begun.result(timeout=30)
    time.sleep(0.1)
    assert new.heard("start") == other.heard("start") == [1, begun.result()]
    first.close(0)


def test_a_port_that_is_taken_may_become_free(tmp_path: Path) -> None:
    body = "Path('count').open('a').write('x')"
    with socket.create_server(("", 0)) as held:
        port = held.getsockname()[1]
        (refused,) = machines(tmp_path, body, range(1), port, port_s=0.2)
        errors = refused.communicate(timeout=30)[1]
        assert refused.returncode == 2 and f"port {port}: Address already in use" in errors
        launchers = machines(tmp_path, body, range(2), port)
        time.sleep(1.5)
    assert [(launcher.communicate(timeout=30)[1], launcher.returncode) for launcher in launchers] == [("", 0)] * 2
    assert (tmp_path / "count").read_text() == "xx"


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize("done", [False, True])
def test_a_machine_that_is_asked_to_stop_stops_all(tmp_path: Path, stopped: int, done: bool) -> None:
    """Also ranks that would not find out by themselves, and by a launcher whose own are done."""
    body = f"Path(f'up{{RANK}}').touch(); time.sleep(0 if {done} and RANK == {stopped} else 60)"
    launchers = machines(tmp_path, body, range(2), free_port(), restarts=2)
    until(tmp_path, "up0", "up1")
    time.sleep(0.5)
    launchers[stopped].terminate()
    assert [(launcher.communicate(timeout=20)[1], launcher.returncode) for launcher in launchers] == [("", 75)] * 2


def test_a_signal_after_another_machine_has_stopped_is_no_second_one(tmp_path: Path) -> None:
    """Both machines are asked to stop, one of them later; a second SIGTERM would end a save."""
    saves = """
asked = []
signal.signal(15, lambda *_: os._exit(143) if asked else os._exit(75) if RANK == 0 else asked.append(15))
signal.signal(signal.SIGUSR2, lambda *_: (asked.append(12), Path("told").touch()))
Path(f"up{RANK}").touch()
while not asked:
    time.sleep(0.02)
time.sleep(2)
sys.exit(75)
"""
    launchers = machines(tmp_path, saves, range(2), free_port())
    until(tmp_path, "up0", "up1")
    launchers[0].terminate()
    until(tmp_path, "told")
    launchers[1].terminate()
    assert [(launcher.communicate(timeout=20)[1], launcher.returncode) for launcher in launchers] == [("", 75)] * 2


def test_a_signal_comes_before_the_gpus_are_known(tmp_path: Path) -> None:
    """The kernel lets the first process of a container have no signal that it does not handle."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\ntouch asked; exec sleep 1\n")
    program.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-m", "ig_dist.cli", "launch", "digits"]
    launcher = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    until(tmp_path, "asked")
    launcher.terminate()
    assert (launcher.communicate(timeout=30)[1], launcher.returncode) == ("", 75)


def test_machines_that_were_not_started_alike_or_do_not_come_are_said(tmp_path: Path) -> None:
    three = {"nodes": 3, "port": free_port()}
    lone = [launched(tmp_path, "", node={"nodes": 2, "rank": rank, "port": free_port()}, join_s=0.2) for rank in (0, 1)]
    first = launched(tmp_path, "", node={**three, "rank": 0})
    same = [launched(tmp_path, "", node={**three, "rank": 1}) for _ in range(2)]
    other = launched(tmp_path, "", node={**three, "rank": 2, "processes": 2})
    errors = other.communicate(timeout=30)[1]
    assert other.returncode == 2 and "node 2 was started for 3 nodes of 2 processes, node 0 for 3 of 1" in errors
    wait_until(lambda: [launcher.poll() for launcher in same] != [None, None])  # one of them is refused
    first.terminate()
    told = first.communicate(timeout=30)[1]
    ended = sorted((launcher.communicate(timeout=30)[1], launcher.returncode) for launcher in same)
    assert first.returncode == 75 and ended[0] == ("", 75)
    twice = "two nodes were started with --node-rank 1: give each its own, 0 to 2\n"
    assert ended[1] == (f"error: {twice}", 2) and f"warning: refused: {twice}" in told
    ended = [(launcher.communicate(timeout=30)[1], launcher.returncode) for launcher in lone]
    assert [code for _, code in ended] == [5, 5]
    assert "node 1 did not come to 127.0.0.1:" in ended[0][0] and "node 0 did not begin at 127.0.0.1:" in ended[1][0]


TRAINJOB = {
    "PET_NNODES": "4",
    "PET_NODE_RANK": "2",
    "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "a-node-0-0.a",
    "PET_MASTER_PORT": "29400",
    "JOB_COMPLETION_INDEX": "2",
}
PYTORCHJOB = {"MASTER_ADDR": "a-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "3", "RANK": "1"}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "4",
}
DSTACK = {
    "DSTACK_NODES_NUM": "2",
    "DSTACK_NODE_RANK": "0",
    "DSTACK_MASTER_NODE_IP": "10.0.0.1",
    "DSTACK_GPUS_PER_NODE": "0",
}
GPUS = {"CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.mark.parametrize(
    ("environment", "given", "node"),
    [
        ({}, {}, Node()),
        (GPUS, {}, Node(processes=2)),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, {"nodes": 1}, Node()),
        (TRAINJOB, {}, Node(4, 2, 8, "a-node-0-0.a", 29400)),
        (
            TRAINJOB | {"PET_NNODES": "4:4", "PET_NPROC_PER_NODE": "auto"} | GPUS,
            {},
            Node(4, 2, 2, "a-node-0-0.a", 29400),
        ),
        (TRAINJOB, {"nodes": 1, "processes": 1}, Node()),
        (PYTORCHJOB, {"processes": 8}, Node(3, 1, 8, "a-master-0", 23456)),
        (PYTORCHJOB | {"LOCAL_RANK": "0"}, {"processes": 8}, Node(processes=8)),
        (SKYPILOT, {}, Node(2, 1, 4, "10.0.0.1")),
        (DSTACK | GPUS, {}, Node(2, 0, 2, "10.0.0.1")),
        ({}, {"nodes": 2, "rank": 1, "processes": 1, "master": "[::1]:5"}, Node(2, 1, 1, "::1", 5)),
        ({"JOB_COMPLETION_INDEX": "1"}, {"nodes": 2, "processes": 1, "master": "a-0.a"}, Node(2, 1, 1, "a-0.a")),
    ],
)
def test_a_machine_is_known_by_the_command_line_and_its_platform(
    environment: Mapping[str, str], given: dict[str, Any], node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    assert this_node(environment, **given) == node


@pytest.mark.parametrize(
    ("environment", "given", "words"),
    [
        (TRAINJOB | SKYPILOT, {}, "PET_NNODES=4, SKYPILOT_NUM_NODES=2 contradict each other: give --nodes"),
        (
            TRAINJOB | {"JOB_COMPLETION_INDEX": "3"},
            {},
            "JOB_COMPLETION_INDEX=3 contradict each other: give --node-rank",
        ),
        (SKYPILOT | DSTACK | {"DSTACK_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "h"}, {}, "give --master HOST:PORT"),
        (TRAINJOB | {"PET_NNODES": "1:4"}, {}, "a fixed number of nodes"),
        (TRAINJOB | {"PET_NODE_RANK": "x"}, {}, "PET_NODE_RANK=x is no number"),
        (TRAINJOB, {"nodes": 2}, "node rank 2 of 2 nodes: ranks are 0 to 1"),
        ({"JOB_COMPLETION_INDEX": "1"}, {}, "JOB_COMPLETION_INDEX says that this is machine 1 of several"),
        ({}, {"rank": 1}, "--node-rank says that this is machine 1 of several, not of how many: give --nodes N"),
        ({}, {"nodes": 2}, "give --node-rank, 0 to 1"),
        ({}, {"nodes": 2, "rank": 0}, "give --master HOST:PORT, the first of them"),
        ({}, {"nodes": 2, "rank": 0, "master": "h:0"}, "--master h:0: give HOST:PORT"),
    ],
)
def test_a_machine_that_is_said_wrongly_gets_one_line(
    environment: Mapping[str, str], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        this_node(environment, **{"processes": 1, **given})
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_gpus_are_counted_as_nvidia_smi_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: a)'; echo 'GPU 1: NVIDIA H100 (UUID: b)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert this_node({}).processes == 2
