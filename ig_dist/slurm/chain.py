"""Jobs that are submitted together: a training, what follows it, and of each array the job that merges it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ig_dist.config import Config
from ig_dist.config.catalogue import check_metrics
from ig_dist.config.file import apply_overrides, config_from_tree
from ig_dist.errors import ConfigError
from ig_dist.launching.jobs import Job, parsed
from ig_dist.plans.samples import samples_url
from ig_dist.slurm import submit as slurm
from ig_dist.slurm.record import Submission
from ig_dist.slurm.script import Request

FOLLOWING = (Job.sample, Job.sweep, Job.evaluate)


class Planned(NamedTuple):
    """One of the jobs."""

    path: Path
    submission: Submission
    request: Request
    after: tuple[tuple[str, int], ...] = ()
    """What must have come before it: afterok or afterany, and the place of the other job among them."""

    def dependency(self, ids: Sequence[str]) -> str:
        """As sbatch takes it, with the ids of the others."""
        return ",".join(f"{how}:{ids[place]}" for how, place in self.after)


def following(texts: Sequence[str], config: Config, folder: str) -> list[tuple[Job, list[str]]]:
    """The arrays that follow a training, and the arguments of each.

    Args:
        texts: such as ``sample --ig-scale 1.4``, in their order.
        config: of the training.
        folder: name of that of the samples, where they are to be evaluated.

    Raises:
        ConfigError: one would refuse its arguments.
    """
    found: list[tuple[Job, list[str]]] = []
    for text in texts:
        name, *words = shlex.split(text) or [""]
        job = next((job for job in FOLLOWING if job.value == name), None)
        if job is None:
            known = ", ".join(job.value for job in FOLLOWING)
            raise ConfigError(f"--then {text!r}: begin with one of {known}, e.g. --then 'sample --ig-scale 1.4'")
        subject = config.run.dir
        if job is Job.evaluate:
            before = next((made for made in found[::-1] if made[0] is Job.sample), None)
            if before is None:
                raise ConfigError(f"--then {text!r}: there are no samples yet: put --then sample before it")
            out = parsed(*before)["out"]
            subject = str(out or f"{samples_url(config)}/{folder}-{len(found)}")
            before[1].extend([] if out else ["--out", subject])
        found.append((job, [subject, *words]))
        try:
            given = parsed(*found[-1])
        except ConfigError as error:
            raise ConfigError(str(error).replace("--job", "--then", 1)) from None
        config_from_tree(
            apply_overrides(config.model_dump(mode="json"), given.get("overrides") or []), f"--then {name}"
        )
        check_metrics((given.get("metrics") or "fid").split(","), "--metrics")
    return found


def submit_all(jobs: Sequence[Planned], config: Config | None = None) -> None:
    """Hand all of them to SLURM, or none.

    Raises:
        ConfigError: SLURM refuses one.
    """
    ids: list[str] = []
    try:
        for job in jobs:
            trained = config if job.submission.kind == "train" else None
            after = job.dependency(ids)
            ids.append(slurm.submit(job.path, job.submission, job.request, config=trained, after=after))
    except ConfigError:
        for job in jobs[: len(ids)]:
            slurm.withdraw(job.path)
        raise
