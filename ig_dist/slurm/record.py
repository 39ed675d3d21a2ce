"""A submission's folder: what was submitted, and what has happened to it. Everything is JSON or text.

RUN/slurm/20260102-030405-ab12/
job.json, id      the submission, written once, and the number that SLURM gave it
batch.sh          what sbatch got
config.yaml       the resolved config of a training
source/           the code as it was
history.jsonl     starts and ends, and waits for the lock of the run (an array: history_3.jsonl for its task 3)
exits/            the exit code of each rank of a start, and which are to blame, until it was judged
log/              batch.log, rank_0.log, ... appended to at each start
cancelled         there once `cancel` was asked for
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from ig_dist.storage.json_lines import append, read_lines

JOB_NAME, SCRIPT_NAME, ID_NAME, CANCELLED_NAME, BLAME_NAME = "job.json", "batch.sh", "id", "cancelled", "blame"
ACCUMULATION = "{accumulation}"  # in a command: that of the world at hand
_BEGINNINGS = {"start": "end", "wait": "waited"}
Time = Annotated[float, Field(ge=0, lt=2**32)]
Kind = Literal["train", "encode", "sample", "sweep", "evaluate", "reference", "merge"]


class World(BaseModel):
    """How many of the nodes that SLURM gave are used, and the micro-batches a step."""

    nodes: int
    accumulation: int


class Submission(BaseModel):
    """A job as it was submitted."""

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    commands: list[list[str]]  # one: Python's arguments in each rank
    run: str  # the run directory, or the folder given for a job without one
    cwd: str  # relative paths are meant from here
    tasks_per_node: int
    cpus_per_task: int | None
    worlds: dict[int, World]  # by the number of nodes that SLURM gave
    array: int = 0  # tasks of the array; 0: no array
    max_failures: int
    exclude_after: int = 2  # failures that a node is blamed for within a day, after which no start uses it; 0: never
    signal_delay_s: int
    options: dict[str, Any]  # what was typed, for `resume`
    srun: dict[str, str | bool] = {}  # more options of srun
    python: list[str] = []  # what starts Python for a rank, in a container; empty: the one that submitted
    notify: str = ""  # shell line that runs when the job is done or given up
    hold: str = ""  # file whose lock a running job of this run holds; a start waits until it is free
    hold_s: float = 600.0
    """How long: until a holder that lost its peers has noticed it, and the server of files that a machine is gone."""


class Event(BaseModel):
    """A line of the history, which others may have written too."""

    model_config = ConfigDict(extra="allow")

    event: str
    time: Time
    log: NonNegativeInt = 0  # bytes of the batch log before it
    nodes: list[str] = []
    blame: list[str] = []
    reason: str = ""
    next: str = ""
    code: int | None = None
    checkpoint: int | None = None
    until: Time | None = None  # of a wait


class Folder:
    """A submission's folder on the shared file system, or what in it is of one task of its array."""

    def __init__(self, path: Path, task: str = "") -> None:
        self.path, self.task, self.log = path, task, path / "log"
        self._of = f"_{task}" if task else ""
        self._history = path / f"history{self._of}.jsonl"

    def write(self, submission: Submission) -> None:
        """Write ``job.json``."""
        (self.path / JOB_NAME).write_text(submission.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def read(self) -> Submission:
        """What was submitted."""
        return Submission.model_validate_json(text_of(self.path / JOB_NAME))

    @property
    def id(self) -> str:
        """The id that SLURM gave the job; empty: none yet."""
        number = text_of(self.path / ID_NAME).strip()
        return number if re.fullmatch(r"[0-9]+", number) else ""  # scancel would take other words for options

    @id.setter
    def id(self, number: str) -> None:
        (self.path / ID_NAME).write_text(f"{number}\n")

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was asked for."""
        return (self.path / CANCELLED_NAME).exists()

    def cancel(self) -> None:
        """No start, and no requeue, from now on."""
        (self.path / CANCELLED_NAME).touch()

    def batch_log(self) -> Path:
        """Where SLURM and the job's first process write."""
        return self.log / f"batch{self._of}.log"

    def rank_log(self, rank: str) -> Path:
        """Where a rank writes."""
        return self.log / (f"task{self._of}_rank_{rank}.log" if self.task else f"rank_{rank}.log")

    def add_event(self, event: str, **what: Any) -> None:
        """Append a start or an end, or that a start waits and has waited."""
        append(self._history, {"event": event, "time": round(time.time(), 3), **what})

    def events(self, *, waits: bool = False) -> list[dict[str, Any]]:
        """Starts and ends, oldest first, and with ``waits`` those for the run's lock.

        An end that SLURM brought about is told by SLURM's own log line.
        """
        events: list[dict[str, Any]] = []
        lines: list[dict[str, Any]] = []
        with contextlib.suppress(OSError):
            lines.extend(read_lines(self._history))
        for event in filter(None, map(_told, lines)):
            if event["event"] in _BEGINNINGS and events and events[-1]["event"] in _BEGINNINGS:
                begun = events[-1]
                end = {"event": _BEGINNINGS[begun["event"]], "time": begun["time"], "code": None, "next": "requeue"}
                events.append({**end, "reason": self.why(begun, event["log"])})
            events.append(event)
        return events if waits else [event for event in events if event["event"] in ("start", "end")]

    def said(self, since: int, until: int | None = None) -> str:
        """What SLURM, srun and the job's first process have written, by the bytes of their log."""
        log = self.batch_log()
        return log.read_bytes()[since:until].decode(errors="replace") if log.exists() else ""

    def why(self, start: dict[str, Any], until: int | None = None) -> str:
        """Why a start came to an end that it did not see itself, in SLURM's words."""
        text = self.said(start["log"], until)
        found = re.findall(r"DUE TO (.+?)(?:, SEE .*)? \*\*\*", text)
        failed = re.findall(r"Node failure on (\S+)", text)
        if found:
            words = str(found[0]).lower()
        elif re.search(r"CANCELLED AT \S+ \*\*\*", text):
            words = "cancelled"
        else:
            words = "ended by SLURM without a word (its first node, or the controller)"
        return words + (f" ({', '.join(dict.fromkeys(failed))})" if failed else "")

    def tasks(self) -> list[Folder]:
        """What is of each of the array's tasks that have a history; of a plain job all."""
        names = [match[1] for file in self.path.glob("history*.jsonl") if (match := re.search(r"_(\d+)\.", file.name))]
        return [Folder(self.path, name) for name in sorted(names, key=int)] or [self]


def folders(run: Path) -> Iterator[tuple[Folder, Submission]]:
    """The submissions of a run, oldest first."""
    for path in sorted((run / "slurm").glob("*/")):
        try:
            yield Folder(path), Folder(path).read()
        except (OSError, ValidationError):
            continue  # being written, or not ours


def text_of(file: Path) -> str:
    """Of a file that may not be there yet; empty also where a pipe or a device is, which would be waited for."""
    try:
        return file.read_bytes().decode(errors="replace") if file.is_file() else ""
    except OSError:
        return ""


def _told(line: dict[str, Any]) -> dict[str, Any] | None:
    """An event of the history with all that it has; None: it is not ours."""
    try:
        return Event.model_validate(line).model_dump()
    except ValidationError:
        return None


def size(file: Path) -> int:
    """Of a file that may not be there yet."""
    return file.stat().st_size if file.exists() else 0
