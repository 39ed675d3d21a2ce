"""The manifest that `ig-dist launch --kubernetes` prints. Its fields were held against kubectl's own types by hand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ig_dist.cli import app
from ig_dist.commands.launch import launch
from ig_dist.errors import ConfigError
from ig_dist.launching.jobs import Job
from ig_dist.launching.kubernetes import manifest
from ig_dist.launching.node import this_node

ROOT = Path(__file__).resolve().parents[2]
SIZE: dict[str, Any] = {"nodes": 2, "processes": 4, "restarts": 8, "grace_s": 300.0}


def documents(words: list[str], job: Job = Job.train, **size: Any) -> dict[str, Any]:
    """By kind."""
    made = yaml.safe_load_all(manifest("registry/ig:1", job, words, **{**SIZE, **size}))
    return {document["kind"]: document for document in made}


def typed(words: list[str]) -> dict[str, Any]:
    """A command line as the launcher understands it."""
    root: Any = typer.main.get_command(app)
    assert words[:2] == ["ig-dist", "launch"]
    given: dict[str, Any] = root.commands["launch"].make_context("launch", words[2:]).params
    return given


def test_the_page_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/kubernetes.md").read_text()
    command, shown = re.search(
        r"```\n(ig-dist launch --kubernetes .*?) > .*?```yaml\n(.*?)```", page, re.DOTALL
    ).groups()
    launch(**typed(shlex.split(command.replace("\\\n", ""))))
    assert capsys.readouterr().out == shown


def test_pods_find_one_another_and_run_the_job_that_was_asked_for() -> None:
    made = documents(["digits", "run.dir=/runs/My_Run", "data.streams=8"])
    job, service = made["Job"]["spec"], made["Service"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    name = made["Job"]["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and name == service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 2, 2)
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    given = typed(container["command"])
    assert (given["nodes"], given["processes"], given["job"], given["restarts"]) == (2, 4, Job.train, 8)
    assert pod["terminationGracePeriodSeconds"] > given["grace"] == 300
    assert [given["target"], *given["rest"]] == ["digits", "run.dir=/runs/My_Run", "data.streams=8"]
    own = {option: given[option] for option in ("nodes", "processes", "master")}
    node = this_node({"JOB_COMPLETION_INDEX": "1"}, **own)  # as in the second pod
    assert (node.rank, node.host) == (1, f"{name}-0.{name}")  # a pod's host name, and the Service's
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]} and mounts["runs"] == "/runs"


def test_rules_follow_the_exit_codes() -> None:
    fail, disrupted, stopped = documents(["digits", "data.streams=8"])["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", [2, 3, 4, 7])
    assert (stopped["action"], stopped["onExitCodes"]["values"]) == ("Ignore", [75])
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert {rule["onExitCodes"]["containerName"] for rule in (fail, stopped)} == {"main"}


def test_a_config_of_ones_own_goes_along(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((ROOT / "ig_dist/configs/digits.yaml").read_text())
    made = documents([str(file), "run.dir=runs/2nd"], nodes=1)
    pod = made["Job"]["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert "/config/mine.yaml" in command and str(file) not in command and "--master" not in command
    assert made["ConfigMap"]["data"] == {"mine.yaml": file.read_text()}
    assert made["Job"]["metadata"]["name"] == made["ConfigMap"]["metadata"]["name"] == "run-2nd"
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["config"] == "/config" and mounts["runs"] == pod["containers"][0]["workingDir"]


def test_other_jobs_and_what_does_not_fit() -> None:
    command = documents(["runs/a", "--ig-scale", "1.4"], Job.sample)["Job"]["spec"]["template"]["spec"]["containers"][0]
    given = typed(command["command"])
    assert given["job"] is Job.sample and [given["target"], *given["rest"]] == ["runs/a", "--ig-scale", "1.4"]
    with pytest.raises(ConfigError, match="do not divide data.streams"):
        documents(["digits", "data.streams=8"], processes=3)
    with pytest.raises(ConfigError, match="a folder below one that a volume can be"):
        documents(["digits", "run.dir=/a", "data.streams=8"])
