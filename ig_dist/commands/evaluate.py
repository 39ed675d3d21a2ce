"""``ig-dist evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ig_dist.commands.options import AsJson, choice, metric_names, pair, print_json
from ig_dist.errors import ConfigError
from ig_dist.terminal import console, is_main_process


def evaluate(
    samples: Annotated[
        str | None,
        typer.Argument(metavar="SAMPLES", help="A run, a plan's folder, an npz (arr_0), or a folder of pictures."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Real images: an npz of statistics (ADM's), an index, pictures. Default: the training data.",
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Scores, comma separated (evaluate.metrics).")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(metavar="KIND", help="adm or torch-fidelity, where the two differ.")
    ] = None,
    num: Annotated[int | None, typer.Option(metavar="N", min=2, help="Score the first so many images only.")] = None,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="EXTRACTOR=PATH", help="Weights of an extractor that lie elsewhere.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Cut pictures of files to this side, as ADM.")
    ] = None,
    nearest: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Draw so many samples above the nearest real pictures.")
    ] = None,
    check_against_adm: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Score ADM's own files; they must give what ADM published.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score images; every score comes with its protocol. Any number of processes may share the work."""
    from ig_dist.evaluation import evaluate as evaluation
    from ig_dist.evaluation.tables import print_result, print_verdicts

    console.stderr = as_json  # stdout is the JSON alone
    places = dict(pair("--weights", text) for text in weights or [])
    if check_against_adm is not None:
        verdicts = evaluation.check_against_adm(check_against_adm, places)
        if is_main_process():
            print_verdicts(verdicts)
        raise typer.Exit(0 if all(verdict.passed for verdict in verdicts) else 4)
    if samples is None:
        raise ConfigError(
            "name what to score: a folder of samples, an npz or a folder of pictures, e.g. `ig-dist evaluate"
            " RUN/samples/PLAN`"
        )
    done = evaluation.evaluate(
        samples,
        reference=reference,
        metrics=metric_names(metrics),
        protocol=choice("--protocol", protocol, ("adm", "torch-fidelity")),  # type: ignore[arg-type]
        num=num,
        weights=places,
        image_size=image_size,
        nearest=nearest,
    )
    if done is None:  # not the first of several processes
        return
    if as_json:
        return print_json(done.result)
    print_result(done.result)
    if done.file is not None:
        console.print(f"written to {done.file}")
