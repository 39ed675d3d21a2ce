"""Parquet shards as Hugging Face lays out image data sets: columns ``image`` {bytes, path} and ``label``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ig_dist.data.shards import pack_file, tar_end
from ig_dist.data.sources.spool import SourceFile, source_reader
from ig_dist.data.sources.tars import LABEL, PICTURES
from ig_dist.errors import ConfigError
from ig_dist.storage.faults import Patience, unreadable
from ig_dist.terminal.extras import missing
from ig_dist.terminal.progress import Advance

_ROWS = 256  # read at a time
_MOST_TIMES, _MOST_BYTES = 16, 64 << 20  # of the file's size, and besides, that its pictures may take


def parquet_classes(file: SourceFile, patience: Patience) -> list[str] | None:
    """The names of the classes by label, from the ``huggingface`` key of the file's metadata; None: it has none.

    Raises:
        ConfigError: no parquet, or not these columns.
    """
    with _opened(file, patience) as opened:
        metadata = opened.schema_arrow.metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def parquet_rows(files: Sequence[SourceFile], patience: Patience) -> list[tuple[str, int, int]]:
    """(name of the file, its size, label) of every row. The images are not read."""
    rows: list[tuple[str, int, int]] = []
    for file in files:
        with _opened(file, patience) as opened:
            labels = opened.read(columns=["label"]).column("label").to_pylist()
        rows += [(file.name, file.size, _checked(label, file, row)) for row, label in enumerate(labels)]
    return rows


def parquet_to_tar(file: SourceFile, target: Path, patience: Patience, advance: Advance) -> None:
    """Write the rows of a parquet file as WebDataset samples, named by their row."""
    with _opened(file, patience, advance) as opened, target.open("wb") as tar:
        row = 0
        for batch in opened.iter_batches(batch_size=_ROWS, columns=["image", "label"]):
            for image, label in zip(batch.column("image"), batch.column("label"), strict=True):
                fields = image.as_py() or {}
                # The content tells the format; the name only has to be a picture's. Without bytes it is rejected later.
                suffix = PurePosixPath(str(fields.get("path") or "")).suffix.lower().removeprefix(".")
                suffix = suffix if suffix in PICTURES else "jpg"
                pack_file(tar, f"{row:08d}.{suffix}", fields.get("bytes") or b"")
                pack_file(tar, f"{row:08d}.{LABEL}", b"%d" % _checked(label.as_py(), file, row))
                row += 1
                if tar.tell() > _MOST_TIMES * file.size + _MOST_BYTES:
                    raise ConfigError(
                        f"--source: {file.name} has {file.size} bytes and unfolds to more than {tar.tell()}: pictures"
                        " do not, fetch it again"
                    )
        tar.write(tar_end(tar.tell()))


def _checked(label: Any, file: SourceFile, row: int) -> int:
    if not isinstance(label, int):
        raise ConfigError(f"--source: row {row} of {file.name} has the label {label!r}, not a class number: mend it")
    return label


@contextmanager
def _opened(file: SourceFile, patience: Patience, advance: Callable[[int], object] = lambda _: None) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing("parquet", "reading parquet needs") from None
    try:
        with source_reader(file, patience, advance) as raw:
            opened = pyarrow.parquet.ParquetFile(raw)
            schema = opened.schema_arrow
            fields = {field.name: field.type for field in schema}
            image = fields.get("image")
            if (
                "label" not in fields
                or image is None
                or not pyarrow.types.is_struct(image)
                or "bytes" not in image.names
                or image.field("bytes").type not in (pyarrow.binary(), pyarrow.large_binary())
            ):
                raise ConfigError(
                    f"--source: {file.name} has the columns {', '.join(schema.names)}; needed are image"
                    " {bytes, path} and label: rename them, or convert the data set"
                )
            yield opened
    except (pyarrow.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise ConfigError(f"--source: {file.name} is not a readable parquet file ({error}): fetch it again") from None
    except OSError as error:
        raise unreadable(file.fs, file.path, error) from None
