"""S3 in a thread: as much of its API as s3fs uses for small objects.

    server = shared()
    server.answer = lambda request: 503 if ... else None   # faults

Objects are in memory. Keys are not checked; where they are missing, the client says so itself.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

from fake_gcs import Request, Server

_TIME = "2026-01-01T00:00:00.000Z"
_CODES = {403: "AccessDenied", 404: "NoSuchKey", 503: "SlowDown"}


class FakeS3:
    """objects: data by name in the one bucket. answer: a status other than usual, or None."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.answer: Callable[[Request], int | None] = lambda request: None
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._server = Server(("127.0.0.1", 0), _Handler)
        self._server.fake = self

    def environment(self) -> dict[str, str]:
        """What botocore finds the server by, and no other."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def clear(self) -> None:
        self.answer = lambda request: None
        with self.lock:
            self.objects.clear()
            self.requests.clear()

    def serve(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()


@functools.cache
def shared() -> FakeS3:
    """One for the whole process, in which s3fs looks for its server once."""
    server = FakeS3()
    server.serve()
    os.environ.update(server.environment())
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.parameters = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fake: FakeS3 = self.server.fake
        bucket, _, name = unquote(parts.path).lstrip("/").partition("/")
        request = Request(self.command, name, self.parameters)
        with self.fake.lock:
            self.fake.requests.append(request)
            status = self.fake.answer(request)
            if status is not None:
                self._error(status)
            elif bucket != "bucket":
                self._error(404, "NoSuchBucket")
            else:
                (self._object if name else self._bucket)(name)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _bucket(self, _: str) -> None:
        if self.command == "POST" and "delete" in self.parameters:
            for key in re.findall(r"<Key>(.*?)</Key>", self.body.decode()):
                self.fake.objects.pop(unescape(key), None)
            return self._xml("DeleteResult", "")
        if self.command == "GET" and "list-type" in self.parameters:
            return self._list()
        return self._error(404, "NoSuchBucketConfiguration")

    def _list(self) -> None:
        prefix, delimiter = (self.parameters.get(key, "") for key in ("prefix", "delimiter"))
        found, above = [], set()
        for name in self.fake.names(prefix):
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                above.add(prefix + rest.partition(delimiter)[0] + delimiter)
                continue
            data = self.fake.objects[name]
            found.append(
                f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size>"
                f"<ETag>{_etag(data)}</ETag><LastModified>{_TIME}</LastModified></Contents>"
            )
        found += [
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            for name in sorted(above)
        ]
        count = f"<KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated>"
        self._xml("ListBucketResult", count + "".join(found))

    def _object(self, name: str) -> None:
        if self.command == "PUT":
            source = self.headers.get("x-amz-copy-source")
            if source is None:
                self.fake.objects[name] = self.body
                return self._send(200, b"", ETag=_etag(self.body))
            self.body = self.fake.objects[unquote(source).lstrip("/").partition("/")[2]]
            self.fake.objects[name] = self.body
            copied = f"<ETag>{_etag(self.body)}</ETag><LastModified>{_TIME}</LastModified>"
            return self._xml("CopyObjectResult", copied)
        if self.command == "DELETE":
            self.fake.objects.pop(name, None)
            return self._send(204, b"")
        if name not in self.fake.objects:
            return self._error(404)
        data = self.fake.objects[name]
        described = {"ETag": _etag(data), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        return self._send(200, data, **described)

    def _xml(self, kind: str, content: str) -> None:
        namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
        text = f'<?xml version="1.0"?><{kind} xmlns="{namespace}">{content}</{kind}>'
        self._send(200, text.encode(), **{"Content-Type": "application/xml"})

    def _error(self, status: int, code: str = "") -> None:
        code = code or _CODES.get(status, "Error")
        text = f"<Error><Code>{code}</Code><Message>{code} here</Message></Error>"
        self._send(status, text.encode(), **{"Content-Type": "application/xml"})

    def _send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
