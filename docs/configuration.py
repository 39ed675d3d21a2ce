"""The field tables of docs/configuration.md, written from the docstrings of ig_dist/config.

python docs/configuration.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined

from ig_dist.config import Config

PAGE = Path(__file__).with_suffix(".md")
MARK = "<!-- `python docs/configuration.py` writes what follows: edit the docstrings of ig_dist/config. -->\n"
BOUNDS = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}
NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


def kind(schema: dict[str, Any]) -> str:
    """What a field may hold, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(kind(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        items = [kind(item) for item in schema["prefixItems"]]
        return f"[{', '.join(items)}]" if len(set(items)) > 1 else f"list of {len(items)}: {items[0]}"
    if schema.get("type") == "array":
        return f"list of: {kind(schema['items'])}"
    if schema.get("type") == "object":
        return "name: text"
    bounds = [text.format(f"{schema[key]:g}") for key, text in BOUNDS.items() if key in schema and schema[key] < 2**53]
    return " ".join([NAMES[schema["type"]], *bounds])


def default(value: Any) -> str:
    """A default as it is typed."""
    if value is PydanticUndefined:
        return "required"
    typed = "''" if value == "" else value if isinstance(value, str) else json.dumps(value)
    return f"`{typed}`"


def one_line(text: str) -> str:
    """A docstring as a cell of a table."""
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())


def table(group: Any, prefix: str) -> Iterator[str]:
    """Rows of a group's fields; a group within a group follows under its own prefix."""
    schema = TypeAdapter(group).json_schema()["properties"]
    for name, field in group.__pydantic_fields__.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from table(field.annotation, f"{prefix}{name}.")
            continue
        value = field.get_default(call_default_factory=True, validated_data={})
        yield f"| `{prefix}{name}` | {kind(schema[name])} | {default(value)} | {one_line(field.description or '')} |"


def sections() -> Iterator[str]:
    """A section for each group."""
    for name, field in Config.model_fields.items():
        group, repeated = field.annotation, ""
        if not isinstance(group, type):  # guidance is a list of groups
            group, repeated = group.__args__[0], "N."
        yield f"## {name}\n\n{one_line(group.__doc__ or '')}\n"
        yield "| key | takes | default | what it does |\n|---|---|---|---|"
        yield "\n".join(table(group, f"{name}.{repeated}")) + "\n"


def page() -> str:
    """The whole page: what was written by hand above the mark, the tables below it."""
    return PAGE.read_text(encoding="utf-8").split(MARK)[0] + MARK + "\n" + "\n".join(sections())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
