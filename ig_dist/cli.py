"""The command line: ``ig-dist VERB``; each verb is a module of ``ig_dist.commands``."""

from __future__ import annotations

import sys

import typer

from ig_dist.commands import launch, slurm
from ig_dist.commands.convert import convert
from ig_dist.commands.encode import encode
from ig_dist.commands.evaluate import evaluate
from ig_dist.commands.export import export
from ig_dist.commands.index import index
from ig_dist.commands.quickstart import quickstart
from ig_dist.commands.reference import reference
from ig_dist.commands.report import report
from ig_dist.commands.sample import sample
from ig_dist.commands.sweep import sweep
from ig_dist.commands.train import train
from ig_dist.commands.verify import verify
from ig_dist.terminal import run_app

app = typer.Typer(
    help="Train, sample and score diffusion transformers with Internal Guidance.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (quickstart, encode, verify, index, train, export, sample, evaluate, sweep, reference, report, convert):
    app.command()(verb)
app.command(context_settings=launch.CONTEXT)(launch.launch)
app.add_typer(slurm.app, name="slurm")


def main(*verb: str) -> None:
    """Entry point of ``ig-dist``, and with a verb of a script that stands for it."""
    sys.argv[1:1] = verb
    run_app(app)


if __name__ == "__main__":
    main()
