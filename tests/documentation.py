"""The commands of README and docs, read from their code blocks, and what is known of each: run, or only parsed?"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))

# Why a command is parsed only. A pattern of the command, in the order in which they are tried.
NOT_RUN = {
    r"s3://": "object storage that does not exist",
    r"ILSVRC2012|VIRTUAL_|--check-against-adm": "ImageNet, or ADM's files",
    r"THEIRS|theirs|\bweights\b|runs/published": "weights or images of others",
    r"fashion": "Fashion-MNIST, and an hour of training",
    r"slurm (status|cancel|resume)|--node-rank": "a cluster",
    r"^ig-dist (launch|evaluate) .*sit_xl2_ig": "eight GPUs and weeks",
}
# These run in the long form only.
LONG = {
    r"^ig-dist launch|launchers/local.py|^torchrun": "processes of their own",
    r"efficientnet": "features of a network",
    r"--source pictures|runs/pictures": "typed by test_own_pictures.py, on drawn shapes",
    r"--seeds|--halving|--cfg-scale 1.0,1.5": "a sweep of many points",
    r"--dry-run --gpus": "a large model, built to be counted",
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str


class Command(NamedTuple):
    """A command line as typed, in its words."""

    page: str
    words: list[str]

    @property
    def line(self) -> str:
        return shlex.join(self.words)

    def why_not(self, *, long: bool) -> str | None:
        """Why it is only parsed; None: it is run."""
        rules = NOT_RUN if long else {**NOT_RUN, **LONG}
        return next((why for pattern, why in rules.items() if re.search(pattern, self.line)), None)


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, from top to bottom."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0, f"{page}: a block without an end"
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, found[1], found[2])


def commands(page: str) -> list[Command]:
    """What a page asks its reader to type: blocks without a language, then commands in the last column of tables."""
    lines = [
        line for block in blocks(page) if not block.language for line in block.text.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(
        r"\| `((?:ig-dist|python) \S+ [^`]+)` \|$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE
    )
    typed = [shlex.split(line, comments=True) for line in lines]
    return [Command(page, words) for words in typed if words]
