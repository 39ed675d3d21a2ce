"""What a launcher can start, on this machine or on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from ig_dist.errors import ConfigError

SOURCE = Path(__file__).resolve().parents[1]


class Job(Enum):
    """Work that several processes share."""

    train = "train"
    encode = "encode"
    sample = "sample"
    sweep = "sweep"


def program(job: Job, arguments: Sequence[str], source: Path = SOURCE) -> list[str]:
    """Python's arguments that run a job.

    Args:
        job: which.
        arguments: of its command.
        source: folder of the code.

    Raises:
        ConfigError: an installation without that program.
    """
    if job is not Job.encode:
        return ["-m", "ig_dist.cli", job.value, *arguments]
    if not (SOURCE / "data_prep/encode_latents.py").exists():
        raise ConfigError("--job encode needs data_prep/encode_latents.py: run it from a checkout")
    return [str(source / "data_prep/encode_latents.py"), *arguments]
