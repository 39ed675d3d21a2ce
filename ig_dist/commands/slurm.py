"""Start a job on a SLURM cluster, and keep it going until it is finished.

    ig-dist slurm --nodes 8
    ig-dist slurm --nodes 4-8 --config configs/sit_xl2_ig.yaml --partition h100 --follow run.dir=runs/a
    ig-dist slurm --job sample --tasks 16 runs/a --ig-scale 1.4
    ig-dist slurm --job evaluate --tasks 8 runs/a/samples/PLAN
    ig-dist slurm --job reference --tasks 8 runs/data --out reference.npz
    ig-dist slurm status runs/a        (also: cancel, resume)

Time limits, preemption, dead nodes and dead processes requeue the job. See docs/slurm.md.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ig_dist.errors import ConfigError
from ig_dist.jobs import Job, job_folder, program
from ig_dist.terminal import console

CLUSTER_FILE = Path("~/.config/ig_dist/cluster.yaml")


class _Submitting(typer.core.TyperGroup):
    """Without a verb of its own, submit."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["submit", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_Submitting, no_args_is_help=True)
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or the folder of a job without a run.")]
Follow = Annotated[bool, typer.Option("--follow", help="Print the log until the job ends.")]


@app.callback()
def defaults(context: typer.Context) -> None:
    """The cluster file stands below the environment, and that below the command line."""
    prefix = "IG_DIST_SLURM_"
    said = {name: os.environ[prefix + name.upper()] for name in _option_names() if prefix + name.upper() in os.environ}
    context.default_map = {"submit": {**_cluster_defaults(), **said}}


@app.command(
    context_settings={
        # what follows the first argument belongs to the job, its options included
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    }
)
def submit(
    rest: Annotated[
        list[str] | None,
        typer.Argument(metavar="[a.b=c ...]", help="Config values; for other jobs their arguments and options."),
    ] = None,
    nodes: Annotated[str, typer.Option(help="Nodes, or the fewest and the most: 4-8.")] = "1",
    job: Annotated[Job, typer.Option(help="What to run; all but train are arrays of --tasks.")] = Job.train,
    config: Annotated[Path, typer.Option(help="Of a training.")] = Path("sit_xl2_ig"),
    tasks: Annotated[int | None, typer.Option(min=1, help="Tasks of an array, a GPU each. Default: 8.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="Default: all that a node has.")] = None,
    tasks_per_node: Annotated[int | None, typer.Option(min=1, help="Processes of a node without GPUs.")] = None,
    cpus_per_gpu: Annotated[int | None, typer.Option(min=1, help="Default: a node's CPUs over its GPUs.")] = None,
    partition: Annotated[str | None, typer.Option(help="Default: the cluster's.")] = None,
    account: Annotated[str | None, typer.Option(help="Account to charge.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Of one start, D-HH:MM:SS. Default: the limit, at most a day.")
    ] = None,
    constraint: Annotated[str | None, typer.Option(help="Features that nodes must have.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes not to use.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory of a node. Default: all of it on whole nodes.")] = None,
    signal_delay: Annotated[int, typer.Option(min=10, help="Seconds before the time limit to stop and save.")] = 120,
    setup: Annotated[list[str] | None, typer.Option(help="Shell line to run first, e.g. `module load cuda`.")] = None,
    max_failures: Annotated[
        int, typer.Option(min=0, help="Tries after failures in a row, without a new checkpoint between.")
    ] = 8,
    exclude_after: Annotated[
        int, typer.Option(min=0, help="Failures within a day after which the node to blame is not used; 0: never.")
    ] = 2,
    folder: Annotated[Path | None, typer.Option(help="Of a job without a run. Default: runs/JOB-NAME.")] = None,
    follow: Follow = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script; submit nothing.")] = False,
) -> None:
    """Submit a training of --nodes nodes, or an array that encodes, samples, sweeps, or makes features to score.

    Other commands: status RUN, cancel RUN, resume RUN. Every option may also be given as IG_DIST_SLURM_<OPTION>, or in
    the YAML file $IG_DIST_CLUSTER (default ~/.config/ig_dist/cluster.yaml).
    """
    arguments = rest or []
    if job is Job.train:
        _refuse_options(arguments)
    elif nodes != "1":
        raise ConfigError(f"--nodes is for --job train: give --tasks, the number of GPUs that {job.value} at once")
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

        _train(request, load_config(config, arguments), follow=follow, dry_run=dry_run)
    else:
        _array(request, job, arguments, folder, follow=follow, dry_run=dry_run)


@app.command()
def status(run: Run, follow: Follow = False) -> None:
    """Say what a run's jobs do, how often they were started, and why each start ended."""
    from ig_dist.slurm import watch

    watch.show_status(run)
    if follow:
        raise typer.Exit(watch.follow(*watch.found_folders(run)[-1]))


@app.command()
def cancel(run: Run) -> None:
    """End a run's jobs; a training saves first. Returns when no process is left."""
    from ig_dist.slurm import watch

    watch.cancel(run)


@app.command()
def resume(run: Run, follow: Follow = False) -> None:
    """Submit a training again as it was, with the code as it is now."""
    from ig_dist.config_file import load_config
    from ig_dist.slurm import watch
    from ig_dist.slurm.script import Request

    trainings = [found for found in watch.found_folders(run) if found[1].kind == "train"]
    if not trainings:
        raise ConfigError(f"{run} holds no training: type the command of the array again, it makes what is missing")
    last, submission = trainings[-1]
    written = run.absolute() / "config.yaml"
    config = written if written.exists() else last.path.absolute() / "config.yaml"
    os.chdir(submission.cwd)  # relative paths are meant from there
    _train(Request(**submission.options), load_config(config), follow=follow, dry_run=False)


def _train(request: Any, config: Any, *, follow: bool, dry_run: bool) -> None:
    from ig_dist.slurm import submit as slurm
    from ig_dist.slurm.record import Submission
    from ig_dist.slurm.script import complete

    run = Path(config.run.dir).absolute()
    path = slurm.new_folder(run)
    asked, request = request, complete(request, assume=dry_run)
    worlds = slurm.worlds(config, request)
    submission = Submission(
        kind="train",
        commands=[["-m", "ig_dist.cli", "train", f"{path}/config.yaml", "train.accumulation={accumulation}"]],
        run=str(run),
        cwd=str(Path.cwd()),
        tasks_per_node=request.ranks_per_node,
        cpus_per_task=request.cpus_per_task,
        worlds=worlds,
        max_failures=request.max_failures,
        exclude_after=request.exclude_after,
        signal_delay_s=request.signal_delay,
        options=asked.model_dump(),
        hold=f"{run}/.lock",
    )
    if dry_run:
        return _print_dry_run(request, [submission], path, lambda: slurm.check_training(config, worlds))
    slurm.refuse_active(run, "is in use by")
    slurm.check_training(config, worlds)
    with slurm.submitting(run):
        slurm.refuse_active(run, "is in use by")  # one that was submitted meanwhile
        slurm.submit(path, submission, request, config=config)
    for nodes, world in worlds.items():
        if world.nodes < nodes:
            console.print(f"of {nodes} nodes {world.nodes} will be used: more do not divide data.streams")
    _tell(path, submission, f"tensorboard --logdir {run}/tensorboard", follow)


def _array(
    request: Any, job: Job, arguments: Sequence[str], folder: Path | None, *, follow: bool, dry_run: bool
) -> None:
    from ig_dist.slurm import submit as slurm
    from ig_dist.slurm.record import Submission, World
    from ig_dist.slurm.script import complete

    run = job_folder(job, arguments, folder)
    if job in (Job.sample, Job.sweep) and not dry_run:
        slurm.refuse_active(run, "changes its weights while it is trained by")
    path = slurm.new_folder(run)
    asked, request = request, complete(request, assume=dry_run)
    one_process = {"gpus_per_node": min(request.gpus_per_node or 0, 1), "tasks_per_node": None, "tasks": 0}
    alone = request.model_copy(update=one_process)
    after = Path(f"{path}-merge")
    typed = [*arguments, *(["--evaluate"] if job is Job.sample else [])]
    submissions = [
        Submission(
            kind=kind,
            commands=[program(job, typed)],
            run=str(run.absolute()),
            cwd=str(Path.cwd()),
            tasks_per_node=one.ranks_per_node,
            cpus_per_task=one.cpus_per_task,
            worlds={1: World(nodes=1, accumulation=1)},
            array=one.tasks,
            max_failures=request.max_failures,
            exclude_after=request.exclude_after,
            signal_delay_s=request.signal_delay,
            options=asked.model_dump(),
        )
        for kind, place, one in ((job.value, path, request), ("merge", after, alone))
    ]
    if dry_run:
        return _print_dry_run(request, submissions, path, lambda: None)
    with slurm.submitting(run):
        number = slurm.submit(path, submissions[0], request)
        # it waits for all tasks, whatever became of them, and makes what is missing
        try:
            slurm.submit(after, submissions[1], alone, after=number)
        except ConfigError:
            slurm.withdraw(path)
            raise
    _tell(path, submissions[0], "", follow)


def _tell(path: Path, submission: Any, watch: str, follow: bool) -> None:
    from ig_dist.slurm import watch as watching
    from ig_dist.slurm.record import Folder

    folder, run = Folder(path), submission.run
    first = "task_0_rank_0.log" if submission.array else "rank_0.log"
    merged = f", merged by {Folder(Path(f'{path}-merge')).id}" if submission.array else ""
    told = {
        "job": f"{folder.id}{merged}",
        "log": f"{folder.log}/{first}",
        "status": f"ig-dist slurm status {run}",
        "stop": f"ig-dist slurm cancel {run}",
    }
    if watch:
        told |= {"watch": watch, "resume": f"ig-dist slurm resume {run}"}
    for name, text in told.items():
        console.print(f"{name + ':':8}{text}", markup=False)
    if follow:
        raise typer.Exit(watching.follow(folder, submission))


def _print_dry_run(request: Any, submissions: Sequence[Any], path: Path, check: Any) -> None:
    from ig_dist.slurm.batch import srun_command
    from ig_dist.slurm.record import ACCUMULATION
    from ig_dist.slurm.script import batch_script

    submission, *then = submissions
    name = f"{submission.kind}-{Path(submission.run).name}"
    print(batch_script(request, submission, path, name=name))
    for nodes, world in submission.worlds.items():
        hosts = ["<node>"] * world.nodes
        ranks = world.nodes * submission.tasks_per_node
        task = f"each of {submission.array} tasks " if submission.array else ""
        print(f"# {task}on {nodes} node{'s' * (nodes > 1)}, {ranks} process{'es' * (ranks > 1)}:")
        text = " ".join(srun_command(path, submission, hosts, "<start>"))
        print("#   " + text.replace(",".join(hosts), f"<the first {world.nodes}>"))
        for command in submission.commands:
            arguments = " ".join(command).replace(ACCUMULATION, str(world.accumulation))
            print(f"# each process: python {arguments}")
    for merge in then:
        print("# once all tasks have ended, whatever became of them, a job of one process:")
        for command in merge.commands:
            print(f"# it alone: python {' '.join(command)}")
    try:
        check()
    except ConfigError as error:
        print(f"would be refused: {error}", file=sys.stderr)


def _refuse_options(arguments: Sequence[str]) -> None:
    for argument in arguments:
        if argument.startswith("-"):
            known = [f"--{name.replace('_', '-')}" for name in _option_names()]
            if argument.split("=")[0] in known:
                raise ConfigError(f"{argument} comes after a config value: give options before the a.b=c")
            near = difflib.get_close_matches(argument, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown option {argument}; did you mean {near}?")


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
