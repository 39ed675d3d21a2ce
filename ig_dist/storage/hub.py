"""Files of a repository on the Hugging Face hub: from its cache, or downloaded once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ig_dist.errors import first_line

TIMEOUT_S = 5.0


class NotOnHubError(Exception):
    """The files are not to be had; the text says why, as the end of a sentence."""


def hub_files(repo: str, files: Sequence[str]) -> list[Path]:
    """Where the files are in the cache, downloaded if need be.

    Args:
        repo: as in ``stabilityai/sd-vae-ft-ema``.
        files: their names in it.

    Raises:
        ImportError: the hub's client is not installed.
        NotOnHubError: they are neither in the cache nor to be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import get_session

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"

    def fetch(**options: Any) -> list[Path]:
        return [Path(hf_hub_download(repo, file, endpoint=endpoint, **options)) for file in files]

    try:
        return fetch(local_files_only=True)
    except FileNotFoundError:
        pass
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise NotOnHubError("it is not in the Hugging Face cache, and HF_HUB_OFFLINE is set")
    try:
        # The hub's own client tries for minutes where there is no network: one request says whether there is.
        answer = get_session().head(f"{endpoint}/{repo}/resolve/main/{files[0]}", timeout=TIMEOUT_S)
        if answer.status_code >= 400:
            raise OSError(f"status {answer.status_code}")
        return fetch(etag_timeout=TIMEOUT_S)
    except Exception as error:  # of the network, of the hub, or of the disk: each library has its own
        reason = first_line(error)
        raise NotOnHubError(f"it is not in the Hugging Face cache, and {endpoint} gave nothing: {reason}") from None
