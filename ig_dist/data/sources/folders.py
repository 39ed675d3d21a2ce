"""Folders of pictures: one sub-folder per class, ImageNet as Kaggle packs it among them."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ig_dist.data.classes import class_words
from ig_dist.data.images import is_picture
from ig_dist.data.sources.source import ByteRange, Found, Listed, file_size, listed_source
from ig_dist.errors import ConfigError

DROPPINGS = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx"}
SPLITS = {"train", "val", "valid", "validation", "test"}
KAGGLE_TRAIN = ("ILSVRC", "Data", "CLS-LOC", "train")
MAPPING = "LOC_synset_mapping.txt"
KIND = "folder of class folders"
_NAMED = 3
_THREADS = 16  # listing waits for the disk, or for the network behind it


def kaggle_source(folder: Path) -> Found | None:
    """ImageNet as Kaggle packs it, given its top folder, its train folder, or one between; None: it is something else.

    Its train pictures; the classes' words are those of its mapping file.

    Raises:
        ConfigError: as ``folder_source``, or a mapping file that is none.
    """
    folder = folder.resolve()
    inner = (folder.joinpath(*KAGGLE_TRAIN[skip:]) for skip in range(len(KAGGLE_TRAIN)))
    given = [folder] if folder.parts[-2:] == KAGGLE_TRAIN[-2:] else []
    train = next((path for path in [*given, *inner] if path.parts[-2:] == KAGGLE_TRAIN[-2:] and path.is_dir()), None)
    if train is None:
        return None
    around = (parent / MAPPING for parent in (train, *train.parents[: len(KAGGLE_TRAIN)]))
    words = next((read_mapping(file) for file in around if file.is_file()), None)
    found = folder_source(train, words, what="ImageNet from Kaggle")
    share = "" if words is None else f" ({len(found.open().classes)} of the {len(words)} classes of {MAPPING})"
    return found._replace(kind=found.kind.replace(KIND, f"ImageNet as from Kaggle{share}"))


def folder_source(folder: Path, words: dict[str, str] | None = None, *, what: str | None = None) -> Found:
    """The files of a folder whose sub-folders are the classes, numbered by sorted name; nested files count.

    A folder without files is no class: the numbers count the others, and the source's kind says what was left out.
    Hidden files and what desktops leave behind are passed over. Nothing is opened but what lies beside the class
    folders: a picture there has no label. The source's name holds a hash over path, size and label of each file; one
    that was replaced by another of the same length is not noticed.

    Args:
        folder: where.
        words: class folder to words; None: those of ImageNet, if its synsets are the class folders.
        what: begins the source's name; None: "folder" and its own name.

    Raises:
        ConfigError: no class folders, pictures beside them, no files, or a folder that cannot be read.
    """
    class_folders = _class_folders(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_files, class_folders))
    empty = [path.name for path, files in zip(class_folders, found, strict=True) if not files]
    class_folders = [path for path in class_folders if path.name not in empty]
    if not class_folders:
        raise ConfigError(f"--source {folder}: its class folders are empty: put the pictures into them")
    listed = []
    for label, (class_folder, files) in enumerate(zip(class_folders, filter(None, found), strict=True)):
        prefix = len(str(class_folder)) - len(class_folder.name)
        listed += [Listed(Path(file).as_posix()[prefix:], label, ByteRange(file, 0, size)) for file, size in files]
    classes = [path.name for path in class_folders]
    class_names = class_words(classes)
    if words is not None:
        unknown = next((name for name in classes if name not in words), None)
        if unknown is not None:
            raise ConfigError(f"--source {folder}: class folder {unknown!r} is not in {MAPPING}: remove one of them")
        class_names = [words[name] for name in classes]
    name = folder.resolve().name.encode(errors="backslashreplace").decode()
    source = listed_source(what or f"folder {name}", listed, classes, class_names)
    some = ", ".join(map(repr, empty[:_NAMED])) + (", ..." if len(empty) > _NAMED else "")
    left_out = f"; {len(empty)} without files left out, class numbers count the others ({some})" if empty else ""
    return Found(f"{KIND}{left_out}", source.name, lambda: source)


def read_mapping(file: Path) -> dict[str, str]:
    """Synset to words, from lines as ``n01440764 tench, Tinca tinca``."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return dict(line.split(" ", 1) for line in lines if line.strip())
    except (OSError, ValueError):
        raise ConfigError(f"{file} is no list of lines `n01440764 tench, Tinca tinca`: restore or remove it") from None


def _class_folders(folder: Path) -> list[Path]:
    layout = f"put the pictures into one sub-folder per class ({folder / 'CLASS' / 'picture.png'})"
    try:
        entries = sorted(path for path in folder.iterdir() if not _is_dropping(path.name))
    except OSError as error:
        raise _unreadable(error) from None
    stray = next((path for path in entries if path.is_file() and is_picture(path)), None)
    if stray is not None:
        raise ConfigError(f"--source {folder} holds pictures without a class ({stray.name}): {layout}")
    class_folders = [path for path in entries if path.is_dir()]
    if not class_folders:
        what = "holds no class folders" if entries else "is empty"
        raise ConfigError(f"--source {folder} {what}: {layout}")
    names = {path.name.lower() for path in class_folders}
    if "train" in names and names <= SPLITS:
        train = next(path for path in class_folders if path.name.lower() == "train")
        raise ConfigError(f"--source {folder} holds splits, not classes: use --source {train}")
    for path in class_folders:
        try:
            path.name.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"--source {folder}: class folder {path.name!r} is not UTF-8: rename it") from None
    return class_folders


def _files(class_folder: Path) -> list[tuple[str, int]]:
    """(path, size) of all files below a class folder, sorted. Links to folders are followed, never into a circle."""
    found, seen = list[tuple[str, int]](), set[str]()

    def fail(error: OSError) -> None:
        raise _unreadable(error)

    for current, folders, names in os.walk(class_folder, onerror=fail, followlinks=True):
        real = os.path.realpath(current)
        if real in seen:
            raise ConfigError(f"--source: {current} leads to {real}, which is counted already: remove the link")
        seen.add(real)
        folders[:] = [name for name in folders if not _is_dropping(name)]
        files = (os.path.join(current, name) for name in names if not _is_dropping(name))  # noqa: PTH118
        found += [(file, file_size(file)) for file in files]
    return sorted(found)


def _is_dropping(name: str) -> bool:
    return name.startswith(".") or name.lower() in DROPPINGS


def _unreadable(error: OSError) -> ConfigError:
    return ConfigError(f"--source: {error.filename} cannot be read ({error.strerror}): make it readable")
