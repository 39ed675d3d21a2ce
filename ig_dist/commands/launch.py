"""``ig-dist launch``."""

import os
from typing import Annotated, Any

import typer

from ig_dist.commands.options import argument, complete_config, complete_keys, flag, option
from ig_dist.launching.jobs import JOBS, Job, own_options_first, program, refuse_verb


class Launch(typer.core.TyperCommand):
    """Takes its own options wherever they stand among those of the job."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's, with the launcher's options first."""
        return super().parse_args(ctx, own_options_first(self, args))


CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False}  # all others belong to the job


def launch(
    target: Annotated[
        str,
        argument(
            "CONFIG|RUN|...",
            "What to train (see `ig-dist train`), to sample from, or the first argument of another job.",
            autocompletion=complete_config,
        ),
    ],
    rest: Annotated[
        list[str] | None, argument("a.b=c|...", "Arguments and options of the job.", autocompletion=complete_keys)
    ] = None,
    processes: Annotated[
        int | None,
        option(
            "N", "On each machine. Default: one per GPU, or 1 without GPUs.", "--processes", "--nproc-per-node", min=1
        ),
    ] = None,
    job: Annotated[Job, option("JOB", f"What to run: {', '.join(JOBS)}.")] = Job.train,
    nodes: Annotated[
        int | None,
        option(
            "N",
            "Machines; the same command runs on each. Default: what Kubeflow, SkyPilot or dstack say, or 1.",
            "--nodes",
            "--nnodes",
            min=1,
        ),
    ] = None,
    node_rank: Annotated[
        int | None, option("N", "Its number. Default: what they or a Kubernetes Job say.", min=0)
    ] = None,
    master: Annotated[
        str | None, option("HOST:PORT", "The first one. Default: what they say.", "--master", "--rdzv-endpoint")
    ] = None,
    restarts: Annotated[
        int | None,
        option(
            "N",
            "Failures in a row after which it starts again, if the exit code says that this may help."
            " Default: 0; on several machines 8.",
            "--restarts",
            "--max-restarts",
            min=0,
        ),
    ] = None,
    grace: Annotated[
        float, option("SECONDS", "For a save, after a signal; what still runs then is killed.", min=1)
    ] = 300,
    dry_run: Annotated[bool, flag("--dry-run", "Print what would run here; start nothing.")] = False,
    kubernetes: Annotated[
        str | None, option("IMAGE", "Print a manifest for Kubernetes (docs/kubernetes.md); start nothing.")
    ] = None,
) -> None:
    """Start a job on the processes of this machine, a training if not said otherwise.

    With --nodes it is one of several machines, on each of which the same command runs. torchrun's names for these
    options are understood too.

    The first process that fails ends the others; the exit code is the job's own.
    """
    refuse_verb(target, job)
    arguments = [target, *(rest or [])]
    if kubernetes is not None:
        from ig_dist.launching.kubernetes import manifest

        size = {"nodes": nodes or 1, "processes": processes or 8, "restarts": 8 if restarts is None else restarts}
        return print(manifest(kubernetes, job, arguments, **size, grace_s=grace), end="")
    from ig_dist.launching.node import this_node
    from ig_dist.launching.ranks import signals_passed_on
    from ig_dist.launching.supervisor import describe, supervise

    with signals_passed_on() as asked:  # before GPUs are asked for, which may take long
        node = this_node(os.environ, nodes=nodes, rank=node_rank, processes=processes, master=master)
        tries = restarts if restarts is not None else 8 if node.nodes > 1 else 0
        if dry_run:
            return print(describe(program(job, arguments), node))
        raise typer.Exit(supervise(program(job, arguments), node, asked, restarts=tries, grace_s=grace))
