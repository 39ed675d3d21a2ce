"""Paths and URLs: what they are called, and what must not be in one."""

import re
from pathlib import Path
from typing import Any

import fsspec

from ig_dist.errors import ConfigError

LOCAL = fsspec.filesystem("file")

WEB = ("http", "https")


def refuse_credentials(url: str, what: str) -> None:
    """URLs are stored and shown: refuse one that holds a password; ``what`` names the setting."""
    for match in re.finditer(r"(\w+)://([^/?#\s]*)@", url):
        if ":" in match[2] or match[1] in WEB:
            hidden = url.replace(match[0], f"{match[1]}://***@")
            raise ConfigError(
                f"{what} {hidden}: no credentials in a URL, which is stored and shown: take them out and give them to"
                " the protocol's own chain (https: ~/.netrc; S3: AWS_PROFILE or ~/.aws; others: the environment)"
            )


def once(fs: Any) -> Any:
    """The file system that tries once."""
    return getattr(fs, "wrapped", fs)


def is_local(fs: Any) -> bool:
    """Whether the file system is this machine's own."""
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def full_url(fs: Any, path: str) -> str:
    """What a user calls the file: a local path, or the URL."""
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


def is_file(entry: dict[str, Any]) -> bool:
    """Whether an fsspec entry is a file, or a local link to one."""
    return entry["type"] == "file" or bool(entry.get("islink") and Path(entry["name"]).is_file())
