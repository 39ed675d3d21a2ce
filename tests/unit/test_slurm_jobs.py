"""What comes after a start of a job, which nodes it uses, and what SLURM's words mean."""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ig_dist.config import Config
from ig_dist.config.file import to_yaml
from ig_dist.errors import ConfigError
from ig_dist.launching.endings import STOPPED
from ig_dist.launching.jobs import Job, job_folder
from ig_dist.slurm import watch
from ig_dist.slurm.commands import Partition, QueuedJob, SlurmError, minutes, partition
from ig_dist.slurm.holding import CutOff, lock_is_free
from ig_dist.slurm.record import Folder, Submission, World
from ig_dist.slurm.request import Request, defaults_of
from ig_dist.slurm.script import batch_script, checked, complete
from ig_dist.slurm.submit import job_id, worlds
from ig_dist.slurm.verdict import (
    Verdict,
    bad_nodes,
    excluded,
    exit_codes,
    failures_in_a_row,
    judge,
    nodes_to_blame,
    silent_nodes,
    what_next,
)
from tests.conftest import ROOT
from tests.scoring import make_plan, tiny_models
from tests.waiting import wait_until


def config(streams: int = 256, batch: int = 256, accumulation: int = 1) -> Config:
    return Config.model_validate(
        {
            "model": {"preset": "SiT-B/2"},
            "data": {"index": "x", "streams": streams},
            "train": {"steps": 1, "global_batch_size": batch, "accumulation": accumulation},
        }
    )


def submission(**changed: Any) -> Submission:
    job = {"run": "", "cwd": "", "tasks_per_node": 2, "cpus_per_task": None, "signal_delay_s": 1, "options": {}}
    worlds = {number: World(nodes=number, accumulation=1) for number in (2, 3)}
    return Submission(**{"kind": "train", "commands": [], "worlds": worlds, "max_failures": 8, **job, **changed})


def test_all_ranks_together_say_what_comes_next() -> None:
    assert judge({0: 0, 1: 0}, 0, "").next == "done"
    assert judge({0: STOPPED, 1: STOPPED}, 0, "")[:2] == ("requeue", STOPPED)
    # one rank saved and left, another was killed on the way: not a failure of the job
    assert judge({0: STOPPED, 1: None}, 137, "node2: task 1: Killed").next == "requeue"
    for code in (2, 3, 4):  # the others lost their peer, or were killed by srun
        assert judge({0: 1, 1: code, 2: None}, 143, "node2: task 2: Killed")[:2] == ("stop", code)
    assert judge({0: 1, 1: None}, 137, "node2: task 1: Killed") == Verdict("failed", 1, "node2: task 1: Killed")
    assert judge({0: None, 1: None}, 137, "") == Verdict("failed", 137, "rank 0, 1 died")
    # a preemption's warning that came before there was anything to save; not a failure of that node
    assert judge({0: None, 1: None}, 143, "node1: tasks 0-1: Terminated")[:2] == ("requeue", STOPPED)
    assert judge({0: 1, 1: None}, 143, "node1: task 1: Terminated").next == "failed"
    assert judge({0: 1, 1: 1}, 1, "") == Verdict("failed", 1, "exit code 1")
    assert judge({0: 8, 1: 1}, 8, "") == Verdict("failed", 8, "exit code 8")  # the storage may come back
    told = "rank 1: out of memory at step 7"
    assert judge({0: 1, 1: 7}, 7, "node2: task 1: Exited", told).reason.endswith(f"does not mend ({told})")
    assert judge({0: 1, 1: 1}, 1, "node2: task 1: Exited", "rank 1: a bug").reason == "rank 1: a bug"


@pytest.mark.parametrize(("number", "left"), [(signal.SIGUSR2, {0: STOPPED}), (signal.SIGTERM, {0: None})])
def test_a_rank_that_srun_ends_was_not_asked_to_stop(tmp_path: Path, number: int, left: dict[int, int | None]) -> None:
    """SIGTERM is what the others get when one has failed; taken for a wish, a failure would be tried for ever."""
    script, ready = tmp_path / "job.py", tmp_path / "ready"
    script.write_text(f"import pathlib, time\npathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)")
    Folder(tmp_path).write(submission(commands=[["-m", "job"]]))
    ids = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": "a"}
    rank = subprocess.Popen(
        [sys.executable, "-m", "ig_dist.slurm.rank", str(tmp_path), "s"],
        env={**os.environ, **ids, "PYTHONPATH": str(tmp_path), "IG_DIST_ACCUMULATION": "1"},
    )
    wait_until(ready.exists, rank)
    rank.send_signal(number)
    rank.wait(timeout=30)
    assert exit_codes(tmp_path / "exits/s", 1) == left


def test_failures_are_tried_again_in_place_and_elsewhere_and_not_for_ever() -> None:
    def step(verdict: Verdict, failures: int, most: int) -> str:
        before = {"event": "end", "time": 0.0, "code": 1, "next": "again"}
        end = {"checkpoint": None, "blame": []}
        return what_next(verdict, end, [before] * failures, ["a", "b"], submission(max_failures=most)).next

    failed = Verdict("failed", 1, "")
    assert [step(failed, failures, 3) for failures in range(5)] == ["again", "requeue", "again", "stop", "stop"]
    assert step(failed, 0, 0) == "stop"
    for verdict in (Verdict("done", 0, ""), Verdict("stop", 2, ""), Verdict("requeue", STOPPED, "")):
        assert step(verdict, 99, 3) == verdict.next


def test_only_failures_without_progress_between_them_count(tmp_path: Path) -> None:
    folder = Folder(tmp_path)

    def failures(checkpoint: int) -> int:
        return failures_in_a_row(folder.events(), checkpoint)

    def fail(checkpoint: int, code: int | None = 1) -> None:
        folder.add_event("start", nodes=["a"], log=0)
        folder.add_event("end", code=code, reason="", next="again", checkpoint=checkpoint)

    assert failures(0) == 0
    fail(100)
    fail(100)
    assert failures(100) == 2
    assert failures(200) == 0
    fail(200)
    assert failures(200) == 1
    fail(200, code=STOPPED)  # a time limit between
    assert failures(200) == 0
    fail(200)
    folder.add_event("start", nodes=["a"], log=0)  # a node died
    folder.add_event("start", nodes=["a"], log=0)
    assert failures(200) == 0
    assert bad_nodes(folder.events(), 1) == set()  # an end that nobody saw is nobody's fault


def test_a_node_that_is_to_blame_again_is_not_used() -> None:
    """In the nodes that are given, where they suffice without it; else after a requeue."""
    failed = Verdict("failed", 1, "node2: task 1: Killed")
    job = submission()
    end = {"code": 1, "reason": failed.reason, "checkpoint": 0, "blame": ["node2"]}
    before = {"event": "end", "time": time.time() - 3600, "next": "again", **end}
    three = ["node1", "node2", "node3"]
    assert what_next(failed, end, [], three, job) == failed._replace(next="again", pause_s=5.0)
    assert what_next(failed, end, [before], three, job) == failed._replace(next="again", avoided=["node2"])
    assert what_next(failed, end, [before], three[:2], job) == failed._replace(next="requeue", avoided=["node2"])
    assert what_next(failed, {**end, "blame": ["node1"]}, [before], three, job).avoided == ()
    assert what_next(failed, end, [{**before, "time": time.time() - 90_000}], three, job).avoided == ()
    never = job.model_copy(update={"exclude_after": 0})
    assert what_next(failed, end, [before], three, never) == failed._replace(next="requeue", pause_s=10.0)
    last = job.model_copy(update={"max_failures": 1})
    assert what_next(failed, end, [before], three, last) == failed._replace(next="stop")
    done = Verdict("done", 0, "done")
    assert what_next(done, end, [before], three, job) == done

    assert nodes_to_blame({3, 2}, "node3: task 4: Killed", three, 2) == ["node2"]  # the job knows better than srun
    assert nodes_to_blame((), "node3: task 4: Killed", three, 2) == ["node3"]
    for bug in ("Exited with exit code 1", "Aborted", "Segmentation fault"):  # it may come anywhere
        assert nodes_to_blame((), f"node3: tasks 4-5: {bug}", three, 2) == []

    assert excluded([{"event": "end", "time": 0.0, "blame": []}], job) is None
    assert excluded([before, before], job) == "node2"
    typed = submission(options={"exclude": "node[7-9]"})
    assert excluded([before, before], typed) == "node[7-9],node2"
    assert excluded([before], typed) == "node[7-9]"
    assert excluded([{**before, "time": 0.0}] * 2, job) == ""  # long ago: it may come back
    assert nodes_to_blame((), "", three, 2) == nodes_to_blame((), "Unable to create step", three, 2) == []


def test_an_end_that_only_slurm_saw_is_told_in_its_words(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.log.mkdir()
    folder.batch_log().write_text("earlier: DUE TO TIME LIMIT ***\n")
    place = folder.batch_log().stat().st_size
    folder.add_event("start", nodes=["a", "b"], log=place)
    with folder.batch_log().open("a") as log:
        log.write(
            "srun: error: Node failure on b\nslurmstepd: error: *** JOB 1 ON a CANCELLED AT x DUE TO NODE FAILURE, "
        )
        log.write("SEE SLURMCTLD LOG FOR DETAILS ***\n")
    folder.add_event("start", nodes=["a", "b"], log=folder.batch_log().stat().st_size)
    folder.add_event("start", nodes=["a", "b"], log=folder.batch_log().stat().st_size)
    reasons = [event["reason"] for event in folder.events() if event["event"] == "end"]
    assert reasons == ["node failure (b)", "ended by SLURM without a word (its first node, or the controller)"]
    history, known = folder.path / "history.jsonl", len(folder.events())
    history.write_text(history.read_text() + '{"event": "e')  # a kill while it was written
    assert len(folder.events()) == known
    folder.add_event("end", code=0, reason="done", next="done")
    assert len(folder.events()) == known + 1


def test_a_start_waits_for_the_lock_of_its_run_so_long(tmp_path: Path) -> None:
    """In the history the wait and its end are no starts: they count for nothing."""
    folder, lock = Folder(tmp_path), tmp_path / ".lock"
    job = submission(hold=str(lock), hold_s=0.2)
    folder.add_event("start", nodes=["a"], log=0)
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("17 on c\n")
        held.flush()
        assert not lock_is_free(folder, job, ["b"], lambda: False)
        (_, end), (wait, waited) = [(entry, entry["end"]) for entry in watch.history(folder, False)]
        assert end["next"] == "requeue" and wait["nodes"] == ["b"] and waited["next"] == "stop"
        assert waited["reason"].endswith("another start (17 on c) for 0 s: not started; end it, then resume")
        free = threading.Timer(0.3, held.close)
        free.start()
        assert lock_is_free(folder, job.model_copy(update={"hold_s": 60.0}), ["b"], lambda: False)
    folder.add_event("start", nodes=["b"], log=0)
    assert "waited" in watch.history(folder, True)[2]["end"]["reason"]
    assert [event["event"] for event in folder.events()] == ["start", "end", "start"]


def test_the_node_that_died_is_named_and_not_the_rank_that_lost_it() -> None:
    hosts, lost = ["a", "b", "c"], "a: task 0: Exited with exit code 1"
    assert silent_nodes({0: 1, 1: None, 2: None, 3: None, 4: 1, 5: None}, hosts, 2, lost) == ["b"]
    assert silent_nodes({0: 1, 1: 1, 2: 1, 3: None, 4: 1, 5: 1}, hosts, 2, lost) == []
    assert silent_nodes({0: None, 1: None, 2: 1, 3: None}, hosts[:2], 2, "a: task 0: Killed") == []
    assert silent_nodes({0: 1, 1: None, 2: None, 3: None}, hosts[:2], 2, "rank 0: a bug") == []


def test_a_line_of_setup_that_fails_ends_the_start() -> None:
    script = "\n".join(["export SLURMD_NODENAME=a", *checked(["export A=1", "false # it's wrong"]), "echo started"])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'error: a: --setup "false # it\'s wrong" failed\n'


def test_a_range_of_nodes_uses_what_divides_the_streams() -> None:
    request = Request(nodes="3-8", gpus_per_node=8)
    assert worlds(config(), request) == {
        3: World(nodes=2, accumulation=4),
        4: World(nodes=4, accumulation=2),
        5: World(nodes=4, accumulation=2),
        6: World(nodes=4, accumulation=2),
        7: World(nodes=4, accumulation=2),
        8: World(nodes=8, accumulation=1),
    }
    assert worlds(config(accumulation=4), Request(nodes="1-2", gpus_per_node=8)) == {
        1: World(nodes=1, accumulation=8),
        2: World(nodes=2, accumulation=4),
    }
    with pytest.raises(ConfigError, match=r"--nodes 3 with 8 processes each: 24 processes do not divide"):
        worlds(config(), Request(nodes="3", gpus_per_node=8))
    with pytest.raises(ConfigError, match=r"--nodes 2 with 6 processes each"):
        worlds(config(), Request(nodes="2-4", gpus_per_node=6))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("30:00", 30), ("2:00:00", 120), ("1-00:00:00", 1440), ("2-12", 3600), ("infinite", None)],
)
def test_slurms_times(text: str, expected: int | None) -> None:
    assert minutes(text) == expected


SINFO = "cpu*|infinite\nh100|2-00:00:00\nmixed|1:00:00\n"
NODES = """
NodeName=c1 CPUEfctv=64 CPUTot=64 ActiveFeatures=(null) Gres=(null) State=IDLE Partitions=cpu,mixed Reason=x CPUTot=1
NodeName=h1 CPUEfctv=190 CPUTot=192 ActiveFeatures=nvlink,ib Gres=gpu:h100:8(S:0-1) Partitions=h100
NodeName=h2 CPUTot=192 ActiveFeatures=ib Gres=gpu:h100:8(S:0-1) Partitions=h100
NodeName=m1 CPUEfctv=96 CPUTot=96 ActiveFeatures=(null) Gres=gpu:a100:4,gpu:t4:2 Partitions=mixed
NodeName=m2 CPUEfctv=64 CPUTot=64 ActiveFeatures=(null) Gres=gpu:a100:4 Partitions=mixed
"""


@pytest.fixture
def clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SLURM says on larger clusters than one machine can be."""
    for name, says in (("sinfo", SINFO), ("scontrol", NODES.lstrip())):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\nif [ $2 = hostnames ]; then echo $3; exit; fi\ncat <<END\n{says}END\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_what_a_partition_has(clusters: None) -> None:
    assert partition(None) == Partition("cpu", 0, 64, None, None)
    assert partition("h100", nodes=2) == Partition("h100", 8, 190, 2880, 2880)  # without CPUs that a node keeps
    assert partition("h100", constraint="ib", exclude="h1")[2] == 192  # type: ignore[index]
    assert partition("h100", constraint="nvlink&ib")[2] == 190  # type: ignore[index]
    assert partition("mixed") == Partition("mixed", 6, 96, 60, 60)
    assert partition("mixed", nodes=2) == Partition("mixed", 4, 64, 60, 60)  # what enough nodes have
    assert partition("cpu,mixed") == Partition("mixed", 6, 96, 60, 60)
    assert partition("mixed,cpu", nodes=9) == Partition("mixed", 6, 96, 60, 60)  # SLURM says that there are too few
    with pytest.raises(ConfigError, match="--partition h100,gpu: unknown partition 'gpu'"):
        partition("h100,gpu")


def test_the_job_that_merges_waits_for_its_array_whatever_else_is_typed(clusters: None, tmp_path: Path) -> None:
    request = complete(Request(sbatch=["dependency=afterok:5"]))
    assert "--dependency=afterok:5" in batch_script(request, submission(), tmp_path)
    after = batch_script(request, submission(), tmp_path, after="afterany:7")
    assert "--dependency=afterany:7" in after and "afterok" not in after


def test_a_time_of_the_cluster_file_is_no_number_of_base_60(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("time: 12:00:00\nnodes: 2\nfollow: true\n")
    monkeypatch.setenv("IG_DIST_CLUSTER", str(file))
    found = defaults_of(["time", "nodes", "follow"])
    assert (found["time"], found["nodes"], found["follow"]) == ("12:00:00", "2", "true")


def test_a_node_is_not_cut_off_where_nobody_answered_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a firewall that drops what it does not know: the ranks of a sound job would be killed."""
    program, places = tmp_path / "scontrol", []
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for controller in ("127.0.0.1", "nowhere.invalid"):
        program.write_text(f"#!/bin/sh\necho 'SlurmctldHost[0]        = head({controller})'\n")
        program.chmod(0o755)
        places += [CutOff(hosts)._places for hosts in (["a", "127.0.0.1"], ["a", "nowhere.invalid"], ["a"])]
    assert places == [[("127.0.0.1", 9)] * 2, *[[]] * 5]


def test_what_is_not_said_comes_from_the_partition(clusters: None) -> None:
    whole = complete(Request(nodes="8", partition="h100"))
    assert (whole.gpus_per_node, whole.cpus_per_gpu, whole.mem, whole.time) == (8, 23, "0", "1-00:00:00")
    assert whole.exclusive and whole.ranks_per_node == 8
    part = complete(Request(partition="h100", gpus_per_node=2, mem="100G"))
    assert (part.cpus_per_gpu, part.mem, part.exclusive, part.ranks_per_node) == (23, "100G", False, 2)
    short = complete(Request(partition="mixed"))
    assert (short.time, short.gpus_per_node) == ("0-01:00:00", 6)
    task = complete(Request(partition="h100", tasks=16))
    assert (task.gpus_per_node, task.cpus_per_gpu, task.exclusive) == (1, 23, False)
    assert complete(Request(gpus_per_node=4, tasks_per_node=4)).on_cpus is False
    none = complete(Request(tasks_per_node=4))
    assert none.on_cpus
    assert (none.gpus_per_node, none.cpus_per_gpu, none.ranks_per_node) == (0, 16, 4)
    with pytest.raises(ConfigError, match=r"--time 3:00:00 is more than partition mixed gives, 0-01:00:00"):
        complete(Request(partition="mixed", time="3:00:00"))


# --- arrays


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """The folder of a plan's samples, in their run, as far as a launcher looks at it."""
    run, folder = tmp_path / "run", tmp_path / "elsewhere/a1b2"
    for made in (run, folder):
        made.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config()))
    described = {
        "plan": make_plan().model_dump(mode="json"),
        "export": tiny_models()[1].model_dump(mode="json"),
        "run": str(run),
        "weak": None,
        "uint8_rule": "",
        "tokenizer": "",
        "evaluate": {},
    }
    (folder / "plan.json").write_text(json.dumps(described))
    return folder


def test_an_array_has_its_folder_in_the_run_that_it_works_for(plan: Path, tmp_path: Path) -> None:
    run, given = tmp_path / "run", tmp_path / "given"
    for job in (Job.sample, Job.sweep):
        assert job_folder(job, [str(run)]) == run
        assert job_folder(job, ["--ig-scale", "1.5", str(run), "sample.num=5"]) == run
    assert job_folder(Job.evaluate, [f"{plan}/"]) == run
    assert job_folder(Job.evaluate, ["--num", "20", str(plan)]) == run
    assert job_folder(Job.evaluate, [str(plan)], given) == given
    (run / "config.yaml").unlink()
    run.rmdir()  # moved, or on another machine
    assert job_folder(Job.evaluate, [str(plan)]) == Path("runs/evaluate-a1b2")
    foreign = tmp_path / "foreign.npz"
    foreign.touch()
    assert job_folder(Job.evaluate, [str(foreign), "--reference", "x.npz"]) == Path("runs/evaluate-foreign")
    assert job_folder(Job.evaluate, [str(foreign), "--metrics", "inception_score"]) == Path("runs/evaluate-foreign")
    assert job_folder(Job.reference, ["digits", "--out", "a/real.npz"]) == Path("runs/reference-real")
    assert job_folder(Job.reference, ["digits", "--out", "real.npz"], given) == given
    assert job_folder(Job.encode, ["--source", "digits", "--dest", "s3://b/data/"]) == Path("runs/encode-data")


@pytest.mark.parametrize(
    ("job", "arguments", "words"),
    [
        ("sample", "", "--job sample needs a run directory"),
        ("sample", "NOTHING", "NOTHING"),
        ("sweep", "RUN --seeds x", "--job sweep: --seeds 'x' must be a valid integer"),
        ("evaluate", "", "--job evaluate needs what to score, e.g."),
        ("evaluate", "--num 5", "--job evaluate needs what to score, e.g."),
        ("evaluate", "UNITS", "UNITS holds no finished samples (no plan.json)"),
        ("evaluate", "NOTHING", "NOTHING does not exist"),
        ("evaluate", "PICTURES", "PICTURES holds no plan's samples (no plan.json): give --reference"),
        ("evaluate", "RUN", "RUN holds no finished samples (no plan.json): make them with `ig-dist sample RUN`"),
        ("evaluate", "PLAN --metrics fidd", "did you mean 'fid'"),
        ("evaluate", "PLAN --bogus", "--job evaluate: unknown option --bogus; did you mean --"),
        ("evaluate", "--check-against-adm RUN", "no work for several processes"),
        ("reference", "digits", "--job reference: --out is missing, e.g. `ig-dist reference"),
        ("reference", "digits --out real", "--out real: give the name of an npz"),
        ("reference", "digits --out r.npz --extractors incep", "--extractors 'incep'"),
        ("reference", "NOTHING --out r.npz", "NOTHING does not exist"),
    ],
)
def test_what_an_array_would_refuse_is_said_before(
    job: str, arguments: str, words: str, plan: Path, tmp_path: Path
) -> None:
    (tmp_path / "units").mkdir()
    (tmp_path / "units/unit_00000.safetensors").touch()
    (tmp_path / "pictures").mkdir()
    places = {"PLAN": plan} | {name: tmp_path / name.lower() for name in ("PICTURES", "RUN", "UNITS", "NOTHING")}
    with pytest.raises(ConfigError) as refused:
        job_folder(Job(job), [str(places.get(word, word)) for word in arguments.split()])
    for name, place in places.items():
        words = words.replace(name, str(place))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def dry_run(
    typed: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str, code: int = 2
) -> list[str]:
    """The lines of one; the code is 2 where the data are not there."""
    patch.setattr(sys, "argv", ["slurm.py", *more, *typed.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "launchers/slurm.py"), run_name="__main__")
    printed, errors = capsys.readouterr()
    assert end.value.code == code and errors.count("\n") == bool(code), errors
    return printed.splitlines()


@pytest.mark.parametrize("job", ["evaluate", "reference", "sample", "sweep"])
def test_a_dry_run_prints_what_each_process_does(
    job: str, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM: nodes of eight GPUs are assumed
    monkeypatch.setenv("IG_DIST_CLUSTER", "")
    arguments = {"evaluate": f"{plan} --num 20", "reference": f"digits --out {tmp_path}/r.npz"}.get(
        job, f"{tmp_path}/run --ig-scale 1.5"
    )
    folder = ["--folder", str(tmp_path / "job")] if job == "reference" else []
    options = ["--job", job, "--tasks", "3", "--gpus-per-node", "2", *folder, "--dry-run"]
    printed = dry_run(arguments, monkeypatch, capsys, *options, code=0)
    assert "#SBATCH --array=0-2" in printed and f"#SBATCH --job-name={job}-{'job' if folder else 'run'}" in printed
    command = f"python -m ig_dist.cli {job} {arguments}" + " --evaluate-if-fit" * (job == "sample")
    assert [line for line in printed if line.startswith(("# each", "# once", "# it"))] == [
        "# each of 3 tasks on 1 node, 2 processes:",
        f"# each process: {command}",
        "# once all tasks have ended, whatever became of them, a job of one process:",
        f"# it alone: {command}",
    ]
    assert not list(tmp_path.rglob("slurm"))


@pytest.mark.parametrize(("array", "said"), [(3, "RANK 0 of 3 shows"), (0, "RANK 0 of 3 shows merges")])
def test_no_task_of_an_array_does_what_one_process_alone_does(tmp_path: Path, array: int, said: str) -> None:
    """Its first one would score before the others have ended, and the job that follows would do so again."""
    script = tmp_path / "job.py"
    script.write_text(
        "import os, pathlib\nfrom ig_dist.terminal import is_first_process, is_main_process\n"
        'said = f\'RANK {os.environ["RANK"]} of {os.environ["WORLD_SIZE"]}\'\n'
        "said += ' shows' * is_first_process() + ' merges' * is_main_process()\n"
        f"pathlib.Path({str(tmp_path / 'said')!r}).write_text(said)"
    )
    Folder(tmp_path).write(submission(kind="evaluate", commands=[["-m", "job"]], array=array))
    ids = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": "a"}
    subprocess.run(
        [sys.executable, "-m", "ig_dist.slurm.rank", str(tmp_path), "s"],
        env={
            **os.environ,
            **ids,
            "SLURM_ARRAY_TASK_ID": "0",
            "WORLD_SIZE": "3",
            "PYTHONPATH": str(tmp_path),
            "IG_DIST_ACCUMULATION": "1",
        },
        check=True,
    )
    assert (tmp_path / "said").read_text() == said


def test_the_status_for_a_program_is_that_of_the_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "slurm/first/log").mkdir(parents=True)
    folder = Folder(run / "slurm/first")
    folder.write(submission(run=str(run)))
    folder.add_event("start", nodes=["node1"], log=0)
    folder.add_event("end", code=STOPPED, reason="time limit", next="requeue", checkpoint=7, blame=[])
    (run / "metrics.jsonl").write_text('{"step": 9, "images_per_s": 2}\n')
    (run / "config.yaml").write_text("train: {steps: 10, global_batch_size: 256}\n")
    told = json.loads(json.dumps(watch.describe(run)))
    (job,) = told["jobs"]
    assert (told["last_step"], job["kind"], job["active"], job["tasks"]) == (9, "train", False, None)
    (start,) = job["starts"]
    assert start["nodes"] == ["node1"] and (start["end"]["reason"], start["end"]["next"]) == ("time limit", "requeue")
    assert told["progress"].startswith("step 9 of 10, expected end without a break: 20")
    cancelled = Folder(run / "slurm/second")
    cancelled.log.mkdir(parents=True)
    cancelled.write(submission(run=str(run)))
    cancelled.batch_log().write_text("slurmstepd: error: *** JOB 2 ON node1 CANCELLED AT 2026-01-02T03:04:05 ***\n")
    cancelled.add_event("start", nodes=["node1"], log=0)
    assert watch.describe(run)["jobs"][1]["starts"][0]["end"]["reason"] == "cancelled"
    given_up = Folder(run / "slurm/third")
    given_up.log.mkdir(parents=True)
    given_up.write(submission(run=str(run), array=4))
    for task, code in (("1", 0), ("2", 2), ("3", 2)):
        one = Folder(given_up.path, task)
        one.add_event("start", nodes=["node1"], log=0)
        one.add_event("end", code=code, reason="", next="stop" if code else "done")
        (given_up.log / f"task_{task}_rank_0.log").write_text(f"began\nerror: no such thing as {task}\nleft\n")
    watch.show_status(run)
    said = capsys.readouterr().out
    assert job["state"] in said and "node1: time limit -> requeue" in said
    assert "it said: error: no such thing as 2 (task_2_rank_0.log)" in said
    assert watch.state([QueuedJob("7", "PENDING", "Priority", "", "2026-01-02T03:04:05")]) == (
        "PENDING (Priority, expected to start 2026-01-02T03:04:05)"
    )


def test_what_follows_a_training_waits_until_it_has_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM: nodes of eight GPUs are assumed
    monkeypatch.setenv("IG_DIST_CLUSTER", "")
    run = tmp_path / "run"
    options = f"--nodes 2 sit_b2_ig run.dir={run} data.index={tmp_path} --tasks 4%2 --dry-run --sbatch gres=gpu:h100:8"
    options += " --container nvcr.io#nvidia/pytorch --container-mounts /data"
    then = ["--then", "sample --ig-scale 1.4 sample.num=50", "--then", "evaluate --metrics fid,recall"]
    lines = dry_run(options, monkeypatch, capsys, *then)

    def said(beginning: str) -> list[str]:
        return [line.removeprefix(beginning) for line in lines if line.startswith(beginning)]

    afters = ["afterok:TRAIN", "afterok:TRAIN,afterany:SAMPLE", "afterok:MERGE", "afterok:MERGE,afterany:EVALUATE"]
    assert said("#SBATCH --dependency=") == afters and len(said("#SBATCH --kill-on-invalid-dep=yes")) == 4
    assert said("#SBATCH --gres=") == ["gpu:h100:8", *["gpu:h100:1"] * 4] and said("#SBATCH --array=") == ["0-3%2"] * 2
    assert said("#SBATCH --nodes=") == ["2", "1", "1", "1", "1"] and said("# once ")[0] == "TRAIN has succeeded:"
    ranks = said("#   srun ")
    mounts, python = (
        f"--container-mounts=/data:/data,{run}:{run},{Path.cwd()}:",
        "PYTHONSAFEPATH=1 python3 -u -m ig_dist",
    )
    assert len(ranks) == 3 and all(mounts in line and f"/source {python}" in line for line in ranks)
    sample, evaluate = (line.split() for line in said("# it alone: python -m ig_dist.cli "))
    assert sample[:5] == ["sample", str(run), "--ig-scale", "1.4", "sample.num=50"] and evaluate[0] == "evaluate"
    assert sample[sample.index("--out") + 1] == evaluate[1] and evaluate[1].startswith(f"{run}/samples/")


def test_what_sites_ask_for_in_words_of_their_own(tmp_path: Path) -> None:
    whole = Request(nodes="2", gpus_per_node=8, mem="0", sbatch=["gres=gpu:h100:8", "mem-per-gpu=60G"])
    text = batch_script(whole, submission(), tmp_path)
    assert "--gres=gpu:h100:8" in text and "--mem-per-gpu=60G" in text
    assert "--gpus-per-node" not in text and "--mem=" not in text and "--ntasks-per-node=8" in text


@pytest.mark.parametrize(("answer", "number"), [("17", "17"), ("17;here\n", "17"), ("Welcome!\n---\n17\n\n", "17")])
def test_the_id_of_a_job_below_a_greeting(answer: str, number: str) -> None:
    assert job_id(answer) == number


def test_gpus_of_which_slurm_knows_nothing(
    clusters: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it knows some elsewhere, they were typed for the wrong partition, or the default one is the wrong one."""
    assert not complete(Request(partition="cpu", gpus_per_node=3)).unknown_gpus
    monkeypatch.setenv("IG_DIST_CLUSTER", "")
    monkeypatch.setattr(sys, "argv", ["slurm.py", "--dry-run", "sit_b2_ig", f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "launchers/slurm.py"), run_name="__main__")
    assert "the default partition has no GPUs: choose one of h100, mixed (--partition)" in capsys.readouterr().err
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\ncat <<END\n{NODES.splitlines()[1]}\nEND\n")
    whole = complete(Request(gpus_per_node=3))
    text = batch_script(whole, submission(), tmp_path)
    assert whole.unknown_gpus and "--ntasks-per-node=3" in text and "gpus-per-node" not in text
    assert "CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1,2}" in text and "--mem" not in text


def test_the_job_that_runs_is_followed_and_not_what_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = "7|COMPLETED|None|n|N/A\n8_0|RUNNING|None|n|N/A\n9|PENDING|Dependency||N/A"
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{jobs}'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for number in "789":
        folder = Folder(tmp_path / "run/slurm" / number)
        folder.path.mkdir(parents=True)
        folder.write(submission())
        folder.id = number
    assert watch.to_follow(tmp_path / "run")[0].id == "8"


def test_a_folder_that_a_node_has_not_is_one_line(tmp_path: Path) -> None:
    Folder(tmp_path).write(submission(cwd="/nowhere", commands=[["-c", "pass"]]))
    ids = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": "a"}
    command = [sys.executable, "-m", "ig_dist.slurm.rank", str(tmp_path), "s"]
    done = subprocess.run(command, env={**os.environ, **ids}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and exit_codes(tmp_path / "exits/s", 1) == {0: 2} and not done.stderr
    assert done.stdout.startswith("error: a: /nowhere, where it was submitted: No such file or directory: submit from")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("newer", ["run", "submission"])
def test_resume_goes_on_with_the_newest_config(
    newer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a submission that was cancelled before it began, or of a start by hand after it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("IG_DIST_CLUSTER", "")
    monkeypatch.chdir(tmp_path)
    run, folder = tmp_path / "run", Folder(tmp_path / "run/slurm/first")
    folder.path.mkdir(parents=True)
    folder.write(submission(run=str(run), cwd=str(tmp_path), options={"gpus_per_node": 8}))
    for place, name, batch in ((run, "run", 128), (folder.path, "submission", 256)):
        tree = config(streams=128, batch=batch)
        tree.run.dir = str(run)
        (place / "config.yaml").write_text(to_yaml(tree))
        os.utime(place / "config.yaml", (1, 2 if name == newer else 1))
    said = dry_run(f"resume {run} --dry-run", monkeypatch, capsys)
    assert f"config: {run if newer == 'run' else folder.path}/config.yaml" in said
    assert f"# of a batch of {128 if newer == 'run' else 256}, a process has" in said[-1]


def test_an_answer_without_an_id_is_told() -> None:
    with pytest.raises(SlurmError, match="which is no job's id"):
        job_id("Welcome!")
