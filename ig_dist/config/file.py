"""From files and the command line to a ``Config``, and the one line that says what is wrong.

Precedence: the defaults < the YAML file < ``a.b=c`` on the command line. Unknown keys are refused with the nearest
name.
"""

import re
import shlex
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ig_dist.config import Config
from ig_dist.config.paths import moved_paths
from ig_dist.errors import ConfigError, nearest
from ig_dist.storage.urls import refuse_credentials
from ig_dist.terminal.keys import CONFIGS, config_keys, nearest_key, shipped_configs

MOST_BYTES = 2**20
MOST_NODES = 100_000


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``a.b=c`` overrides, validate.

    Raises:
        ConfigError: with one line that names the key and the remedy.
    """
    path = find_config(path)
    is_run = path.name == "config.yaml" and any((path.parent / name).exists() for name in (".lock", "metrics.jsonl"))
    return _load(path, overrides, path.parent if is_run else None)


def _load(path: Path, overrides: typing.Sequence[str], run: Path | None) -> Config:
    """``run``: the run directory whose config it is, wherever that was when the run began."""
    tree = read_groups(path)
    tree = tree if run is None else moved_paths(tree, run)
    config = config_from_tree(tree, str(path), overrides)
    return config if config.run.dir else _in_run_dir(config, f"runs/{path.stem}")


def read_groups(path: Path) -> dict[str, Any]:
    """The groups of a YAML file, which may be anything.

    Raises:
        ConfigError: it is no file that can be read, or no YAML, or not groups.
    """
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path} is no file of less than {MOST_BYTES >> 20} MiB: give a config")
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is not None and _nodes(node, {}) > MOST_NODES:
            raise ConfigError(f"{path} is not a config: its aliases (*name) stand for more than {MOST_NODES:,} values")
        tree = {} if node is None else loader.construct_document(node) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{path} must hold a mapping of config groups, found {type(tree).__name__}")
    return tree


def _nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a YAML node stands for: each alias counts as what it is of, so that a few lines may be millions."""
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # until it is counted: then it holds itself
        parts = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []
        each = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(_nodes(part, known) for part in each)
    return known[id(node)]


def find_config(named: str | Path) -> Path:
    """A config file: a path, or the name of one that comes with the package (``digits`` or ``configs/digits.yaml``).

    Raises:
        ConfigError: no such file.
    """
    path = Path(named)
    if "=" in path.name and not path.is_file():
        raise ConfigError(f"{named} stands where the config stands: give the config first, e.g. digits {named}")
    shipped = CONFIGS / f"{path.stem}.yaml"
    if not path.is_file() and str(path) in (path.stem, f"configs/{path.stem}.yaml") and shipped.is_file():
        return shipped
    if (path / "config.yaml").is_file():
        raise ConfigError(f"{path} is a run: go on with it by `ig-dist train {shlex.quote(f'{path}/config.yaml')}`")
    if not path.is_file():
        known = shipped_configs()
        near = nearest(path.stem, known, least=0.75)
        meant = f"did you mean {near[0]}?" if near else f"give a file, or one of {', '.join(known)}"
        raise ConfigError(f"no config file at {path}: {meant}")
    return path


def load_run(run: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """The resolved config of a run directory, with overrides; its paths as they are now, see ``run_paths``.

    Raises:
        ConfigError: no run there.
    """
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run} is not a run directory (no config.yaml): give the run.dir of `ig-dist train`")
    return _in_run_dir(_load(file, overrides, Path(run)), str(run))


def with_guidance(
    config: Config,
    *,
    ig_scale: float | None = None,
    cfg_scale: float | None = None,
    auto_scale: float | None = None,
    ig_interval: tuple[float, float] | None = None,
    cfg_interval: tuple[float, float] | None = None,
    auto_interval: tuple[float, float] | None = None,
) -> Config:
    """A copy with other guidance; what is None stays, and a term that is there keeps its interval and branches."""
    tree = config.model_dump(mode="json")
    asked = (("ig", ig_scale, ig_interval), ("cfg", cfg_scale, cfg_interval), ("auto", auto_scale, auto_interval))
    for kind, scale, interval in asked:
        terms = [term for term in tree["guidance"] if term["kind"] == kind]
        if scale is not None and not terms:
            terms = [{"kind": kind}]
            tree["guidance"] += terms
        for term in terms:
            if scale is not None:
                term["scale"] = scale
            if interval is not None:
                term["interval"] = list(interval)
    return config_from_tree(tree, source="guidance")


def config_from_tree(tree: dict[str, Any], source: str, overrides: typing.Sequence[str] = ()) -> Config:
    """Validate a parsed config; ``source`` names it in the error, unless the overrides are what is wrong."""
    whole = apply_overrides(tree, overrides)
    _refuse_credentials(whole, [])
    try:
        return Config.model_validate(whole)
    except ValidationError as error:
        if overrides:
            config_from_tree(tree, source)  # it may be wrong by itself
        raise ConfigError(f"{'overrides' if overrides else source}: {_explain(error)}") from None


def saved_config(tree: dict[str, Any], where: str) -> Config:
    """The config that stands in a checkpoint; ConfigError where it has what this version does not know."""
    return config_from_tree(tree, f"{where} was saved by another version of ig-dist, use that one")


def _refuse_credentials(node: Any, path: list[str]) -> None:
    """Of all values, since any may be a URL and is stored with the run."""
    if isinstance(node, str):
        refuse_credentials(node, ".".join(path))
    elif isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            _refuse_credentials(value, [*path, str(key)])


def apply_overrides(tree: dict[str, Any], overrides: typing.Sequence[str]) -> dict[str, Any]:
    """A nested mapping in which ``a.b=c`` are set (list items by number); values are YAML."""
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"override {override!r} is not of the form group.key=value{_hint(override)}")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"override {key}: value {text!r} is not valid YAML: {_one_line(error)}") from None
        tree = _replaced(tree, key.split("."), value)
    return tree


def _replaced(node: Any, key: list[str], value: Any, depth: int = 0) -> Any:
    """A copy of a node, which stands so deep in a tree, in which the value stands at the key."""
    if depth == len(key):
        return value
    part, said = key[depth], f"override {'.'.join(key)}: {'.'.join(key[:depth])}"
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise ConfigError(f"{said} has items 0 to {len(node) - 1}, not {part!r}")
        i = int(part)
        return [*node[:i], _replaced(node[i], key, value, depth + 1), *node[i + 1 :]]
    if not isinstance(node, dict | None):
        raise ConfigError(f"{said} is a value, it has no key {part!r}")
    return {**(node or {}), part: _replaced((node or {}).get(part), key, value, depth + 1)}


def flat(groups: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """``{"train": {"steps": 5}}`` as ``train.steps`` and 5: what a group does not name stays."""
    found: dict[str, Any] = {}
    for key, value in groups.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {above + key: value}
    return found


def _hint(word: str) -> str:
    """What a word without = may have been meant as."""
    if Path(word).stem in shipped_configs() or word.endswith(".yaml"):
        return "; a config stands before them all"
    return f", e.g. {word}=..." if word in config_keys() else ""


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, every field present."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _in_run_dir(config: Config, run_dir: str) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": run_dir})})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(error: ValidationError) -> str:
    """The first problem in one line, with the nearest key for an unknown one."""
    problems = error.errors()
    # A missing group is often the echo of a misspelt one: report the misspelling first.
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    problems.sort(key=lambda problem: problem["type"] not in unknown)
    first, more = problems[0], len(problems) - 1
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in unknown:
        *group, name = map(str, first["loc"])
        names = list(_fields_at(first["loc"][:-1]))
        near = nearest(name, names, least=0.75)
        elsewhere = None if near else nearest_key(name)  # as `steps=5` means train.steps
        near = near or nearest(name, names)
        text = f"unknown key {where!r}; did you mean {elsewhere or '.'.join([*group, *near])!r}?"
    else:
        message = _one_line(ValueError(first["msg"].removeprefix("Value error, ")))
        given = first.get("input")
        shown = f" (got {given!r})" if where and isinstance(given, (str, int, float, bool, types.NoneType)) else ""
        allowed = re.findall(r"'(\w+)'", message) if first["type"] == "literal_error" else []
        shown += "".join(f"; did you mean {name!r}?" for name in nearest(str(given), allowed))
        text = f"{where}: {message}{shown}" if where and not message.startswith(f"{where}.") else message
    return text + (f" (and {more} more)" if more else "")


def _fields_at(location: typing.Sequence[str | int]) -> Mapping[str, Any]:
    """The fields of the group at a place, each with its ``annotation``."""
    fields: Mapping[str, Any] = Config.model_fields
    for part in location:
        if isinstance(part, str):
            kinds = (fields[part].annotation, *typing.get_args(fields[part].annotation))  # of a list too
            group = next(kind for kind in kinds if isinstance(kind, type) and typing.get_origin(kind) is None)
            fields = group.__pydantic_fields__  # type: ignore[attr-defined]
    return fields
