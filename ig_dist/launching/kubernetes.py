"""A manifest that runs a job on Kubernetes: an indexed Job with a pod for each machine, and a Service for their names.

Any cluster has Jobs; JobSet and Kubeflow's TrainJob are controllers to install, and what they add, to start all pods
again when one has failed, the launchers do in place, faster, and with the exit codes of all ranks before them.
"""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from ig_dist.errors import ConfigError
from ig_dist.launching.endings import FINAL, STOPPED
from ig_dist.launching.jobs import Job
from ig_dist.launching.node import PORT

TEMPLATE = Path(__file__).with_name("manifest.yaml.jinja")
WORK = "/work"
MARGIN_S = 30  # from the launcher's grace to the kubelet's SIGKILL
_LONGEST_NAME = 52  # a pod's host name is it with an index, of at most 63 characters


def manifest(
    image: str, job: Job, arguments: Sequence[str], *, nodes: int, processes: int, restarts: int, grace_s: float
) -> str:
    """The manifest, as YAML, of a job on ``nodes`` machines of so many ``processes``, with a GPU each.

    The image has ``ig-dist`` on its PATH. A config that is a file here goes along.

    Raises:
        ConfigError: the config is wrong, or does not fit the number of processes.
    """
    words, files = list(arguments), dict[str, str]()
    if job is Job.train:
        name, folder = _training(words, nodes, processes)
        if (file := Path(words[0])).is_file():
            words[0], files[file.name] = f"/config/{file.name}", file.read_text(encoding="utf-8")
    else:
        name, folder = f"{job.value}-{Path(words[0]).name.lstrip('-')}", WORK
    name = _label(name)
    size = ["--nodes", str(nodes), "--processes", str(processes)]
    kind = ["--job", job.value] if job is not Job.train else []
    where = ["--master", f"{name}-0.{name}:{PORT}"] if nodes > 1 else []
    again = ["--restarts", str(restarts), "--grace", f"{grace_s:g}"]
    values: dict[str, Any] = {
        "name": name,
        "image": image,
        "command": ["ig-dist", "launch", *size, *where, *again, *kind, *words],
        "folder": folder,
        "work": WORK,
        "config": files,
        "grace_s": round(grace_s) + MARGIN_S,
        "final": FINAL,
        "stopped": STOPPED,
    }
    template = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))
    typed = shlex.join(["ig-dist", "launch", "--kubernetes", image, *size, *kind, *arguments])
    as_yaml = {key: json.dumps(value) if value else "" for key, value in values.items()}  # JSON is
    return template.render(typed=typed, nodes=nodes, processes=processes, **as_yaml)


def _training(words: Sequence[str], nodes: int, processes: int) -> tuple[str, str]:
    """A training's name, and where the volume of its runs is."""
    from ig_dist.config.file import load_config

    config = load_config(Path(words[0]), list(words[1:]))
    config.check_world_size(nodes * processes, processes)
    run = Path(config.run.dir)
    if run.is_absolute() and run.parent == Path("/"):
        raise ConfigError(f"run.dir {run}: give a folder below one that a volume can be, e.g. /runs{run}")
    return run.name, str(run.parent) if run.is_absolute() and not run.is_relative_to(WORK) else WORK


def _label(text: str) -> str:
    """A name that a Service may have: lower case, digits and dashes, a letter first."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}"
    return name[:_LONGEST_NAME].rstrip("-")
