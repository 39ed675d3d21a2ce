"""What a launcher can start, on this machine or on a cluster."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from ig_dist.errors import ConfigError, nearest
from ig_dist.terminal.usage import NEAR, UsageError, explained, options, value_of


class Job(Enum):
    """Work that several processes share."""

    train = "train"
    encode = "encode"
    sample = "sample"
    sweep = "sweep"
    evaluate = "evaluate"
    reference = "reference"


JOBS = tuple(job.value for job in Job)
NEEDS = {
    Job.encode: "pictures and a folder, e.g. --job encode --tasks 32 --source pictures --dest runs/data",
    Job.sample: "a run directory, e.g. --job sample --tasks 16 runs/a",
    Job.sweep: "a run directory, e.g. --job sweep --tasks 16 runs/a",
    Job.evaluate: "what to score, e.g. --job evaluate --tasks 8 runs/a/samples/PLAN",
    Job.reference: "pictures and the file to write, e.g. --job reference --tasks 8 runs/data --out reference.npz",
}


def program(job: Job, arguments: Sequence[str]) -> list[str]:
    """Python's arguments that run a job with these arguments of its verb."""
    return ["-m", "ig_dist.cli", job.value, *arguments]


def own_options_first(launcher: Any, typed: Sequence[str]) -> list[str]:
    """The words of a launcher's command line with its own options first, wherever they were typed.

    An option that the job's verb has too belongs to the job, once its own words have begun. But --dry-run is always the
    launcher's, or what was to be looked at first would be started.

    Raises:
        ConfigError: an option without its value, or one that nobody has and that is nearest to the launcher's.
    """
    from ig_dist.cli import app

    takes_value = {name: not option.is_flag for option in launcher.params for name in option.opts if name[:1] == "-"}
    job = value_of("--job", typed)
    verbs: Any = typer.main.get_command(app)
    known = set(options(verbs.commands[job if job in JOBS else "train"]))
    of_the_job = known - {"--help", "--dry-run"} if job in JOBS and job != "train" else set()
    own: list[str] = []
    rest: list[str] = []
    words = iter(typed)
    for word in words:
        name, separator, _ = word.partition("=")
        if name not in takes_value or (rest and name in of_the_job):
            near = nearest(name, {*known, *takes_value}, least=NEAR)
            if name.startswith("--") and name not in known and near and near[0] in takes_value:
                raise ConfigError(f"unknown option {name}; did you mean {near[0]}?")
            rest.append(word)
            continue
        own.append(word)
        if takes_value[name] and not separator:
            value = next(words, None)
            if value is None:
                raise ConfigError(f"{word} needs a value")
            own.append(value)
    return [*own, *rest]


def refuse_verb(word: str, job: Job) -> None:
    """Raise ConfigError if the first word for a launcher is a verb instead of what the verb works on."""
    if word in JOBS and not Path(word).exists():
        say = "leave it out, training is what is started" if word == "train" else f"say --job {word}"
        raise ConfigError(f"{word!r} stands where {'a config' if job is Job.train else 'an argument'} stands: {say}")


def job_folder(job: Job, arguments: Sequence[str], folder: Path | None = None) -> Path:
    """Where the record of an array lies: in the run that it works for, or else in ``folder`` or one of its own.

    Raises:
        ConfigError: arguments that the job would refuse.
    """
    given, run = parsed(job, arguments), None
    if job is Job.encode:
        name = _last_part(given["dest"])
    elif job in (Job.sample, Job.sweep):
        from ig_dist.export import find_run

        name, run = Path(given["run"]).name, find_run(given["run"])[1]
        if run is not None and folder is not None:
            raise ConfigError(f"--folder {folder}: a job of a run has its folder in the run; leave --folder out")
    elif job is Job.evaluate:
        name, run = _last_part(given["samples"] or ""), _scored_run(given)
    else:
        from ig_dist.evaluation.references import check_arguments

        name = given["out"].stem
        check_arguments(given["out"], given["extractors"].split(","))
        refuse_missing(given["source"])
    return folder or run or Path("runs") / f"{job.value}-{name}"


def parsed(job: Job, arguments: Sequence[str]) -> dict[str, Any]:
    """The arguments of a job's command as it understands them."""
    from ig_dist.cli import app

    if not arguments:
        raise ConfigError(f"--job {job.value} needs {NEEDS[job]}")
    command: Any = typer.main.get_command(app)
    try:
        with typer.Context(command, info_name="ig-dist") as parent:
            found: dict[str, Any] = command.commands[job.value].make_context(job.value, [*arguments], parent).params
    except UsageError as error:
        raise ConfigError(f"--job {job.value}: {explained(error, arguments)}") from None
    return found


def _scored_run(given: dict[str, Any]) -> Path | None:
    """The run of the samples that are to be scored; None: they are no plan's, or its run is not here."""
    from ig_dist.config.catalogue import METRICS, check_metrics
    from ig_dist.plans.samples import PLAN_NAME, find_samples, is_run, read_samples

    src = given["samples"]
    if given["check_against_adm"] is not None:
        raise ConfigError("--check-against-adm is no work for several processes: use `ig-dist evaluate` alone")
    if src is None:
        raise ConfigError(f"--job evaluate needs {NEEDS[Job.evaluate]}")
    metrics = check_metrics((given["metrics"] or "fid").split(","), "--metrics")
    samples = find_samples(src)
    if samples is not None:
        _, run, _ = read_samples(samples)
        return run if is_run(run) else None
    refuse_missing(src)
    alone = not given["nearest"] and all(METRICS[name].kind == "inception_score" for name in metrics)
    if given["reference"] is None and not alone:
        raise ConfigError(f"{src} holds no plan's samples (no {PLAN_NAME}): give --reference, what to hold it against")
    return None


def refuse_missing(src: str) -> None:
    """Raise ConfigError if real pictures are nowhere, before anything else is looked for."""
    from ig_dist.data.sources import is_missing

    if is_missing(src):
        raise ConfigError(f"{src} does not exist: give an index, an npz, tars, or a folder of pictures")


def _last_part(src: str) -> str:
    return src.rstrip("/").rsplit("/", 1)[-1].removesuffix(".npz")
