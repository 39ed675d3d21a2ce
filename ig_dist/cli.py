"""The command line: ``ig-dist VERB``; each verb is a module of ``ig_dist.commands``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ig_dist import __version__
from ig_dist.commands import launch, slurm
from ig_dist.commands.convert import convert
from ig_dist.commands.encode import encode
from ig_dist.commands.evaluate import evaluate
from ig_dist.commands.examples import epilog
from ig_dist.commands.export import export
from ig_dist.commands.index import index
from ig_dist.commands.plans import plans
from ig_dist.commands.quickstart import quickstart
from ig_dist.commands.reference import reference
from ig_dist.commands.report import report
from ig_dist.commands.sample import sample
from ig_dist.commands.sweep import sweep
from ig_dist.commands.train import train
from ig_dist.commands.verify import verify
from ig_dist.terminal import run_app

VERBS: dict[Callable[..., Any], str] = {
    quickstart: "The whole system on real digits, in about six minutes.",
    encode: "Make shards of latents from images, with an index.",
    verify: "Hold shards against their index.",
    index: "Index shards that were made elsewhere.",
    train: "Train a model, or go on with it.",
    sample: "Make images.",
    evaluate: "Score images.",
    sweep: "Score many guidance scales.",
    plans: "List the samples of a run.",
    report: "Write all about a run into one HTML file.",
    export: "Export the weights of a run.",
    reference: "Make statistics of real images, to score against.",
    convert: "Convert published weights (SiT, REPA, IG, LightningDiT).",
}

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    subcommand_metavar="VERB ...",
    epilog=epilog(""),
)
for function, summary in VERBS.items():
    app.command(short_help=summary, epilog=epilog(function.__name__))(function)
app.command(
    cls=launch.Launch,
    context_settings=launch.CONTEXT,
    short_help="Start a job on the processes of this machine.",
    epilog=epilog("launch"),
)(launch.launch)
app.add_typer(slurm.app, name="slurm", short_help="Start a job on a SLURM cluster.")


@app.callback(invoke_without_command=True)
def ig_dist(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Train, sample and score diffusion transformers with Internal Guidance."""
    if version:
        print(f"ig-dist {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(*verb: str) -> None:
    """Entry point of ``ig-dist``, and with a verb of a script that stands for it."""
    sys.argv[1:1] = verb
    run_app(app, "ig-dist")


if __name__ == "__main__":
    main()
