"""The download against a server that misbehaves in every way known, and archives that mean harm."""

import contextlib
import dataclasses
import email.utils
import errno
import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import pytest

from cifar100cli import download, fetch, unpack
from cifar100cli.download import ARCHIVES, OFFICIAL, Archive, Installed, find_installed
from cifar100cli.errors import CifarError, DataError, UsageError

FOLDER = "cifar-100-python"
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
    def ranges(self) -> list[str | None]:
        return [exchange.range for exchange in self.exchanges]

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.close()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which are noted instead of waited."""
    noted: list[float] = []
    monkeypatch.setattr(fetch, "_sleep", noted.append)
    return noted


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


def assert_complete(data_dir: Path) -> None:
    """The data set is there, and nothing else is but the lock."""
    for name, content in FILES.items():
        assert (data_dir / FOLDER / name).read_bytes() == content
    assert {path.name for path in data_dir.iterdir()} - {".download-cifar100.lock"} == {FOLDER}
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


def test_plain(server: Server, tmp_path: Path) -> None:
    listener = Listener()
    data_dir = tmp_path / "not" / "there yet"
    installed = install(data_dir, server.url("/a", good), listener=listener)
    assert installed == Installed(
        "cifar100", data_dir / FOLDER, True, ARCHIVE.sha256, False, fetched_bytes=len(BODY), resumed_bytes=0
    )
    assert_complete(data_dir)
    assert server.ranges == [None]
    assert server.exchanges[0].encoding == "identity"
    assert str(server.exchanges[0].agent).startswith("cifar100/")
    assert (len(BODY), len(BODY)) in listener.progress
    assert listener.checked == [data_dir / ".cifar100-new"]


def test_second_call_asks_nobody_and_writes_nothing(server: Server, tmp_path: Path) -> None:
    url = server.url("/a", good)
    first = install(tmp_path, url)
    (tmp_path / ".download-cifar100.lock").unlink(missing_ok=True)
    second = install(tmp_path, url)
    assert second == dataclasses.replace(first, already_there=True, fetched_bytes=0)
    assert len(server.exchanges) == 1
    assert {path.name for path in tmp_path.iterdir()} == {FOLDER}


def test_force_replaces(server: Server, tmp_path: Path) -> None:
    url = server.url("/a", good)
    install(tmp_path, url)
    listener = Listener()
    assert install(tmp_path, url, force=True, listener=listener).fetched_bytes == len(BODY)
    assert listener.lines == [f"unpacking {ARCHIVE.filename}"]
    assert len(server.exchanges) == 2
    assert_complete(tmp_path)


def test_resumes_at_the_byte(server: Server, tmp_path: Path, waits: list[float]) -> None:
    listener = Listener()
    installed = install(tmp_path, server.url("/a", dropping(HALF), good), listener=listener)
    assert server.ranges == [None, f"bytes={HALF}-"]
    assert server.exchanges[1].sent == len(BODY) - HALF
    assert (installed.fetched_bytes, installed.resumed_bytes) == (len(BODY), 0)
    assert f"ended after {HALF} of {len(BODY)} bytes" in listener.lines[0]
    assert len(waits) == 1
    assert_complete(tmp_path)


def test_drops_at_every_tenth(server: Server, tmp_path: Path) -> None:
    stops = [len(BODY) * tenth // 10 for tenth in range(1, 10)]
    install(tmp_path, server.url("/a", *map(dropping, stops), good), retries=2)
    assert server.ranges == [None, *(f"bytes={stop}-" for stop in stops)]
    assert_complete(tmp_path)


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


@pytest.mark.parametrize(
    "behaviours",
    [
        [dropping(HALF), whole],
        [dropping(HALF), whole_from_start],
        [dropping(HALF), from_too_far, good],
        [dropping(1), dropping(2), good],
        [in_chunks],
        [in_broken_chunks, good],
        [without_length],
        [short_without_length, good],
        [dropping(HALF), without_length],
        [nonsense, good],
        [dropping(0), good],
        [serving(OTHER[: len(BODY) - 1]), good],
    ],
    ids=lambda behaviours: "-".join(behaviour.__name__ for behaviour in behaviours),
)
def test_bad_weather(server: Server, tmp_path: Path, behaviours: list[Behaviour]) -> None:
    first, *rest = behaviours
    spare = server.url("/spare", good)
    install(tmp_path, server.url("/a", first, *(rest or [first])), spare)
    assert_complete(tmp_path)


def test_range_ignored_keeps_what_is_there(server: Server, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(BODY[:HALF])
    installed = install(tmp_path, server.url("/a", whole))
    assert server.ranges == [f"bytes={HALF}-"]
    assert (installed.resumed_bytes, installed.fetched_bytes) == (HALF, len(BODY))
    assert_complete(tmp_path)


def test_stall(server: Server, tmp_path: Path) -> None:
    listener = Listener()
    install(tmp_path, server.url("/a", stalling, good), timeout=0.2, listener=listener)
    assert server.ranges == [None, f"bytes={HALF}-"]
    assert "nothing came for too long" in listener.lines[0]
    assert_complete(tmp_path)


@pytest.mark.parametrize("code", [429, 500, 503])
def test_busy_server_is_asked_again(server: Server, tmp_path: Path, waits: list[float], code: int) -> None:
    install(tmp_path, server.url("/a", status(code), good))
    assert len(waits) == 1
    assert 0.7 < waits[0] < 1.3


@pytest.mark.parametrize(("asked", "waited"), [("7", 7), ("3600", 60), ("date", 20), ("soon", 1), ("-5", 1)])
def test_retry_after(server: Server, tmp_path: Path, waits: list[float], asked: str, waited: float) -> None:
    value = email.utils.formatdate(time.time() + 20, usegmt=True) if asked == "date" else asked
    install(tmp_path, server.url("/a", status(429, Retry_After=value), good))
    assert waits == [pytest.approx(waited, abs=1.5)]


def test_backs_off_then_gives_up_and_goes_on_later(server: Server, tmp_path: Path, waits: list[float]) -> None:
    url = server.url("/a", dropping(HALF), status(503))
    with pytest.raises(CifarError, match=rf"HTTP 503.*{HALF} bytes are kept.*--url.*--from") as raised:
        install(tmp_path, url, retries=8)
    assert_one_line(raised.value)
    assert raised.value.exit_code == 1
    assert len(server.exchanges) == 9
    for wait, nominal in zip(waits, [1, 1, 2, 4, 8, 16, 30, 30], strict=True):
        assert 0.75 * nominal <= wait <= min(30, 1.25 * nominal)
    installed = install(tmp_path, server.url("/a", good))
    assert (installed.resumed_bytes, installed.fetched_bytes) == (HALF, len(BODY) - HALF)
    assert_complete(tmp_path)


def test_nobody_listens(tmp_path: Path, server: Server) -> None:
    server.http.socket.close()
    with pytest.raises(CifarError, match=r"refused.*nothing came") as raised:
        install(tmp_path, f"http://127.0.0.1:{server.http.server_port}/a", retries=3)
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 418])
def test_a_client_error_drops_the_address_at_once(server: Server, tmp_path: Path, code: int) -> None:
    bad = server.url("/bad", status(code))
    with pytest.raises(CifarError, match=f"/bad: answers HTTP {code}") as raised:
        install(tmp_path, bad)
    assert raised.value.exit_code == 1
    assert len(server.exchanges) == 1
    install(tmp_path, bad, server.url("/a", good))
    assert len(server.exchanges) == 3
    assert_complete(tmp_path)


def test_mirrors_share_what_has_come(server: Server, tmp_path: Path) -> None:
    install(tmp_path, server.url("/a", dropping(HALF)), server.url("/b", page), server.url("/c", good))
    assert server.ranges == [None, f"bytes={HALF}-", f"bytes={HALF}-"]
    assert_complete(tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_smaller_archive_does_not_cost_what_has_come(server: Server, tmp_path: Path, ranges: bool) -> None:
    body = gzip.compress(b"another")
    smaller = serving(body) if ranges else lambda exchange: exchange.answer(200, {"Content-Length": len(body)}, body)
    (tmp_path / PART).write_bytes(BODY[:HALF])
    with pytest.raises(DataError, match=f"has {len(body)} bytes"):
        install(tmp_path, server.url("/a", smaller))
    assert (tmp_path / PART).stat().st_size == HALF


def test_redirect_keeps_the_range(server: Server, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(BODY[:HALF])
    server.url("/b", good)
    install(tmp_path, server.url("/a", status(302, Location="/b")))
    assert server.ranges == [f"bytes={HALF}-"] * 2
    assert_complete(tmp_path)


@pytest.mark.parametrize("target", ["/a", "ftp://127.0.0.1/a", "file:///etc/passwd"])
def test_redirect_to_nowhere(server: Server, tmp_path: Path, target: str) -> None:
    with pytest.raises(CifarError, match="HTTP 302, a redirect in a circle or out of the web") as raised:
        install(tmp_path, server.url("/a", status(302, Location=target)))
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("url", ["ftp://a/b", "file:///b", "a.tar.gz", "http://", "http://a:b/", "http://a/b c", ""])
def test_unusable_address(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match="http://"):
        install(tmp_path / "data", url)
    assert not (tmp_path / "data").exists()


def test_unusable_digest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        install(tmp_path / "data", sha256="cafe")


@pytest.mark.parametrize("before", [0, HALF])
def test_web_page(server: Server, tmp_path: Path, before: int) -> None:
    put_old(tmp_path)
    (tmp_path / PART).write_bytes(BODY[:before])
    with pytest.raises(DataError, match="a web page, not with the archive"):
        install(tmp_path, server.url("/a", page))
    assert (tmp_path / PART).stat().st_size == before
    assert_old(tmp_path)


def test_compressed_web_page(server: Server, tmp_path: Path) -> None:
    body = gzip.compress(b"<html>Please log in</html>")
    headers = {"Content-Encoding": "gzip", "Content-Type": "text/html"}
    with pytest.raises(DataError, match="a web page"):
        install(tmp_path, server.url("/a", serving(body, **headers)))


@pytest.mark.parametrize("sha256", [OFFICIAL, None])
@pytest.mark.parametrize("twice", [False, True])
def test_content_encoding(server: Server, tmp_path: Path, twice: bool, sha256: str | None) -> None:
    body = gzip.compress(BODY) if twice else BODY
    headers = {"Content-Encoding": "gzip"}
    installed = install(tmp_path, server.url("/a", serving(body, **headers)), sha256=sha256)
    assert installed.sha256 == ARCHIVE.sha256
    assert_complete(tmp_path)


def without_end(exchange: Exchange) -> None:
    exchange.answer(200, {})
    exchange.send(BODY)
    for _ in range(1000):
        exchange.send(bytes(100_000))


@pytest.mark.parametrize("sha256", [OFFICIAL, None])
@pytest.mark.parametrize("behaviour", [without_end, serving(BODY + bytes(3_000_000))])
def test_too_many_bytes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour, sha256: str | None
) -> None:
    monkeypatch.setattr(fetch, "MAX_ARCHIVE", 2_000_000)
    put_old(tmp_path)
    with pytest.raises(DataError, match="more than the"):
        install(tmp_path, server.url("/a", behaviour), sha256=sha256)
    assert server.exchanges[0].sent < 50_000_000
    assert not (tmp_path / PART).exists()
    assert_old(tmp_path)


def test_wrong_digest(server: Server, tmp_path: Path) -> None:
    put_old(tmp_path)
    wrong = BODY[:-20] + bytes(20)
    with pytest.raises(DataError, match="untouched") as raised:
        install(tmp_path, server.url("/a", serving(wrong)))
    text = assert_one_line(raised.value)
    assert f"/a: sha256 is {sha256_of(wrong)}, expected {ARCHIVE.sha256}" in text
    assert f"--sha256 {sha256_of(wrong)}" in text
    assert len(server.exchanges) == 1
    assert not (tmp_path / PART).exists()
    assert_old(tmp_path)


@pytest.mark.parametrize("sha256", [sha256_of(OTHER).upper(), None])
def test_another_archive_on_request(server: Server, tmp_path: Path, sha256: str | None) -> None:
    archive = dataclasses.replace(ARCHIVE, files={**MD5S, "meta": "0" * 32})
    installed = install(tmp_path, server.url("/a", serving(OTHER)), archive=archive, sha256=sha256)
    assert (installed.official, installed.sha256) == (False, sha256_of(OTHER))
    assert find_installed(archive, tmp_path) == dataclasses.replace(installed, already_there=True, fetched_bytes=0)


@pytest.mark.parametrize(
    "left_over",
    [
        bytes(HALF),
        bytes(len(BODY)),
        bytes(len(BODY) + 100),
        gzip.compress(PLAIN, mtime=1)[:HALF],
        bytes(len(BODY) - 1),
    ],
    ids=["part", "whole", "longer", "other", "shorter"],
)
def test_corrupt_part(server: Server, tmp_path: Path, left_over: bytes) -> None:
    (tmp_path / PART).write_bytes(left_over)
    installed = install(tmp_path, server.url("/a", good))
    assert server.ranges[-1] is None
    assert installed.resumed_bytes == 0
    assert_complete(tmp_path)


def test_corrupt_part_and_wrong_archive(server: Server, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(bytes(10))
    with pytest.raises(DataError, match=sha256_of(OTHER[:-1])):
        install(
            tmp_path,
            server.url("/a", serving(OTHER[:-1])),
            archive=dataclasses.replace(ARCHIVE, size=len(OTHER)),
        )
    assert server.ranges == ["bytes=10-", None]


def test_part_that_the_server_does_not_have(server: Server, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(bytes(len(BODY) + 1))
    install(tmp_path, server.url("/a", good), sha256=None)
    assert server.ranges == [f"bytes={len(BODY) + 1}-", None]
    assert_complete(tmp_path)


def test_starts_again_only_once(server: Server, tmp_path: Path) -> None:
    url = server.url("/a", *[dropping(HALF), status(416)] * 3)
    with pytest.raises(DataError, match="does not have"):
        install(tmp_path, url)
    assert server.ranges == [None, f"bytes={HALF}-"] * 2


def test_a_gap_is_not_filled_with_what_follows(server: Server, tmp_path: Path) -> None:
    listener = Listener()
    install(tmp_path, server.url("/a", dropping(HALF), from_too_far, good), listener=listener)
    assert f"answers from byte {HALF + 10} on, asked from {HALF}" in listener.lines[1]
    assert server.ranges == [None, *[f"bytes={HALF}-"] * 2]


@pytest.mark.parametrize(("sha256", "requests"), [(OFFICIAL, 0), (None, 1)])
def test_complete_part(server: Server, tmp_path: Path, sha256: str | None, requests: int) -> None:
    (tmp_path / PART).write_bytes(BODY)
    installed = install(tmp_path, server.url("/a", good), sha256=sha256)
    assert (installed.resumed_bytes, installed.fetched_bytes) == (len(BODY), 0)
    assert len(server.exchanges) == requests
    assert_complete(tmp_path)


# Processes


PROGRAM = """
import dataclasses, json, sys
from pathlib import Path
from cifar100cli.download import Archive, install
def log(line): print(line, flush=True)
archive, data_dir, url = Archive(**json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
quiet = {"check": lambda folder: None, "progress": lambda done, total: None}
installed = install(archive, data_dir, urls=[url], log=log, **quiet)
print(json.dumps([installed.already_there, installed.fetched_bytes, installed.resumed_bytes]))
"""


@contextlib.contextmanager
def process(data_dir: Path, url: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROGRAM, json.dumps(dataclasses.asdict(ARCHIVE)), str(data_dir), url]
    root = Path(download.__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_process_costs_nothing(server: Server, tmp_path: Path) -> None:
    part = tmp_path / PART
    with process(tmp_path, server.url("/a", halting)) as running:
        wait_for(lambda: part.exists() and part.stat().st_size == HALF)
        os.kill(running.pid, signal.SIGKILL)
    installed = install(tmp_path, server.url("/a", good))
    assert server.ranges == [None, f"bytes={HALF}-"]
    assert (installed.resumed_bytes, installed.fetched_bytes) == (HALF, len(BODY) - HALF)
    assert_complete(tmp_path)


def test_two_processes_fetch_once(server: Server, tmp_path: Path) -> None:
    url = server.url("/a", halting)
    with process(tmp_path, url) as first:
        wait_for(lambda: bool(server.exchanges))
        with process(tmp_path, url) as second:
            assert second.stdout is not None
            assert "another process is downloading cifar100; waiting" in second.stdout.readline()
            server.released.set()
            assert json.loads(first.communicate()[0].splitlines()[-1]) == [False, len(BODY), 0]
            assert json.loads(second.communicate()[0].splitlines()[-1]) == [True, 0, 0]
    assert len(server.exchanges) == 1
    assert_complete(tmp_path)


def test_interrupt_keeps_the_part(server: Server, tmp_path: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    arguments: dict[str, Any] = {"check": lambda folder: None, "log": lambda line: None}
    url = server.url("/a", good)
    with pytest.raises(KeyboardInterrupt):
        download.install(ARCHIVE, tmp_path, urls=[url], progress=interrupt, **arguments)
    kept = (tmp_path / PART).stat().st_size
    assert 0 < kept < len(BODY)
    assert install(tmp_path, url).resumed_bytes == kept


# From a file


def test_from_file(tmp_path: Path) -> None:
    source = tmp_path / "mine.tar.gz"
    source.write_bytes(BODY)
    data_dir = tmp_path / "data"
    listener = Listener()
    installed = install(data_dir, "http://127.0.0.1:9/never", source=source, listener=listener)
    assert (installed.official, installed.fetched_bytes) == (True, 0)
    assert listener.progress[-1] == (len(BODY), len(BODY))
    assert source.read_bytes() == BODY
    assert_complete(data_dir)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        ("folder", "not a file"),
        (PLAIN, "not a gzip archive"),
        (b"", "not a gzip archive"),
        (OTHER, f"sha256 is {sha256_of(OTHER)}, expected {ARCHIVE.sha256}"),
    ],
    ids=["missing", "folder", "tar", "empty", "other"],
)
def test_from_something_else(tmp_path: Path, content: bytes | str | None, reason: str) -> None:
    source = tmp_path / "mine.tar.gz"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        source.mkdir()
    put_old(tmp_path / "data")
    with pytest.raises(DataError, match=re.escape(f"{source}: {reason}")) as raised:
        install(tmp_path / "data", source=source)
    assert_one_line(raised.value)
    assert source.exists() == (content is not None)
    assert_old(tmp_path / "data")


# Hostile archives


def special(kind: bytes, name: str = f"{FOLDER}/train2", **attributes: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return gzip.compress(make_tar((info, None)))


def named(name: str) -> bytes:
    return gzip.compress(make_tar((make_file(name)[0], b"harm")))


def sparse() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info, content = make_file(f"{FOLDER}/train", b"0123456789")
        info.pax_headers = {"GNU.sparse.map": "0,5,900000000,5", "GNU.sparse.size": "900000005"}
        tar.addfile(info, content)
    return gzip.compress(buffer.getvalue())


def too_many() -> bytes:
    return gzip.compress(make_tar(*((make_file(f"{FOLDER}/{number}")[0], b"harm") for number in range(1000))))


def nested_headers() -> bytes:
    header = tarfile.TarInfo("x")
    header.type = tarfile.XHDTYPE
    return gzip.compress(header.tobuf(tarfile.PAX_FORMAT) * 20_000)


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (named("/etc/cron.d/harm"), "not inside"),
        (named(f"{FOLDER}/../../harm"), "not inside"),
        (named("harm"), "not inside"),
        (named("cifar-10-batches-py/train"), "not inside"),
        (named(f"{FOLDER}/train"), "there twice"),
        (named(f"{FOLDER}//./train"), "there twice"),
        (special(tarfile.SYMTYPE, linkname="/etc/passwd"), "neither"),
        (special(tarfile.LNKTYPE, linkname=f"{FOLDER}/train"), "neither"),
        (special(tarfile.CHRTYPE), "neither"),
        (special(tarfile.BLKTYPE), "neither"),
        (special(tarfile.FIFOTYPE), "neither"),
        (special(b"?"), "neither"),
        (special(tarfile.GNUTYPE_SPARSE), "neither"),
        (sparse(), "neither"),
        (special(tarfile.REGTYPE, size=(256 << 20) + 1), "too large"),
        (special(tarfile.REGTYPE, size=-1024), "too large"),
        (special(tarfile.REGTYPE, name=f"{FOLDER}/\x1b[2J\n", linkname="x", size=1 << 40), "too large"),
        (special(tarfile.XHDTYPE, size=1 << 30), "impossible size"),
        (special(tarfile.GNUTYPE_LONGNAME, size=-512), "impossible size"),
        (nested_headers(), "not a sound tar|impossible size|damaged"),
        (too_many(), "too much"),
        (gzip.compress(PLAIN[: len(PLAIN) // 2]), "damaged or cut short"),
        (gzip.compress(PLAIN[:1024] + b"\xff" * 2048), "has no|damaged"),
        (gzip.compress(b"no tar at all"), "damaged"),
        (gzip.compress(b""), "damaged"),
        (BODY[:HALF], "damaged or cut short"),
        (BODY[:-8], "damaged or cut short"),
        (BODY[:-8] + bytes(8), "damaged or cut short"),
        (BODY[:HALF] + bytes(100) + BODY[HALF + 100 :], "damaged"),
        (BODY + b"more", "damaged"),
        (gzip.compress(make_tar(folder="cifar-10-batches-py")), "not inside"),
        (gzip.compress(PLAIN.replace(b"/meta\x00", b"/mata\x00")), "has no|damaged"),
    ],
)
@pytest.mark.parametrize("way", ["fetched", "file"])
def test_hostile_archive(server: Server, tmp_path: Path, archive: bytes, reason: str, way: str) -> None:
    data_dir = tmp_path / "data"
    source = tmp_path / "mine.tar.gz"
    put_old(data_dir)
    source.write_bytes(archive)
    url = server.url("/a", serving(archive))
    with pytest.raises(DataError, match=reason) as raised:
        install(data_dir, url, source=source if way == "file" else None, sha256=None)
    text = assert_one_line(raised.value)
    assert str(source if way == "file" else ARCHIVE.filename) in text
    assert_old(data_dir)
    assert not (data_dir / PART).exists()
    assert {path.name for path in tmp_path.iterdir()} == {"data", source.name}


def test_missing_file(tmp_path: Path) -> None:
    source = tmp_path / "mine.tar.gz"
    source.write_bytes(BODY)
    archive = dataclasses.replace(ARCHIVE, files={**MD5S, "labels": "0" * 32})
    with pytest.raises(DataError, match=f"has no {FOLDER}/labels"):
        install(tmp_path, source=source, archive=archive)


@pytest.mark.parametrize(("limit", "reason"), [("MAX_UNPACKED", "too much"), ("MAX_TAIL", "after its end")])
def test_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, reason: str) -> None:
    monkeypatch.setattr(unpack, limit, 1_000_010)
    source = tmp_path / "mine.tar.gz"
    source.write_bytes(gzip.compress(PLAIN + bytes(5_000_000)))
    with pytest.raises(DataError, match=reason):
        install(tmp_path / "data", source=source, sha256=None)
    assert not (tmp_path / "data" / FOLDER).exists()


def test_content_check(server: Server, tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        raise DataError(f"{folder / 'train'}: 49999 images")

    put_old(tmp_path)
    with pytest.raises(DataError, match="49999"):
        install(tmp_path, server.url("/a", good), check=check)
    assert_old(tmp_path)
    assert not (tmp_path / PART).exists()


# The disk


def test_data_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        install(tmp_path / "file" / "data")


def full_disk(*_arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_while_fetching(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = fetch.Part.append

    def append_until_full(part: fetch.Part, file: IO[bytes], chunk: bytes) -> None:
        if part.size > 100_000:
            full_disk()
        append(part, file, chunk)

    put_old(tmp_path)
    url = server.url("/a", good)
    with monkeypatch.context() as patch:
        patch.setattr(fetch.Part, "append", append_until_full)
        with pytest.raises(OSError, match="No space"):
            install(tmp_path, url)
    assert len(server.exchanges) == 1
    assert_old(tmp_path)
    assert install(tmp_path, url).resumed_bytes > 100_000
    assert_complete(tmp_path)


def test_full_disk_while_unpacking(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_old(tmp_path)
    url = server.url("/a", good)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space"):
            install(tmp_path, url)
    assert_old(tmp_path)
    installed = install(tmp_path, url)
    assert (installed.resumed_bytes, installed.fetched_bytes) == (len(BODY), 0)
    assert len(server.exchanges) == 1
    assert_complete(tmp_path)


@pytest.mark.parametrize("force", [False, True])
def test_crash_between_the_renames(server: Server, tmp_path: Path, force: bool) -> None:
    url = server.url("/a", good)
    install(tmp_path, url)
    (tmp_path / FOLDER).rename(tmp_path / ".cifar100-old")
    (tmp_path / ".cifar100-new").mkdir()
    (tmp_path / ".cifar100-new" / "train").write_bytes(b"half")
    assert find_installed(ARCHIVE, tmp_path) is None
    assert install(tmp_path, url, force=force).already_there is not force
    assert_complete(tmp_path)


def test_failed_rename_is_undone(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def rename_all_but_new(path: Path, target: Path) -> Path:
        if path.name == ".cifar100-new":
            full_disk()
        return rename(path, target)

    put_old(tmp_path)
    monkeypatch.setattr(Path, "rename", rename_all_but_new)
    with pytest.raises(OSError, match="No space"):
        install(tmp_path, server.url("/a", good))
    assert_old(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_replaces_what_is_no_data_set(server: Server, tmp_path: Path, kind: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    data_dir = tmp_path / "data"
    put_old(elsewhere)
    data_dir.mkdir()
    if kind == "folder":
        put_old(data_dir)
    elif kind == "file":
        (data_dir / FOLDER).touch()
    else:
        (data_dir / FOLDER).symlink_to(elsewhere / FOLDER)
    listener = Listener()
    install(data_dir, server.url("/a", good), listener=listener)
    assert f"{data_dir / FOLDER}: not a data set that can be verified; replaced" in listener.lines
    assert_complete(data_dir)
    assert_old(elsewhere)


# Finding


def put_files(data_dir: Path) -> Path:
    folder = data_dir / FOLDER
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("left_over", ["", "{", "[1]", '{"files": 3}', '{"files": {"train": 1}}', "null"])
def test_adopts_an_official_folder(tmp_path: Path, left_over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put_files(tmp_path)
    if left_over:
        (folder / ".cifar100.json").write_text(left_over)
    installed = install(tmp_path, "http://127.0.0.1:9/never")
    assert installed == Installed("cifar100", folder, True, None, True, 0, 0)
    manifest = json.loads((folder / ".cifar100.json").read_text())
    assert (manifest["official"], manifest["files"]["meta"]["md5"]) == (True, MD5S["meta"])
    monkeypatch.setattr(download, "_md5", None)
    assert find_installed(ARCHIVE, tmp_path) == installed


def test_adopts_a_folder_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_files(tmp_path)
    monkeypatch.setattr(download, "_write_manifest", full_disk)
    assert find_installed(ARCHIVE, tmp_path) is not None
    assert {path.name for path in tmp_path.iterdir()} == {FOLDER}


def test_touched_files_are_read_again(server: Server, tmp_path: Path) -> None:
    archive = dataclasses.replace(ARCHIVE, files={**MD5S, "meta": "0" * 32})
    installed = install(tmp_path, server.url("/a", serving(OTHER)), archive=archive, sha256=None)
    meta = tmp_path / FOLDER / "meta"
    os.utime(meta, (1, 1))
    found = find_installed(archive, tmp_path)
    assert found == dataclasses.replace(installed, already_there=True, fetched_bytes=0)
    meta.write_bytes(b"The names of the classes")
    os.utime(meta, (2, 2))
    assert find_installed(archive, tmp_path) is None
    assert meta.read_bytes() == b"The names of the classes"


def test_official_files_put_over_others_are_of_no_known_archive(server: Server, tmp_path: Path) -> None:
    archive = dataclasses.replace(ARCHIVE, files={**MD5S, "meta": "0" * 32})
    install(tmp_path, server.url("/a", serving(OTHER)), archive=archive, sha256=None)
    (tmp_path / FOLDER / "meta").write_bytes(b"official")
    official = dataclasses.replace(ARCHIVE, files={**MD5S, "meta": hashlib.md5(b"official").hexdigest()})
    found = find_installed(official, tmp_path)
    assert found is not None
    assert (found.official, found.sha256) == (True, None)


@pytest.mark.parametrize("missing", ["train", "test", "meta", None])
def test_nothing_found(tmp_path: Path, missing: str | None) -> None:
    assert find_installed(ARCHIVE, tmp_path) is None
    folder = put_files(tmp_path)
    if missing is not None:
        (folder / missing).unlink()
        (folder / missing).mkdir()
    else:
        (folder / "train").write_bytes(b"another")
    assert find_installed(ARCHIVE, tmp_path) is None


def test_the_official_archives() -> None:
    assert {name: archive.filename for name, archive in ARCHIVES.items()} == {
        "cifar100": "cifar-100-python.tar.gz",
        "cifar10": "cifar-10-python.tar.gz",
    }
    for archive in ARCHIVES.values():
        assert re.fullmatch("[0-9a-f]{64}", archive.sha256)
        assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in archive.files.values())
