"""Files of web servers, http:// and https://, through the client of fsspec (aiohttp).

fsspec's own calls are not used: ``info`` reads a failing server as a missing file, and its ranges
do not notice that a file was replaced. Each request here asks for a range, which also tells the
size; HEAD is not used, as signed addresses refuse it. Proxies come from the environment
(``HTTPS_PROXY``), user names and passwords from ``~/.netrc``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from pipeline.io.read_only import Place, Store
from pipeline.io.s3 import StorageError

WHOLE_BYTES = 256 << 20
"""Most bytes of a file that a server sends only as a whole: it is held in memory."""
_MAY_PASS = {408, 425, 429}
"""Answers below 500 after which the same request may succeed."""


def store() -> Store:
    """Return the store of this process."""
    return WebServers()


class WebServers:
    """A `Store` of files on web servers. They have no folders."""

    def __init__(self):
        import aiohttp
        from fsspec.implementations.http import HTTPFileSystem

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
        self._client = HTTPFileSystem(
            client_kwargs={"trust_env": True, "timeout": timeout},
            skip_instance_cache=True,
        )

    def look(self, uri: str) -> Place:
        return self._ask(uri, 0, 1, is_look=True)[0]

    def read(self, uri: str, start: int, end: int, known: Place) -> bytes:
        place, data = self._ask(uri, start, end)
        if (place.size, place.stamp) != (known.size, known.stamp):
            raise StorageError(f"{uri} was changed while it was read; run again")
        return data

    def list_files(self, uri: str, recursive: bool) -> list[str]:
        raise StorageError(
            f"{uri}: web servers do not list files, so name each file (uri takes a list)"
        )

    def _ask(
        self,
        uri: str,
        start: int,
        end: int,
        is_look: bool = False,
    ) -> tuple[Place, bytes]:
        """Ask for a range; return what the answer says of the file, and the bytes.

        The answer of a server that sends files only as a whole is read where its content is asked
        for, and where only the content tells what the file is.
        """
        from fsspec.asyn import sync

        answer: Any = sync(self._client.loop, self._get, uri, start, end, is_look)
        return answer

    async def _get(self, uri: str, start: int, end: int, is_look: bool) -> tuple[Place, bytes]:
        import yarl

        session = await self._client.set_session()
        plain, headers = self._request(uri)
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        # an address with %-signs is sent as it is written: its signature may cover them
        address = yarl.URL(plain, encoded="%" in plain)
        authorization = headers.pop("Authorization", None)
        sent = session.get(
            address,
            headers=headers,
            middlewares=[_authorized(address, authorization)] if authorization else [],
        )
        async with sent as answer:
            said = answer.headers.get("Content-Range", "")
            total = re.fullmatch(r"bytes (?:\*|(\d+)-\d+)/(\d+)", said)
            if answer.status == 416 and total and total[1] is None:  # an empty file has no range
                return self._place(uri, int(total[2]), answer.headers), b""
            check_status(answer.status, answer.reason)
            if answer.headers.get("Content-Encoding", "identity") not in ("", "identity"):
                raise StorageError(
                    f"{uri}: the server compresses what it sends; download it and name the local "
                    "file"
                )
            if answer.status == 206:
                if total is None or total[1] is None or int(total[1]) != start:
                    raise StorageError(f"{uri}: the server sends another range than was asked for")
                place = self._place(uri, int(total[2]), answer.headers)
                return place, await answer.read()
            size = answer.headers.get("Content-Length")
            if size is not None and is_look and _validator(answer.headers):
                return self._place(uri, int(size), answer.headers)._replace(only_whole=True), b""
            data = await self._read_whole(uri, answer)
            stamp = _validator(answer.headers) or f"sha256:{hashlib.sha256(data).hexdigest()}"
            return Place(len(data), stamp, only_whole=True), data[start:end]

    def _request(self, uri: str) -> tuple[str, dict[str, str]]:
        """Return the address of a file, and headers of the requests for it."""
        return uri, {}

    async def _read_whole(self, uri: str, answer: Any) -> bytes:
        """Return the content of a file that a server sends only as a whole."""
        data = bytearray()
        async for chunk in answer.content.iter_chunked(1 << 20):
            data += chunk
            if len(data) > WHOLE_BYTES:
                raise StorageError(
                    f"{uri}: this server sends files only as a whole, and this one has more than "
                    f"{WHOLE_BYTES >> 20} MiB; download it and name the local file"
                )
        return bytes(data)

    @staticmethod
    def _place(uri: str, size: int, headers: Mapping[str, str]) -> Place:
        """Return what the headers of an answer say of a file."""
        stamp, modified_s = _validator(headers), None
        if not stamp:
            raise StorageError(
                f"{uri}: the server sends neither ETag nor Last-Modified, so that a change of the "
                "file would go unnoticed; download it and name the local file"
            )
        with contextlib.suppress(ValueError):
            modified_s = parsedate_to_datetime(headers.get("Last-Modified", "")).timestamp()
        return Place(size, stamp, modified_s=modified_s)


def _authorized(address: Any, authorization: str) -> Any:
    """Return what gives requests to the server of an address the header ``Authorization``.

    It takes the place of a login from ``~/.netrc``; the client refuses to be given both. Other
    servers that a request is sent on to do not get it.
    """

    async def send(request: Any, hand_on: Any) -> Any:
        if request.url.origin() == address.origin():
            request.headers["Authorization"] = authorization
        return await hand_on(request)

    return send


def check_status(status: int, reason: str | None) -> None:
    """Raise an OSError for the status of an answer that is no file."""
    said = f"the server answers {status} {reason or ''}".rstrip()
    if status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, said)
    if status in (401, 403):
        raise PermissionError(errno.EACCES, said)
    if status >= 500 or status in _MAY_PASS:
        raise ConnectionError(said)
    if status not in (200, 206):
        raise OSError(errno.EINVAL, said)


def _validator(headers: Mapping[str, str]) -> str:
    """Return what changes with the content of a file: its ETag, else its time of change."""
    return headers.get("ETag") or headers.get("Last-Modified") or ""
