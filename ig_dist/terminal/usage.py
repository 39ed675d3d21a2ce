"""A command line that cannot be run: what is wrong with it, in one line, as of a wrong config key."""

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import typer

from ig_dist.errors import ConfigError, nearest
from ig_dist.terminal.keys import nearest_key

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # of click, whichever one typer brings
LAUNCHERS = ("launch", "slurm")
NEAR = 0.75


def explained(error: Any, typed: Sequence[str]) -> ConfigError:
    """A ``UsageError`` of click as a user reads it: its kinds are told apart by what they hold, names are private."""
    context = error.ctx
    option: Any = getattr(error, "option_name", None)
    if hasattr(error, "possibilities"):
        return ConfigError(unknown_option(option, context, typed))
    if option is not None:
        return ConfigError(f"{option} {'needs a' if 'requires' in error.message else 'takes no'} value")
    where = context.command_path
    if hasattr(error, "param"):
        name = _shown(error.param)
        if hasattr(error, "param_type"):
            return ConfigError(f"{name} is missing{_example(context)}; see `{where} --help`")
        name = next((option for option in error.param.opts if value_of(option, typed) is not None), name)  # as typed
        return ConfigError(_wrong_value(name, error.message, value_of(name, typed)))
    quoted = re.findall(r"'([^']*)'", error.message)
    if hasattr(context.command, "commands") and quoted:
        return ConfigError(unknown("verb", quoted[0], context.command.commands))
    said = re.sub(r"^Got unexpected extra arguments?(\(s\))? \((.*)\)$", r"\2 is one argument too many", error.message)
    return ConfigError(f"{said.rstrip('.')}{_example(context)}; see `{where} --help`")


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """That there is no such name, and the nearest one; of a word that is near to none, all of them."""
    known = list(known)
    near = nearest(name, known, least=0.5)
    return f"unknown {kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else f": use {', '.join(known)}")


def unknown_option(option: str, context: Any, typed: Sequence[str]) -> str:
    """That a verb has no such option, and what was meant: another of its options, a config key, or a launcher."""
    known, verb, word = options(context.command), context.info_name, option.lstrip("-")
    text = f"unknown option {option}"
    near = nearest(option, known, least=NEAR)
    if len(word) == 1:  # there are no short ones
        near = [name for name in known if name.startswith(f"--{word}")]
    if near:
        return f"{text}; did you mean {near[0]}?"
    takes_keys = any(parameter.name == "overrides" for parameter in context.command.params)
    key = nearest_key(word.replace("-", "_"), verb, least=0.95) if takes_keys else None
    if key is not None:
        value = value_of(option, typed)
        return f"{text} of `ig-dist {verb}`; did you mean {key}={'...' if value is None else shlex.quote(value)}?"
    for launcher in LAUNCHERS:
        found = getattr(context.find_root().command, "commands", {}).get(launcher)
        starts = getattr(found, "commands", {}).get("submit", found)
        if verb not in LAUNCHERS and option in options(starts):
            return f"{text} of `ig-dist {verb}`; `ig-dist {launcher}` has it, see `ig-dist {launcher} --help`"
    return f"{text}; did you mean {nearest(option, known)[0]}?"


def options(command: Any) -> list[str]:
    """The options of a command, as they are typed."""
    given = [name for parameter in getattr(command, "params", []) for name in (*parameter.opts, "--help")]
    return sorted({name for name in given if name.startswith("-")}) or ["--help"]


def value_of(option: str, typed: Sequence[str]) -> str | None:
    """What was typed as the value of an option."""
    for word, following in zip(typed, [*typed[1:], "-"], strict=False):
        name, separator, value = word.partition("=")
        if name == option and (separator or not following.startswith("-")):
            return value if separator else following
    return None


def _wrong_value(name: str, said: str, value: str | None) -> str:
    said = said.removeprefix("Value error, ").partition(", unable to parse")[0].rstrip(".")
    given = name if value is None or repr(value) in said else f"{name} {value!r}"
    choices = re.findall(r"'([^']*)'", said)
    if " is not one of " in said and len(choices) > 1:
        return unknown(name, choices[0], choices[1:]).removeprefix("unknown ")
    return f"{given}{': ' * (not said.startswith('Input'))}{said.replace('Input should be', ' must be')}"


def _shown(parameter: Any) -> str:
    """An option as it is typed, an argument as the help names it."""
    if parameter.param_type_name == "option":
        return str(max(parameter.opts, key=len))
    return str(parameter.metavar or parameter.name.upper())


def _example(context: Any) -> str:
    from ig_dist.commands.examples import EXAMPLES

    examples = EXAMPLES.get(context.command_path.partition(" ")[2])
    return f", e.g. `{examples[0]}`" if examples else ""
