"""Images to encode: what SRC is, told from what lies there.

digits                          the 8 x 8 digits of scikit-learn
fashion-mnist                   the 60,000 pictures of Fashion-MNIST to train on; its 10,000 others: fashion-mnist-test
ILSVRC2012_img_train.tar        ImageNet's tar of class tars, read in place
FOLDER                          ImageNet as from Kaggle; class folders; tars; parquet files; IDX files as MNIST has
'data/train-{0000..0146}.tar'   WebDataset shards: one, a glob, a brace range; also s3://... and other URLs
'data/train-*.parquet'          parquet shards as on Hugging Face, local or remote
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from braceexpand import braceexpand

from ig_dist.data.sources.folders import folder_source, kaggle_source
from ig_dist.data.sources.idx import NAMED, find_idx, idx_native, idx_source
from ig_dist.data.sources.source import DIGITS, Found, Native, Source, digits
from ig_dist.data.sources.spool import SourceFile, file_version, spooled_source
from ig_dist.data.sources.tars import TarFile, tar_source
from ig_dist.errors import ConfigError, first_line
from ig_dist.storage.faults import PATIENCE, Patience
from ig_dist.storage.files import open_url
from ig_dist.storage.urls import is_file, is_local, refuse_credentials

__all__ = ["Found", "Native", "Source", "find_source", "is_missing", "is_name", "native_format", "refuse_missing"]

FORMS = (
    "`digits`, `fashion-mnist`, a folder with one sub-folder of pictures per class, ILSVRC2012_img_train.tar,"
    " the folder from Kaggle, WebDataset tars, parquet files or a folder of IDX files"
)
_SUFFIXES = (".tar", ".parquet")
_OTHER_SPLITS = re.compile(r"(^|[^a-z])(val|valid|validation|test)([^a-z]|$)")


def find_source(src: str, spool_base: str | None = None, patience: Patience = PATIENCE) -> Found:
    """Recognise a source.

    Args:
        src: see above.
        spool_base: folder for copies of what cannot be read in place; None: in the temporary folder.
        patience: how long faults of a storage are borne; its ``stop`` ends what threads still try.

    Raises:
        ConfigError: nothing there, or nothing that can be encoded.
    """
    refuse_missing(src)
    if src == "digits":
        source = digits()
        return Found("scikit-learn's digits", source.name, lambda: source)
    idx = find_idx(src)
    if idx is not None:
        return idx_source(idx)
    src = src.removeprefix("file://")
    path = Path(src)
    if "://" not in src and path.is_dir():
        if found := kaggle_source(path):
            return found
        files = _files_in_folder(path)
        return _file_source(src, files, spool_base, patience) if files else folder_source(path)
    if files := _listed_files(src, patience):
        return _file_source(src, files, spool_base, patience)
    if path.is_file():
        raise ConfigError(f"--source {src!r} is a file, no .tar or .parquet: use {FORMS}")
    denied = " (or not for you: ~/.netrc has passwords)" if src.startswith("http") else ""
    raise ConfigError(f"--source {src}: no .tar or .parquet files there{denied}; use {FORMS}")


def is_name(src: str) -> bool:
    """Whether SRC is a data set's name, no place."""
    return src == "digits" or src in NAMED


def native_format(src: str) -> Native | None:
    """Of a source of pixels their format, without reading them; None: pictures, which are cut to a size.

    Raises:
        ConfigError: the files of a data set's name are not there, or damaged.
    """
    if src == "digits":
        return DIGITS
    idx = find_idx(src)
    return None if idx is None else idx_native(idx)


def is_missing(src: str) -> bool:
    """Whether a source is a local path where nothing is: no name, no URL and no pattern."""
    return not (is_name(src) or "://" in src or glob.has_magic(src) or "{" in src or Path(src).exists())


def refuse_missing(src: str) -> None:
    """Say at once that a local path is not there, or that a URL holds credentials."""
    refuse_credentials(src, "--source")
    if is_missing(src):
        raise ConfigError(f"--source {src!r} does not exist: use {FORMS}")


def _file_source(src: str, files: Sequence[SourceFile], spool_base: str | None, patience: Patience) -> Found:
    """Tars or parquet files; local tars are read in place, all others through copies."""
    is_parquet = files[0].name.endswith(".parquet")
    what = f"{'parquet' if is_parquet else 'tars'} {PurePosixPath(src.rstrip('/')).name}"
    if not is_local(files[0].fs) or is_parquet:
        return spooled_source(what, files, spool_base, patience)
    kind, source = tar_source([TarFile(file.path, file.name) for file in files], what)
    return Found(kind, source.name, lambda: source)


def _files_in_folder(folder: Path) -> list[SourceFile]:
    """The tars or parquet files in a local folder or in its ``data``, as Hugging Face lays it out; or none.

    Where they lie among other folders, those are the classes.
    """
    try:
        visible = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError as error:
        raise ConfigError(f"--source: {folder} cannot be read ({error.strerror}): make it readable") from None
    if visible and folder / "data" not in visible:
        return []
    fs, path = open_url(str(folder / "data" if visible else folder), "--source")
    return _chosen(str(folder), fs, fs.ls(path, detail=True))


def _listed_files(src: str, patience: Patience) -> list[SourceFile]:
    """The tars or parquet files that SRC names: one, a URL's, a glob's or a brace range's, in sorted order."""
    fs, _ = open_url(src, "--source", patience, web=True)
    web = "http" in fs.protocol
    try:
        patterns = list(braceexpand(src, escape=False))
    except ValueError:  # a brace that is only a letter
        patterns = [src]
    entries: list[dict[str, Any]] = []
    for pattern in patterns:
        path = open_url(pattern, "--source", patience, web=True)[1]
        try:
            if glob.has_magic(path):
                entries += fs.glob(path, detail=True).values()
            elif web:  # looking for a folder would read the file
                entries.append(fs.info(path))
            else:
                entries += fs.ls(path, detail=True) if fs.isdir(path) else [fs.info(path)]
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"--source {src} cannot be read ({first_line(error)})") from None
    return _chosen(src, fs, entries)


def _chosen(src: str, fs: Any, entries: Sequence[dict[str, Any]]) -> list[SourceFile]:
    """The tars or parquet files among fsspec's entries; of several splits the one called train."""
    found: dict[str, SourceFile] = {}
    for entry in entries:
        path = entry["name"]
        if path.endswith(_SUFFIXES) and is_file(entry):  # or a link: the hub's cache is a folder of them
            if entry["size"] is None:
                raise ConfigError(f"--source {path}: the server does not tell its size: download it and use the copy")
            found[path] = SourceFile(fs, path, PurePosixPath(path).name, int(entry["size"]), file_version(entry))
    files = [found[path] for path in sorted(found)]
    if {PurePosixPath(file.name).suffix for file in files} == set(_SUFFIXES):
        raise ConfigError(f"--source {src} holds both .tar and .parquet files: name one kind (e.g. '{src}/*.tar')")
    if any("train" in file.name.lower() for file in files):
        return [file for file in files if not _OTHER_SPLITS.search(file.name.lower())]
    return files
