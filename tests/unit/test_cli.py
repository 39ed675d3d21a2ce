"""The command line: what a wrong one gets, what the help shows, what a shell completes, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from ig_dist.cli import app
from ig_dist.commands.examples import EXAMPLES
from ig_dist.config import Config
from ig_dist.errors import ConfigError
from ig_dist.launching.jobs import JOBS, Job, own_options_first, refuse_verb
from ig_dist.terminal.keys import config_keys, nearest_key
from ig_dist.terminal.usage import options
from tests.integration.test_bad_input import call

ROOT: Any = typer.main.get_command(app)

MISTAKES = {
    "trian digits": "unknown verb 'trian'; did you mean 'train'?",
    "frobnicate": "unknown verb 'frobnicate': use quickstart, encode, ",
    "--vresion": "unknown option --vresion; did you mean --version?",
    "train": "CONFIG is missing, e.g. `ig-dist train digits`; see `ig-dist train --help`",
    "train digits --nmu 3": "unknown option --nmu; did you mean --mfu?",
    "train digits --gpus": "--gpus needs a value",
    "train digits --dry-run=3": "--dry-run takes no value",
    "train digits --gpus many": "--gpus 'many' must be a valid integer",
    "train digits --gpus=0": "--gpus '0' must be greater than or equal to 1",
    "launch --processes 0 digits": "--processes '0' must be greater than or equal to 1",
    "train --steps 5": "unknown option --steps of `ig-dist train`; did you mean train.steps=5?",
    "train digits --batch-size": "did you mean train.global_batch_size=...?",
    "train digits --processes 2": "`ig-dist launch` has it, see `ig-dist launch --help`",
    "train digits --nodes 2": "`ig-dist launch` has it",
    "train run.dir=x digits": "run.dir=x stands where the config stands: give the config first",
    "launch --restart 3 digits": "unknown option --restart; did you mean --restarts?",  # said before anything starts
    "train digts": "no config file at digts: did you mean digits?",
    "train digits steps=5": "unknown key 'steps'; did you mean 'train.steps'?",
    "train digits train.lr=5": "unknown key 'train.lr'; did you mean 'optimizer.lr'?",
    "train digits modle.depth=5": "unknown key 'modle'; did you mean 'model'?",
    "train digits sit_b2_ig": "override 'sit_b2_ig' is not of the form group.key=value; a config stands before",
    "sample --num 4": "RUN is missing, e.g. `ig-dist sample runs/digits",
    "sample runs/a -n 4": "unknown option -n; did you mean --num?",
    "export runs/a runs/b": "runs/b is one argument too many, e.g. `ig-dist export runs/digits`",
    "reference digits": "--out is missing, e.g. `ig-dist reference runs/digits-data --out digits.npz`",
    "reference nowhere --out x.npz": "nowhere does not exist: give an index, an npz",
    "report runs/a --json": "unknown option --json; did you mean --",
    "launch": "CONFIG|RUN|... is missing, e.g. `ig-dist launch",
    "launch digits --job smaple": "--job 'smaple'; did you mean 'sample'?",
    "launch digits --processes": "--processes needs a value",
    "launch train digits": "'train' stands where a config stands: leave it out",
    "slurm cancel": "RUN is missing, e.g. `ig-dist slurm cancel runs/b2`",
    "slurm statsu runs/a": "unknown verb 'statsu' of ig-dist slurm; did you mean 'status'?",
    "slurm digits --tasks 2": "--tasks is for arrays, e.g. --job sample: give --nodes",
    "slurm digits --nodse 2": "unknown option --nodse; did you mean --nodes?",
    "slurm digits --config sit_b2_ig": "two configs, sit_b2_ig and digits: leave one out",
    "slurm digits sit_b2_ig": "override 'sit_b2_ig' is not of the form group.key=value; a config stands before",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_gets_one_line_with_the_nearest_name(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, errors = call(["ig-dist", *typed.split()], capsys)
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("error: "), errors
    assert MISTAKES[typed] in errors


def test_a_run_is_no_config_and_says_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    (run / "config.yaml").touch()
    code, errors = call(["ig-dist", "train", str(run)], capsys)
    assert code == 2 and f"ig-dist train '{run}/config.yaml'" in errors


def test_torchrun_is_told_what_it_repeats_below_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    _, errors = call(["ig-dist", "trian"], capsys)
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert errors == f"error: {told['message']}\n" and int(told["extraInfo"]["timestamp"]) > 0


def test_the_hints_know_every_key_of_the_config() -> None:
    def keys(group: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name, field in group.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys(kind, f"{prefix}{name}.")
            else:
                yield prefix + name

    assert config_keys() == tuple(keys(Config))
    assert [nearest_key("seed", verb) for verb in ("train", "sample")] == ["run.seed", "sample.seed"]
    assert nearest_key("frobnicate") is None


def commands(command: Any = ROOT, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every verb with its command; the verbs of ``slurm`` by both names."""
    yield name, command
    for verb, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {verb}".strip())


COMMANDS = dict(commands())


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_shows_examples_and_they_are_true(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["ig-dist", *verb.split(), "--help"])
    code, text = _end(capsys)
    assert code == 0 and all(len(line) <= 80 or line.startswith("    ig-dist") for line in text.splitlines())
    for example in EXAMPLES[verb]:
        assert f"  {example}" in text
        program, *typed = shlex.split(example)
        assert program == "ig-dist" and " ".join(typed).startswith(verb.removesuffix(" submit"))
        parse(typed)


def _end(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stdout of the command line in ``sys.argv``."""
    from ig_dist import cli

    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), capsys.readouterr().out


def parse(typed: list[str]) -> dict[str, Any]:
    """The parameters of a command line, those of a launcher's job too; raises what a user would be told."""
    verb, *rest = typed
    command = ROOT.commands[verb]
    if verb == "slurm":
        verb, *rest = rest if rest[0] in command.commands else ["submit", *rest]
        command = command.commands[verb]
    found: dict[str, Any] = command.make_context(verb, rest).params
    if verb in ("launch", "submit") and found["job"] is not Job.train:
        parse([found["job"].value, *([found["target"]] if verb == "launch" else []), *found["rest"]])
    return found


WORDS = {"RUN", "CONFIG", "INDEX", "SAMPLES", "URL", "SRC", "DEST", "FILE", "FOLDER", "PATH", "STEP", "DECAY", "JOB"}
WORDS |= {"N", "X", "NAME", "NAMES", "TIME", "SIZE", "SECONDS", "COMMAND", "LOW,HIGH", "EXTRACTOR=PATH", "a.b=c"}
WORDS |= {"...", "i/W", "X,...", "NAME,...", "STEP,...", "DECAY,...", "CLASS,...", "HEX", "SEED", "KIND", "PLACE"}
WORDS |= {"HOST:PORT", "IMAGE", "KEY=VALUE"}


@pytest.mark.parametrize("verb", COMMANDS)
def test_values_are_named_by_one_vocabulary(verb: str) -> None:
    for parameter in COMMANDS[verb].params:
        for word in (parameter.metavar or "").split("|"):
            assert word in WORDS | {""}, f"ig-dist {verb}: {word}"


def test_a_launcher_takes_its_options_anywhere() -> None:
    launch, submit = ROOT.commands["launch"], ROOT.commands["slurm"].commands["submit"]
    assert own_options_first(launch, ["digits", "--processes", "2", "a.b=c", "--job=train"]) == [
        *("--processes", "2", "--job=train", "digits", "a.b=c")
    ]
    sample = ["runs/a", "--job", "sample", "--num", "4", "--processes=3"]
    assert own_options_first(launch, sample) == ["--job", "sample", "--processes=3", "runs/a", "--num", "4"]
    # encode has --processes too: once its own words have begun it is its own. --dry-run starts nothing, wherever it is
    encode = ["--processes", "2", "--job", "encode", "--source", "x", "--dry-run", "--processes", "8"]
    assert own_options_first(launch, encode) == [*encode[:4], "--dry-run", *encode[4:6], *encode[7:]]
    assert own_options_first(submit, ["digits", "--nodes", "8", "--dry-run"]) == ["--nodes", "8", "--dry-run", "digits"]
    assert set(JOBS) == {job.value for job in Job} and "--processes" in options(launch)


def test_a_verb_for_a_launcher_is_refused_unless_there_is_such_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="say --job sample"):
        refuse_verb("sample", Job.train)
    (tmp_path / "sample").mkdir()
    refuse_verb("sample", Job.sample)


@pytest.mark.parametrize("typed", ["", "--help"])
def test_slurm_alone_says_what_it_is_for(
    typed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["launchers/slurm.py", "slurm", *typed.split()])
    code, text = _end(capsys)
    assert code == 0 and "Start a job on a SLURM cluster, and keep it going" in text
    words = ("--nodes", "--tasks", "--partition", "status RUN", "cancel RUN", "resume RUN")
    assert all(word in " ".join(text.split()) for word in words)


def test_the_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ig-dist", "--version"])
    code, text = _end(capsys)
    assert code == 0 and re.fullmatch(r"ig-dist \d+\.\d+\.\d+\S*\n", text)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("tra", {"train"}),
        ("train sit_x", {"sit_xl2", "sit_xl2_ig"}),
        ("train --dr", {"--dry-run"}),
        ("train digits optimizer.l", {"optimizer.lr="}),
        ("sample runs/digits ema.", {"ema.decays="}),
        ("slurm sta", {"status"}),
        ("slurm --no", {"--nodes", "--notify"}),
        ("slurm submit --nodes 2 sit_b", {"sit_b2_ig"}),
        ("launch --processes 2 digi", {"digits"}),
        ("launch digits --processes 2 checkpoint.u", {"checkpoint.url="}),
    ],
)
def test_a_shell_completes(
    words: str, offered: set[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_IG_DIST_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"ig-dist {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    monkeypatch.setattr(sys, "argv", ["ig-dist"])
    code, text = _end(capsys)
    assert code == 0 and set(text.split()) == offered


def test_a_file_beside_the_user_is_no_module_of_python(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('not this one')")
    command = [Path(sys.executable).with_name("ig-dist"), "launch", "digits", "--job", "reference"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --out is missing"), done.stderr


def test_it_ends_quietly_when_its_reader_has_left() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ig_dist.cli", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert done.returncode == 1 and not done.stderr
