"""The command line: ``ig-dist VERB``; each verb is a module of ``ig_dist.commands``."""

import sys
from importlib import import_module
from typing import Annotated

import typer

from ig_dist import __version__
from ig_dist.commands import launch, slurm
from ig_dist.commands.examples import epilog
from ig_dist.terminal import run_app

VERBS: tuple[str, ...] = ("quickstart", "encode", "verify", "index", "train", "sample", "evaluate", "sweep", "plans")
VERBS += ("report", "export", "reference", "convert")

app = typer.Typer(
    rich_markup_mode=None, pretty_exceptions_enable=False, subcommand_metavar="VERB ...", epilog=epilog("")
)
for verb in VERBS:
    app.command(epilog=epilog(verb))(getattr(import_module(f"ig_dist.commands.{verb}"), verb))
HELP = "Start a job on the processes of this machine."
app.command(cls=launch.Launch, context_settings=launch.CONTEXT, short_help=HELP, epilog=epilog("launch"))(launch.launch)
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
