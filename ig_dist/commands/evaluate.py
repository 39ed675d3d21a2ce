"""``ig-dist evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from ig_dist.commands.options import AsJson, ImageSize, Metrics, Weights, argument, option, places, print_json
from ig_dist.errors import ConfigError
from ig_dist.terminal import console, is_main_process


def evaluate(
    samples: Annotated[
        str | None, argument("SAMPLES", "A run, a plan's folder, an npz (arr_0), or a folder of pictures.")
    ] = None,
    reference: Annotated[
        str | None,
        option("SRC", "Real images: an npz of statistics (ADM's), an index, pictures. Default: the training data."),
    ] = None,
    metrics: Metrics = None,
    protocol: Annotated[str | None, option("KIND", "adm or torch-fidelity, where the two differ.")] = None,
    num: Annotated[int | None, option("N", "Score the first so many images only.", min=2)] = None,
    weights: Weights = None,
    image_size: ImageSize = None,
    nearest: Annotated[int | None, option("N", "Draw so many samples above the nearest real pictures.", min=1)] = None,
    check_against_adm: Annotated[
        Path | None, option("FOLDER", "Score ADM's own files; they must give what ADM published.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score images; every score comes with its protocol. Any number of processes may share the work."""
    from ig_dist.config.catalogue import check_metrics
    from ig_dist.evaluation import evaluate as evaluation
    from ig_dist.evaluation.tables import print_result, print_verdicts

    console.stderr = as_json  # stdout is the JSON alone
    if check_against_adm is not None:
        verdicts = evaluation.check_against_adm(check_against_adm, places(weights))
        if is_main_process():
            print_verdicts(verdicts)
        raise typer.Exit(0 if all(verdict.passed for verdict in verdicts) else 4)
    if protocol not in (None, "adm", "torch-fidelity"):
        raise ConfigError(f"--protocol {protocol!r}: use adm or torch-fidelity")
    if samples is None:
        raise ConfigError(
            "name what to score: a folder of samples, an npz or a folder of pictures, e.g. `ig-dist evaluate"
            " RUN/samples/PLAN`"
        )
    done = evaluation.evaluate(
        samples,
        reference=reference,
        metrics=[] if metrics is None else check_metrics(metrics.split(","), "--metrics"),
        protocol=protocol,  # type: ignore[arg-type]
        num=num,
        weights=places(weights),
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
