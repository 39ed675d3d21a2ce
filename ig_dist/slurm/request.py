"""What may be asked of SLURM: the options of ``ig-dist slurm``, and what they are where nothing is typed."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

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


def _option(metavar: str, help: str, **more: Any) -> Any:
    return typer.Option(metavar=metavar, help=help, **more)


@dataclass
class Request:
    """What the user asked for; None: whatever is right for the cluster. What has a help text is an option."""

    nodes: Annotated[str, _option("N", "Nodes, or the fewest and the most: 4-8.")] = "1"
    gpus_per_node: Annotated[int | None, _option("N", "Default: all that a node has.", min=0)] = None
    tasks_per_node: Annotated[int | None, _option("N", "Processes of a node without GPUs.", min=1)] = None
    cpus_per_gpu: Annotated[int | None, _option("N", "Default: a node's CPUs over its GPUs.", min=1)] = None
    partition: Annotated[str | None, _option("NAMES", "One, or several with commas. Default: the cluster's.")] = None
    account: Annotated[str | None, _option("NAME", "Account to charge.")] = None
    qos: Annotated[str | None, _option("NAME", "Quality of service.")] = None
    time: Annotated[str | None, _option("TIME", "Of one start, D-HH:MM:SS. Default: the limit, at most a day.")] = None
    constraint: Annotated[str | None, _option("NAMES", "Features that nodes must have.")] = None
    exclude: Annotated[str | None, _option("NAMES", "Nodes not to use.")] = None
    mem: Annotated[str | None, _option("SIZE", "Memory of a node. Default: all of it on whole nodes.")] = None
    signal_delay: Annotated[int, _option("SECONDS", "So long before the time limit to stop and save.", min=10)] = 120
    setup: Annotated[
        list[str], _option("COMMAND", "Shell line to run first, e.g. `module load cuda`. It must succeed.")
    ] = field(default_factory=list)
    sbatch: Annotated[
        list[str], _option("KEY=VALUE", "More for sbatch, e.g. reservation=maintenance. May be repeated.")
    ] = field(default_factory=list)
    srun: Annotated[
        list[str], _option("KEY=VALUE", "More for the srun of the processes, e.g. container-image=IMAGE.")
    ] = field(default_factory=list)
    container: Annotated[
        str, _option("IMAGE", "Container of the processes: FILE.sif of Apptainer, or what pyxis takes.")
    ] = ""
    container_mounts: Annotated[
        str, _option("FOLDER", "What it sees, with commas; A:B for A at B. The run and this folder are among it.")
    ] = ""
    notify: Annotated[
        str, _option("COMMAND", "Run when the job is done or given up, with RUN, CODE and REASON set.")
    ] = ""
    then: Annotated[
        list[str],
        _option(
            "JOB",
            "What follows a training that is done, as arrays: sample, sweep or evaluate, with their options in"
            " quotes. May be repeated.",
        ),
    ] = field(default_factory=list)
    max_failures: Annotated[
        int, _option("N", "Tries after failures in a row, without a new checkpoint between.", min=0)
    ] = 8
    exclude_after: Annotated[
        int, _option("N", "Failures within a day after which the node to blame is not used; 0: never.", min=0)
    ] = 2
    tasks: int = 0
    at_once: int | None = None  # tasks that run at a time; None: as many as SLURM gives
    # set by `complete`
    exclusive: bool = False  # whole nodes: all of their GPUs are asked for
    on_cpus: bool = False  # no GPUs are wanted
    unknown_gpus: bool = False  # nodes have GPUs of which SLURM knows nothing

    def __post_init__(self) -> None:
        self.then = [text for text in self.then if text]  # --then '' is none

    @property
    def node_range(self) -> tuple[int, int]:
        """The fewest and the most nodes.

        Raises:
            ConfigError: not N or A-B.
        """
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", self.nodes)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            raise ConfigError(f"--nodes {self.nodes!r}: give a number of nodes, or the fewest and the most, e.g. 4-8")
        return low, high

    @property
    def ranks_per_node(self) -> int:
        """One for each GPU, or as many as asked for where there are none."""
        return self.gpus_per_node or self.tasks_per_node or 1


def defaults_of(known: Sequence[str]) -> dict[str, Any]:
    """Of all options: the environment stands above the cluster file, and that above sbatch's variables."""
    said: dict[str, Any] = {name: os.environ[text] for text, name in SBATCH.items() if text in os.environ}
    said |= _cluster_file(known)
    said |= {name: os.environ[text] for name in known if (text := f"{PREFIX}{name.upper()}") in os.environ}
    return {name: [value] if name in LISTS and isinstance(value, str) else value for name, value in said.items()}


def say_unused_variables() -> None:
    """Warn of sbatch's variables that are not followed."""
    unused = sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in SBATCH)
    if unused:
        warn(f"not followed, for the batch script says it all: {', '.join(unused)}")


def _cluster_file(known: Sequence[str]) -> dict[str, Any]:
    """Options from the cluster file, as text: 12:00:00 would be a number, of base 60.

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

    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold option: value lines, found {type(tree).__name__}")
    tree = {key.replace("-", "_"): value for key, value in tree.items() if value}
    for key in tree:
        if key not in known:
            near = nearest(key, known)[0]
            raise ConfigError(f"{file}: unknown option {key!r}; did you mean {near!r}?")
    return tree
