"""What has become of a run's jobs: their state, their history, and how far a training is."""

import os
import re
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ig_dist.errors import ConfigError, IgDistError
from ig_dist.slurm.commands import QueuedJob, my_folders, queued
from ig_dist.slurm.record import JOB_NAME, Folder, Submission, folders, text_of
from ig_dist.slurm.verdict import bad_nodes
from ig_dist.storage.json_lines import read_lines
from ig_dist.terminal import console

PATIENCE_S = 10.0
SHOWN_STARTS = 12
# why a job waits for ever, and what to do
STUCK = {
    "BadConstraints": "too few nodes fit: cancel, and submit with fewer --nodes, or without what limits them",
    "launch failed requeued held": "a node could not start it: scontrol release {id}",
    "job requeued in held state": "held: scontrol release {id}",
    "JobHeldUser": "held: scontrol release {id}",
    "JobHeldAdmin": "held by an administrator",
    "DependencyNeverSatisfied": "what it waits for has failed: cancel",
    "PartitionTimeLimit": "the partition gives less time: cancel, and submit with a smaller --time",
    "QOSMaxWallDurationPerJobLimit": "the QOS gives less time: cancel, and submit with a smaller --time",
    "PartitionNodeLimit": "the partition gives fewer nodes: cancel, and submit with fewer --nodes",
}


def found_folders(run: Path) -> list[tuple[Folder, Submission]]:
    """A run's submissions, oldest first.

    Raises:
        ConfigError: none.
    """
    found = list(folders(run))
    if not found:
        raise ConfigError(f"{run} was never submitted (no {run}/slurm): start it with ig-dist slurm")
    return found


def to_follow(run: Path) -> tuple[Folder, Submission]:
    """The first of a run's submissions that waits or runs, or else the newest."""
    found = found_folders(run)
    jobs = queued([folder.id for folder, _ in found])
    active = {job.id.partition("_")[0] for job in jobs if job.active}
    return next((one for one in found if one[0].id in active), found[-1])


def refuse_others(folder: Folder, submission: Submission, run: Path) -> None:
    """Refuse to submit again what this user may not have typed: options hold shell lines.

    Raises:
        ConfigError: another user wrote the submission, or it came with a run from another place.
    """
    owned = {place.stat().st_uid for place in (folder.path, folder.path / JOB_NAME)} <= {os.getuid()}
    if not owned or Path(submission.run).resolve() != run.resolve():
        whose = "is of a run that was elsewhere" if owned else "is another user's"
        raise ConfigError(
            f"{folder.path} {whose}: its options may run commands and are not taken over: submit it anew with"
            f" ig-dist slurm {run}/config.yaml and the options that you want"
        )


def show_status(run: Path) -> None:
    """Print the state of a run's jobs, their starts and why each ended."""
    told = describe(run)
    for job in told["jobs"]:
        console.print(f"{job['kind']} job {job['id'] or '(not submitted)'}: {job['state']}")
        for text in job["advice"]:
            console.print(f"  {text}")
        for task, starts in (job["tasks"] or {"": job["starts"]}).items():
            _show_starts(task, starts)
        if job["avoided"]:
            console.print(f"  avoided today: {', '.join(job['avoided'])}")
        if job["said"] is not None:
            console.print(f"  it said: {job['said']}")
        console.print(f"  log: {job['log']}")
    if told["progress"] is not None:
        console.print(told["progress"])


def show_all() -> None:
    """Print the jobs of this user that wait or run, a line for each run."""
    logs = my_folders()
    paths = dict.fromkeys(Path(log).parent.parent for log in logs if Path(log).parent.name == "log")
    found = False
    for folder in map(Folder, paths):
        try:
            submission = folder.read()
        except (OSError, ValidationError):  # not ours
            continue
        found = True
        _, told = _ask(folder)
        far = how_far(Path(submission.run)) if submission.kind == "train" else None
        tail = f"; {far}" if far else ""
        console.print(f"{submission.run}: {submission.kind} job {folder.id}, {told}{tail}")
    if not found:
        console.print("no job of yours waits or runs that ig-dist slurm has submitted; of a run: status RUN")


def describe(run: Path) -> dict[str, Any]:
    """What ``show_status`` prints, for a program."""
    told = []
    for folder, submission in found_folders(run):
        jobs, state_now = _ask(folder)
        starts = {one.task: history(one, _may_run(jobs, one.task)) for one in folder.tasks()}
        avoided = [bad_nodes(one.events(), submission.exclude_after) for one in folder.tasks()]
        told.append(
            {
                "kind": submission.kind,
                "id": folder.id,
                "state": state_now,
                "active": None if jobs is None else any(job.active for job in jobs),
                "advice": advice(jobs or []),
                "tasks": starts if submission.array else None,
                "starts": None if submission.array else next(iter(starts.values()), []),
                "avoided": sorted(set().union(*avoided)),
                "said": failed_words(folder),
                "log": str(folder.log),
            }
        )
    return {"run": str(run), "jobs": told, "last_step": last_step(run), "progress": how_far(run)}


def _ask(folder: Folder) -> tuple[list[QueuedJob] | None, str]:
    """What SLURM says of a submission, and in words; None: it does not answer, but the history is in files."""
    try:
        jobs = queued([folder.id], patience_s=PATIENCE_S)
    except IgDistError as error:
        return None, f"unknown, SLURM does not answer ({error}); what is in files:"
    return jobs, state(jobs)


def _may_run(jobs: Sequence[QueuedJob] | None, task: str) -> bool:
    active = [job.id for job in jobs or [] if job.active]
    return jobs is None or any(job.endswith(f"_{task}") if task else True for job in active)


def history(folder: Folder, active: bool) -> list[dict[str, Any]]:
    """The starts of a job, and its waits for the run's lock, each with its end, if it had one."""
    starts: list[dict[str, Any]] = []
    for event in folder.events(waits=True):
        if event["event"] in ("start", "wait"):
            starts.append({**event, "end": None})
        elif starts:
            starts[-1]["end"] = event
    if starts and starts[-1]["end"] is None and not active:
        reason = "cancelled" if folder.cancelled else folder.why(starts[-1])
        starts[-1]["end"] = {"reason": reason, "next": "", "code": None}
    return starts


def _show_starts(task: str, entries: Sequence[dict[str, Any]]) -> None:
    if not entries or (task and [(entry["end"] or {}).get("next") for entry in entries] == ["done"]):
        return  # of an array, only tasks with something to tell
    name = f"task {task}: " if task else ""
    count = sum(entry["event"] == "start" for entry in entries)
    console.print(f"  {name}{count} start{'s' * (count != 1)}, {max(0, count - 1)} restarts")
    for number, entry in list(enumerate(entries))[-SHOWN_STARTS:]:
        began = _clock(entry["time"])
        nodes, end = entry["nodes"], entry["end"]
        blame = f" (blamed: {', '.join(end['blame'])})" if end and end.get("blame") else ""
        where = ",".join(nodes) if len(nodes) < 5 else f"{len(nodes)} nodes ({nodes[0]}, ...)"
        then = f" -> {end['next']}" if end and end["next"] not in ("", "done") else ""
        now = f"waits until {_clock(entry['until'])} for a process that holds the run" if entry["until"] else "runs"
        console.print(f"    {number}  {began}  {where}: {end['reason'] if end else now}{blame}{then}")


def failed_words(folder: Folder) -> str | None:
    """What the first task that was given up, or the training, said last, and where; None: none was."""
    for task in folder.tasks():
        events = task.events()
        if not events or events[-1].get("next") != "stop" or not events[-1].get("code"):
            continue
        for log in sorted(folder.log.glob(task.rank_log("*").name), key=lambda file: file.stat().st_mtime):
            lines = log.read_bytes()[-8192:].decode(errors="replace").splitlines()
            errors = [line for line in lines if re.match(r"error: |[\w.]+(Error|Exception)\b", line)]
            if errors:
                return f"{errors[-1]} ({log.name})"
    return None


def last_step(run: Path) -> int | None:
    """The step of the newest line of metrics."""
    line = _last_metrics(run)
    return None if line is None else int(line["step"])


def how_far(run: Path) -> str | None:
    """The last step of a training, of how many, and when it will be at its end at this speed; None: no step yet."""
    line = _last_metrics(run)
    if line is None:
        return None
    try:
        train = yaml.safe_load(text_of(run / "config.yaml"))["train"]
        left = train["steps"] - int(line["step"])
        seconds = left * train["global_batch_size"] / line["images_per_s"]
        end = _clock(time.time() + seconds) if left else ""
        return f"step {line['step']} of {train['steps']}" + (f", expected end without a break: {end}" if end else "")
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError, RecursionError, yaml.YAMLError):
        return f"step {line['step']}"


def _last_metrics(run: Path) -> dict[str, Any] | None:
    try:
        *_, found = read_lines(run / "metrics.jsonl", last_bytes=65536)
        return found if isinstance(found.get("step"), int) else None
    except (OSError, ValueError):
        return None


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")


def advice(jobs: Sequence[QueuedJob]) -> list[str]:
    """What to do about jobs that wait for ever."""
    return sorted({STUCK[job.reason].format(id=job.id) for job in jobs if job.reason in STUCK})


def state(jobs: Sequence[QueuedJob]) -> str:
    """Of a submission's jobs, in SLURM's words."""
    if not jobs:
        return "SLURM knows it no more"
    if len(jobs) > 1:
        states = [job.state for job in jobs]
        return ", ".join(f"{states.count(one)} {one}" for one in dict.fromkeys(states))
    (job,) = jobs
    where = f" on {job.nodes}" if job.nodes else ""
    begins = f", expected to start {job.begins}" if job.state == "PENDING" and job.begins not in ("N/A", "") else ""
    return f"{job.state}{where}" + (f" ({job.reason}{begins})" if job.reason not in ("None", "") else "")
