"""A run's jobs from outside: their log as it is written until they end, and their end at once."""

import time
from pathlib import Path

from ig_dist.launching.endings import FINAL, STOPPED
from ig_dist.slurm.commands import SlurmError, queued, slurm
from ig_dist.slurm.record import Folder, Submission
from ig_dist.slurm.watch import advice, found_folders, state
from ig_dist.terminal import console

LOOK_S, ASK_S = 0.5, 15.0  # at files, and SLURM, seldom in the end: its controller serves everybody
CANCEL_S = 120.0


def cancel(run: Path) -> None:
    """End a run's jobs; returns when none of their processes is left. A training that runs saves first.

    Raises:
        SlurmError: they did not end.
    """
    ids: list[str] = []
    saving: list[tuple[Folder, Submission]] = []
    for folder, submission in found_folders(run):
        jobs = [job for job in queued([folder.id]) if job.active]
        if jobs:
            folder.cancel()  # first, so that nothing is requeued meanwhile
            ids.append(folder.id)
        if submission.kind == "train" and any(job.state == "RUNNING" for job in jobs):
            saving.append((folder, submission))
    if not ids:
        console.print(f"{run}: no job is queued or runs")
        return
    if others := [job for job in ids if job not in [folder.id for folder, _ in saving]]:
        slurm("scancel", *others)
    for folder, submission in saving:
        _let_save(folder, submission)
    slurm("scancel", *ids)
    deadline, pause = time.monotonic() + CANCEL_S, LOOK_S
    while any(job.active for job in queued(ids)):
        if time.monotonic() > deadline:
            raise SlurmError(f"job {', '.join(ids)} is still ending after {CANCEL_S:.0f} s: see squeue")
        time.sleep(pause)
        pause = min(2 * pause, ASK_S)
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


def follow(folder: Folder, submission: Submission) -> int:
    """Print a job's logs as they are written, until it ends; its exit code. Ctrl-C leaves the job alone."""
    first = Folder(folder.path, "0" if submission.array else "")
    places = {first.batch_log(): 0, first.rank_log("0"): 0}
    said, known, pause, ask_at, ended = "", 0, LOOK_S, 0.0, False
    try:
        while not ended:
            events = first.events()
            if len(events) != known:  # ask at once, and often again
                known, pause, ask_at = len(events), LOOK_S, 0.0
            if time.monotonic() >= ask_at:
                over = bool(events) and events[-1]["next"] in ("done", "stop")
                pause = LOOK_S if over else min(2 * pause, ASK_S)
                ask_at = time.monotonic() + pause
                now, jobs = "SLURM does not answer; asking again", None
                try:
                    jobs = queued([folder.id])
                    now, ended = state(jobs), not any(job.active for job in jobs)
                except SlurmError:
                    pass
                if now != said:
                    console.print("\n  ".join([f"job {folder.id}: {now}", *advice(jobs or [])]))
                said = now
            for file in places:
                places[file] += _print_from(file, places[file])
            if not ended:
                time.sleep(LOOK_S)
        return final_code(folder)
    except KeyboardInterrupt:
        console.print(f"\njob {folder.id} goes on; follow it with: ig-dist slurm status {submission.run} --follow")
        return 0


def final_code(folder: Folder) -> int:
    """The exit code of a job that has ended: the worst of its tasks."""
    ends = [(task.events() or [{}])[-1].get("code") for task in folder.tasks()]  # a start has none
    codes = [1 if code is None else int(code) for code in ends]
    return next((code for code in (*FINAL, 1, STOPPED) if code in codes), max(codes))


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
