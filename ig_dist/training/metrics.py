"""What a run reports: ``metrics.jsonl``, TensorBoard and the progress bar, and what throughput means."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ig_dist.errors import ConfigError
from ig_dist.run_dir import replace_text
from ig_dist.storage.json_lines import LineFile, read_lines
from ig_dist.terminal import console
from ig_dist.terminal.progress import bar

# Dense bf16 peaks in TFLOP/s, from the vendors' data sheets, by a part of the device's name.
PEAK_TFLOPS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0}


def peak_tflops_of(device: torch.device) -> float | None:
    """Dense bf16 peak of a GPU; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def model_flops_utilisation(
    flops_per_image: float, images_per_s: float, world_size: int, device: torch.device, peak_tflops: float | None
) -> float | None:
    """Achieved FLOP/s over the peak of all devices (2 FLOP per MAC); None where the peak is not known."""
    peak_tflops = peak_tflops or peak_tflops_of(device)
    if peak_tflops is None:
        return None
    return flops_per_image * images_per_s / (world_size * peak_tflops * 1e12)


class RunLog:
    """Writes the metrics of rank 0, until ``close``; on other ranks, whose ``path`` is None, it does nothing.

    Lines of an earlier start after ``start``, the step that the run goes on from, are cut off.
    """

    def __init__(self, path: Path | None, *, start: int, total: int, name: str) -> None:
        self._path, self._total = path, total
        self._board: Any = None  # a SummaryWriter
        self._hook = threading.excepthook
        self._progress = bar(name, total, start, hidden=path is None)
        if path is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            try:
                cut_back(path / "metrics.jsonl", start)
            except OSError as error:
                raise ConfigError(f"{path}/metrics.jsonl: {error.strerror}: see that it has space") from None
            self._lines = LineFile(path / "metrics.jsonl")
            threading.excepthook = self._thread_failed
            with self._board_may_fail():
                self._board = SummaryWriter(str(path / "tensorboard"), purge_step=start + 1)
        self._progress.start()

    def close(self) -> None:
        """Take the bar away, and write out what TensorBoard still holds."""
        self._progress.stop()
        threading.excepthook = self._hook
        if self._board is not None:
            with self._board_may_fail():
                self._board.close()

    @contextmanager
    def _board_may_fail(self) -> Iterator[None]:
        """TensorBoard's file is a copy for the eye: without space for it the run goes on without it."""
        try:
            yield
        except OSError as error:
            self._board = None
            console.print(f"no TensorBoard from now on ({error.strerror}): metrics.jsonl has its values")

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread; what goes wrong there is raised once more at the next value."""
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard")):
            self._hook(failure)

    def _show(self, step: int, group: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if self._board is not None and isinstance(value, (int, float)):
                with self._board_may_fail():
                    self._board.add_scalar(f"{group}/{key}", value, step)

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._progress.update(self._progress.task_ids[0], completed=step)

    def add(self, step: int, values: Mapping[str, float], group: str = "validation") -> None:
        """Values that are not measured at every line: a line of their own, and TensorBoard under ``group``."""
        if self._path is None:
            return
        self._lines.append({"step": step, **values})
        self._show(step, group, values)
        shown = (f"{key} {one:.4f}" if isinstance(one, float) else f"{key} {one}" for key, one in values.items())
        console.print("  ".join([f"step {step}", *shown]))

    def add_picture(self, step: int, picture: NDArray[np.uint8]) -> None:
        """A picture (H, W, channels), in ``samples/training`` for the report and in TensorBoard."""
        if self._path is None:
            return
        try:
            (folder := self._path / "samples" / "training").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.squeeze()).save(folder / f"step_{step:010d}.png")
        except OSError as error:
            console.print(f"the samples of step {step} were not written ({error.strerror})")
        if self._board is not None:
            with self._board_may_fail():
                self._board.add_image("samples", picture, step, dataformats="HWC")
                self._board.flush()

    def write(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics; ``step`` is among them. TensorBoard gets the numbers."""
        if self._path is None:
            return
        self._lines.append(metrics)
        step = int(metrics["step"] or 0)
        self._show(step, "train", {key: value for key, value in metrics.items() if key != "step"})
        status = f"loss {metrics['loss']:.4f}  {metrics['images_per_s']:.0f} images/s"
        self._progress.update(self._progress.task_ids[0], completed=step, rate=status)
        if not console.is_terminal:
            images = (self._total - step) * metrics["images_seen"] / step
            left = timedelta(seconds=round(images / metrics["images_per_s"]))
            console.print(f"step {step}/{self._total}  {status}" + (f"  {left} left" if images else ""))


def cut_back(file: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` after ``step``, and what is none of its lines."""
    if file.exists():
        kept = [line for line in read_lines(file) if isinstance(line.get("step"), int) and line["step"] <= step]
        replace_text(file, "".join(json.dumps(line) + "\n" for line in kept))
