"""``ig-dist encode``: images to WebDataset shards of latents, with an index.

Images are shuffled globally by the seed; shard k is made of places k S to (k + 1) S of that order. Any number of
processes may run the same command, on one machine or many: each makes shards that are missing. A shard is written
whole or not at all, the index last: after an interruption run the same command again.
"""

import signal
from types import FrameType
from typing import Annotated

from ig_dist.commands.options import flag, option
from ig_dist.terminal import to_stderr


def encode(
    source: Annotated[
        str,
        option(
            "SRC",
            "Images: `digits`, `fashion-mnist`, ILSVRC2012_img_train.tar, the folder from Kaggle, a folder of"
            " class folders or of IDX files, WebDataset tars, or parquet files (path, 'glob*' or URL).",
        ),
    ],
    dest: Annotated[str, option("URL", "Folder for shards and index: a path or any fsspec URL.")],
    tokenizer: Annotated[
        str, option("NAME", "`pixel`, sd-vae-ft-ema, sd-vae-ft-mse, va-vae-f16d32, or the path of weights.")
    ] = "pixel",
    image_size: Annotated[
        int | None, option("N", "Side of the square images cut from pictures. Default with a VAE: 256.")
    ] = None,
    flips: Annotated[bool, flag("--flips", "Store the latents of the mirrored images too.")] = False,
    store: Annotated[
        str | None,
        option("KIND", "`moments` (posterior mean and std) or `sample` (one draw). Default with a VAE: moments."),
    ] = None,
    precision: Annotated[
        str | None, option("KIND", "Arithmetic of the encoder: fp32, bf16, fp16. Default: bf16 on a GPU.")
    ] = None,
    seed: Annotated[int, option("SEED", "Seed of the global shuffle and of posterior draws.", min=0)] = 0,
    samples_per_shard: Annotated[
        int | None, option("N", "Files in each shard but the last. Default: about 256 MB.", min=1)
    ] = None,
    max_rejected: Annotated[float, option("X", "Fraction of the files that may be no pictures.")] = 0.01,
    workers: Annotated[int | None, option("N", "Processes that decode. Default: the cores, 16 at most.", min=0)] = None,
    batch_size: Annotated[
        int | None, option("N", "Images that the tokenizer encodes at a time. Default: 64, on a CPU 16.", min=1)
    ] = None,
    worker: Annotated[str | None, option("i/W", "This is the i-th of W. Default: as torchrun or SLURM says.")] = None,
    spool: Annotated[
        str | None, option("FOLDER", "Folder for copies of remote tars and of parquet. Default: a temporary one.")
    ] = None,
    dry_run: Annotated[bool, flag("--dry-run", "Say what it will take; write nothing.")] = False,
    processes: Annotated[int, option("N", "With --dry-run: hours for so many.", "--processes", "--gpus", min=1)] = 1,
) -> None:
    """Make shards of latents from images, with an index. Run it again, or on more machines, at will."""
    given = locals()  # they are those of the work, by the same names
    from ig_dist.encoding.run import encode as run_encoding

    signal.signal(signal.SIGTERM, stop)
    run_encoding(**given)


def stop(number: int, frame: FrameType | None) -> None:
    """A signal ends this process; the shard that is being written is still finished, where the storage takes it."""
    to_stderr(f"stopped: {signal.Signals(number).name}; finished shards stay, run the same command again")
    raise SystemExit(75)
