"""docs/pictures/packages.svg: the parts of ig_dist in reading order, and which imports which, from the imports.

python docs/architecture_map.py

A part stands above what it imports. An arrow that other arrows already say is left out. An import that goes up is red.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs/pictures/packages.svg"
IMPORT = re.compile(r"^(?:from|import) (ig_dist[\w.]*)(?: import (\w+))?", re.MULTILINE)
BASE = "errors, rng ..."
GROUPS = {  # root modules that are read together
    BASE: ["terminal"],
    "commands": ["cli", "commands"],
    "api": ["api", "pipeline"],
    "export": ["export"],
    "run_dir": ["run_dir"],
    "config": ["config", "configs"],
}
ROWS = [  # four columns; what is below knows nothing of what is above
    ["", "commands", "api", ""],
    ["slurm", "", "report", ""],
    ["", "launching", "", ""],
    ["training", "", "", ""],
    ["", "evaluation", "", ""],
    ["", "sampling", "", ""],
    ["", "features", "", ""],
    ["", "plans", "convert", "encoding"],
    ["export", "", "", ""],
    ["checkpoints", "", "", "autoencoders"],
    ["parallel", "", "", ""],
    ["optim", "run_dir", "", ""],
    ["", "config", "", ""],
    ["", "", "diffusion", "data"],
    ["", "arithmetic", "models", ""],
    ["", "", "", "storage"],
    ["", BASE, "", ""],
]
WIDTH, STEP, BOX, HIGH = 720, 58, 130, 32


def part_of(module: str) -> str:
    """The part that a module belongs to; a root module that is in no group belongs to the base."""
    name = module.split(".")[1] if "." in module else ""
    return next((group for group, names in GROUPS.items() if name in names), name if is_package(name) else BASE)


def is_package(name: str) -> bool:
    """Whether it is a folder of the package."""
    return name != "" and (ROOT / "ig_dist" / name / "__init__.py").is_file()


def imported(file: Path) -> Iterable[str]:
    """Modules of ours that a file imports as it is imported itself."""
    for module, name in IMPORT.findall(file.read_text(encoding="utf-8")):
        yield f"ig_dist.{name}" if module == "ig_dist" else module


def imports() -> dict[tuple[str, str], int]:
    """How many imports lead from one part to another."""
    found: dict[tuple[str, str], int] = {}
    for file in sorted((ROOT / "ig_dist").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for name in imported(file):
            pair = part_of(module), part_of(name)
            if pair[0] != pair[1]:
                found[pair] = found.get(pair, 0) + 1
    return found


def drawn(pairs: Iterable[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Arrows down that no way over other parts replaces, and arrows that go up or aside."""
    row = {part: i for i, parts in enumerate(ROWS) for part in parts if part}
    pairs = sorted(pairs)
    down = {pair for pair in pairs if row[pair[0]] < row[pair[1]]}

    def reaches(start: str, end: str) -> bool:
        return any(to == end or reaches(to, end) for here, to in down if here == start)

    needed = [(a, b) for a, b in sorted(down) if not any(h == a and t != b and reaches(t, b) for h, t in down)]
    return needed, [pair for pair in pairs if pair not in down]


def picture() -> str:
    """The SVG."""
    places = {
        part: (WIDTH * (i + 0.5 + 0.2 * (row % 3 - 1)) / len(parts), 10 + STEP * row)  # not straight below one another
        for row, parts in enumerate(ROWS)
        for i, part in enumerate(parts)
        if part
    }
    needed, upward = drawn(imports())
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {STEP * len(ROWS)}" font-family="sans-serif"'
        ' font-size="14" text-anchor="middle">',
        f'<rect width="{WIDTH}" height="{STEP * len(ROWS)}" fill="#fff"/>',
    ]
    for (start, end), colour in [(p, "#8a94a0") for p in needed] + [(p, "#c62828") for p in upward]:
        (x, y), (to, below) = places[start], places[end]
        y, below = (y + HIGH, below) if below > y else (y, below + HIGH)
        lines.append(
            f'<path d="M{x:.0f} {y}C{x:.0f} {(y + below) / 2:.0f} {to:.0f} {(y + below) / 2:.0f} {to:.0f} {below}"'
            f' fill="none" stroke="{colour}"/>'
        )
    for part, (x, y) in places.items():
        lines.append(
            f'<rect x="{x - BOX / 2:.0f}" y="{y}" width="{BOX}" height="{HIGH}" rx="6" fill="#eef3fb"'
            ' stroke="#1f6feb"/>'
            f'<text x="{x:.0f}" y="{y + 22}">{part}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    for pair in drawn(imports())[1]:
        print("upward:", *pair)
