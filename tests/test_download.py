"""The download against a server that misbehaves in every way known."""

import contextlib
import dataclasses
import email.utils
import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from email.message import Message
from http.client import HTTPSConnection
from pathlib import Path
from typing import IO, Any
from urllib.request import Request

import pytest

from cifar100cli import download, fetch
from cifar100cli.download import ARCHIVES, OFFICIAL, Installed, find_installed
from cifar100cli.errors import CifarError, DataError, DownloadInterrupted, FolderError, UsageError
from tests.weather import (
    ARCHIVE,
    BODY,
    FILES,
    FOLDER,
    HALF,
    KEPT,
    MD5S,
    OTHER,
    PART,
    PLAIN,
    Behaviour,
    Exchange,
    Listener,
    Server,
    assert_complete,
    assert_old,
    assert_one_line,
    claiming,
    dripping,
    dropping,
    from_too_far,
    good,
    halting,
    in_broken_chunks,
    in_chunks,
    install,
    nonsense,
    page,
    put_old,
    raw,
    serving,
    sha256_of,
    short_without_length,
    stalling,
    status,
    whole,
    whole_from_start,
    without_end,
    without_length,
)

pytestmark = pytest.mark.usefixtures("waits", "as_on_windows")


@pytest.fixture
def as_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is open is neither removed nor renamed, nor is the folder that it is in."""
    opened = weakref.WeakKeyDictionary[IO[Any], Path]()
    plain_open = Path.open

    def open_file(path: Path, *arguments: Any, **options: Any) -> IO[Any]:
        file: IO[Any] = plain_open(path, *arguments, **options)
        opened[file] = path
        return file

    def unless_open(operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(path: Path, *arguments: Any, **options: Any) -> Any:
            if any(path in (held, *held.parents) for file, held in opened.items() if not file.closed):
                raise PermissionError(errno.EACCES, "used by another process", str(path))
            return operation(path, *arguments, **options)

        return operate

    monkeypatch.setattr(Path, "open", open_file)
    for name in ("unlink", "rename", "replace"):
        monkeypatch.setattr(Path, name, unless_open(getattr(Path, name)))


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


def test_drops_at_every_percent(server: Server, tmp_path: Path) -> None:
    """Nothing is sent twice: the server's bytes are the archive's."""
    stops = [len(BODY) * percent // 100 for percent in range(1, 100)]
    install(tmp_path, server.url("/a", *map(dropping, stops), good), retries=2)
    assert server.ranges == [None, *(f"bytes={stop}-" for stop in stops)]
    assert server.sent == len(BODY)
    assert_complete(tmp_path)


def test_a_few_bytes_are_no_progress(server: Server, tmp_path: Path) -> None:
    """A server that gives a hundred bytes at a time would keep us for weeks."""
    url = server.url("/a", *(dropping(stop) for stop in range(100, 10_000, 100)))
    with pytest.raises(CifarError, match="ended after 500 of"):
        install(tmp_path, url)
    assert len(server.exchanges) == 5


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
        [raw(b"HTTP/1.0 200 OK\r\nContent-Length: -5\r\n\r\n", BODY)],
        [raw(b"HTTP/1.0 200 OK\r\nContent-Length: many\r\n\r\n", BODY)],
        [raw(b"HTTP/1.0 200 OK\r\nContent-Length: 9999999999999999\r\n\r\n", BODY), good],
        [raw(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(BODY) + 9), BODY), good],
        [raw(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % HALF, BODY), good],
        [raw(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY), BODY + b"more")],
        [raw(b"HTTP/1.0 abc\r\n\r\n"), good],
        [raw(b"HTTP/1.0 204 Nothing\r\n\r\n"), good],
        [raw(b"HTTP/1.0 200 OK\r\n"), good],
        [raw(b"HTTP/1.0 200 OK\r\nX: " + b"x" * 100_000), good],
        [raw(b"HTTP/1.0 200 OK\r\n", again=b"X: x\r\n" * 1000), good],
        [raw(b"", again=b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), good],
        [raw(b"HTTP/1.0 302 There\r\nLocation: /\r\n\r\n", again=bytes(100_000)), good],
        [raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n", BODY), good],
        [raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n", BODY), good],
        [raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", BODY), good],
        [raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", again=b"X: x\r\n" * 1000), good],
        [dropping(HALF), claiming("bytes 5-3/2"), good],
        [dropping(HALF), claiming(f"bytes {HALF}-{len(BODY) - 1}/{len(BODY) + 9}"), good],
        [dropping(HALF), claiming(f"bytes {HALF}-{len(BODY) - 1}/{HALF - 9}"), good],
        [dropping(HALF), claiming(f"bytes -1-{len(BODY)}/{len(BODY)}"), good],
        [dropping(HALF), claiming("bytes */*"), good],
        [dropping(HALF), claiming(""), good],
        [dropping(HALF), claiming(f"bytes {HALF}-{len(BODY) - 1}/*")],
        [dropping(HALF), status(206), good],
        [dropping(HALF), status(304), good],
    ],
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
    install(tmp_path, server.url("/a", stalling, good), timeout=1.0, listener=listener)
    assert server.ranges == [None, f"bytes={HALF}-"]
    assert "timed out: no data came" in listener.lines[0]
    assert_complete(tmp_path)


def test_a_drip_is_a_stall(server: Server, tmp_path: Path) -> None:
    listener = Listener()
    install(tmp_path, server.url("/a", dripping, good), timeout=1.0, listener=listener)
    assert "timed out: no data came" in listener.lines[0]
    assert server.exchanges[0].sent < fetch.LEAST
    assert_complete(tmp_path)


@pytest.mark.parametrize("code", [429, 500, 503])
def test_busy_server_is_asked_again(server: Server, tmp_path: Path, waits: list[float], code: int) -> None:
    install(tmp_path, server.url("/a", status(code), good))
    assert len(waits) == 1
    assert 0.7 < waits[0] < 1.3


@pytest.mark.parametrize(
    ("asked", "waited"), [("7", 7), ("3600", 60), ("date", 20), ("soon", 1), ("-5", 1), ("year", 60), ("9" * 5000, 60)]
)
def test_retry_after(server: Server, tmp_path: Path, waits: list[float], asked: str, waited: float) -> None:
    later = {"date": 20, "year": 365 * 86_400}
    value = email.utils.formatdate(time.time() + later[asked], usegmt=True) if asked in later else asked
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
    with pytest.raises(CifarError, match=r"refused.*nothing is kept") as raised:
        install(tmp_path, f"http://127.0.0.1:{server.http.server_port}/a", retries=3)
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """The address is not what is refused, and the proxy's password is nobody's business."""
    monkeypatch.setenv("no_proxy", "")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        proxy = f"127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv(f"{scheme}_proxy", f"http://user:secret@{proxy}")
        words = rf"refused \(through the proxy {proxy}; .*NO_PROXY.*nothing is kept"
        with pytest.raises(CifarError, match=words) as raised:
            install(tmp_path, f"{scheme}://example.invalid/a", retries=1)
    assert "secret" not in str(raised.value)


def test_an_unknown_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a company's proxy reads along: no second attempt helps, and the variable that does is named."""

    def connect(_self: object) -> None:
        raise ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")

    monkeypatch.setattr(HTTPSConnection, "connect", connect)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(CifarError, match=r"self-signed certificate; .*SSL_CERT_FILE.*nothing is kept"):
        install(tmp_path, "https://example.invalid/a")


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


def test_a_file_that_is_not_read_is_told(server: Server, tmp_path: Path) -> None:
    install(tmp_path / "data", server.url("/a", good))
    (tmp_path / "mine.tar.gz").write_bytes(b"another")
    listener = Listener()
    install(tmp_path / "data", source=tmp_path / "mine.tar.gz", sha256=None, listener=listener)
    assert any("mine.tar.gz: not read" in line and "--force" in line for line in listener.lines)


def test_every_mirror_has_its_turn(server: Server, tmp_path: Path) -> None:
    install(tmp_path, server.url("/a", page), server.url("/b", page), server.url("/c", good), retries=1)
    assert_complete(tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_smaller_archive_does_not_cost_what_has_come(server: Server, tmp_path: Path, ranges: bool) -> None:
    body = gzip.compress(b"another")
    smaller = serving(body) if ranges else lambda exchange: exchange.answer(200, {"Content-Length": len(body)}, body)
    (tmp_path / PART).write_bytes(BODY[:HALF])
    with pytest.raises(DataError, match=f"has {len(body)} bytes"):
        install(tmp_path, server.url("/a", smaller))
    assert (tmp_path / PART).stat().st_size == HALF
    larger = serving(BODY[: HALF + 100])
    with pytest.raises(DataError, match=f"has {HALF + 100} bytes, and the archive {len(BODY)}"):
        install(tmp_path, server.url("/b", larger))
    assert (tmp_path / PART).stat().st_size == HALF


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_part_that_is_no_plain_file(server: Server, tmp_path: Path, kind: str) -> None:
    """Nobody waits at a pipe, and nothing is written to where a link leads."""
    data_dir, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data_dir.mkdir()
    elsewhere.write_bytes(b"mine")
    part = data_dir / PART
    if kind == "pipe":
        os.mkfifo(part)
    elif kind == "link":
        part.symlink_to(elsewhere)
    else:
        part.mkdir()
    with pytest.raises(FolderError, match=f"{PART}: is not a plain file: remove it"):
        install(data_dir, server.url("/a", good))
    assert elsewhere.read_bytes() == b"mine"
    assert server.exchanges == []


def test_what_is_in_place_is_not_what_was_asked_for(server: Server, tmp_path: Path) -> None:
    url = server.url("/a", good)
    installed = install(tmp_path, url)
    assert install(tmp_path, url, sha256=installed.sha256).already_there
    assert install(tmp_path, url, sha256=None).already_there
    with pytest.raises(DataError, match="is of another archive than that of --sha256 0000"):
        install(tmp_path, url, sha256=64 * "0")
    with pytest.raises(DataError, match="no such file; --from takes"):
        install(tmp_path, source=tmp_path / "none.tar.gz")
    assert len(server.exchanges) == 1


def test_redirect_keeps_the_range(server: Server, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(BODY[:HALF])
    server.url("/b", good)
    install(tmp_path, server.url("/a", status(302, Location="/b")))
    assert server.ranges == [f"bytes={HALF}-"] * 2
    assert_complete(tmp_path)


@pytest.mark.parametrize("target", ["/a", "ftp://127.0.0.1/a", "file:///etc/passwd"])
def test_redirect_to_nowhere(server: Server, tmp_path: Path, target: str) -> None:
    with pytest.raises(CifarError, match="HTTP 302, a redirect in a circle, or to something") as raised:
        install(tmp_path, server.url("/a", status(302, Location=target)))
    assert raised.value.exit_code == 1


def test_https_is_not_left_where_nothing_else_vouches() -> None:
    """Under `--sha256 none` whoever sits on the way could put another archive in its place."""

    def follow(before: str, after: str, *, verified: bool) -> Request | None:
        request = Request(f"{before}://127.0.0.1/a")
        request.set_proxy("127.0.0.1:1", "https")  # which an address of http, too, may be fetched through
        redirects = fetch._WebRedirects(verified=verified)
        return redirects.redirect_request(request, io.BytesIO(), 302, "Found", Message(), f"{after}://127.0.0.1/b")

    assert follow("https", "http", verified=True)
    for before, after in (("https", "https"), ("http", "http"), ("http", "https")):
        assert follow(before, after, verified=False)
    with pytest.raises(fetch._RefusedError, match="redirects to http,"):
        follow("https", "http", verified=False)


@pytest.mark.parametrize(
    "target",
    [
        "http://[",
        "http://a:b/",
        "http://127.0.0.1:99999/",
        f"http://{'a' * 64}.b/",
        "http://a..b/",
        "http://\x01/",
        "//",
    ],
)
def test_redirect_to_what_cannot_be(server: Server, tmp_path: Path, target: str) -> None:
    with pytest.raises(CifarError) as raised:
        install(tmp_path, server.url("/a", status(302, Location=target)), retries=1)
    assert raised.value.exit_code == 1
    assert_one_line(raised.value)


def test_endless_redirects(server: Server, tmp_path: Path) -> None:
    for number in range(30):
        server.url(f"/{number}", status(302, Location=f"/{number + 1}"))
    with pytest.raises(CifarError, match="a redirect in a circle"):
        install(tmp_path, server.url("/a", status(302, Location="/0")))
    assert len(server.exchanges) < 15


@pytest.mark.parametrize("url", ["ftp://a/b", "file:///b", "a.tar.gz", "http://", "http://a:b/", "http://a/b c", ""])
def test_unusable_address(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match="http://"):
        install(tmp_path / "data", url)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("start", ["https://me:word", "https://me:w/ord", "https://me:w[ord", "https://me", "me:word"])
def test_a_password_in_an_address_is_not_told(tmp_path: Path, start: str) -> None:
    """With a slash in it, the address is none, and the line about that had the password in it."""
    with pytest.raises(UsageError) as told:
        install(tmp_path / "data", f"{start}@127.0.0.1/a")
    assert str(told.value) == "--url: a name or password in an address is sent nowhere; leave it out"


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


@pytest.mark.parametrize("behaviour", [in_chunks, without_length, short_without_length])
def test_another_digest_is_offered_only_where_all_has_come(
    server: Server, tmp_path: Path, behaviour: Behaviour
) -> None:
    """Chunks have an end of their own; a connection that closes, of an archive of unknown size, may have broken."""
    with pytest.raises(DataError) as raised:
        install(tmp_path, server.url("/a", behaviour), sha256="0" * 64)
    text = assert_one_line(raised.value)
    came = HALF if behaviour is short_without_length else len(BODY)
    told = f"named no length: these {came} bytes may be a part of it"
    assert ("--sha256" in text, told in text) == ((True, False) if behaviour is in_chunks else (False, True))


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
    with pytest.raises(DataError, match=sha256_of(OTHER)):
        install(tmp_path, server.url("/a", serving(OTHER)), archive=dataclasses.replace(ARCHIVE, size=len(OTHER)))
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


def dropping_version(stop: int, tag: str) -> Behaviour:
    return lambda exchange: exchange.answer_range(BODY, stop, ETag=tag)


CHANGED = gzip.compress(PLAIN, mtime=1)
"""The same content in another archive of the same size, as a server has it that builds archives anew."""


@pytest.mark.parametrize("sha256", [OFFICIAL, None])
@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
def test_the_file_changes_between_two_attempts(server: Server, tmp_path: Path, sha256: str | None, header: str) -> None:
    """Bytes of two files never make one archive: with a digest it tells, without one the server's own word does."""
    later = len(CHANGED) - 9  # the gzip header, with the one byte that differs, comes first

    def first(exchange: Exchange) -> None:
        exchange.answer_range(CHANGED, later, **{header: "one"})

    url = server.url("/a", first, serving(BODY, **{header: "two"}))
    installed = install(tmp_path, url, sha256=sha256)
    assert installed.sha256 == ARCHIVE.sha256
    assert server.ranges == [None, f"bytes={later}-", None]
    assert_complete(tmp_path)


@pytest.mark.parametrize("sha256", [OFFICIAL, None])
def test_a_changed_file_without_ranges_and_versions(server: Server, tmp_path: Path, sha256: str | None) -> None:
    """What is skipped is compared with what is there."""
    listener = Listener()
    url = server.url("/a", lambda exchange: exchange.answer_range(CHANGED, HALF), whole)
    installed = install(tmp_path, url, sha256=sha256, listener=listener)
    assert installed.sha256 == ARCHIVE.sha256
    assert "begins with other bytes than are already here" in listener.lines[1]
    assert_complete(tmp_path)


def test_the_size_changes_between_two_attempts(server: Server, tmp_path: Path) -> None:
    url = server.url("/a", lambda exchange: exchange.answer_range(OTHER, HALF), good)
    assert install(tmp_path, url, sha256=None).sha256 == ARCHIVE.sha256
    assert server.ranges == [None, f"bytes={HALF}-", None]


def test_versions_are_a_servers_own(server: Server, tmp_path: Path) -> None:
    """Two mirrors name the same archive in two ways; the digest tells, and else the size and gzip's own checksum."""
    one = server.url("/a", dropping_version(HALF, "of one"))
    two = server.url("/b", serving(BODY, ETag="of two"))
    install(tmp_path, one, two, sha256=None)
    assert server.sent == len(BODY)
    assert_complete(tmp_path)


def test_a_gap_is_not_filled_with_what_follows(server: Server, tmp_path: Path) -> None:
    listener = Listener()
    install(tmp_path, server.url("/a", dropping(HALF), from_too_far, good), listener=listener)
    assert f"sends bytes from {HALF + 10} on, and was asked for those from {HALF}" in listener.lines[1]
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
    with pytest.raises(DownloadInterrupted, match=r"^[\d,]+ bytes are kept, and the same command goes on") as stopped:
        download.install(ARCHIVE, tmp_path, urls=[url], progress=interrupt, **arguments)
    assert stopped.value.exit_code == 130
    kept = (tmp_path / PART).stat().st_size
    assert 0 < kept < len(BODY)
    assert install(tmp_path, url).resumed_bytes == kept


# The disk


def test_data_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="Not a directory; --data-dir or CIFAR100_DATA_DIR names another place"):
        install(tmp_path / "file" / "data")
    with pytest.raises(FolderError, match="it is not a folder"):
        install(tmp_path / "file")


def full_disk(*_arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_while_fetching(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = fetch.Part.append

    def append_until_full(part: fetch.Part, file: IO[bytes], chunk: bytes) -> None:
        if part.size > 100_000:
            full_disk()
        append(part, file, chunk)

    told = (
        rf"{tmp_path}: No space left on device; 1\d\d,\d{{3}} bytes are kept, .* --data-dir or CIFAR100_DATA_DIR names"
    )
    put_old(tmp_path)
    url = server.url("/a", good)
    with monkeypatch.context() as patch:
        patch.setattr(fetch.Part, "append", append_until_full)
        with pytest.raises(FolderError, match=told):
            install(tmp_path, url)
    assert len(server.exchanges) == 1
    assert_old(tmp_path)
    assert install(tmp_path, url).resumed_bytes > 100_000
    assert_complete(tmp_path, kept=True)


def test_full_disk_while_unpacking(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = rf"{tmp_path}.*: No space left on device; {len(BODY):,} bytes are kept"
    put_old(tmp_path)
    url = server.url("/a", good)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(FolderError, match=told):
            install(tmp_path, url)
    assert_old(tmp_path)
    installed = install(tmp_path, url)
    assert (installed.resumed_bytes, installed.fetched_bytes) == (len(BODY), 0)
    assert len(server.exchanges) == 1
    assert_complete(tmp_path, kept=True)


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
    replace = Path.replace

    def replace_all_but_new(path: Path, target: Path) -> Path:
        if path.name == ".cifar100-new":
            full_disk()
        return replace(path, target)

    put_old(tmp_path)
    monkeypatch.setattr(Path, "replace", replace_all_but_new)
    with pytest.raises(FolderError, match="No space"):
        install(tmp_path, server.url("/a", good))
    assert_old(tmp_path)


def test_windows_is_asked_again_to_rename_a_folder_that_is_looked_at(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As virus scanners do with every file that is new."""
    replace, refused = Path.replace, []

    def refuse_each_once(path: Path, target: Path) -> Path:
        if path not in refused:
            refused.append(path)
            raise PermissionError(errno.EACCES, "Access is denied", str(path))
        return replace(path, target)

    put_old(tmp_path)
    monkeypatch.setattr(Path, "replace", refuse_each_once)
    monkeypatch.setattr(sys, "platform", "win32")
    install(tmp_path, server.url("/a", good), force=True)
    assert [path.name for path in refused] == [FOLDER, ".cifar100-new"]
    assert_complete(tmp_path, kept=True)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_keeps_what_is_no_data_set_under_another_name(server: Server, tmp_path: Path, kind: str) -> None:
    """It may be somebody's own, as with other labels."""
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
    kept = data_dir / KEPT
    assert f"{data_dir / FOLDER}: not a data set that can be verified; kept as {kept}" in listener.lines
    assert_complete(data_dir, kept=True)
    assert_old(elsewhere)
    if kind == "file":
        assert kept.is_file()
    else:
        kept.rename(tmp_path / FOLDER)
        assert_old(tmp_path)
        (tmp_path / FOLDER).rename(kept)
    shutil.rmtree(data_dir / FOLDER)
    (data_dir / FOLDER).mkdir()
    install(data_dir, server.url("/a", good))
    assert (data_dir / f"{KEPT}-2").is_dir(), "nor does one take another's place"


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
