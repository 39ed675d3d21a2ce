"""A run's jobs from outside: their log as it is written until they end, and their end at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from ig_dist.launching import endings
from ig_dist.launching.endings import STOPPED, After
from ig_dist.slurm.commands import QueuedJob, SlurmError, queued, slurm
from ig_dist.slurm.record import Folder, Submission
from ig_dist.slurm.watch import advice, found_folders, state
from ig_dist.terminal import console

LOOK_S, ASK_S = 1.0, 15.0  # at files, and SLURM: its controller serves everybody
CANCEL_S = 120.0


def cancel(run: Path) -> None:
    """End a run's jobs; returns when none of their processes is left. A training that runs saves first.

    Raises:
        SlurmError: they did not end.
    """
    active: list[Folder] = []
    saving: list[tuple[Folder, Submission]] = []
    for folder, submission in found_folders(run):
        jobs = [job for job in queued([folder.id]) if job.active] if folder.id else []
        if jobs:
            folder.cancel()  # first, so that nothing is requeued meanwhile
            active.append(folder)
        if submission.kind == "train" and any(job.state == "RUNNING" for job in jobs):
            saving.append((folder, submission))
    if not active:
        console.print(f"{run}: no job is queued or runs")
        return
    ids = [folder.id for folder in active]
    others = [folder.id for folder in active if folder.id not in [one.id for one, _ in saving]]
    if others:
        slurm("scancel", *others)
    for folder, submission in saving:
        _let_save(folder, submission)
    slurm("scancel", *ids)
    deadline = time.monotonic() + CANCEL_S
    for pause in _pauses():
        if not any(job.active for job in queued(ids)):
            break
        if time.monotonic() > deadline:
            raise SlurmError(f"job {', '.join(ids)} is still ending after {CANCEL_S:.0f} s: see squeue")
        time.sleep(pause)
    saved = [_newest(folder).get("checkpoint") for folder, _ in saving]
    steps = [f"saved at step {step}; " for step in saved if step is not None]
    console.print(f"cancelled: job {', '.join(ids)}; {''.join(steps)}go on with: ig-dist slurm resume {run}")


def _let_save(folder: Folder, submission: Submission) -> None:
    """Ask a training to save and leave, as before a time limit, and wait until it has, for as long as there it may."""
    if _newest(folder).get("event") != "start":  # it begins, or waits for the run's lock
        return
    console.print(f"job {folder.id}: asked to save; waits for up to {submission.signal_delay_s} s")
    try:
        slurm("scancel", "--signal=USR2", "--batch", folder.id)
    except SlurmError as error:  # it has just ended
        console.print(str(error))
        return
    began = time.monotonic()
    while _newest(folder).get("event") == "start":
        waited = time.monotonic() - began
        if waited > submission.signal_delay_s:
            console.print(f"job {folder.id}: has not saved in {waited:.0f} s: ended all the same")
            return
        time.sleep(0.2)


def _newest(folder: Folder) -> dict[str, object]:
    """The start of a training that runs, or else its end; nothing before the first start."""
    return (folder.events() or [{}])[-1]


def _pauses() -> Iterator[float]:
    """Between questions to SLURM: first short ones, in the end ``ASK_S``."""
    pause = 0.5
    while True:
        yield pause
        pause = min(2 * pause, ASK_S)


def follow(folder: Folder, submission: Submission) -> int:
    """Print a job's logs as they are written, until it ends; its exit code. Ctrl-C leaves the job alone."""
    first = Folder(folder.path, "0" if submission.array else "")
    files = [first.batch_log(), first.rank_log("0")]
    places = dict.fromkeys(files, 0)
    said, away, ended, asked, pauses, known = "", False, False, 0.0, _pauses(), 0
    pause = next(pauses)
    try:
        while not ended:
            events = first.events()
            over = bool(events) and events[-1].get("next") in ("done", "stop")
            if len(events) != known or (over and pause > 1):  # ask at once, and often again
                known, pauses, asked = len(events), _pauses(), 0.0
            if time.monotonic() - asked > pause:
                asked, pause = time.monotonic(), next(pauses)
                jobs = _try(folder.id)
                if jobs is None and not away:
                    console.print("SLURM does not answer; asking again")
                away = jobs is None
                now = said if jobs is None else state(jobs)
                if now != said:
                    console.print(f"job {folder.id}: {now}")
                    for text in advice(jobs or []):
                        console.print(f"  {text}")
                said, ended = now, jobs is not None and not any(job.active for job in jobs)
            for file in files:
                places[file] += _print_from(file, places[file])
            if not ended:
                time.sleep(min(LOOK_S, pause))
        return final_code(folder)
    except KeyboardInterrupt:
        console.print(f"\njob {folder.id} goes on; follow it with: ig-dist slurm status {submission.run} --follow")
        return 0


def final_code(folder: Folder) -> int:
    """The exit code of a job that has ended: the worst of its tasks."""
    ends = [(task.events() or [{}])[-1].get("code") for task in folder.tasks()]  # a start has none
    codes = [1 if code is None else int(code) for code in ends]
    return next((code for code in (*endings.codes(After.NEVER), 1, STOPPED) if code in codes), max(codes))


def _try(job: str) -> list[QueuedJob] | None:
    try:
        return queued([job])
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
