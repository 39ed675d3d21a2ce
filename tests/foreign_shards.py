"""WebDataset shards of latents as others write them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import webdataset

from ig_dist.storage.files import open_url

SIZES = [9, 1, 14]


def write_foreign(
    url: str,
    kind: str = "sample",
    dtype: str = "float32",
    keys: tuple[str, str | None, str] = ("npy", "flip.npy", "cls"),
) -> dict[str, Any]:
    """Shards as the webdataset library writes them; the arrays that are in them."""
    count, rng = sum(SIZES), np.random.default_rng(5)
    shape = (count, 4, 3, 3)
    arrays = np.abs(rng.standard_normal((2, *shape))).astype(dtype)  # halves of moments: the second is a std
    if kind == "sample":
        arrays = arrays - np.asarray(0.5, dtype)
    labels = rng.integers(0, 7, count)
    labels[0] = 6
    fs, path = open_url(url, "test")
    fs.makedirs(path, exist_ok=True)
    first = 0
    for number, size in enumerate(SIZES):
        packed = io.BytesIO()
        with webdataset.TarWriter(packed) as writer:
            for i in range(first, first + size):
                fields = {keys[0]: arrays[0, i], keys[2]: int(labels[i]), "json": {"i": i}}
                if keys[1]:
                    fields[keys[1]] = arrays[1, i]
                writer.write({"__key__": f"n0{i}/image_{i:04d}", **fields})
        fs.pipe_file(f"{path}/part-{number:02d}.tar", packed.getvalue())
        first += size
    return {"latents": arrays[0], "flips": arrays[1], "labels": labels}
