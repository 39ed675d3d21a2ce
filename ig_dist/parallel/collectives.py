"""The collectives of this process, from PyTorch's flight recorder: which one it waits in, and which ones it came to."""

import http.client
import json
import math
import os
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import distributed_c10d

RECORDS = 512  # some steps of a large model's buckets, and a quarter of a megabyte a rank once written down
_BYTES = {"Byte": 1, "Char": 1, "Bool": 1, "Half": 2, "BFloat16": 2, "Short": 2, "Int": 4, "Float": 4}
_MOST_TENSORS = 3
_NCCL = "dump_nccl_trace_json"
_ANSWER_S = 60.0


def set_defaults(collective_s: float) -> None:
    """Have collectives recorded, and NCCL leave the last word to the watchdog. To be called before the first group.

    What the user has set stays.
    """
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # the older name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDS))
    defaults = {
        # an event at the beginning of each: only a device that has not begun tells whom the others wait for
        "TORCH_NCCL_ENABLE_TIMING": "1",
        # or its watchdog aborts (134) a process whose device fails, before the error is told, named and blamed
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
        # its monitor aborts a process whose driver hangs, by default after 8 minutes: before ours speaks
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(math.ceil(2 * collective_s)),
        # the records are kept in the run directory, as JSON, and not pickled in every home
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def communication_error(device: torch.device) -> str:
    """What NCCL has found wrong with the links or the peers; empty: nothing. Asks neither device nor driver."""
    if device.type != "cuda" or not torch_dist.is_initialized():
        return ""
    for group in list(distributed_c10d._world.pg_map):  # those of HSDP's mesh have links of their own
        with suppress(AttributeError, RuntimeError):  # of a group that is being left, or has no NCCL
            backend: Any = group._get_backend(device)
            if backend.get_error() not in (c10d.ErrorType.SUCCESS, c10d.ErrorType.TIMEOUT):
                return str(backend.get_error()).rpartition(".")[2]
    return ""


class Collective(NamedTuple):
    """One that has not ended."""

    group: str  # backend and process group; the same name on all of its ranks
    number: int  # among the group's
    text: str
    waited_s: float


class Standing(NamedTuple):
    """Where a rank stands among the collectives."""

    came: dict[str, int]
    """Number of the newest one of each group that this rank came to; where a device does the work: that it began."""
    waits: Collective | None  # the oldest one that this rank came to and that has not ended


def standing(records: Mapping[str, Any]) -> Standing:
    """Where this process stands, from its records."""
    came: dict[str, int] = {}
    waits = []
    for backend, record in records.items():
        told = backend == "nccl" and os.environ.get("TORCH_NCCL_ENABLE_TIMING", "0")[:1].lower() in "1ty"
        for entry in record.get("entries", []):
            if entry["is_p2p"]:
                continue
            group, number = f"{backend} {entry['process_group'][0]}", entry["collective_seq_id"]
            ended = entry["retired"] or entry["state"] == "completed"
            begun = ended or not told or entry["state"] == "started"  # gloo has no device, and is always "scheduled"
            came[group] = max(came.get(group, 0), number if begun else 0)
            if begun and not ended:
                waits.append((entry["time_created_ns"] / 1e9, Collective(group, number, _describe(entry), 0.0)))
    if not waits:
        return Standing(came, None)
    since, oldest = min(waits)
    return Standing(came, oldest._replace(waited_s=max(0.0, time.time() - since)))


def _describe(entry: Mapping[str, Any]) -> str:
    backend, _, operation = entry["profiling_name"].rpartition(":")
    name, purpose = entry["process_group"]
    tensors = [*zip(entry["input_dtypes"], entry["input_sizes"], strict=False)]
    size = sum(_BYTES.get(dtype, 8) * math.prod(shape) for dtype, shape in tensors)
    shapes = [f"{dtype} {shape}" for dtype, shape in tensors[:_MOST_TENSORS]]
    shapes += [f"{len(tensors) - _MOST_TENSORS} more"] if len(tensors) > _MOST_TENSORS else []
    group = f"group {name}" if purpose in ("", "undefined") else f"group {name}, {purpose},"
    return f"{operation} {entry['collective_seq_id']} of {group} on {backend} ({', '.join(shapes)}: {size:,} bytes)"


class Handlers:
    """PyTorch's handlers for debugging in this process, asked over HTTP.

    The functions of the same names hold the interpreter's lock while they ask the device about each collective that has
    not ended: under a driver that does not answer, no thread could speak any more. A server's threads do not need it.
    """

    def __init__(self) -> None:
        self._socket = str(Path(tempfile.mkdtemp(prefix="ig-dist-")) / "handlers")
        self._server = c10d._WorkerServer(self._socket, -1)

    def ask(self, name: str) -> Any:
        """What a handler says.

        Raises:
            OSError: it does not answer.
        """
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(_ANSWER_S)
            link.connect(self._socket)
            connection = http.client.HTTPConnection("localhost")
            connection.sock = link
            connection.request("POST", f"/handler/{name}")
            return json.loads(connection.getresponse().read())


class Recorder:
    """Reads the records in a thread of its own: while a device hangs, its driver may not answer."""

    def __init__(self) -> None:
        self.records: dict[str, Any] = {}  # of each backend, as read last
        self.standing = Standing({}, None)
        self._reading: threading.Thread | None = None
        self._handlers: Handlers | None = None  # not before one is wanted: its server says that it listens

    def read(self, wait_s: float) -> Standing:
        """Where this process stands, read within so many seconds, or else what was last known."""
        if self._reading is None or not self._reading.is_alive():
            self._reading = threading.Thread(target=self._read, name="recorder", daemon=True)
            self._reading.start()
        self._reading.join(wait_s)
        return self.standing

    def _read(self) -> None:
        if not torch_dist.is_initialized():
            return
        records = {"gloo": json.loads(c10d._dump_fr_trace_json())}  # type: ignore[attr-defined]
        with suppress(OSError, RuntimeError, ValueError, http.client.HTTPException):  # gloo's records count alone
            if _NCCL in c10d._get_handler_names():  # type: ignore[attr-defined]
                self._handlers = self._handlers or Handlers()
                records["nccl"] = self._handlers.ask(_NCCL)
        self.records = records
        self.standing = standing(records)
