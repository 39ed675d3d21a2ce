"""Where a tokenizer's weights are found, and the one line that is said where they are not or do not fit."""

import hashlib
import json
import shutil
import socket
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torch import nn

from ig_dist.autoencoders.tokenizers import get_tokenizer
from tests.autoencoders import HUB_NAME, error_of, save_vae

pytestmark = pytest.mark.usefixtures("alone")


def test_unknown_names() -> None:
    for name in ("nowhere/vae", "x" * 300, ""):
        message = error_of(name)
        assert "unknown tokenizer" in message and "the nearest names are" in message
    assert "'sd-vae-ft-ema'" in error_of("sd-vae-ft-emma")


def test_a_name_in_the_tokenizers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "tokenizers"
    save_vae(root / "mine")
    assert get_tokenizer("mine").name == "mine"
    save_vae(root / "sd-vae-ft-ema")
    names = {get_tokenizer(name).name for name in ("sd-vae-ft-ema", HUB_NAME)}
    assert names == {HUB_NAME}
    monkeypatch.delenv("IG_DIST_TOKENIZERS")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/.cache/ig_dist/tokenizers" in error_of("mine")


@pytest.mark.parametrize("name", [HUB_NAME, "sd-vae-ft-ema"])
def test_without_network_the_download_is_named(name: str, tmp_path: Path) -> None:
    message = error_of(name)
    folder = tmp_path / "tokenizers" / "sd-vae-ft-ema"
    files = "config.json diffusion_pytorch_model.safetensors"
    assert f"`hf download {HUB_NAME} {files} --local-dir {folder}`" in message and "HF_HUB_OFFLINE is set" in message


def test_va_vaes_download_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizers" / "va-vae-f16d32"
    file = "vavae-imagenet256-f16d32-dinov2.pt"
    command = f"`hf download hustvl/vavae-imagenet256-f16d32-dinov2 {file} --local-dir {folder}`"
    assert command in error_of("va-vae-f16d32")


def test_a_dead_network_is_given_up_soon(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("ig_dist.storage.hub.TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        for address in ("http://127.0.0.1:9", f"http://127.0.0.1:{silent.getsockname()[1]}"):
            monkeypatch.setenv("HF_ENDPOINT", address)
            began = time.monotonic()
            assert f"{address} gave nothing" in error_of(HUB_NAME)
            assert time.monotonic() - began < 60
    assert capfd.readouterr().err == ""


class Hub(SimpleHTTPRequestHandler):
    """Serves a folder as the hub does: files under /REPO/resolve/main/, with the headers that its client reads."""

    folder: Path
    status = 200

    def do_GET(self) -> None:
        data = (self.folder / Path(self.path).name).read_bytes()
        self.send_response(self.status)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_the_hub_is_asked_last(small: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(Hub, "folder", small[0], raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(Hub, "status", 403)  # as a proxy that lets nobody through
        assert "gave nothing: status 403" in error_of(HUB_NAME)
        monkeypatch.setattr(Hub, "status", 200)
        tokenizer = get_tokenizer(HUB_NAME)
        server.shutdown()
    assert tokenizer.sha256 == get_tokenizer(str(small[0])).sha256
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert get_tokenizer("sd-vae-ft-ema") is tokenizer  # from the cache


def test_weights_in_the_hugging_face_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--stabilityai--sd-vae-ft-ema" / "snapshots" / ("0" * 40)
    save_vae(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    assert get_tokenizer(HUB_NAME).name == HUB_NAME


def test_without_diffusers(small: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(small[0], tmp_path / "copy")  # a path that was not loaded before
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "needs diffusers: pip install 'diffusers" in error_of(str(tmp_path / "copy"))
    assert get_tokenizer("pixel").name == "pixel"


def test_folders_that_are_none(small: tuple[Path, nn.Module], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "should hold config.json and" in error_of(str(tmp_path / "empty"))

    def broken(name: str, file: str, content: bytes | None) -> str:
        folder = tmp_path / name
        shutil.copytree(small[0], folder)
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_bytes(content)
        return error_of(str(folder))

    config = json.loads((small[0] / "config.json").read_text())
    weights = "diffusion_pytorch_model.safetensors"
    assert "No such file" in broken("no weights", weights, None)
    assert "is damaged" in broken("cut weights", weights, (small[0] / weights).read_bytes()[:5000])
    assert "is no config" in broken("no JSON", "config.json", b"{")
    assert "is no config" in broken("a list", "config.json", b"[]")
    for name, change, expected in (
        ("other class", {"_class_name": "VQModel"}, "'VQModel'"),
        ("negative scale", {"scaling_factor": -1}, "positive scale"),
        ("wrong scale", {"scaling_factor": "much"}, "is no config"),
        ("unknown block", {"down_block_types": ["UpUp", "UpUp"]}, "make no autoencoder"),
        ("wider", {"block_out_channels": [32, 96]}, "of another shape: encoder.down_blocks.1"),
        ("deeper", {"layers_per_block": 2}, "missing: encoder.down_blocks.0.resnets.1"),
    ):
        message = broken(name, "config.json", json.dumps({**config, **change}).encode())
        assert expected in message, message


def test_diffusers_names_without_their_config(small: tuple[Path, nn.Module]) -> None:
    assert "give the folder" in error_of(str(small[0] / "diffusion_pytorch_model.safetensors"))
