"""What is particular to S3: one streaming GET into memory, one PUT that is checked, uploads that nobody finishes."""

import base64
import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http import HTTPStatus
from typing import Any

from ig_dist.storage.faults import Patience, retried, under

SINGLE_PUT_BYTES = 5 * 2**30  # S3's limit. One PUT is atomic and leaves no half upload behind.

_PART_BYTES = 2**20

_CLIENT_LOCK = threading.Lock()


def client_config(patience: Patience) -> dict[str, Any]:
    """Settings of botocore. No retries of its own: every fault reaches ``retried``, which counts and bounds them."""
    return {
        "connect_timeout": min(10.0, patience.stall_s),
        "read_timeout": patience.stall_s,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "max_pool_connections": 64,
    }


def get_parts(
    fs: Any, path: str, start: int, size: int, room: Callable[[], memoryview], patience: Patience
) -> Iterator[memoryview]:
    """One streaming GET into the room that there is, in this thread.

    s3fs hands every chunk through the one event loop of the process, joins them, and needs the GIL for each; with plain
    sockets reader threads read side by side, from the socket straight into their memory (urllib3 copies twice).
    """
    import botocore.exceptions
    import s3fs.errors

    try:
        # what is left of a broken answer must not reach the next request
        with closing(_ask(fs, path, f"bytes={start}-{start + size - 1}", patience)) as body:
            raw = body._raw_stream
            plain: Any = getattr(raw, "_fp", None)  # http.client's answer
            source = plain if hasattr(plain, "readinto") and not getattr(raw, "chunked", True) else body
            while (here := room()[:_PART_BYTES]) and (count := source.readinto(here)):
                size -= count
                yield here[:count]
            if not size:
                raw.release_conn()  # the connection serves the next request
    except botocore.exceptions.ClientError as error:
        raise s3fs.errors.translate_boto_error(error) from error


def _ask(fs: Any, path: str, asked: str, patience: Patience) -> Any:
    """The body of a GET.

    Botocore finds out anew for each request where a bucket is and what to say to it, for 1 to 2 ms of the processor,
    which the interpreter's lock hands to one thread at a time. Here the URL is kept, and signed each time. Where the
    answer is not the bytes, as with a bucket that has moved, botocore asks in its own way, from now on.
    """
    from botocore.awsrequest import AWSRequest
    from botocore.exceptions import ClientError
    from botocore.response import StreamingBody

    client = _client(fs, patience)
    bucket, key, _ = fs.split_path(path)
    place = {"Bucket": bucket, "Key": key}
    if path not in fs.urls:
        fs.urls[path] = client.generate_presigned_url("get_object", Params=place).partition("?")[0]
    if fs.urls[path]:
        request = AWSRequest("GET", fs.urls[path], {"Range": asked}, stream_output=True)
        client._request_signer.sign("GetObject", request)
        answer = client._endpoint.http_session.send(request.prepare())
        if answer.status_code == HTTPStatus.PARTIAL_CONTENT:
            return StreamingBody(answer.raw, None)
        answer.raw.close()
        if answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            said = {"Code": str(answer.status_code), "Message": answer.raw.reason}
            metadata = {"HTTPStatusCode": answer.status_code}
            raise ClientError({"Error": said, "ResponseMetadata": metadata}, "GetObject")
        fs.urls[path] = ""
    return client.get_object(**place, Range=asked)["Body"]


def _client(fs: Any, patience: Patience) -> Any:
    """A synchronous client with the address and credentials of an s3fs file system; it may be used by many threads."""
    import botocore.config
    import botocore.session

    with _CLIENT_LOCK:
        if not hasattr(fs, "synchronous_client"):  # lives as long as the file system, which fsspec keeps
            config = botocore.config.Config(
                **client_config(patience), signature_version=botocore.UNSIGNED if fs.anon else None
            )
            session = botocore.session.get_session()
            if fs.session:  # it has parsed what botocore knows of S3, which takes 0.1 s
                session.register_component("data_loader", fs.session.get_component("data_loader"))
            fs.urls = {}
            fs.synchronous_client = session.create_client(
                "s3",
                endpoint_url=fs.endpoint_url,
                aws_access_key_id=fs.key,
                aws_secret_access_key=fs.secret,
                aws_session_token=fs.token,
                config=config,
            )
    return fs.synchronous_client


def md5(data: bytes | memoryview) -> str:
    """The hash that S3 holds an upload against."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def abort_orphaned_uploads(fs: Any, path: str, patience: Patience | None = None) -> int:
    """Abort the multipart uploads of a path, and below it, that nobody will finish; the number of them.

    A process that is killed while it uploads leaves parts that cost storage and are listed nowhere. Call it only
    when nobody writes there any more. Nothing to do but on S3.
    """
    if "s3" not in fs.protocol:
        return 0
    fs = under(fs, patience)
    bucket, prefix, _ = fs.split_path(path)

    def call(method: str, **arguments: Any) -> Any:
        return retried(fs, path, lambda: fs.call_s3(method, Bucket=bucket, **arguments))

    count, page = 0, {"IsTruncated": True}
    markers: dict[str, str] = {}
    while page.get("IsTruncated"):  # at most 1,000 a page
        page = call("list_multipart_uploads", Prefix=prefix, **markers)
        uploads = page.get("Uploads") or []
        for upload in (one for one in uploads if not prefix or f"{one['Key']}/".startswith(f"{prefix}/")):
            with contextlib.suppress(FileNotFoundError):  # it is gone, and the answer was lost
                call("abort_multipart_upload", Key=upload["Key"], UploadId=upload["UploadId"])
            count += 1
        markers = {"KeyMarker": page.get("NextKeyMarker", ""), "UploadIdMarker": page.get("NextUploadIdMarker", "")}
    return count
