"""README and docs: every command that they show is typed.

In the short form the commands run as they stand, with overrides appended that make models and plans small. What needs
a cluster, ImageNet or weights of others is parsed: its verb, options, arguments and config keys must exist. A command
of which nothing is known fails the test. The long form appends nothing.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from PIL import Image
from torch.distributed.run import get_args_parser

import ig_dist
from ig_dist.cli import app
from ig_dist.config.file import apply_overrides, config_from_tree, find_config, load_config
from tests.conftest import run_command
from tests.documentation import LONG, NOT_RUN, PAGES, ROOT, Command, blocks, commands

TINY = ["model.depth=2", "model.hidden_size=16", "model.num_heads=2", "model.aux_depth=1", "model.patch_size=4"]
SMALL = {
    "train": [*TINY, "train.steps=20", "train.global_batch_size=8", "log.sample_every_steps=0"],
    "sample": ["sample.steps=2"],
    "sweep": ["sample.steps=2", "sample.num=100"],
}
DOORS = {"launchers/slurm.py": "slurm", "launchers/local.py": "launch", "data_prep/encode_latents.py": "encode"}
# what is meant by the names that the pages use, in the folder where their commands are typed
STAND_INS = {"quickstart/run": "runs/digits", "runs/a": "runs/digits", "runs/b2": "runs/digits"}
typed_in: dict[Path, set[str]] = defaultdict(set)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's commands were typed, in their short form."""
    return typed_front_page(tmp_path_factory.mktemp("typed"), long=False)


def typed_front_page(place: Path, *, long: bool) -> Path:
    prepare(place)
    type_all("README.md", place, long=long)
    return place


def type_all(page: str, place: Path, *, long: bool) -> None:
    for command in commands(page):
        if command.line not in typed_in[place]:  # pages repeat a few, which would find all done
            type_in(command, place, long=long)
            typed_in[place].add(command.line)


def prepare(place: Path) -> None:
    """Pictures, and the runs that pages name as if one had them."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        folder = place / "pictures" / name
        folder.mkdir(parents=True)
        for number in range(40):
            Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8)).save(folder / f"{number}.png")
    for name, real in STAND_INS.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).symlink_to(place / real)


def test_the_front_page_does_what_it_says(place: Path) -> None:
    run = place / "runs/digits"
    assert (run / "checkpoints").is_dir() and (run / "report.html").is_file() and (place / "runs/other").is_dir()
    assert {len(np.load(file)["arr_0"]) for file in run.glob("samples/*/samples.npz")} >= {1797}


@pytest.mark.parametrize("page", PAGES[1:])
def test_every_command_of_a_page(page: str, place: Path) -> None:
    type_all(page, place, long=False)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_every_command_as_it_stands(tmp_path: Path) -> None:
    typed_front_page(tmp_path, long=True)
    for page in PAGES[1:]:
        type_all(page, tmp_path, long=True)


@pytest.mark.parametrize("page", PAGES)
def test_every_other_block_of_a_page(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for block in blocks(page):
        match block.language:
            case "python":
                exec(compile(block.text, page, "exec"), {})
            case "yaml":
                for tree in yaml.safe_load_all(block.text):
                    check_yaml(tree)
            case language:
                assert language in ("", "text"), f"{page}: what is a block of {language}?"


@pytest.mark.parametrize("page", PAGES)
def test_every_verb_and_option_in_a_sentence(page: str) -> None:
    text = (ROOT / page).read_text()
    for script, arguments in re.findall(r"`python ((?:launchers|data_prep)/\w+\.py) ([^`]+)`", text):
        parse([DOORS[script], *arguments.split()])
    for typed in re.findall(r"`ig-dist ([a-z][^`]*)`", text):
        words = typed.split()
        known = options(words[0])
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, f"{page}: ig-dist {typed}"


def test_every_rule_that_leaves_a_command_unrun_has_a_command() -> None:
    found = {command.why_not(long=False) for page in PAGES for command in commands(page)}
    assert found == {*NOT_RUN.values(), *LONG.values(), None}


def type_in(command: Command, place: Path, *, long: bool) -> None:
    """Run a command, or parse it where it cannot be run here."""
    program, *words = command.words[: command.words.index(">")] if ">" in command.words else command.words
    if (script := next(iter(words), "")) in DOORS:
        assert f'main("{DOORS[script]}")' in (ROOT / script).read_text()
        program, words = "ig-dist", [DOORS[script], *words[1:]]
    if program == "torchrun":
        known = get_args_parser().parse_args(words)  # torchrun's own: it ends the test at an option that it has not
        assert known.module and known.training_script == "ig_dist.cli", command.line
        program, words = "ig-dist", known.training_script_args
    if program != "ig-dist":
        return check_program(program, words, place)
    if command.why_not(long=long) is not None or command.words[0] == "torchrun":
        return parse(words)
    if words[0] == "slurm" and "--dry-run" not in words:
        words.insert(1, "--dry-run")
    if not long and "--dry-run" not in words:
        words = [*(word.replace("@600", "@20") for word in words), *SMALL.get(words[0], [])]
    words = [word.replace("PLAN", latest_plan(place)) if "PLAN" in word else word for word in words]
    done = run_command(["ig-dist", *words], cwd=place, timeout=3600)
    # the script of a job whose data are not here is shown, and that it would be refused
    refused = words[0] == "slurm" and "#SBATCH" in done.stdout and "would be refused: data.index" in done.stderr
    assert done.returncode == (2 if refused else 0), f"{command.page}: {command.line}\n{done.stderr}"


def latest_plan(place: Path) -> str:
    """The folder of the plan with the most images."""
    return max(place.glob("runs/digits/samples/*/samples.npz"), key=lambda file: file.stat().st_size).parent.name


def parse(words: list[str]) -> None:
    """Hold a command of ig-dist against its verb; refused arguments are an exception, unknown config keys too."""
    verb, *rest = words
    root: Any = typer.main.get_command(app)
    command = root.commands[verb]
    if verb == "slurm":
        own = rest[:1] if rest[0] in command.commands else ["submit"]
        command, rest = command.commands[own[0]], rest[1:] if own == rest[:1] else rest
    context = command.make_context(verb, [*rest])
    given = context.params
    if given.get("kubernetes"):  # it prints, after all checks
        command.invoke(context)
    if "job" in given:  # a launcher: what follows is of the job
        words_of_job = [*filter(None, [given.get("target")]), *(given["rest"] or [])]
        if given["job"].value == "train" and (not words_of_job or "=" in words_of_job[0]):
            words_of_job = ["sit_xl2_ig", *words_of_job]
        return parse([given["job"].value, *words_of_job])
    if verb == "train":
        load_config(given["config"], given["overrides"] or [])
    elif given.get("overrides"):
        tree = yaml.safe_load(find_config("digits").read_text())
        config_from_tree(apply_overrides(tree, given["overrides"]), source=verb)


def options(verb: str) -> set[str]:
    """The options of a verb, as they are typed."""
    root: Any = typer.main.get_command(app)
    assert verb in root.commands, f"ig-dist has no verb {verb}"
    command = root.commands[verb]
    found = [command, *getattr(command, "commands", {}).values()]
    return {option for one in found for parameter in one.params for option in parameter.opts} | {"--help"}


def check_program(program: str, words: list[str], place: Path) -> None:
    """Commands of other programs: what they name must exist."""
    match program, words:
        case "make", [target]:
            assert re.search(rf"^(\S+ )*{target}( \S+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case "source", [".venv/bin/activate"]:
            pass
        case "pip", ["install", what]:
            name, extras = re.fullmatch(r"([^\[]+)(?:\[(.*)\])?", what).groups()  # type: ignore[union-attr]
            assert name in (".", f"dist/ig_dist-{ig_dist.__version__}-py3-none-any.whl")
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert {*(extras or "").split(",")} - {""} <= project["optional-dependencies"].keys()
        case "pip", ["wheel", "--no-deps", "-w", "dist", "."]:
            pass
        case "kubectl", ["apply" | "logs", *_]:
            pass
        case "tensorboard", ["--logdir", folder]:
            assert any((place / folder).iterdir())
        case "hf", ["download", repository, file, "--local-dir", folder]:
            code = (ROOT / "ig_dist/autoencoders/tokenizers.py").read_text()
            assert repository in code and file in code and folder.startswith("~/.cache/ig_dist/tokenizers/")
        case "python", [script, *_]:
            compile((ROOT / script).read_text(), script, "exec")
        case _:
            pytest.fail(f"what is {program} {' '.join(words)}? Teach this test")


def check_yaml(tree: dict[str, Any]) -> None:
    """A part of a config, a cluster file, or what another platform is given, with our commands in it."""
    if "apiVersion" in tree:  # compared with what is printed by tests/unit/test_kubernetes.py
        return
    if {"run", "num_nodes"} <= tree.keys() or tree.get("type") == "task":
        for line in tree.get("commands") or [tree["run"]]:
            parse(shlex.split(line)[1:])
        return
    if tree.keys() <= {name.removeprefix("--").replace("-", "_") for name in options("slurm")}:
        return
    whole = yaml.safe_load(find_config("digits").read_text()) | {"sample": {"weak_model": "RUN@STEP"}}
    config_from_tree(whole | tree, source="a block of yaml")
