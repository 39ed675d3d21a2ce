"""What comes after a start: judged from how all its ranks ended, and from what came before it."""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ig_dist.launching import endings
from ig_dist.launching.endings import FINAL, STOPPED
from ig_dist.slurm.record import Submission

BLAME_S = 86_400.0


class Verdict(NamedTuple):
    """What comes after a start, and why."""

    next: str  # done, stop, again (in this allocation) or requeue; of `judge` also failed, which `what_next` decides
    code: int
    reason: str
    pause_s: float = 0.0
    avoided: Sequence[str] = ()  # nodes that are not used from now on


def exit_codes(exits: Path, ranks: int) -> dict[int, int | None]:
    """By rank; None: it left none."""
    files = {rank: exits / str(rank) for rank in range(ranks)}
    return {rank: int(file.read_text() or 1) if file.exists() else None for rank, file in files.items()}


def judge(codes: Mapping[int, int | None], srun_code: int, first_error: str, failure: str = "") -> Verdict:
    """What the exit codes of all ranks say, with the first end that srun reported, and what that rank said of it."""
    if all(code == 0 for code in codes.values()):
        return Verdict("done", 0, "done")
    for code in FINAL:  # another rank's loss of its peer, or its death by srun, is only an echo
        who = [rank for rank, found in codes.items() if found == code]
        if who:
            told = f" ({failure})" if failure else ""
            return Verdict("stop", code, f"exit code {code} of rank {who[0]}, which trying again does not mend{told}")
    if STOPPED in codes.values():
        return Verdict("requeue", STOPPED, "asked to stop, and saved")
    if first_error.endswith("Terminated") and not any(codes.values()):  # a preemption's warning, which came too early
        return Verdict("requeue", STOPPED, "ended by SLURM before it could save")
    dead = ", ".join(str(rank) for rank, code in codes.items() if code is None)
    code = max((code for code in codes.values() if code), default=srun_code or 1)
    return Verdict("failed", code, failure or first_error or (f"rank {dead} died" if dead else f"exit code {code}"))


def what_next(
    verdict: Verdict,
    end: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    given: Sequence[str],
    submission: Submission,
) -> Verdict:
    """What follows a start that has just ended, with its newest ``checkpoint`` and the nodes to ``blame``.

    ``events`` came before it, ``given`` are the nodes that SLURM gave.
    """
    if verdict.next != "failed":
        return verdict
    failures = failures_in_a_row(events, end["checkpoint"])
    if failures >= submission.max_failures:
        return verdict._replace(next="stop")
    now = {"event": "end", "time": time.time(), **end}
    bad = bad_nodes([*events, now], submission.exclude_after)
    if new := sorted(bad & set(end["blame"])):
        elsewhere = bad & set(usable(given, bad, submission))
        return verdict._replace(next="requeue" if elsewhere else "again", avoided=new)
    step = "requeue" if failures % 2 else "again"  # other nodes may help where the same ones did not
    return verdict._replace(next=step, pause_s=endings.pause_s(failures))


def failures_in_a_row(events: Sequence[Mapping[str, Any]], checkpoint: int | None) -> int:
    """Failures since the last end that was none, or since the newest ``checkpoint``; None: the job writes none."""
    count = 0
    for event in reversed(events):
        if event["event"] != "end":
            continue
        if event["next"] not in ("again", "requeue") or event["code"] in (None, STOPPED):
            break
        if checkpoint is not None and checkpoint > (event.get("checkpoint") or 0):
            break
        count += 1
    return count


def nodes_to_blame(ranks: Iterable[int], first_error: str, hosts: Sequence[str], tasks_per_node: int) -> list[str]:
    """Where the ranks run that the job itself blames, or else the one that srun saw killed first.

    Not the first one that exits, aborts or faults by itself: with a bug that is any.
    """
    if named := {hosts[rank // tasks_per_node] for rank in ranks}:
        return sorted(named)
    host = first_error.partition(":")[0]
    return [host] if host in hosts and first_error.endswith(("Killed", "Bus error")) else []


def silent_nodes(
    codes: Mapping[int, int | None], hosts: Sequence[str], tasks_per_node: int, first_error: str
) -> list[str]:
    """Nodes of which no rank left a code, where what srun saw first is a rank elsewhere that lost them (code 1)."""
    host, _, said = first_error.partition(":")
    if host not in hosts or not said.endswith("Exited with exit code 1"):
        return []
    spoke = {hosts[rank // tasks_per_node] for rank, code in codes.items() if code is not None}
    return [name for name in hosts if name not in spoke and name != host]


def bad_nodes(events: Iterable[Mapping[str, Any]], most: int) -> set[str]:
    """Nodes that were to blame so many times within a day; 0: none ever are."""
    newest = [event for event in events if event["event"] == "end" and event["time"] > time.time() - BLAME_S]
    counts = Counter(node for event in newest for node in event.get("blame", []))
    return {node for node, count in counts.items() if most and count >= most}


def excluded(events: Sequence[Mapping[str, Any]], submission: Submission) -> str | None:
    """The nodes that a requeued job must not get, those of `--exclude` too; None: nothing has changed that."""
    if not any(event.get("blame") for event in events):
        return None
    typed = submission.options.get("exclude")
    return ",".join([*([typed] if typed else []), *sorted(bad_nodes(events, submission.exclude_after))])


def usable(given: Sequence[str], bad: Collection[str], submission: Submission) -> list[str]:
    """The nodes but the bad ones; all of them where the job cannot do with so few."""
    good = [host for host in given if host not in bad]
    return good if len(good) in submission.worlds else list(given)
