"""A server that misbehaves on purpose, and a small archive for it to serve."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import random
import tarfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cifar100cli import download
from cifar100cli.download import ARCHIVES, Archive, Installed, find_installed

FOLDER = "cifar-100-python"
KEPT = f"{FOLDER}.earlier"  # what was there and could not be verified
FILES = {
    "train": random.Random(1).randbytes(900_000),
    "test": random.Random(2).randbytes(100_000),
    "meta": b"the names of the classes",
}


def make_tar(*members: tuple[tarfile.TarInfo, bytes | None], folder: str = FOLDER) -> bytes:
    """A whole data set, followed by the given members; None leaves out the content that a header promises."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        directory = tarfile.TarInfo(folder)
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for name, content in {**FILES, "file.txt~": b"nothing"}.items():
            tar.addfile(*make_file(f"{folder}/{name}", content))
        for info, payload in members:
            if payload is None:
                buffer.write(info.tobuf(tarfile.GNU_FORMAT))
            else:
                tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def make_file(name: str, content: bytes = b"harm") -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, io.BytesIO(content)


PLAIN = make_tar()
BODY = gzip.compress(PLAIN, mtime=0)
HALF = len(BODY) // 2
OTHER = gzip.compress(make_tar((make_file(f"{FOLDER}/more")[0], b"harm")), mtime=0)
MD5S = {name: hashlib.md5(content).hexdigest() for name, content in FILES.items()}


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


ARCHIVE = dataclasses.replace(ARCHIVES["cifar100"], size=len(BODY), sha256=sha256_of(BODY), files=MD5S)
PART = f"{ARCHIVE.filename}.part"


# A server whose every answer is written by the test


class Exchange:
    """One request, and the means to answer it well or badly."""

    def __init__(self, handler: BaseHTTPRequestHandler, released: threading.Event) -> None:
        self.handler = handler
        self.range = handler.headers.get("Range")
        self.encoding = handler.headers.get("Accept-Encoding")
        self.agent = handler.headers.get("User-Agent")
        self.start = int(self.range.removeprefix("bytes=").removesuffix("-")) if self.range else 0
        self.sent = 0
        self.released = released

    def answer(self, status: int, headers: dict[str, object], body: bytes = b"") -> None:
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name, str(value))
        self.handler.end_headers()
        self.send(body)

    def send(self, body: bytes) -> None:
        self.handler.wfile.write(body)
        self.handler.wfile.flush()
        self.sent += len(body)

    def answer_range(self, body: bytes, stop: int | None = None, /, **headers: object) -> None:
        """As it should be, but the connection ends before the byte `stop`."""
        if self.range and self.start >= len(body):
            self.answer(416, {"Content-Range": f"bytes */{len(body)}"})
            return
        extent = {"Content-Range": f"bytes {self.start}-{len(body) - 1}/{len(body)}"} if self.range else {}
        length = {"Content-Length": len(body) - self.start}
        self.answer(206 if self.range else 200, {**extent, **length, **headers}, body[self.start : stop])


Behaviour = Callable[[Exchange], None]


class Server:
    """Answers each path by its list of behaviours, one per request; the last one stays."""

    def __init__(self) -> None:
        self.behaviours: dict[str, list[Behaviour]] = {}
        self.exchanges: list[Exchange] = []
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                exchange = Exchange(self, server.released)
                server.exchanges.append(exchange)
                behaviours = server.behaviours[self.path]
                behaviour = behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]
                with contextlib.suppress(ConnectionError):
                    behaviour(exchange)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = False
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def url(self, path: str, *behaviours: Behaviour) -> str:
        self.behaviours[path] = list(behaviours)
        return f"http://127.0.0.1:{self.http.server_port}{path}"

    @property
    def sent(self) -> int:
        """Bytes of bodies, in all."""
        return sum(exchange.sent for exchange in self.exchanges)

    @property
    def ranges(self) -> list[str | None]:
        return [exchange.range for exchange in self.exchanges]

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def good(exchange: Exchange) -> None:
    exchange.answer_range(BODY)


def serving(body: bytes, **headers: object) -> Behaviour:
    return lambda exchange: exchange.answer_range(body, **headers)


def dropping(stop: int) -> Behaviour:
    return lambda exchange: exchange.answer_range(BODY, stop)


def whole(exchange: Exchange) -> None:
    """Knows nothing of ranges."""
    exchange.answer(200, {"Content-Length": len(BODY)}, BODY)


def status(code: int, **headers: object) -> Behaviour:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda exchange: exchange.answer(code, {**named, "Content-Length": 0})


def page(exchange: Exchange) -> None:
    body = b"<!DOCTYPE html><title>Please log in</title>"
    exchange.answer(200, {"Content-Type": "text/html", "Content-Length": len(body)}, body)


def stalling(exchange: Exchange) -> None:
    exchange.answer_range(BODY, HALF)
    exchange.released.wait(20)


def halting(exchange: Exchange) -> None:
    """Sends the second half only when it is released."""
    exchange.answer(200, {"Content-Length": len(BODY)}, BODY[: HALF - 10])
    time.sleep(0.05)
    exchange.send(BODY[HALF - 10 : HALF])
    exchange.released.wait(20)
    exchange.send(BODY[HALF:])


def whole_from_start(exchange: Exchange) -> None:
    """Answers a range by 206, but from the first byte on."""
    extent = f"bytes 0-{len(BODY) - 1}/{len(BODY)}"
    exchange.answer(206, {"Content-Range": extent, "Content-Length": len(BODY)}, BODY)


def from_too_far(exchange: Exchange) -> None:
    extent = f"bytes {exchange.start + 10}-{len(BODY) - 1}/{len(BODY)}"
    exchange.answer(206, {"Content-Range": extent}, BODY[exchange.start + 10 :])


def in_chunks(exchange: Exchange) -> None:
    exchange.handler.protocol_version = "HTTP/1.1"
    exchange.answer(200, {"Transfer-Encoding": "chunked", "Connection": "close"})
    for start in range(0, len(BODY), 100_000):
        piece = BODY[start : start + 100_000]
        exchange.send(b"%x\r\n%s\r\n" % (len(piece), piece))
    exchange.send(b"0\r\n\r\n")


def in_broken_chunks(exchange: Exchange) -> None:
    exchange.handler.protocol_version = "HTTP/1.1"
    exchange.answer(200, {"Transfer-Encoding": "chunked", "Connection": "close"})
    exchange.send(b"%x\r\n%s" % (HALF * 2, BODY[:HALF]))


def without_length(exchange: Exchange) -> None:
    exchange.answer(200, {}, BODY)


def short_without_length(exchange: Exchange) -> None:
    exchange.answer(200, {}, BODY[:HALF])


def nonsense(exchange: Exchange) -> None:
    exchange.handler.wfile.write(b"\x1b[31mwhat?\r\n\r\n")


def without_end(exchange: Exchange) -> None:
    exchange.answer(200, {})
    exchange.send(BODY)
    for _ in range(1000):
        exchange.send(bytes(100_000))


def raw(head: bytes, body: bytes = b"", again: bytes = b"") -> Behaviour:
    """These very bytes; `again` follows until the other side has had enough."""

    def behaviour(exchange: Exchange) -> None:
        exchange.handler.wfile.write(head)
        exchange.send(body)
        while again and not exchange.released.is_set():
            exchange.send(again)

    return behaviour


def claiming(extent: object) -> Behaviour:
    """Answers a range with the right bytes and this Content-Range."""
    return lambda exchange: exchange.answer(206, {"Content-Range": extent}, BODY[exchange.start :])


def dripping(exchange: Exchange) -> None:
    exchange.answer(200, {"Content-Length": len(BODY)})
    for place in range(1000):
        exchange.send(BODY[place : place + 1])
        if exchange.released.wait(0.02):
            break


# Installing


@dataclasses.dataclass
class Listener:
    lines: list[str] = dataclasses.field(default_factory=list)
    progress: list[tuple[int, int | None]] = dataclasses.field(default_factory=list)
    checked: list[Path] = dataclasses.field(default_factory=list)

    def check(self, folder: Path) -> None:
        self.checked.append(folder)
        assert (folder / "train").read_bytes() == FILES["train"]

    def note(self, done: int, total: int | None) -> None:
        self.progress.append((done, total))


def install(data_dir: Path, *urls: str, archive: Archive = ARCHIVE, **options: Any) -> Installed:
    listener = options.pop("listener", None) or Listener()
    options = {"check": listener.check, "timeout": 5.0, **options}
    return download.install(archive, data_dir, urls=urls, progress=listener.note, log=listener.lines.append, **options)


def assert_complete(data_dir: Path, *, kept: bool = False) -> None:
    """The data set is there, and nothing else is but the lock, and what was kept of an earlier one."""
    for name, content in FILES.items():
        assert (data_dir / FOLDER / name).read_bytes() == content
    expected = {FOLDER, KEPT} if kept else {FOLDER}
    assert {path.name for path in data_dir.iterdir()} - {".download-cifar100.lock"} == expected
    assert {path.name for path in (data_dir / FOLDER).iterdir()} == {*FILES, ".cifar100.json"}
    assert find_installed(ARCHIVE, data_dir) is not None


def put_old(data_dir: Path) -> None:
    (data_dir / FOLDER).mkdir(parents=True)
    (data_dir / FOLDER / "train").write_bytes(b"old")


def assert_old(data_dir: Path) -> None:
    assert (data_dir / FOLDER / "train").read_bytes() == b"old"
    assert not [path for path in data_dir.iterdir() if path.name.startswith(".cifar100")]


def assert_one_line(error: BaseException) -> str:
    text = str(error)
    assert text.isprintable()
    return text
