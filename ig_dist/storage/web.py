"""What is particular to the web: a server may answer with more than was asked for, and without end."""

from __future__ import annotations

from typing import Any

import fsspec.asyn

_PART_BYTES = 2**16


def get_range(fs: Any, url: str, start: int, size: int, timeout_s: float) -> memoryview:
    """Some bytes of a file, or one more, which says that the server sends others than these.

    fsspec reads an answer to its end, however far that is.
    """

    async def get() -> bytearray:
        options = dict(fs.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{start + size - 1}"}
        session, data = await fs.set_session(), bytearray()
        async with session.get(fs.encode_url(url), headers=headers, **options) as answer:
            fs._raise_not_found_for_status(answer, url)
            async for part in answer.content.iter_chunked(_PART_BYTES):
                data += part[: size + 1 - len(data)]
                if len(data) > size:
                    break
        return data

    return memoryview(fsspec.asyn.sync(fs.loop, get, timeout=timeout_s))
