"""The first process of a job, on its first node: starts the ranks, and decides what comes after them.

``python -m ig_dist.slurm.batch FOLDER``. It imports no torch: a start waits for nothing here.

SLURM signals it ``--signal-delay`` seconds before the time limit, and it passes the signal on through srun. Ranks that
were asked to stop save and leave exit code 75, and the job is requeued. A rank that died is not SLURM's business (it
would only fail the job): the ranks are started again on the same nodes, and if they die again without a new checkpoint
between, the job is requeued, with growing pauses and a bound. A failure that would come again is left alone. A node
that is to blame for several failures is avoided.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from ig_dist.errors import IgDistError
from ig_dist.launching.endings import STOPPED
from ig_dist.parallel.blame import blamed, noted_failure
from ig_dist.slurm.commands import SlurmError, host_names, minutes, queued, slurm
from ig_dist.slurm.holding import CutOff, end_ranks_here, lock_is_free
from ig_dist.slurm.record import BLAME_NAME, SCRIPT_NAME, Folder, Submission, World, size
from ig_dist.slurm.verdict import (
    bad_nodes,
    excluded,
    exit_codes,
    judge,
    nodes_to_blame,
    silent_nodes,
    usable,
    what_next,
)

CANCEL_S, NOTIFY_S = 60.0, 60.0


_SAID = {
    "done": "finished",
    "stop": "not started again",
    "again": "started again in this allocation",
    "requeue": "requeued",
}


class Job:
    """A job as its first process has it, and what SLURM has told that process."""

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path, os.environ.get("SLURM_ARRAY_TASK_ID", ""))
        self.submission = self.folder.read()
        self.asked = False
        """To stop: the time limit is near, or a user wants it."""
        self.ended = False
        """SLURM is ending the job, and knows what to do with it."""
        self.srun: subprocess.Popen[bytes] | None = None
        signal.signal(signal.SIGUSR2, self._stop)
        signal.signal(signal.SIGTERM, self._end)
        self.given = host_names(os.environ["SLURM_JOB_NODELIST"])

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        os.write(sys.stdout.fileno(), b"asked to stop\n")  # print is not for signal handlers
        if self.srun is not None:
            self.srun.send_signal(signal.SIGUSR2)  # srun passes it on to all ranks

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.ended = True

    def run(self) -> int:
        """Start the ranks until the job is done, requeued or given up; the exit code."""
        while not self.ended:
            if (code := self._start()) is not None:
                return code
        return 128 + signal.SIGTERM

    def _start(self) -> int | None:
        """Start the ranks once, and act on how they end; None: they are started again here."""
        folder, submission = self.folder, self.submission
        if folder.cancelled:
            print("cancelled: nothing is started")
            return 0
        if not lock_is_free(folder, submission, self.given, lambda: self.ended or self.asked):
            self._notify(1, f"{submission.hold} is held by a process of another start")
            return 1
        if self.ended:
            return None
        if self.asked:  # while nothing ran
            folder.add_event("end", code=STOPPED, reason="asked to stop", next="requeue")
            return self._requeue()
        good = usable(self.given, bad_nodes(folder.events(), submission.exclude_after), submission)
        world = submission.worlds[len(good)]
        hosts, idle = good[: world.nodes], good[world.nodes :]
        tasks = submission.tasks_per_node
        if idle:
            used = f"{world.nodes} are used ({world.nodes * tasks} processes)"
            print(f"{len(good)} nodes, {used}: more do not divide data.streams. Idle: {', '.join(idle)}")
        start = f"{os.environ['SLURM_JOB_ID']}-{time.time_ns()}"
        before = size(folder.batch_log())
        folder.add_event("start", nodes=hosts, log=before)
        srun_code = self._run_ranks(hosts, world, start)
        if srun_code is None:  # another start may have its history by now
            print("this node was cut off from the others and from SLURM's controller: its ranks are ended")
            return 1
        if self.ended:
            if folder.cancelled or not _time_is_up():  # SLURM's own log line says why, see Folder.why
                if self.srun is not None:  # its ranks may be saving: a job whose first process ends is at its end
                    self.srun.wait()
                return 128 + signal.SIGTERM
            reason = "time limit, before the ranks had saved"
            folder.add_event("end", code=None, reason=reason, next="requeue")
            return self._requeue()
        exits = folder.path / "exits" / start
        codes = exit_codes(exits, world.nodes * tasks)
        ended = re.search(r"^srun: error: (\S+: tasks? .+)", folder.said(before), re.MULTILINE)
        first_error = ended[1].strip() if ended else ""
        verdict = judge(codes, srun_code, first_error, noted_failure(exits / BLAME_NAME))
        failed, cancelled = verdict.next == "failed", folder.cancelled and verdict.next != "done"
        blame = nodes_to_blame(blamed(exits / BLAME_NAME), first_error, hosts, tasks) if failed else []
        shutil.rmtree(exits, ignore_errors=True)
        reason = verdict.reason
        if verdict.next == "requeue":
            reason = f"{'cancelled' if cancelled else _why_asked(submission)}: {reason}"
        elif silent := silent_nodes(codes, hosts, tasks, reason):
            reason = f"no word from {', '.join(silent)}: its processes or the network died ({reason})"
        newest = self._newest_checkpoint() if cancelled or failed else None
        end = {"code": verdict.code, "reason": reason, "checkpoint": newest, "blame": blame}
        events = folder.events()
        what = verdict._replace(next="stop") if cancelled else what_next(verdict, end, events, self.given, submission)
        folder.add_event("end", **end, next=what.next)
        if what.avoided:
            print(f"avoided from now on: {', '.join(what.avoided)} (--exclude-after {submission.exclude_after})")
        print(f"{reason}: {_SAID[what.next]}" + (f" in {what.pause_s:.0f} s" if what.pause_s else ""))
        if what.next == "requeue":
            return self._requeue(what.pause_s)
        if what.next == "again":
            self._sleep(what.pause_s)
            return None
        self._notify(verdict.code, reason)
        if cancelled:
            self._sleep(CANCEL_S)  # `cancel` ends the job, so that SLURM calls it cancelled
        return verdict.code

    def _run_ranks(self, hosts: list[str], world: World, start: str) -> int | None:
        """Run srun to its end; its exit code, or None: it runs elsewhere, for this node is cut off."""
        submission = self.submission
        environment = {
            **os.environ,
            "MASTER_ADDR": hosts[0],
            "MASTER_PORT": str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000),  # jobs may share a node
            "WORLD_SIZE": str(world.nodes * submission.tasks_per_node * max(1, submission.array)),
            "LOCAL_WORLD_SIZE": str(submission.tasks_per_node),
            "IG_DIST_ACCUMULATION": str(world.accumulation),
        }
        command = srun_command(self.folder, submission, hosts, start)
        # what srun says goes where this process writes, and is read there
        stderr = subprocess.STDOUT
        srun = self.srun = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=stderr)
        if self.asked:  # before there was a srun to pass it on to
            srun.send_signal(signal.SIGUSR2)
        code, watch = None, CutOff(hosts)
        while code is None and not self.ended:  # then SLURM ends this process too, before a srun whose ranks hang
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = srun.wait(timeout=0.2)
            if watch.is_cut_off():  # SLURM has started, or will start, the job elsewhere
                end_ranks_here(self.folder.path)
                srun.kill()
                return None
        if code is None:
            return 128 + signal.SIGTERM
        self.srun = None
        return 128 - code if code < 0 else code

    def _newest_checkpoint(self) -> int | None:
        """The newest checkpoint of a training; None: none, or not a training."""
        config = self.folder.path / "config.yaml"
        if not config.exists():
            return None
        from ig_dist.checkpoints.store import checkpoint_store  # 2 s, for torch; after a failure nobody waits for them
        from ig_dist.config.file import load_config

        try:
            return max(checkpoint_store(load_config(config)).steps(), default=0)
        except (IgDistError, OSError) as error:
            print(f"the checkpoints cannot be listed: {error}")
            return None

    def _requeue(self, pause_s: float = 0.0) -> int:
        """Requeue this job, to start no sooner than that, elsewhere. SLURM then ends this process."""
        changes = [f"starttime=now+{pause_s:.0f}"] if pause_s > 0 else []
        if (nodes := self._exclusion()) is not None:
            changes.append(f"excnodelist={nodes}")
        job = os.environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{self.folder.task}"
        for wait in (1, 5, 20, *[60] * 60, 0):  # the controller may be away for a while
            try:
                _scontrol("requeue", job)
                break
            except SlurmError as error:
                print(f"scontrol requeue: {error}")
                if self.ended or not wait:  # SLURM was faster, and requeues by itself
                    return 128 + signal.SIGTERM
                self._sleep(wait)
        for change in changes:
            try:
                _scontrol("update", f"jobid={job}", change)
            except SlurmError as error:
                print(f"requeued without {change}: {error}")
        self._sleep(30)
        return STOPPED

    def _exclusion(self) -> str | None:
        """The nodes that the job must not get from now on; None: as it was, for SLURM has too few others."""
        nodes = excluded(self.folder.events(), self.submission)
        if nodes:
            try:
                slurm("sbatch", "--test-only", f"--exclude={nodes}", str(self.folder.path / SCRIPT_NAME))
            except SlurmError as error:
                print(f"{nodes} may be used again, there are too few others: {error}")
                return None
        return nodes

    def _notify(self, code: int, reason: str) -> None:
        """Run the user's line, if there is one; what it does changes nothing here."""
        line, told = self.submission.notify, {"RUN": self.submission.run, "CODE": str(code), "REASON": reason}
        try:
            if line:
                place = self.submission.cwd
                subprocess.run(line, shell=True, env=os.environ | told, timeout=NOTIFY_S, cwd=place, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"--notify: {error}")

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.ended:
            time.sleep(0.1)


def srun_command(folder: Folder, submission: Submission, hosts: list[str], start: str) -> list[str]:
    """How the ranks are started."""
    count = len(hosts) * submission.tasks_per_node
    return [
        "srun",
        f"--nodes={len(hosts)}",
        f"--nodelist={','.join(hosts)}",
        f"--ntasks={count}",
        f"--ntasks-per-node={submission.tasks_per_node}",
        # since SLURM 22.05 srun does not take it from sbatch
        *([f"--cpus-per-task={submission.cpus_per_task}"] if submission.cpus_per_task else []),
        # neighbouring ranks on one socket, as the GPUs that they use are
        "--cpu-bind=cores",
        "--distribution=block:block",
        "--kill-on-bad-exit=1",  # NCCL would find out that a rank is dead after train.timeout_s only
        "--unbuffered",
        "--open-mode=append",
        f"--output={folder.rank_log('%t')}",
        *(f"--{key}" if value is True else f"--{key}={value}" for key, value in submission.srun.items()),
        *(submission.python or [sys.executable]),
        "-u",
        "-m",
        "ig_dist.slurm.rank",
        str(folder.path),
        start,
    ]


def _scontrol(*words: str) -> None:
    """SLURM's SIGTERM comes later: at a requeue it goes to all processes of the job, a scontrol that asks too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        slurm("scontrol", *words)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _time_is_up() -> bool:
    """Whether the time limit is why SLURM ends this job: it requeues after everything else, but not then."""
    try:
        return any(job.reason == "TimeLimit" for job in queued([os.environ["SLURM_JOB_ID"]]))
    except SlurmError:
        return False


def _why_asked(submission: Submission) -> str:
    """Why the ranks were asked to stop: SLURM does so when the time limit is near."""
    try:
        left = slurm("squeue", "--noheader", f"--jobs={os.environ['SLURM_JOB_ID']}", "-o", "%L")
        limit = minutes(left)
        near = limit is not None and limit * 60 <= submission.signal_delay_s + 60
    except IgDistError:  # it does not answer, or the time is over
        near = True
    return "the time limit was near" if near else "a signal came"


if __name__ == "__main__":
    sys.exit(Job(Path(sys.argv[1])).run())
