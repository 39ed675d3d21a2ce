"""What has become of a run's jobs: their state and history, their log as it is written, and their end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ig_dist import endings
from ig_dist.endings import STOPPED, After
from ig_dist.errors import ConfigError
from ig_dist.slurm.commands import QueuedJob, SlurmError, queued, slurm
from ig_dist.slurm.record import Folder, Submission, folders
from ig_dist.slurm.verdict import bad_nodes
from ig_dist.terminal import console

POLL_S = 2.0
CANCEL_S = 120.0
SHOWN_STARTS = 12
# why a job waits for ever, and what to do
STUCK = {
    "BadConstraints": "too few nodes fit: cancel, and submit with fewer --nodes, or without what limits them",
    "launch failed requeued held": "a node could not start it: scontrol release {id}",
    "JobHeldUser": "held: scontrol release {id}",
    "JobHeldAdmin": "held by an administrator",
    "PartitionTimeLimit": "the partition gives less time: cancel, and submit with a smaller --time",
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


def show_status(run: Path) -> None:
    """Print the state of a run's jobs, their starts and why each ended."""
    for folder, submission in found_folders(run):
        jobs = queued([folder.id] if folder.id else [])
        console.print(f"{submission.kind} job {folder.id or '(not submitted)'}: {_state(jobs)}", markup=False)
        for text in sorted({STUCK[job.reason].format(id=job.id) for job in jobs if job.reason in STUCK}):
            console.print(f"  {text}")
        active = {job.id for job in jobs if job.active}
        for task in folder.tasks():
            _show_history(folder, submission, task, any(job.endswith(f"_{task}") if task else True for job in active))
        console.print(f"  log: {folder.log}", markup=False)
    step = last_step(run)
    if step is not None:
        console.print(f"last step in {run}/metrics.jsonl: {step}", markup=False)


def describe(run: Path) -> dict[str, Any]:
    """What ``show_status`` prints, for a program."""
    told = []
    for folder, submission in found_folders(run):
        jobs = queued([folder.id] if folder.id else [])
        active = {job.id for job in jobs if job.active}
        starts = {
            task: history(folder, task, any(job.endswith(f"_{task}") if task else True for job in active))
            for task in folder.tasks()
        }
        told.append(
            {
                "kind": submission.kind,
                "id": folder.id,
                "state": _state(jobs),
                "active": bool(active),
                "tasks": starts if submission.array else None,
                "starts": None if submission.array else next(iter(starts.values()), []),
                "log": str(folder.log),
            }
        )
    return {"run": str(run), "jobs": told, "last_step": last_step(run)}


def history(folder: Folder, task: str, active: bool) -> list[dict[str, Any]]:
    """The starts of a job, each with its end, if it had one."""
    starts: list[dict[str, Any]] = []
    for event in folder.events(task):
        if event["event"] == "start":
            starts.append({**event, "end": None})
        elif starts:
            starts[-1]["end"] = event
    if starts and starts[-1]["end"] is None and not active:
        starts[-1]["end"] = {"reason": folder.why(starts[-1], task=task), "next": "", "code": None}
    return starts


def _show_history(folder: Folder, submission: Submission, task: str, active: bool) -> None:
    starts = history(folder, task, active)
    if not starts or (task and [(start["end"] or {}).get("next") for start in starts] == ["done"]):
        return  # of an array, only tasks with something to tell
    name = f"task {task}: " if task else ""
    console.print(f"  {name}{len(starts)} start{'s' * (len(starts) > 1)}, {len(starts) - 1} restarts", markup=False)
    if bad := bad_nodes(folder.events(task), submission.exclude_after):
        console.print(f"    avoided today: {', '.join(sorted(bad))}", markup=False)
    for number, start in list(enumerate(starts))[-SHOWN_STARTS:]:
        began = datetime.fromtimestamp(start["time"]).strftime("%Y-%m-%d %H:%M:%S")
        nodes, end = start["nodes"], start["end"]
        blame = f" (blamed: {', '.join(end['blame'])})" if end and end.get("blame") else ""
        where = ",".join(nodes) if len(nodes) < 5 else f"{len(nodes)} nodes ({nodes[0]}, ...)"
        then = f" -> {end['next']}" if end and end["next"] not in ("", "done") else ""
        console.print(f"    {number}  {began}  {where}: {end['reason'] if end else 'runs'}{blame}{then}", markup=False)


def last_step(run: Path) -> int | None:
    """The step of the newest line of metrics."""
    file = run / "metrics.jsonl"
    try:
        lines = file.read_bytes()[-65536:].splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, IndexError, ValueError, KeyError):
        return None


def cancel(run: Path) -> None:
    """End a run's jobs; returns when none of their processes is left.

    Raises:
        SlurmError: they did not end.
    """
    active: list[Folder] = []
    for folder, _ in found_folders(run):
        if folder.id and any(job.active for job in queued([folder.id])):
            folder.cancel()  # first, so that nothing is requeued meanwhile
            active.append(folder)
    if not active:
        console.print(f"{run}: no job is queued or runs")
        return
    ids = [folder.id for folder in active]
    slurm("scancel", *ids)
    deadline = time.monotonic() + CANCEL_S
    while any(job.active for job in queued(ids)):
        if time.monotonic() > deadline:
            raise SlurmError(f"job {', '.join(ids)} is still ending after {CANCEL_S:.0f} s: see squeue")
        time.sleep(0.5)
    console.print(f"cancelled: job {', '.join(ids)}; go on with: ig-dist slurm resume {run}", markup=False)


def follow(folder: Folder, submission: Submission) -> int:
    """Print a job's logs as they are written, until it ends; its exit code. Ctrl-C leaves the job alone."""
    task = "0" if submission.array else ""
    files = [folder.batch_log(task), folder.log / f"{f'task_{task}_' if task else ''}rank_0.log"]
    places = dict.fromkeys(files, 0)
    said, misses = "", 0
    try:
        while True:
            jobs = _try(lambda: queued([folder.id]))
            misses = misses + 1 if jobs is None else 0
            if misses == 1:
                console.print("SLURM does not answer; asking again")
            ended = jobs is not None and not any(job.active for job in jobs)
            state = said if jobs is None else _state(jobs)
            if state != said:
                console.print(f"job {folder.id}: {state}", markup=False)
                for text in sorted({STUCK[job.reason].format(id=job.id) for job in jobs or [] if job.reason in STUCK}):
                    console.print(f"  {text}")
            said = state
            for file in files:
                places[file] += _print_from(file, places[file])
            if ended:
                return final_code(folder)
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        console.print(f"\njob {folder.id} goes on; follow it with: ig-dist slurm status {submission.run} --follow")
        return 0


def final_code(folder: Folder) -> int:
    """The exit code of a job that has ended: the worst of its tasks."""
    codes = []
    for task in folder.tasks():
        ends = [event for event in folder.events(task) if event["event"] == "end"]
        last = ends[-1] if ends and folder.events(task)[-1]["event"] == "end" else None
        codes.append(1 if last is None or last["code"] is None else int(last["code"]))
    return next((code for code in (*endings.codes(After.NEVER), 1, STOPPED) if code in codes), max(codes))


def _state(jobs: Sequence[QueuedJob]) -> str:
    if not jobs:
        return "SLURM knows it no more"
    if len(jobs) > 1:
        states = [job.state for job in jobs]
        return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    (job,) = jobs
    where = f" on {job.nodes}" if job.nodes else ""
    return f"{job.state}{where}" + (f" ({job.reason})" if job.reason not in ("None", "") else "")


def _try(ask: Callable[[], list[QueuedJob]]) -> list[QueuedJob] | None:
    try:
        return ask()
    except SlurmError:
        return None


def _print_from(file: Path, place: int) -> int:
    """Print what was appended; the number of bytes."""
    try:
        with file.open("rb") as log:
            log.seek(place)
            data = log.read()
    except FileNotFoundError:
        return 0
    data = data[: data.rfind(b"\n") + 1]
    if data:
        print(data.decode(errors="replace"), end="", flush=True)
    return len(data)
