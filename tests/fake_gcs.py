"""Google Cloud Storage in a thread: as much of its JSON API as gcsfs, Orbax and TensorStore use.

    server = shared()
    server.answer = lambda request: 503 if ... else None   # faults

Objects are in memory. Like the real one it has no directories and no rename, gives each write of
an object a new generation, and keeps conditions on generations.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

# Read when gcsfs is imported: it would ask Google what kind of bucket this is.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)")
_OBJECTS = re.compile(r"(?:/upload)?/storage/v1/b/([^/]+)/o/?")
_BUCKET = re.compile(r"/storage/v1/b/([^/]+)/?")
_COPY = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    parameters: dict[str, str]


@dataclass(frozen=True)
class _Object:
    data: bytes
    generation: int

    def described(self, bucket: str, name: str) -> dict[str, Any]:
        md5 = base64.b64encode(hashlib.md5(self.data).digest()).decode()
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "metageneration": "1",
            "md5Hash": md5,
            "etag": str(self.generation),
            "storageClass": "STANDARD",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }


class FakeGcs:
    """buckets: object by name, by bucket. answer: a status other than usual, or None."""

    def __init__(self, *buckets: str) -> None:
        self.buckets: dict[str, dict[str, _Object]] = {name: {} for name in buckets or ("bucket",)}
        self.answer: Callable[[Request], int | None] = lambda request: None
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._generations = itertools.count(1)
        self._uploads: dict[str, tuple[str, str, bytearray]] = {}
        self._server = Server(("127.0.0.1", 0), _Handler)
        self._server.fake = self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """What gcsfs and TensorStore find the server by."""
        return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url}

    def names(self, prefix: str = "", bucket: str = "bucket") -> list[str]:
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def read(self, name: str, bucket: str = "bucket") -> bytes:
        return self.buckets[bucket][name].data

    def write(self, name: str, data: bytes, bucket: str = "bucket") -> _Object:
        with self.lock:
            made = self.buckets[bucket][name] = _Object(data, next(self._generations))
            return made

    def upload(self, directory: Path, prefix: str) -> None:
        """All files of a directory, as `gcloud storage cp -r` would."""
        for file in sorted(directory.rglob("*")):
            if file.is_file():
                self.write(f"{prefix}/{file.relative_to(directory).as_posix()}", file.read_bytes())

    def download(self, prefix: str, directory: Path) -> None:
        for name in self.names(f"{prefix}/"):
            file = directory / name.removeprefix(f"{prefix}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.read(name))

    def serve(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def clear(self, prefix: str = "") -> None:
        """Back to usual, without the objects whose names begin so."""
        self.answer = lambda request: None
        with self.lock:
            for name in self.names(prefix):
                del self.buckets["bucket"][name]
            self.requests.clear()


@functools.cache
def shared() -> FakeGcs:
    """One for the whole process, since gcsfs and TensorStore look for their server once."""
    server = FakeGcs("bucket")
    server.serve()
    os.environ.update(server.environment())
    return server


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    fake: Any

    def handle_error(self, *_: Any) -> None:
        """A client that does not wait for its answer is nothing to tell."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.parameters = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.body = self._body()
        request = Request(self.command, unquote(parts.path), self.parameters)
        fake = self.server.fake
        with fake.lock:
            fake.requests.append(request)
            status = fake.answer(request)
            if status is not None:
                self._error(status)
            else:
                self._route(parts.path)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = bytearray()
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return bytes(found)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _route(self, path: str) -> None:
        found = (_COPY, _OBJECT, _OBJECTS, _BUCKET)
        kinds = (self._copy, self._object, self._objects, self._bucket)
        for pattern, answer in zip(found, kinds, strict=True):
            if match := pattern.fullmatch(path):
                names = [unquote(name) for name in match.groups()]
                if any(name not in self.server.fake.buckets for name in names[::2]):
                    return self._error(404)
                return answer(*names)
        return self._error(404)

    # ----------------------------------------------------------- what can be asked

    def _bucket(self, bucket: str) -> None:
        self._json({"kind": "storage#bucket", "name": bucket, "location": "HERE"})

    def _objects(self, bucket: str) -> None:
        if self.command == "GET":
            return self._list(bucket)
        if "upload_id" in self.parameters:  # a part of a resumable upload
            return self._continue()
        kind = self.parameters["uploadType"]
        if kind == "media":
            return self._store(bucket, self.parameters["name"], self.body)
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            described, data = _parts(self.body, boundary[1].encode())
            return self._store(bucket, json.loads(described)["name"], data)
        name = json.loads(self.body or b"{}").get("name") or self.parameters["name"]
        upload = f"{len(self.server.fake._uploads)}"
        self.server.fake._uploads[upload] = (bucket, name, bytearray())
        place = f"{self.server.fake.url}{urlsplit(self.path).path}"
        return self._send(200, b"", Location=f"{place}?uploadType=resumable&upload_id={upload}")

    def _continue(self) -> None:
        bucket, name, data = self.server.fake._uploads[self.parameters["upload_id"]]
        data += self.body
        total = (self.headers.get("Content-Range") or "/*").rpartition("/")[2]
        if total == "*" or len(data) < int(total):
            return self._send(308, b"", Range=f"bytes=0-{len(data) - 1}")
        return self._store(bucket, name, bytes(data))

    def _list(self, bucket: str) -> None:
        prefix = self.parameters.get("prefix", "")
        delimiter = self.parameters.get("delimiter")
        start, end = self.parameters.get("startOffset", ""), self.parameters.get("endOffset")
        items, prefixes = [], set()
        for name, stored in sorted(self.server.fake.buckets[bucket].items()):
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(stored.described(bucket, name))
        self._json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _object(self, bucket: str, name: str) -> None:
        stored = self.server.fake.buckets[bucket].get(name)
        if not self._conditions_hold(stored):
            return self._error(412)
        if stored is None:
            return self._error(404)
        if self.command == "DELETE":
            del self.server.fake.buckets[bucket][name]
            return self._send(204, b"")
        if self.parameters.get("alt") != "media":
            return self._json(stored.described(bucket, name))
        return self._media(stored)

    def _media(self, stored: _Object) -> None:
        md5 = base64.b64encode(hashlib.md5(stored.data).digest()).decode()
        headers = {"x-goog-generation": str(stored.generation), "x-goog-hash": f"md5={md5}"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, stored.data, **headers)
        size = len(stored.data)
        start = int(wanted[1]) if wanted[1] else size - int(wanted[2])
        stop = min(int(wanted[2]) + 1, size) if wanted[1] and wanted[2] else size
        if start >= size:
            return self._error(416)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return self._send(206, stored.data[start:stop], **headers)

    def _copy(self, bucket: str, name: str, to_bucket: str, to_name: str) -> None:
        stored = self.server.fake.buckets[bucket].get(name)
        if stored is None:
            return self._error(404)
        made = self.server.fake.write(to_name, stored.data, to_bucket)
        size = str(len(stored.data))
        self._json(
            {
                "kind": "storage#rewriteResponse",
                "done": True,
                "objectSize": size,
                "totalBytesRewritten": size,
                "resource": made.described(to_bucket, to_name),
            }
        )

    def _store(self, bucket: str, name: str, data: bytes) -> None:
        if not self._conditions_hold(self.server.fake.buckets[bucket].get(name)):
            return self._error(412)
        self._json(self.server.fake.write(name, data, bucket).described(bucket, name))

    def _conditions_hold(self, stored: _Object | None) -> bool:
        generation = str(stored.generation) if stored else "0"
        wanted = self.parameters.get("ifGenerationMatch")
        other = self.parameters.get("ifGenerationNotMatch")
        return wanted in (None, generation) and other != generation

    # ----------------------------------------------------------- what is sent

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _error(self, status: int) -> None:
        message = {
            401: "Anonymous caller does not have storage.objects.get access to the bucket.",
            403: "the service account does not have storage.objects.create access.",
        }.get(status, f"status {status}")
        self._send(status, json.dumps({"error": {"code": status, "message": message}}).encode())

    def _send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _parts(body: bytes, boundary: bytes) -> tuple[bytes, bytes]:
    """The two parts of a multipart upload: what describes the object, and its data."""
    found = body.split(b"--" + boundary)[1:3]
    first, second = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in found)
    return first, re.sub(rb"\r?\n\Z", b"", second)
