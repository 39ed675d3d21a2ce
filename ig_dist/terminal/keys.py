"""Names of configs and of their keys, for hints and completion.

The keys are read from the source of the config, since to import it takes seconds (torch).
"""

import ast
import difflib
from functools import cache
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
_SOURCES = Path(__file__).parents[1] / "config"


def shipped_configs() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


@cache
def config_keys() -> tuple[str, ...]:
    """All keys that an override can name, in the order of the config; of ``guidance``, a list, the name alone."""
    classes = {
        node.name: node
        for file in sorted(_SOURCES.glob("*.py"))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }

    def keys(name: str, prefix: str) -> list[str]:
        found = []
        for field in classes[name].body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                key, kind = prefix + field.target.id, ast.unparse(field.annotation)
                if not kind.startswith("ClassVar"):
                    found += keys(kind, f"{key}.") if kind in classes else [key]
        return found

    return tuple(keys("Config", ""))


def nearest_key(name: str, group: str = "", *, least: float = 0.9) -> str | None:
    """The key whose last part is nearest to a name, those of one group first; None: none is near."""

    def nearness(key: str) -> float:
        first, _, rest = key.partition(".")
        near = difflib.SequenceMatcher(None, name, (rest or first).rpartition(".")[2]).ratio()
        return near + 0.3 * (first == group)

    best = max(config_keys(), key=nearness)
    return best if nearness(best) >= least else None
