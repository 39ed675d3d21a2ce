"""Pictures of a run in the report: samples of plans, grids of the training, nearest real pictures."""

import base64
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ig_dist.config import Config
from ig_dist.config.describe import guidance_name, plan_name
from ig_dist.data.classes import class_words
from ig_dist.data.index import IndexFile
from ig_dist.storage.files import read_file
from ig_dist.storage.urls import LOCAL

MOST_PICTURES = 8  # of a kind
MOST_BYTES, MOST_PIXELS = 2**26, 2**26  # of a file that is shown
MOST_PNG_BYTES = 1_000_000  # what is larger goes in as JPEG
SMALL = 400  # pixels of width below which a picture is enlarged without smoothing
NEAREST = "_nearest"


class Picture(NamedTuple):
    """As the template needs it."""

    title: str
    alt: str
    uri: str
    small: bool


def embedded(file: Path, title: str, alt: str) -> Picture | None:
    """A picture as a data URL; None: there is no readable one (it may just be written)."""
    try:
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            return None
        data, kind = file.read_bytes(), "png"
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MOST_PIXELS:
                return None
            small = image.width < SMALL
            if len(data) > MOST_PNG_BYTES:
                image.convert("RGB").save(smaller := io.BytesIO(), "JPEG", quality=90)
                data, kind = smaller.getvalue(), "jpeg"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return Picture(title, alt, f"data:image/{kind};base64,{base64.b64encode(data).decode()}", small)


def plan_pictures(run: Path) -> tuple[list[Picture], int]:
    """Samples of the newest plans, ordered by their guidance; how many older ones are left out."""
    files = [file for file in (run / "samples").glob("*.png") if not file.stem.endswith(NEAREST)]
    chosen = sorted((*_plan_order(run, file.stem), file) for file in _newest(files))
    found = [embedded(file, name, f"samples of the plan {name}") for _, name, file in chosen]
    return [picture for picture in found if picture], len(files) - len(chosen)


def nearest_pictures(run: Path) -> list[Picture]:
    """Samples of plans above the nearest real pictures, the newest first."""
    files = _newest((run / "samples").glob(f"*{NEAREST}.png"))
    names = [_plan_order(run, file.stem.removesuffix(NEAREST))[1] for file in files]
    said = "samples above the nearest training pictures"
    found = [embedded(file, name, f"{said}, {name}") for file, name in zip(files, names, strict=True)]
    return [picture for picture in found if picture]


def training_grids(run: Path, config: Config, index: IndexFile | None) -> tuple[list[Picture], str]:
    """Grids that were drawn while training, spread over its steps, and what stands in their rows and columns."""
    found = (run / "samples" / "training").glob("step_*.png")
    files = sorted(file for file in found if re.fullmatch(r"step_\d{1,18}", file.stem))
    kept = np.linspace(0, len(files) - 1, min(len(files), MOST_PICTURES)).round().astype(int)
    steps = [f"step {int(files[i].stem[5:]):,}" for i in kept]
    grids = [embedded(files[i], step, f"samples at {step}") for i, step in zip(kept, steps, strict=True)]
    guidance = [term for term in config.model_dump()["guidance"] if term["kind"] != "auto"]
    rows = f"Above unguided, below {guidance_name(guidance)}." if guidance else "Unguided."
    names = columns_of(index, 10)
    return [grid for grid in grids if grid], f"{rows} The same noise in each column. {names}".strip()


def columns_of(index: IndexFile | None, most: int) -> str:
    """The classes of a grid's columns, where they have names."""
    names = [] if index is None else [w.split(",")[0] for w in class_words(index.classes) or index.classes]
    return "" if not names or all(name.isdecimal() for name in names) else f"Columns: {', '.join(names[:most])}."


def _newest(files: Iterable[Path]) -> list[Path]:
    return sorted(files, key=lambda file: (-file.stat().st_mtime, file.name))[:MOST_PICTURES]


def _plan_order(run: Path, plan: str) -> tuple[tuple[int, list[float]], str]:
    """Where a plan stands among others, and its name in words."""
    try:
        told = json.loads(read_file(LOCAL, str(run / "samples" / plan / "plan.json")))
        scales = [float(term["scale"]) for term in told["plan"]["guidance"]]
        return (len(scales), scales), plan_name(plan, told["plan"], told["export"]["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return (0, []), plan
