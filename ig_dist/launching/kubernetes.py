"""A manifest that runs a job on Kubernetes: an indexed Job with a pod for each machine, and a Service for their names.

Any cluster has Jobs; JobSet and Kubeflow's TrainJob are controllers to install, and what they add, to start all pods
again when one has failed, the launchers do in place, faster, and with the exit codes of all ranks before them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ig_dist.errors import ConfigError
from ig_dist.launching.endings import STOPPED, After, codes
from ig_dist.launching.jobs import Job
from ig_dist.launching.node import PORT

WORK = "/work"
CLAIM = "runs"
MARGIN_S = 30
"""From the launcher's grace to the kubelet's SIGKILL."""
_LONGEST_NAME = 52  # a pod's host name is it with an index, of at most 63 characters
_HEAD = f"""\
# {{typed}}
# It needs a PersistentVolumeClaim {CLAIM!r} that all nodes can write (ReadWriteMany). Start it: kubectl apply -f FILE
"""


def manifest(
    image: str,
    job: Job,
    arguments: Sequence[str],
    *,
    nodes: int,
    processes: int,
    restarts: int,
    grace_s: float,
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
    size: list[Any] = ["--nodes", nodes, "--processes", processes]
    kind = ["--job", job.value] if job is not Job.train else []
    where = ["--master", f"{name}-0.{name}:{PORT}"] if nodes > 1 else []
    command = ["ig-dist", "launch", *size, *where, "--restarts", restarts, "--grace", f"{grace_s:g}", *kind, *words]
    volumes = [
        (CLAIM, folder, {"persistentVolumeClaim": {"claimName": CLAIM}}),
        ("shm", "/dev/shm", {"emptyDir": {"medium": "Memory"}}),  # NCCL's; a container's own has 64 MB
        *([("config", "/config", {"configMap": {"name": name}})] if files else []),
    ]
    container = {
        "name": "main",
        "image": image,
        "command": [str(word) for word in command],
        "workingDir": WORK,
        "env": [
            {"name": "PYTHONUNBUFFERED", "value": "1"},
            # machines are named by it, where one is to blame
            {"name": "IG_DIST_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ],
        "resources": {"limits": {"nvidia.com/gpu": processes}},
        "volumeMounts": [{"name": volume, "mountPath": place} for volume, place, _ in volumes],
    }
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": round(grace_s) + MARGIN_S,
        "containers": [container],
        "volumes": [{"name": volume, **source} for volume, _, source in volumes],
    }
    documents: list[dict[str, Any]] = [
        {
            **_head("v1", "Service", name),
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {"batch.kubernetes.io/job-name": name},
            },
        },
        {
            **_head("batch/v1", "Job", name),
            "spec": {
                "completionMode": "Indexed",
                "completions": nodes,
                "parallelism": nodes,
                "backoffLimit": 8 * nodes,  # a failure may end a pod on each of them
                "podFailurePolicy": {"rules": failure_rules()},
                "template": {"spec": pod},
            },
        },
    ]
    if files:
        documents.insert(0, {**_head("v1", "ConfigMap", name), "data": files})
    typed = shlex.join(map(str, ["ig-dist", "launch", "--kubernetes", image, *size, *kind, *arguments]))
    text: str = yaml.safe_dump_all(documents, sort_keys=False, default_flow_style=None, width=110)
    return _HEAD.format(typed=typed) + text


def failure_rules() -> list[dict[str, Any]]:
    """What a pod's exit code means for its Job; a pod that no rule is for counts towards ``backoffLimit``."""

    def on_codes(action: str, values: Sequence[int]) -> dict[str, Any]:
        return {
            "action": action,
            "onExitCodes": {"containerName": "main", "operator": "In", "values": sorted(values)},
        }

    return [
        on_codes("FailJob", codes(After.NEVER)),
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        on_codes("Ignore", [STOPPED]),
    ]


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


def _head(version: str, kind: str, name: str) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}}
