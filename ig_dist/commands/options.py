"""Arguments and options that several verbs have, and how their texts are read."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ig_dist.errors import ConfigError
from ig_dist.terminal.keys import config_keys, shipped_configs

WORKERS = min(16, 2 * (os.cpu_count() or 1))
"""Threads that read a shard each, if not said otherwise."""


def option(metavar: str, help: str, *names: str, **more: Any) -> Any:
    """An option with a value: what stands for that in the help, what it is, names, bounds."""
    return typer.Option(*names, metavar=metavar, help=help, **more)


def flag(name: str, help: str) -> Any:
    """An option without a value."""
    return typer.Option(name, help=help)


def argument(metavar: str, help: str, **more: Any) -> Any:
    """What is typed without a name."""
    return typer.Argument(metavar=metavar, help=help, **more)


def complete_config(incomplete: str) -> list[str]:
    """What a shell offers for CONFIG, besides files."""
    return [name for name in shipped_configs() if name.startswith(incomplete)]


def complete_keys(incomplete: str) -> list[str]:
    """What a shell offers for a.b=c."""
    return [f"{key}=" for key in config_keys() if key.startswith(incomplete)]


ConfigPath = Annotated[
    Path,
    argument(
        "CONFIG", "YAML file, or the name of one that comes with ig_dist, e.g. digits.", autocompletion=complete_config
    ),
]
Overrides = Annotated[list[str] | None, argument("a.b=c", "Config values to replace.", autocompletion=complete_keys)]
Run = Annotated[Path, argument("RUN", "Run directory; where one step is meant RUN@STEP, or a checkpoint or export.")]
Ema = Annotated[float | None, option("DECAY", "Decay of the average to use; default: the first of ema.decays.")]
Raw = Annotated[bool, flag("--raw", "Use the weights themselves instead of an average.")]
Weak = Annotated[str | None, option("RUN", "Second model of autoguidance: RUN, RUN@STEP or an export folder.")]
Metrics = Annotated[str | None, option("NAME,...", "Scores, comma separated (evaluate.metrics).")]
ImageSize = Annotated[int | None, option("N", "Cut pictures of files to this side, as ADM.", min=1)]
Weights = Annotated[list[str] | None, option("EXTRACTOR=PATH", "Weights of an extractor that lie elsewhere.")]
AutoInterval = Annotated[str | None, option("LOW,HIGH", "Times LOW,HIGH at which autoguidance is on.")]
Workers = Annotated[int, option("N", "Threads, a shard each.", min=1)]
AsJson = Annotated[bool, flag("--json", "Print JSON instead of a table.")]


def numbers(name: str, text: str) -> list[float]:
    """Numbers separated by commas; ``name`` is the option's, for the error."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} {text!r}: give numbers separated by commas, e.g. 1.0,1.4") from None


def interval(name: str, text: str | None) -> tuple[float, float] | None:
    """Two times within [0, 1]; None stays None."""
    if text is None:
        return None
    times = numbers(name, text)
    if len(times) != 2 or not 0 <= times[0] <= times[1] <= 1:
        raise ConfigError(f"{name} {text!r}: give LOW,HIGH with 0 <= LOW <= HIGH <= 1, e.g. 0.3,1")
    return times[0], times[1]


def places(weights: list[str] | None) -> dict[str, str]:
    """Where the weights of extractors lie."""
    found = {}
    for text in weights or []:
        name, separator, found[name] = text.partition("=")
        if not separator:
            raise ConfigError(f"--weights {text!r}: give EXTRACTOR=PATH, e.g. inception=weights.pth")
    return found


def print_json(value: dict[str, Any]) -> None:
    """Print the result of a verb for a program."""
    print(json.dumps(value, indent=1))
