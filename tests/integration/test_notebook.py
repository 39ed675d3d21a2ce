"""docs/notebook.ipynb runs, in a short form, and shows bitwise what the command line makes."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

import ig_dist
from tests.conftest import ROOT, succeed

NOTEBOOK = ROOT / "docs/notebook.ipynb"
LENGTH, SHORT = "STEPS, IMAGES = 600, 500", "STEPS, IMAGES = 10, 70"
SHOWN = "pipe(labels=range(10), ig_scale=1.4, seed=1)"
TYPED = "--class 0,1,2,3,4,5,6,7,8,9 --num 10 --ig-scale 1.4 --seed 1"


def picture(cell: nbformat.NotebookNode) -> Image.Image:
    (png,) = (output["data"]["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    return Image.open(io.BytesIO(base64.b64decode(png)))


def test_the_notebook_shows_what_the_command_line_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    stored = [cell.copy() for cell in cells]
    assert NOTEBOOK.stat().st_size < 300_000 and [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    (first,) = (cell for cell in cells if LENGTH in cell.source)
    first.source = first.source.replace(LENGTH, SHORT)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    for cell, before in zip(cells, stored, strict=True):  # the pictures that are stored are of these cells
        kinds = [{name for output in one.outputs for name in output.get("data", {})} for one in (cell, before)]
        assert kinds[0] - {"image/jpeg"} == kinds[1] - {"image/jpeg"}, cell.source
    (cell,) = (cell for cell in cells if cell.source == SHOWN)
    done = succeed(["ig-dist", "sample", "runs/notebook", *TYPED.split()], cwd=tmp_path)
    file = next(word for word in done.stdout.replace(",", " ").split() if word.endswith("samples.npz"))
    with np.load(tmp_path / file) as made:
        assert np.array_equal(np.asarray(picture(cell)), np.asarray(ig_dist.grid(made["arr_0"])))
