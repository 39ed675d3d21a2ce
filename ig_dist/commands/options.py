"""Arguments and options that several verbs have, and how their texts are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ig_dist.errors import ConfigError
from ig_dist.terminal.keys import config_keys, shipped_configs


def complete_config(incomplete: str) -> list[str]:
    """What a shell offers for CONFIG, besides files."""
    return [name for name in shipped_configs() if name.startswith(incomplete)]


def complete_keys(incomplete: str) -> list[str]:
    """What a shell offers for a.b=c."""
    return [f"{key}=" for key in config_keys() if key.startswith(incomplete)]


ConfigPath = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="YAML file, or the name of one that comes with ig_dist, e.g. digits.",
        autocompletion=complete_config,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="a.b=c", help="Config values to replace.", autocompletion=complete_keys),
]
Run = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Run directory; where one step is meant RUN@STEP, or a checkpoint or export."),
]
Ema = Annotated[
    float | None, typer.Option(metavar="DECAY", help="Decay of the average to use; default: the first of ema.decays.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Use the weights themselves instead of an average.")]
Weak = Annotated[
    str | None, typer.Option(metavar="RUN", help="Second model of autoguidance: RUN, RUN@STEP or an export folder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def numbers(option: str, text: str) -> list[float]:
    """Numbers separated by commas; ``option`` names them in the error."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: give numbers separated by commas, e.g. 1.0,1.4") from None


def interval(option: str, text: str | None) -> tuple[float, float] | None:
    """Two times within [0, 1]; None stays None."""
    if text is None:
        return None
    times = numbers(option, text)
    if len(times) != 2 or not 0 <= times[0] <= times[1] <= 1:
        raise ConfigError(f"{option} {text!r}: give LOW,HIGH with 0 <= LOW <= HIGH <= 1, e.g. 0.3,1")
    return times[0], times[1]


def pair(option: str, text: str) -> tuple[str, str]:
    """Name and place of EXTRACTOR=PATH."""
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"{option} {text!r}: give EXTRACTOR=PATH, e.g. inception=weights.pth")
    return name, value


def choice(option: str, value: str | None, known: tuple[str, ...]) -> str | None:
    """``value``, which must be one of those known, or None."""
    if value is not None and value not in known:
        raise ConfigError(f"{option} {value!r}: use {' or '.join(known)}")
    return value


def metric_names(text: str | None) -> list[str]:
    """Names of scores separated by commas."""
    from ig_dist.config.catalogue import check_metrics

    return [] if text is None else check_metrics(text.split(","), "--metrics")


def print_json(value: dict[str, Any]) -> None:
    """Print the result of a verb for a program."""
    print(json.dumps(value, indent=1))
