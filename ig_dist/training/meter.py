"""What is measured while training, between two lines of metrics: without waiting for the device until one is due.

The steps of all ranks take the same time, since they wait for each other in the collectives: a slow rank shows by the
time of what it does alone.
"""

import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ig_dist.config import Config
from ig_dist.data.reader import ShardReader
from ig_dist.data.stream import Batch
from ig_dist.errors import NonFiniteError, listed
from ig_dist.models.dit import DiT
from ig_dist.models.presets import forward_flops
from ig_dist.parallel.dist import Dist, gather_objects, sum_over_ranks
from ig_dist.parallel.engine import StepResult
from ig_dist.terminal import console
from ig_dist.training.metrics import model_flops_utilisation, peak_tflops_of
from ig_dist.training.phases import Phases

SLOW, COSTLY, IN_A_ROW = 1.5, 0.1, 2  # what of a rank is told
MOST_SAMPLES = 64  # whose losses were not finite, in one line

Metrics = dict[str, float | int | list[int] | None]


class Meter:
    """Throughput, waiting, memory, recompiles and non-finite steps since the last line of metrics."""

    def __init__(self, config: Config, model: DiT, dist: Dist, phases: Phases) -> None:
        self._config, self._dist, self.phases = config, dist, phases
        peak = config.train.peak_tflops or peak_tflops_of(dist.device)
        # backward costs twice the forward; where no share of a peak can be told, the second that counting takes to load
        self._train_flops = 3 * forward_flops(model.config) if peak else 0
        self._streak = torch.zeros((), device=dist.device)
        self._skipped = torch.zeros((), device=dist.device)
        self._told = 0  # of ``_skipped``: what has been said
        self._suspects: list[tuple[int, Tensor, Tensor]] = []
        """Of each step since the last line: its number, its samples, and their losses."""
        self._stall: float | None = None
        self._recompiles, self._graphs = 0, 0
        self.own, self._watch = OwnWork(dist.device), Watch()
        self.pause()

    def pause(self) -> None:
        """Begin to count anew: what lies behind (a save, the start) is not throughput."""
        self._began, self._steps = time.perf_counter(), 0
        self._waited = self.phases.seconds["data"]
        self.own.take()
        self._graphs = compiled_graphs()  # those of validation and sampling have shapes of their own

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The loop stands still for a save."""
        began = time.perf_counter()
        yield
        self._stall = time.perf_counter() - began
        self.pause()

    def count(self, result: StepResult, batch: Batch, losses: Tensor, step: int) -> None:
        """Count a step, on the device; ``losses`` are (losses, rows) of this rank, the first the one in backward."""
        self._steps += 1
        void = 1 - result.finite
        self._skipped += void
        self._streak = (self._streak + 1) * void
        self._suspects.append((step, batch.ids, losses[0]))
        if not self.phases.warm:
            self.own.take()  # what the first step does once is not what it takes
        graphs = compiled_graphs()
        self._recompiles += graphs - self._graphs if self.phases.warm else 0
        self._graphs = graphs

    def read(self, losses: Tensor, result: StepResult, batch: Batch, step: int, reader: ShardReader) -> Metrics:
        """The line of metrics. Waits for the device. COLLECTIVE."""
        means = sum_over_ranks(losses.mean(dim=1).double() / self._dist.world_size, self._dist).tolist()
        counts = batch_fingerprint(batch), len(reader.quarantined), reader.patience.faults, self._recompiles
        waited = (self.phases.seconds["data"] - self._waited) / self._steps
        mine = *counts, waited, peak_memory(self._dist.device), self.own.take(), self._dist.place
        *counted, waits, memories, own, places = zip(*gather_objects(mine, self._dist), strict=True)
        fingerprint, quarantined, faults, recompiles = map(sum, counted)
        skipped, streak, guilty = int(self._skipped), int(self._streak), self._nonfinite_samples()
        if streak >= self._config.train.max_nonfinite_steps:
            raise NonFiniteError(
                f"the last {streak} steps up to step {step} had a non-finite gradient ({_suspicion(guilty)}): lower"
                " optimizer.lr or use train.precision=fp32; the last checkpoint is from before or equal to it"
            )
        batch_size = self._config.train.global_batch_size
        world_size, device, peak_tflops = self._dist.world_size, self._dist.device, self._config.train.peak_tflops
        images_per_s = self._steps * batch_size / (time.perf_counter() - self._began)
        line: Metrics = {
            "images_seen": step * batch_size,
            "loss": means[0],
            "loss_final": means[1],
            "loss_aux": means[2],
            **({"loss_cosine": means[3]} if self._config.loss.cosine_weight else {}),
            "grad_norm": float(result.grad_norm),
            "images_per_s": images_per_s,
            "mfu": model_flops_utilisation(self._train_flops, images_per_s, world_size, device, peak_tflops),
            "data_wait_s": max(waits),
            "nonfinite_steps": skipped,
            "quarantined": quarantined,
            "storage_faults": faults,
            "checkpoint_stall_s": self._stall,
            "peak_memory_bytes": max(memories),
            "recompiles": recompiles,
            "batch_fingerprint": fingerprint,
            **self._slowest(own, places),
        }
        if guilty is not None:
            line["nonfinite_samples"] = sorted({sample for _, sample in guilty})[:MOST_SAMPLES]
        self.pause()
        return line

    def _slowest(self, own: Sequence[float], places: Sequence[str]) -> Metrics:
        """Which rank takes longest for what it does alone, said where it matters."""
        if len(own) == 1:
            return {}
        found = slowest(own, time.perf_counter() - self._began)
        if self._watch.sees(found) and self._dist.is_main:
            console.print(
                f"slow: {places[found.rank]} takes {found.ratio:.1f} times the median rank's time"
                f" for its own work, which makes every step {100 * found.cost:.0f}% longer"
            )
        return {"slowest_rank": found.rank, "slowest_rank_ratio": found.ratio}

    def _nonfinite_samples(self) -> list[tuple[int, int]] | None:
        """(Step, sample) of all ranks whose loss was not finite; None when no step was skipped. COLLECTIVE."""
        suspects, self._suspects = self._suspects, []
        skipped, self._told = int(self._skipped) - self._told, int(self._skipped)
        if not skipped:
            return None  # the same on every rank: the gate is
        mine = [(step, int(sample)) for step, ids, loss in suspects for sample in ids[~loss.isfinite().cpu()]]
        guilty = sorted({pair for pairs in gather_objects(mine, self._dist) for pair in pairs})
        if self._dist.is_main:
            first, last = suspects[0][0], suspects[-1][0]
            which = f"step {last}" if first == last else f"{skipped} of the steps {first} to {last}"
            console.print(f"skipped for a non-finite gradient: {which} ({_suspicion(guilty)})")
        return guilty


def _suspicion(guilty: list[tuple[int, int]] | None) -> str:
    if not guilty:
        return "no sample's loss was non-finite: it arose in the backward pass"
    return f"samples with a non-finite loss: {listed([f'{sample} (step {step})' for step, sample in guilty])}"


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    dynamo: Any = sys.modules.get("torch._dynamo")  # slow to import, and without it nothing was compiled
    return int(dynamo.utils.counters["stats"]["unique_graphs"]) if dynamo else 0


def peak_memory(device: torch.device) -> int:
    """The most memory, in bytes: on a GPU allocated since the last call, else of the process since it began."""
    if device.type != "cuda":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def batch_fingerprint(batch: Batch) -> int:
    """A number that says which sample stood at which position; the sum over ranks names the global batch.

    Equal lines of two runs prove equal batches, whatever the number of processes.
    """
    mixed = (batch.ids * 0x9E3779B1 + batch.positions * 0x85EBCA77) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
    return int((mixed ^ (mixed >> 12)).sum())


class OwnWork:
    """The time of this rank's own work: on a GPU between events, which nothing waits for until it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts what is done inside; no collective may be among it."""
        begin = self._mark()
        yield
        self._spans.append((begin, self._mark()))

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def take(self) -> float:
        """Seconds since the last call. Waits for the device."""
        spans, self._spans = self._spans, []
        if not self._on_gpu:
            return float(sum(end - begin for begin, end in spans))
        if spans:
            spans[-1][1].synchronize()
        return sum(float(begin.elapsed_time(end)) for begin, end in spans) / 1e3


class Slowest(NamedTuple):
    """The slowest rank of some steps."""

    rank: int
    ratio: float  # its own work's time over the median rank's
    cost: float  # by how much it makes all steps longer, as a share of them


def slowest(own: Sequence[float], elapsed: float) -> Slowest:
    """The slowest of all ranks, by the seconds of each one's own work and of all the steps."""
    rank = max(range(len(own)), key=own.__getitem__)
    middle = statistics.median_low(own)
    return Slowest(rank, own[rank] / middle if middle else 1.0, (own[rank] - middle) / elapsed)


class Watch:
    """Says once of a rank that it is slow: when it was in two lines of metrics in a row, and matters."""

    _rank, _times = -1, 0

    def sees(self, found: Slowest) -> bool:
        """Whether to say it now."""
        before = self._times if found.rank == self._rank else 0
        self._rank = found.rank
        self._times = before + 1 if found.ratio >= SLOW and found.cost >= COSTLY else 0
        return self._times == IN_A_ROW
