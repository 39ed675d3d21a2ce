"""Submitting: what can be known to be wrong is said before; then a snapshot of the source, and sbatch."""

import fcntl
import json
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ig_dist.config import Config
from ig_dist.config.file import to_yaml
from ig_dist.config.provenance import COMMIT_NAME, SOURCE, commit
from ig_dist.data.index import read_index
from ig_dist.data.latents import check_latents
from ig_dist.data.stream import check_window_memory
from ig_dist.errors import ConfigError
from ig_dist.parallel.build import check_engine
from ig_dist.run_dir import changed_keys
from ig_dist.slurm.commands import SlurmError, queued, slurm
from ig_dist.slurm.record import SCRIPT_NAME, Folder, Submission, World, folders
from ig_dist.slurm.request import Request
from ig_dist.slurm.script import batch_script

# what SLURM's refusals are about, and the option that says it
OPTIONS = {
    "account": "--account or --partition",  # "Invalid account or account/partition combination"
    "partition": "--partition",
    "qos": "--qos",
    "feature": "--constraint",
    "node name": "--exclude",
    "time": "--time",
    "memory": "--mem",
    "node configuration": "--nodes, --gpus-per-node, --cpus-per-gpu or --mem",
    "node count": "--nodes",
}


class Planned(NamedTuple):
    """A job that is to be submitted."""

    path: Path
    submission: Submission
    request: Request
    after: Sequence[tuple[str, int]]  # afterok or afterany, and the place among the jobs of what comes before it

    def dependency(self, ids: Sequence[str]) -> str:
        """As sbatch takes it, with the ids of the jobs."""
        return ",".join(f"{how}:{ids[place]}" for how, place in self.after)


def worlds(config: Config, request: Request) -> dict[int, World]:
    """For each number of nodes that SLURM may give, how many are used.

    With fewer nodes a process has more of the batch: micro-batches are made more, so that they need no more memory.

    Raises:
        ConfigError: none of the numbers asked for can share the batch.
    """
    low, high = request.node_range
    ranks, batch = request.ranks_per_node, config.train.global_batch_size
    refused = {nodes: _refusal(config, nodes, ranks) for nodes in range(1, high + 1)}
    allowed = [nodes for nodes in refused if not refused[nodes]]
    if (low == high or not allowed or allowed[0] > low) and (error := refused[low]):
        raise ConfigError(f"--nodes {low} with {ranks} processes each: {error}")
    largest = batch // (allowed[-1] * ranks * config.train.accumulation)  # micro-batch on all the nodes
    found = {}
    for nodes in range(low, high + 1):
        used = max(n for n in allowed if n <= nodes)
        share = batch // (used * ranks)
        most = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= largest)
        found[nodes] = World(nodes=used, accumulation=max(most, config.train.accumulation))
    return found


def _refusal(config: Config, nodes: int, ranks: int) -> str:
    """Why so many nodes cannot share the batch; empty: they can."""
    try:
        config.check_world_size(nodes * ranks, ranks)
    except ConfigError as error:
        return str(error)
    return ""


def check_training(config: Config, found: dict[int, World]) -> None:
    """What the trainer would refuse.

    Raises:
        ConfigError: the config does not fit the data, the run directory or the numbers of nodes.
    """
    check_engine(config)
    index = read_index(config.data.index)
    config = config.with_data(index.info.latent.shape, len(index.info.classes))
    check_latents(index.info.latent, config.data.posterior, config.data.flip)
    for nodes in {world.nodes for world in found.values()}:
        check_window_memory(
            index,
            streams=config.data.streams,
            window_samples=config.data.window_samples,
            window_bytes=config.data.window_bytes,
            nodes=nodes,
        )
    differ = changed_keys(Path(config.run.dir), config)
    if differ:
        raise ConfigError(f"run.dir {config.run.dir} belongs to another config: {', '.join(differ)}; choose another")


@contextmanager
def _submitting(run: Path) -> Iterator[None]:
    """One submission of a run at a time.

    Raises:
        ConfigError: the folder cannot be written.
    """
    existed = [path for path in (run, run / "slurm") if path.exists()]
    try:
        (run / "slurm").mkdir(parents=True, exist_ok=True)
        lock = (run / "slurm/.lock").open("a")
    except OSError as error:
        raise ConfigError(f"{run}: {error.strerror}: choose a folder that can be written (run.dir)") from None
    try:
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except BaseException:  # a refusal leaves nothing behind
        if run / "slurm" not in existed:
            shutil.rmtree(run / "slurm")
        if run not in existed:
            run.rmdir()
        raise


def _refuse_active(run: Path, why: str) -> None:
    """Raise ConfigError if a training of the run is queued or runs."""
    ids = [folder.id for folder, submission in folders(run) if submission.kind == "train"]
    for job in queued(ids):
        if job.active:
            raise ConfigError(f"{run} {why} job {job.id} ({job.state}): follow or cancel that one, or wait")


def new_folder(run: Path) -> Path:
    """The path of a new submission."""
    return run.absolute() / "slurm" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


def submit_all(jobs: Sequence[Planned], run: Path, why: str, config: Config | None = None) -> None:
    """Hand all of them to SLURM, or none; ``config`` is that of the training among them.

    Raises:
        ConfigError: a training of the run is active, and ``why`` that matters; or SLURM refuses a job.
    """
    ids: list[str] = []
    with _submitting(run):
        if why:
            _refuse_active(run, why)
        try:
            for job in jobs:
                ids.append(_submit(job, job.dependency(ids), config))
        except ConfigError:
            for job, number in zip(jobs, ids, strict=False):
                slurm("scancel", number)
                shutil.rmtree(job.path)
            raise


def _submit(job: Planned, after: str, config: Config | None) -> str:
    """Write the submission's folder and hand it to SLURM; the job's id."""
    folder, script = Folder(job.path), job.path / SCRIPT_NAME
    folder.log.mkdir(parents=True)
    try:
        snapshot(job.path / "source")
        folder.write(job.submission)
        if config is not None and job.submission.kind == "train":
            (job.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        script.write_text(batch_script(job.request, job.submission, job.path, after=after), encoding="utf-8")
        for check in (["--test-only"], ["--parsable"]):
            answer = slurm("sbatch", *check, str(script))
        folder.id = job_id(answer)
    except BaseException as error:
        shutil.rmtree(job.path)
        if not isinstance(error, SlurmError):
            raise
        options = [option for word, option in OPTIONS.items() if word in str(error).lower()]
        remedy = f"change {options[0]}" if options else "see its options with --help"
        raise ConfigError(f"SLURM refuses: {error}; {remedy}") from None
    return folder.id


def job_id(answer: str) -> str:
    """The id in what ``sbatch --parsable`` says: ``ID`` or ``ID;CLUSTER``, at some sites below a greeting.

    Raises:
        SlurmError: there is none.
    """
    last = (answer.strip().splitlines() or [""])[-1].split(";")[0].strip()
    if not last.isdecimal():
        raise SlurmError(f"sbatch said {answer.strip()!r}, which is no job's id (squeue --me tells what it did)")
    return last


def snapshot(dest: Path) -> None:
    """Copy the code that this process runs: the package alone, from a checkout or where it is installed."""
    shutil.copytree(SOURCE / "ig_dist", dest / "ig_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (dest / COMMIT_NAME).write_text(json.dumps(commit()), encoding="utf-8")
