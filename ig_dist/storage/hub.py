"""Weights that others have published: the folders where users put them, and the Hugging Face hub."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ig_dist.errors import ConfigError, first_line
from ig_dist.terminal.extras import missing

TIMEOUT_S = 5.0


def weights_root(kind: Literal["tokenizer", "extractor"]) -> Path:
    """The folder of all tokenizers (extractors): ``$IG_DIST_TOKENIZERS``, or ``~/.cache/ig_dist/tokenizers``."""
    given = os.environ.get(f"IG_DIST_{kind.upper()}S")
    return Path(given).expanduser() if given else Path.home() / f".cache/ig_dist/{kind}s"


@dataclass(frozen=True)
class HubWeights:
    """Weights in a repository on the hub."""

    kind: Literal["tokenizer", "extractor"]
    name: str
    folder: str  # of theirs, in the folder of the kind
    repo: str
    files: Sequence[str]
    extra: str  # of ig-dist, that brings the hub's client

    def fetch(self) -> Path:
        """The folder with the files, in the hub's cache, downloaded if need be.

        Raises:
            ConfigError: they are not to be had, or the hub's client is not installed.
        """
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.utils import get_session
        except ImportError:
            raise missing(self.extra, f"{self.kind} {self.name} needs") from None
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"

        def fetch(**options: Any) -> Path:
            found = [hf_hub_download(self.repo, file, endpoint=endpoint, **options) for file in self.files]
            return Path(found[0]).parent

        try:
            return fetch(local_files_only=True)
        except FileNotFoundError:
            pass
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise self.not_found("it is not in the Hugging Face cache, and HF_HUB_OFFLINE is set")
        try:
            # The hub's own client tries for minutes where there is no network: one request says whether there is.
            url = f"{endpoint}/{self.repo}/resolve/main/{self.files[0]}"
            answer = get_session().head(url, timeout=TIMEOUT_S)
            if answer.status_code >= 400:
                raise OSError(f"status {answer.status_code}")
            return fetch(etag_timeout=TIMEOUT_S)
        except Exception as error:  # of the network, of the hub, or of the disk: each library has its own
            gave = f"{endpoint} gave nothing: {first_line(error)}"
            raise self.not_found(f"it is not in the Hugging Face cache, and {gave}") from None

    def not_found(self, why: str) -> ConfigError:
        """The command that fetches them, and where they may lie."""
        place = str(weights_root(self.kind) / self.folder)
        command = shlex.join(["hf", "download", self.repo, *self.files, "--local-dir", place])
        return ConfigError(
            f"no weights of {self.kind} {self.name}: {why}; where there is a network run `{command}`"
            f" (or put the files into another folder {self.folder} and set IG_DIST_{self.kind.upper()}S to its parent)"
        )
