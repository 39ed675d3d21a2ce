"""``ig-dist slurm``; time limits, preemption, dead nodes and dead processes requeue the job (docs/slurm.md)."""

import inspect
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ig_dist.commands.examples import epilog
from ig_dist.commands.launch import CONTEXT, Launch
from ig_dist.commands.options import AsJson, argument, complete_config, complete_keys, flag, option, print_json
from ig_dist.errors import ConfigError, nearest
from ig_dist.launching.jobs import JOBS, Job, refuse_verb
from ig_dist.slurm.request import Request, defaults_of, say_unused_variables
from ig_dist.terminal.usage import unknown_option

DEFAULT = Path("sit_xl2_ig")


class _Submitting(typer.core.TyperGroup):
    """Without a verb of its own, submit; help is that of submitting."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's, with the verb that was left out."""
        if args == ["--help"] or not (args or ctx.resilient_parsing):  # a shell that completes is resilient
            args = ["submit", "--help"]
        elif args and args[0] not in self.commands:
            near = nearest(args[0], self.commands, least=0.75)
            if near and not Path(args[0]).exists():
                raise ConfigError(f"unknown verb {args[0]!r} of ig-dist slurm; did you mean {near[0]!r}?")
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
Run = Annotated[Path, argument("RUN", "Run directory, or the folder of a job without a run.")]
Follow = Annotated[bool, flag("--follow", "Print the log until the job ends.")]


@app.callback()
def defaults(context: typer.Context) -> None:
    """The command line stands above the environment, that above the cluster file, and that above sbatch's variables."""
    if context.invoked_subcommand in ("submit", "resume"):  # whatever is wrong there, the others work
        command: Any = typer.main.get_command(app)
        names = [parameter.name for parameter in command.commands["submit"].params if parameter.name != "rest"]
        context.default_map = {"submit": defaults_of(names)}


def _with_request(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose ``**options`` are the fields of a ``Request`` that have a help text: typer sees each of them."""
    signature, hints = inspect.signature(command, eval_str=True), get_type_hints(Request, include_extras=True)
    *own, _ = signature.parameters.values()
    kind, defaults = inspect.Parameter.POSITIONAL_OR_KEYWORD, Request()
    asked = [
        inspect.Parameter(name, kind, default=getattr(defaults, name), annotation=hint)
        for name, hint in hints.items()
        if hasattr(hint, "__metadata__")
    ]
    command.__signature__ = signature.replace(parameters=[*own, *asked])  # type: ignore[attr-defined]
    return command


@app.command(cls=Launch, context_settings=CONTEXT, epilog=epilog("slurm submit"))
@_with_request
def submit(
    context: typer.Context,
    rest: Annotated[
        list[str] | None,
        argument(
            "CONFIG|a.b=c|...",
            "Of a training; of other jobs their arguments and options.",
            autocompletion=lambda incomplete: [*complete_config(incomplete), *complete_keys(incomplete)],
        ),
    ] = None,
    job: Annotated[
        Job, option("JOB", f"What to run: {', '.join(JOBS)}; all but train are arrays of --tasks.")
    ] = Job.train,
    config: Annotated[Path | None, option("CONFIG", "Another way to give the config. Default: sit_xl2_ig.")] = None,
    tasks: Annotated[
        str | None, option("N", "Tasks of an array, a GPU each; 16%4: four at a time. Default: 8.")
    ] = None,
    folder: Annotated[Path | None, option("FOLDER", "Of a job without a run. Default: runs/JOB-NAME.")] = None,
    follow: Follow = False,
    dry_run: Annotated[bool, flag("--dry-run", "Print the batch script; submit nothing.")] = False,
    **options: Any,
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
    typed = _typed(context)
    if job is Job.train:
        if "folder" in typed:
            raise ConfigError("--folder is for arrays: a training has its folder in run.dir")
        _refuse_options(context, arguments)
        if not options["then"] and "tasks" in typed:
            raise ConfigError("--tasks is for arrays, e.g. --job sample: give --nodes, or --tasks-per-node")
        if arguments and "=" not in arguments[0]:
            if config is not None:
                raise ConfigError(f"two configs, {config} and {arguments[0]}: leave one out")
            config, arguments = Path(arguments[0]), arguments[1:]
    elif "then" in typed:
        raise ConfigError(f"--then follows a training: {job.value} is scored, or made, by itself")
    elif "config" in typed:
        raise ConfigError(f"--config is for --job train: {job.value} has arguments of its own")
    elif options["nodes"] != "1":
        raise ConfigError(f"--nodes is for --job train: give --tasks, the number of GPUs that {job.value} at once")
    from ig_dist.slurm import start

    count, at_once = _tasks(tasks or "8")
    say_unused_variables()
    request = Request(**options, tasks=count, at_once=at_once)
    if job is Job.train:
        from ig_dist.config.file import load_config

        code = start.training(request, load_config(config or DEFAULT, arguments), follow=follow, dry_run=dry_run)
    else:
        code = start.array(request, job, arguments, folder, follow=follow, dry_run=dry_run)
    raise typer.Exit(code)


@app.command(epilog=epilog("slurm status"))
def status(
    run: Annotated[Path | None, argument("RUN", "As of cancel. Default: all your jobs that wait or run.")] = None,
    follow: Follow = False,
    as_json: AsJson = False,
) -> None:
    """Say what a run's jobs do, how often they were started, and why each start ended."""
    from ig_dist.slurm import watch

    if run is None:
        if follow or as_json:
            raise ConfigError("RUN is missing: --follow and --json are of one run")
        return watch.show_all()
    if as_json:
        return print_json(watch.describe(run))
    watch.show_status(run)
    if follow:
        from ig_dist.slurm import control

        raise typer.Exit(control.follow(*watch.to_follow(run)))


@app.command(epilog=epilog("slurm cancel"))
def cancel(run: Run) -> None:
    """End a run's jobs; a training saves first. Returns when no process is left."""
    from ig_dist.slurm import control

    control.cancel(run)


@app.command(
    epilog=epilog("slurm resume"), context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def resume(
    context: typer.Context,
    words: Annotated[list[str], argument("RUN|...", "Run directory, then options of submit and keys a.b=c.")],
) -> None:
    """Submit a training again as it was, with the code as it is now, and what is typed changed."""
    from ig_dist.config.file import load_config
    from ig_dist.slurm import start, watch
    from ig_dist.terminal import console

    command: Any = typer.main.get_command(app)
    with command.commands["submit"].make_context("submit", list(words), parent=context.parent) as given:
        typed = _typed(given)
    run, *overrides = typed.pop("rest", None) or [""]
    _refuse_options(given, [run, *overrides])
    flags = {name: typed.pop(name, False) for name in ("follow", "dry_run")}
    for name in typed:
        if not run or not hasattr(Request(), name):
            raise ConfigError(f"--{name.replace('_', '-')} is not for resume" if run else "RUN is missing")
    trainings = [found for found in watch.found_folders(Path(run)) if found[1].kind == "train"]
    if not trainings:
        raise ConfigError(f"{run} holds no training: type the command of the array again, it makes what is missing")
    last, submission = trainings[-1]
    watch.refuse_others(last, submission, Path(run))
    if "tasks" in typed:
        typed["tasks"], typed["at_once"] = _tasks(typed["tasks"])
    request = Request(**{**submission.options, **typed})
    if "tasks" in typed and not request.then:
        raise ConfigError("--tasks is of what follows a training: give --then too")
    # a submission that never began is not in the run's own, nor is a start by hand in that of the submission
    files = [folder.absolute() / "config.yaml" for folder in (Path(run), last.path)]
    newest = max((file for file in files if file.exists()), key=lambda file: file.stat().st_mtime, default=files[0])
    console.print(f"config: {newest}")
    config = load_config(newest, overrides)
    if watch.last_step(Path(run)) == config.train.steps and [e.get("next") for e in last.events()][-1:] == ["done"]:
        console.print(f"{run} is finished: {config.train.steps} steps; for more of them, type train.steps=N")
        return
    try:
        os.chdir(submission.cwd)  # relative paths are meant from there
    except OSError as error:
        raise ConfigError(f"{submission.cwd}, where the job was submitted: {error.strerror}: submit it anew") from None
    raise typer.Exit(start.training(request, config, **flags))


def _tasks(text: str) -> tuple[int, int | None]:
    """``16`` or, with a bound on how many run at a time, ``16%4``."""
    match = re.fullmatch(r"([1-9]\d*)(?:%([1-9]\d*))?", text)
    if match is None:
        raise ConfigError(f"--tasks {text!r}: give a number, or one and how many may run at a time, e.g. 16%4")
    return int(match[1]), int(match[2]) if match[2] else None


def _typed(context: typer.Context) -> dict[str, Any]:
    """What stands on the command line, and not elsewhere."""
    found = context.params.items()
    return {k: v for k, v in found if getattr(context.get_parameter_source(k), "name", "") == "COMMANDLINE"}


def _refuse_options(context: typer.Context, arguments: Sequence[str]) -> None:
    for word in arguments:
        if word.startswith("-"):
            raise ConfigError(unknown_option(word.partition("=")[0], context, arguments))
