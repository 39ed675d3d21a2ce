"""Sources of images: every form of an ImageNet gives the same files, and what is wrong is one line."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from ig_dist.data.classes import class_words, imagenet_classes
from ig_dist.data.images import RejectedImage
from ig_dist.data.sources import find_source
from ig_dist.data.sources.source import NO_FILE, ByteRange, Source, read_bytes
from ig_dist.errors import ConfigError, DataError
from tests import imagenet_like
from tests.imagenet_like import SYNSETS


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp("form") / name) for name, make in imagenet_like.FORMS.items()}


def contents(source: Source) -> list[tuple[int, bytes]]:
    read = (read_bytes(source.item(i)) for i in range(len(source.labels)))  # type: ignore[arg-type]
    return sorted(zip(source.labels.tolist(), read, strict=True))


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_the_list_of_imagenet_classes() -> None:
    classes = imagenet_classes()
    assert len(classes) == 1000 and list(classes) == sorted(classes)
    assert next(iter(classes.items())) == ("n01440764", "tench, Tinca tinca")
    assert list(classes.items())[207] == ("n02099601", "golden retriever")
    assert list(classes.items())[999] == ("n15075141", "toilet tissue, toilet paper, bathroom tissue")
    assert classes["n03126707"] == classes["n02012849"] == "crane"  # the machine and the bird
    assert class_words([str(i) for i in range(1000)]) == list(classes.values())
    assert class_words(["n02099601", "n01440764"]) == ["golden retriever", "tench, Tinca tinca"]
    assert class_words([str(i) for i in range(999)]) is None and class_words(["cat", "dog"]) is None


@pytest.mark.parametrize("form", imagenet_like.FORMS)
def test_every_form_holds_the_same_files_and_labels(form: str, forms: dict[str, Path], tmp_path: Path) -> None:
    found = find_source(str(forms[form]), str(tmp_path))
    source = found.open()
    assert contents(source) == sorted((file.label, file.data) for file in imagenet_like.files())
    assert source.name == found.name and "240 files, sha256 " in source.name
    words = [imagenet_classes()[synset] for synset in SYNSETS]
    by_number = form in ("WebDataset", "parquet")
    assert source.classes == ([str(i) for i in range(20)] if by_number else SYNSETS)
    assert source.class_names == (None if form == "WebDataset" else words)
    # again, it is the same source
    assert find_source(str(forms[form]), str(tmp_path)).name == source.name


def test_a_thousand_numbered_classes_are_imagenets(tmp_path: Path) -> None:
    members = {name: data for i in range(1000) for name, data in ((f"{i}.jpg", b"x"), (f"{i}.cls", b"%d" % i))}
    source = find_source(str(tar_of(tmp_path / "a.tar", members))).open()
    assert source.classes[207] == "207" and source.class_names is not None
    assert source.class_names[207] == "golden retriever"


def test_kaggles_folder_from_any_of_its_levels(forms: dict[str, Path]) -> None:
    top = forms["Kaggle"]
    levels = [top, top / "ILSVRC", top / "ILSVRC/Data", top / "ILSVRC/Data/CLS-LOC", top / "ILSVRC/Data/CLS-LOC/train"]
    found = [find_source(str(level)) for level in levels]
    assert len({source.name for source in found}) == 1
    assert {source.kind for source in found} == {
        "ImageNet as from Kaggle (20 of the 20 classes of LOC_synset_mapping.txt)"
    }


def test_a_folder_of_class_tars_is_the_tar_of_them(forms: dict[str, Path], tmp_path: Path) -> None:
    with tarfile.open(forms["class tars"]) as tar:
        tar.extractall(tmp_path, filter="data")
    source = find_source(str(tmp_path)).open()
    assert contents(source) == contents(find_source(str(forms["class tars"])).open())


def test_shards_by_glob_and_by_braces(forms: dict[str, Path]) -> None:
    folder = forms["WebDataset"]
    whole = find_source(str(folder)).open()
    for pattern in (f"{folder}/train-*.tar", f"{folder}/train-{{00000..00002}}.tar", f"file://{folder}"):
        assert contents(find_source(pattern).open()) == contents(whole)


@pytest.mark.parametrize("form", ["WebDataset", "parquet"])
def test_a_remote_source_is_copied_once(form: str, forms: dict[str, Path], tmp_path: Path) -> None:
    remote = fsspec.filesystem("memory")
    url = f"/{tmp_path.name}"
    folder = forms[form] / ("data" if form == "parquet" else "")
    for file in folder.iterdir():
        remote.pipe_file(f"{url}/{file.name}", file.read_bytes())
    found = find_source(f"memory:/{url}", str(tmp_path))
    assert not list(tmp_path.iterdir())  # nothing is copied to know its name
    source = found.open()
    assert contents(source) == contents(find_source(str(forms[form]), str(tmp_path / "other")).open())
    (spool,) = (path for path in tmp_path.iterdir() if path.name != "other")
    before = {path: path.stat().st_mtime_ns for path in spool.iterdir()}
    assert contents(find_source(f"memory:/{url}", str(tmp_path)).open()) == contents(source)
    assert {path: path.stat().st_mtime_ns for path in spool.iterdir()} == before
    # a part tells the size of the whole
    assert found.open_part is not None
    part, share = found.open_part(str(tmp_path / "part"))
    assert 0.3 < len(part.labels) / len(source.labels) < 0.6 and 0.2 < share < 0.6


def test_the_name_follows_paths_sizes_and_labels(tmp_path: Path) -> None:
    def name(members: dict[str, bytes]) -> str:
        return find_source(str(tar_of(tmp_path / "a.tar", members))).name

    plain = {"a.jpg": b"1", "a.cls": b"0", "b.jpg": b"22", "b.cls": b"1"}
    names = [
        name(plain),
        name({**plain, "a.cls": b"1", "b.cls": b"0"}),
        name({**plain, "b.jpg": b"333"}),
        name({"c.jpg": b"1", "c.cls": b"0", "b.jpg": b"22", "b.cls": b"1"}),
    ]
    assert len(set(names)) == 4 and name(plain) == names[0]


def test_a_file_that_changed_since_it_was_listed_is_no_verdict(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"12345")
    assert read_bytes(ByteRange(str(file), 0, 5)) == b"12345"
    assert read_bytes(ByteRange(str(file), 2, 2)) == b"34"
    for size in (4, 6):
        with pytest.raises(DataError, match="changed while"):
            read_bytes(ByteRange(str(file), 0, size))
    with pytest.raises(DataError, match="changed while"):
        read_bytes(ByteRange(str(file), 3, 9))
    with pytest.raises(DataError, match="run the same command again"):
        read_bytes(ByteRange(str(tmp_path / "gone.jpg"), 0, 5))
    with pytest.raises(RejectedImage, match="not a regular file"):
        read_bytes(ByteRange(str(file), 0, NO_FILE))


def test_a_folder_of_links_as_in_the_hubs_cache(forms: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "snapshot/data").mkdir(parents=True)
    for file in (forms["parquet"] / "data").iterdir():
        (tmp_path / "snapshot/data" / file.name).symlink_to(file)
    found = find_source(str(tmp_path / "snapshot"), str(tmp_path / "spool"))
    assert found.kind.startswith("2 parquet files, ") and len(found.open().labels) == 240


def test_links_to_nowhere_and_pipes_are_listed_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    source = find_source(str(tmp_path)).open()
    assert source.paths == ["a/link.jpg"] and source.item(0).size == NO_FILE  # type: ignore[union-attr]


def test_folders_without_files_are_no_classes(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/.DS_Store", "c/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "New folder").mkdir()
    found = find_source(str(tmp_path))
    left_out = "2 without files left out, class numbers count the others ('New folder', 'b')"
    assert found.kind == f"folder of class folders; {left_out}"
    source = found.open()
    assert (source.classes, source.labels.tolist(), source.paths) == (["a", "c"], [0, 1], ["a/1.png", "c/2.png"])


# what is wrong: how it is made, and what the line must say
def _parquet(columns: dict[str, list[object]]) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), root / "a.parquet")
        return root / "a.parquet"

    return make


def _truncated(root: Path) -> Path:
    whole = imagenet_like.class_tars(root)
    whole.write_bytes(whole.read_bytes()[:300_000])
    return whole


def _compressed(root: Path) -> Path:
    (root / "a.tar").write_bytes(gzip.compress(tar_of(root / "b", {"a.jpg": b"1"}).read_bytes()))
    return root / "a.tar"


def _mixed(root: Path) -> Path:
    tar_of(root / "a.tar", {})
    (root / "b.parquet").touch()
    return root


def _mapping(root: Path) -> Path:
    (imagenet_like.kaggle(root) / "LOC_synset_mapping.txt").write_text("n01440764 tench\n")
    return root


def _splits(root: Path) -> Path:
    for split in ("train", "val"):
        (root / split / "cat").mkdir(parents=True)
    return root


BAD: dict[str, tuple[Callable[[Path], Path | str], list[str]]] = {
    "empty tar": (lambda root: tar_of(root / "a.tar", {}), ["a.tar holds no pictures", "n01440764.tar", ".cls"]),
    "empty file": (lambda root: Path(shutil.copy("/dev/null", root / "a.tar")), ["a.tar is not a readable tar"]),
    "compressed": (_compressed, ["a.tar is not a readable tar (is compressed", "unpack"]),
    "cut off": (_truncated, ["train.tar is not a readable tar (is cut off at byte 300000", "copy it"]),
    "no pictures": (lambda root: tar_of(root / "a.tar", {"a.txt": b"1"}), ["a.tar holds no pictures"]),
    "no label": (lambda root: tar_of(root / "a.tar", {"x/a.jpg": b"1"}), ["sample x/a of a.tar has no .cls"]),
    "no number": (lambda root: tar_of(root / "a.tar", {"a.jpg": b"1", "a.cls": b"cat"}), ["a.cls", "cat", "number"]),
    "two pictures": (lambda root: tar_of(root / "a.tar", {"a.jpg": b"1", "a.png": b"1"}), ["a of a.tar has two"]),
    "negative label": (lambda root: tar_of(root / "a.tar", {"a.jpg": b"1", "a.cls": b"-1"}), ["label -1", "mend"]),
    "counts from 1": (
        lambda root: tar_of(root / "a.tar", {"a.jpg": b"1", "a.cls": b"1"}),
        ["1 of 2 classes have no image (the first: 0)", "from 0 without gaps"],
    ),
    "empty class tar": (lambda root: tar_of(root / "n01440764.tar", {}), ["n01440764.tar is empty"]),
    "other columns": (
        _parquet({"picture": [b"1"], "label": [0]}),
        ["a.parquet has the columns picture, label", "image {bytes, path} and label"],
    ),
    "no struct": (_parquet({"image": [b"1"], "label": [0]}), ["a.parquet has the columns image, label"]),
    "null label": (_parquet({"image": [{"bytes": b"1"}], "label": pyarrow.array([None])}), ["row 0", "None"]),  # type: ignore[dict-item]
    "no parquet": (lambda root: Path(shutil.copy("/etc/hostname", root / "a.parquet")), ["not a readable parquet"]),
    "both kinds": (_mixed, ["both .tar and .parquet"]),
    "foreign mapping": (_mapping, ["'n01698640' is not in LOC_synset_mapping.txt"]),
    "splits": (_splits, ["holds splits, not classes", "use --source", "/train"]),
    "other file": (lambda root: Path(shutil.copy("/etc/hostname", root / "a.zip")), ["is a file", "use `digits`"]),
    "no match": (lambda root: root / "train-*.tar", ["no .tar or .parquet files there"]),
    "no such url": (lambda root: "memory://nowhere", ["memory://nowhere: no .tar or .parquet files there"]),
    "unknown protocol": (lambda root: "s4://nowhere/*.tar", ["s4"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_are_one_line(case: str, tmp_path: Path) -> None:
    make, words = BAD[case]
    (tmp_path / "root").mkdir()
    src = str(make(tmp_path / "root"))
    with pytest.raises(ConfigError) as error:
        find_source(src, str(tmp_path / "spool")).open()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), error.value


def test_no_room_for_copies(forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"copying the source takes .* kB, .* has 1\.0 kB free: .*--spool"):
        find_source(str(forms["parquet"]), str(tmp_path)).open()
