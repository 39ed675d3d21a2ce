"""The figure of docs/data.md: where the samples of two epochs go, drawn from the order itself.

python docs/figures/order.py docs/pictures/order.png
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ig_dist.data.order import SampleOrder

SIZES = [14, 14, 14, 14, 10]
STREAMS, BATCH, SHOWN = 4, 8, 22
COLOURS = plt.get_cmap("Set2").colors
SHARD_OF = np.repeat(np.arange(len(SIZES)), SIZES)

order = SampleOrder(SIZES, streams=STREAMS, global_batch_size=BATCH, window_samples=6, seed=5)


def windows(stream: int, stop: int) -> list:
    """The stream's windows up to its sample ``stop``."""
    found = [order.window(stream, 0)]
    while found[-1].stop < stop:
        found.append(order.window(stream, found[-1].stop))
    return found


def box(axis: plt.Axes, x: float, y: float, sample: int, epoch: int) -> None:
    """One sample: its shard's colour and its id; hatched in epoch 1."""
    style = {"facecolor": COLOURS[SHARD_OF[sample]], "hatch": "////" if epoch else None, "edgecolor": "white"}
    axis.add_patch(plt.Rectangle((x, y), 0.92, 0.8, lw=0.4, **style))
    axis.text(x + 0.46, y + 0.38, str(sample), ha="center", va="center", fontsize=7)


def draw_line(axis: plt.Axes) -> None:
    """The shards of epoch 0, cut into streams."""
    at = 0
    for stream in range(STREAMS):
        begin = at
        for piece in (p for w in windows(stream, SHOWN) if w.epoch == 0 for p in w.stretches):
            axis.barh(0, piece.stop - piece.start, left=at, color=COLOURS[piece.shard])
            at += piece.stop - piece.start
        axis.text((begin + at) / 2, 0.55, f"stream {stream}: {at - begin} samples", ha="center", fontsize=8)
        for edge in (begin, at):
            axis.plot([edge, edge], [-0.6, 0.6], color="black", lw=1.5)
    axis.set(xlim=(-3, 69), ylim=(-0.6, 1.0))
    axis.set_title("1. Epoch 0: shards (colours) in permuted order, end to end, cut into streams")


def draw_streams(axis: plt.Axes) -> None:
    """The samples of each stream in the order in which they are seen."""
    for stream in range(STREAMS):
        y = STREAMS - 1 - stream
        axis.text(2.6, y + 0.4, f"stream {stream}", ha="right", va="center", fontsize=8)
        for window in windows(stream, SHOWN):
            for number, sample in enumerate(order.ids(window)[: SHOWN - window.first], start=window.first):
                box(axis, 3 + number, y, int(sample), window.epoch)
            if window.stop < SHOWN:
                last = order.window(stream, window.stop).epoch > window.epoch
                axis.plot([2.96 + window.stop] * 2, [y - 0.1, y + 0.9], color="black", lw=2.8 if last else 1.2)
    axis.add_patch(plt.Rectangle((8.94, -0.15), 2.04, 4.2, fill=False, edgecolor="crimson", lw=2))
    axis.text(10, -0.55, "batch 3", color="crimson", ha="center", fontsize=9)
    axis.set(xlim=(-1, 26), ylim=(-0.9, 4.1))
    axis.set_title("2. Samples shuffled within windows (lines); a stream runs on into its next epoch (hatched)")


def draw_batch(axis: plt.Axes) -> None:
    """Batch 3, its positions, and whose rows they are."""
    ids, epochs = order.batch(3)
    for row, (sample, epoch) in enumerate(zip(ids, epochs, strict=True)):
        box(axis, 3 + 2 * row, 1.0, int(sample), int(epoch))
        axis.text(3.46 + 2 * row, 0.65, f"p = {3 * BATCH + row}", ha="center", fontsize=7)
    for world_size, y in ((2, 0.2), (4, -0.35)):
        width = 2 * BATCH / world_size
        for rank in range(world_size):
            begin, end = 2.9 + rank * width, 1.7 + (rank + 1) * width
            axis.plot([begin, end], [y, y], color="black", lw=1.5)
            axis.text((begin + end) / 2, y - 0.33, f"rank {rank} of {world_size}", ha="center", fontsize=8)
    axis.set(xlim=(-1, 26), ylim=(-0.9, 2.0))
    axis.set_title("3. Batch 3: position p is the key of all randomness; ranks take consecutive streams")


figure, axes = plt.subplots(3, 1, figsize=(10, 5.2), height_ratios=[1, 2.4, 1.6], layout="constrained")
for axis, draw in zip(axes, (draw_line, draw_streams, draw_batch), strict=True):
    draw(axis)
    axis.axis("off")
figure.savefig(sys.argv[1], dpi=110)
