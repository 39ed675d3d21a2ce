"""Start a job on a SLURM cluster, and keep it going until it is finished.

    ig-dist slurm --nodes 8
    ig-dist slurm --nodes 4-8 --partition h100 --follow sit_xl2_ig run.dir=runs/a
    ig-dist slurm --job sample --tasks 16 runs/a --ig-scale 1.4
    ig-dist slurm --job evaluate --tasks 8 runs/a/samples/PLAN
    ig-dist slurm --job reference --tasks 8 runs/data --out reference.npz
    ig-dist slurm status runs/a        (also: cancel, resume)

Time limits, preemption, dead nodes and dead processes requeue the job. See docs/slurm.md.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ig_dist.commands.examples import epilog
from ig_dist.commands.launch import CONTEXT, Launch
from ig_dist.commands.options import AsJson, complete_config, complete_keys, print_json
from ig_dist.errors import ConfigError
from ig_dist.jobs import JOBS, Job, refuse_verb
from ig_dist.usage import unknown_option

CLUSTER_FILE = Path("~/.config/ig_dist/cluster.yaml")
DEFAULT = Path("sit_xl2_ig")
VERBS = ("submit", "status", "cancel", "resume")


class _Submitting(typer.core.TyperGroup):
    """Without a verb of its own, submit; help is that of submitting."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's, with the verb that was left out."""
        if args == ["--help"] or not (args or ctx.resilient_parsing):  # a shell that completes is resilient
            args = ["submit", "--help"]
        elif args and args[0] not in self.commands:
            _refuse_misspelt_verb(args[0])
            args = ["submit", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """As typer's, with what could follow ``submit``."""
        submit = self.commands["submit"]
        context = submit.make_context("submit", [], parent=ctx, resilient_parsing=True)
        return [*super().shell_complete(ctx, incomplete), *submit.shell_complete(context, incomplete)]


app = typer.Typer(
    cls=_Submitting, rich_markup_mode=None, help="Start a job on a SLURM cluster, and keep it going until it is done."
)
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or the folder of a job without a run.")]
Follow = Annotated[bool, typer.Option("--follow", help="Print the log until the job ends.")]


@app.callback()
def defaults(context: typer.Context) -> None:
    """The cluster file stands below the environment, and that below the command line."""
    prefix = "IG_DIST_SLURM_"
    said = {name: os.environ[prefix + name.upper()] for name in _option_names() if prefix + name.upper() in os.environ}
    context.default_map = {"submit": {**_cluster_defaults(), **said}}


@app.command(cls=Launch, context_settings=CONTEXT, epilog=epilog("slurm submit"))
def submit(
    context: typer.Context,
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG|a.b=c|...",
            help="Of a training; of other jobs their arguments and options.",
            autocompletion=lambda incomplete: [*complete_config(incomplete), *complete_keys(incomplete)],
        ),
    ] = None,
    nodes: Annotated[str, typer.Option(metavar="N", help="Nodes, or the fewest and the most: 4-8.")] = "1",
    job: Annotated[
        Job, typer.Option(metavar="JOB", help=f"What to run: {', '.join(JOBS)}; all but train are arrays of --tasks.")
    ] = Job.train,
    config: Annotated[
        Path | None, typer.Option(metavar="CONFIG", help="Another way to give the config. Default: sit_xl2_ig.")
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tasks of an array, a GPU each. Default: 8.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, metavar="N", help="Default: all that a node has.")] = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes of a node without GPUs.")
    ] = None,
    cpus_per_gpu: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Default: a node's CPUs over its GPUs.")
    ] = None,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the cluster's.")] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help="Account to charge.")] = None,
    qos: Annotated[str | None, typer.Option(metavar="NAME", help="Quality of service.")] = None,
    time: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Of one start, D-HH:MM:SS. Default: the limit, at most a day."),
    ] = None,
    constraint: Annotated[str | None, typer.Option(metavar="NAMES", help="Features that nodes must have.")] = None,
    exclude: Annotated[str | None, typer.Option(metavar="NAMES", help="Nodes not to use.")] = None,
    mem: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a node. Default: all of it on whole nodes.")
    ] = None,
    signal_delay: Annotated[
        int, typer.Option(min=10, metavar="SECONDS", help="So long before the time limit to stop and save.")
    ] = 120,
    setup: Annotated[
        list[str] | None, typer.Option(metavar="COMMAND", help="Shell line to run first, e.g. `module load cuda`.")
    ] = None,
    max_failures: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tries after failures in a row, without a new checkpoint between.")
    ] = 8,
    exclude_after: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Failures within a day after which the node to blame is not used; 0: never."
        ),
    ] = 2,
    folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of a job without a run. Default: runs/JOB-NAME.")
    ] = None,
    follow: Follow = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script; submit nothing.")] = False,
) -> None:
    """Start a job on a SLURM cluster, and keep it going until it is done.

    Either a training of CONFIG on --nodes nodes, or an array of --tasks tasks that encodes, samples, sweeps, scores or
    makes a reference.

    Look after it with `ig-dist slurm status RUN`, `cancel RUN` and `resume RUN`.

    Every option may also be given as IG_DIST_SLURM_<OPTION>, or in the YAML file $IG_DIST_CLUSTER (default
    ~/.config/ig_dist/cluster.yaml).
    """
    arguments = rest or []
    if arguments:
        refuse_verb(arguments[0], job)
    if job is Job.train:
        _refuse_options(context, arguments)
        if tasks is not None and getattr(context.get_parameter_source("tasks"), "name", "") == "COMMANDLINE":
            raise ConfigError("--tasks is for arrays, e.g. --job sample: give --nodes, or --tasks-per-node")
        chosen, words = _config_first(config, arguments)
    elif nodes != "1":
        raise ConfigError(f"--nodes is for --job train: give --tasks, the number of GPUs that {job.value} at once")
    from ig_dist.slurm import start
    from ig_dist.slurm.script import Request

    request = Request(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        cpus_per_gpu=cpus_per_gpu,
        partition=partition,
        account=account,
        qos=qos,
        time=time,
        constraint=constraint,
        exclude=exclude,
        mem=mem,
        signal_delay=signal_delay,
        setup=setup or [],
        max_failures=max_failures,
        exclude_after=exclude_after,
        tasks=0 if job is Job.train else tasks or 8,
    )
    if job is Job.train:
        from ig_dist.config_file import load_config

        code = start.training(request, load_config(chosen, words), follow=follow, dry_run=dry_run)
    else:
        code = start.array(request, job, arguments, folder, follow=follow, dry_run=dry_run)
    raise typer.Exit(code)


@app.command(epilog=epilog("slurm status"))
def status(run: Run, follow: Follow = False, as_json: AsJson = False) -> None:
    """Say what a run's jobs do, how often they were started, and why each start ended."""
    from ig_dist.slurm import watch

    if as_json:
        return print_json(watch.describe(run))
    watch.show_status(run)
    if follow:
        raise typer.Exit(watch.follow(*watch.found_folders(run)[-1]))


@app.command(epilog=epilog("slurm cancel"))
def cancel(run: Run) -> None:
    """End a run's jobs; a training saves first. Returns when no process is left."""
    from ig_dist.slurm import watch

    watch.cancel(run)


@app.command(epilog=epilog("slurm resume"))
def resume(run: Run, follow: Follow = False) -> None:
    """Submit a training again as it was, with the code as it is now."""
    from ig_dist.config_file import load_config
    from ig_dist.slurm import start, watch
    from ig_dist.slurm.script import Request

    trainings = [found for found in watch.found_folders(run) if found[1].kind == "train"]
    if not trainings:
        raise ConfigError(f"{run} holds no training: type the command of the array again, it makes what is missing")
    last, submission = trainings[-1]
    written = run.absolute() / "config.yaml"
    config = written if written.exists() else last.path.absolute() / "config.yaml"
    os.chdir(submission.cwd)  # relative paths are meant from there
    raise typer.Exit(start.training(Request(**submission.options), load_config(config), follow=follow, dry_run=False))


def _refuse_options(context: typer.Context, arguments: Sequence[str]) -> None:
    for argument in arguments:
        if argument.startswith("-"):
            raise ConfigError(unknown_option(argument.partition("=")[0], context, arguments))


def _config_first(config: Path | None, arguments: Sequence[str]) -> tuple[Path, Sequence[str]]:
    """The config, where it is the first argument or an option, and the other arguments."""
    if not arguments or "=" in arguments[0]:
        return config or DEFAULT, arguments
    if config is not None:
        raise ConfigError(f"two configs, {config} and {arguments[0]}: leave one out")
    return Path(arguments[0]), arguments[1:]


def _refuse_misspelt_verb(word: str) -> None:
    near = difflib.get_close_matches(word, VERBS, n=1, cutoff=0.75)
    if near and not Path(word).exists():
        raise ConfigError(f"unknown verb {word!r} of ig-dist slurm; did you mean {near[0]!r}?")


def _option_names() -> list[str]:
    command = typer.main.get_command(app).commands["submit"]  # type: ignore[attr-defined]
    return [parameter.name for parameter in command.params if parameter.name != "rest"]


def _cluster_defaults() -> dict[str, Any]:
    """Options from the cluster file.

    Raises:
        ConfigError: not YAML, or a key that is no option.
    """
    named = os.environ.get("IG_DIST_CLUSTER")
    file = Path(named or CLUSTER_FILE).expanduser()
    if not file.is_file():
        if named:
            raise ConfigError(f"IG_DIST_CLUSTER: no file at {file}")
        return {}
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold option: value lines, found {type(tree).__name__}")
    tree = {str(key).replace("-", "_"): value for key, value in tree.items()}
    for key in tree:
        if key not in _option_names():
            near = difflib.get_close_matches(key, _option_names(), n=1, cutoff=0.0)[0]
            raise ConfigError(f"{file}: unknown option {key!r}; did you mean {near!r}?")
    return tree
