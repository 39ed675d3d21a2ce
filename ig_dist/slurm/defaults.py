"""What the options of ``ig-dist slurm`` are where nothing is typed: variables, and the cluster's file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ig_dist.errors import ConfigError, nearest
from ig_dist.terminal import warn

CLUSTER_FILE = Path("~/.config/ig_dist/cluster.yaml")
PREFIX = "IG_DIST_SLURM_"
SBATCH = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_TIMELIMIT": "time",
}
"""Variables of sbatch that are an option here. sbatch would follow them before what the script says."""
LISTS = ("setup", "sbatch", "srun", "then")


def defaults_of(known: Sequence[str]) -> dict[str, Any]:
    """Of all options: the environment stands above the cluster file, and that above sbatch's variables."""
    variables = {name: f"{PREFIX}{name.upper()}" for name in known}
    said: dict[str, Any] = {name: os.environ[text] for name, text in variables.items() if text in os.environ}
    lists = {name: [said[name]] for name in LISTS if name in said}
    sbatch = {name: os.environ[variable] for variable, name in SBATCH.items() if variable in os.environ}
    return {**sbatch, **_cluster_file(known), **said, **lists}


def say_unused_variables() -> None:
    """Warn of sbatch's variables that are not followed."""
    unused = sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in SBATCH)
    if unused:
        warn(f"not followed, for the batch script says it all: {', '.join(unused)}")


def _cluster_file(known: Sequence[str]) -> dict[str, Any]:
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
    import yaml

    class Loader(yaml.SafeLoader):
        """Numbers stay text: 12:00:00 would be one, of base 60."""

        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:int"]
            for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold option: value lines, found {type(tree).__name__}")
    tree = {str(key).replace("-", "_"): value for key, value in tree.items()}
    for key in tree:
        if key not in known:
            near = nearest(key, known)[0]
            raise ConfigError(f"{file}: unknown option {key!r}; did you mean {near!r}?")
    return {key: [value] if key in LISTS and isinstance(value, str) else value for key, value in tree.items()}
