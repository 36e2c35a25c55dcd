"""Fetch one archive over HTTP through bad weather: time-outs, retries, mirrors, and going on by Range.

What has come so far is kept in a `.part` file that outlives broken connections and killed processes. It
counts as the archive only once its digest is the expected one.
"""

import contextlib
import email.utils
import gzip
import hashlib
import io
import random
import re
import socket
import stat
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from pathlib import Path
from ssl import SSLCertVerificationError
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from cifar100cli import __version__
from cifar100cli.errors import CifarError, DataError, FolderError, UsageError

Progress = Callable[[int, int | None], None]
"""Called with the bytes done and, where known, the total; once per phase from the start."""

Log = Callable[[str], None]
"""Called with a line for the user."""

Version = tuple[str | None, str | None, int | None]
"""What tells one file of a server's from the next at the same address: ETag, Last-Modified, and size in bytes."""

CHUNK = 1 << 18
GZIP_MAGIC = b"\x1f\x8b"
MAX_ARCHIVE = 1 << 30
MAX_BACKOFF = 30.0  # seconds
MAX_RETRY_AFTER = 60.0  # seconds
LEAST = 1000  # bytes that have to come within the time-out; fewer are a stall
PROGRESS = 4096  # bytes that an attempt has to bring, or it counts as failed
MAX_HEAD = 1 << 20  # bytes of status lines, headers, and redirects with their bodies

_sleep = time.sleep


class _FailedError(Exception):
    """An attempt went wrong in a way that another one may not."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class _RefusedError(Exception):
    """This address will not give the archive, however often it is asked; `content`: it gave another thing."""

    def __init__(self, reason: str, *, content: bool = False) -> None:
        super().__init__(reason)
        self.content = content


class _SpoiltError(Exception):
    """The bytes so far are not the archive's; `restart`: they come from several places, try from one."""

    def __init__(self, reason: str, *, restart: bool) -> None:
        super().__init__(reason)
        self.restart = restart


class Part:
    """The archive as far as it has come; the file outlives broken connections and killed processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.resumed = 0
        self.fetched = 0
        self.last_start = 0
        self._versions: dict[str, Version] = {}
        self._sha256 = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._sha256.hexdigest()

    def read(self, progress: Progress, total: int | None) -> None:
        """Take in what is on the disk already."""
        self.size = 0
        self._sha256 = hashlib.sha256()
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            while chunk := file.read(CHUNK):
                self._sha256.update(chunk)
                self.size += len(chunk)
                progress(self.size, total)

    def is_of(self, url: str, version: Version) -> bool:
        """Whether what an address has now can be the archive whose first bytes are here; what is unknown can."""
        for other, known in self._versions.items():
            # Servers name versions in their own ways, but one archive has one size.
            pairs = list(zip(known, version, strict=True))[0 if other == url else -1 :]
            if any(before is not None and now is not None and before != now for before, now in pairs):
                return False
        self._versions[url] = version
        return True

    def append(self, file: IO[bytes], chunk: bytes) -> None:
        file.write(chunk)
        file.flush()
        self._sha256.update(chunk)
        self.size += len(chunk)

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.size = self.resumed = 0
        self._versions = {}
        self._sha256 = hashlib.sha256()

    def unwrap(self) -> bool:
        """Undo the compression that some servers put on top of the archive's own; True if there was one."""
        inner = self.path.with_suffix(".inner")
        inner.unlink(missing_ok=True)  # which may be a link to elsewhere
        try:
            with gzip.open(self.path) as outer, inner.open("wb") as file:
                chunk = outer.read(CHUNK)
                if not chunk.startswith(GZIP_MAGIC):
                    return False
                while chunk and file.tell() <= MAX_ARCHIVE:
                    file.write(chunk)
                    chunk = outer.read(CHUNK)
            inner.replace(self.path)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return False
        finally:
            inner.unlink(missing_ok=True)
        self.read(lambda _done, _total: None, None)
        return True


class _Stream(io.RawIOBase):
    """A connection's bytes, as long as enough and not too many come.

    http.client waits as long as it takes for the end of headers, of interim answers, and of what follows the last
    chunk, and urllib reads the whole body of a redirect: a server that never ends would hold us for ever.
    """

    def __init__(self, raw: io.RawIOBase, timeout: float) -> None:
        self.left = MAX_HEAD
        self._raw = raw
        self._timeout = timeout
        self._since, self._got = time.monotonic(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        got = self._raw.readinto(buffer)
        self._got += got or 0
        self.left -= got or 0
        if self.left < 0:
            raise HTTPException("sends far more than was asked for")
        now = time.monotonic()
        if now - self._since > self._timeout:
            if self._got < LEAST:
                raise TimeoutError
            self._since, self._got = now, 0
        return got

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.stream = _Stream(self.fp.detach(), sock.gettimeout() or 30.0)
        self.fp = io.BufferedReader(self.stream)


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(HTTPSConnection):
    response_class = _Response


class _Http(HTTPHandler):
    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_Connection, req)


class _Https(HTTPSHandler):
    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, req)


class _WebRedirects(HTTPRedirectHandler):
    """Follows redirects, but not out of the web, nor out of https where no digest verifies what comes.

    urllib itself would go on to ftp.
    """

    def __init__(self, *, verified: bool) -> None:
        self._verified = verified

    def http_error_302(self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)  # type: ignore[arg-type]
        except ValueError:  # the new address cannot be, and urllib leaves the answer to whoever collects the garbage
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        before, scheme = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme  # `req.type` may be the proxy's
        if scheme not in ("http", "https"):
            raise HTTPError(req.full_url, code, msg, headers, fp)
        if scheme == "http" and before == "https" and not self._verified:
            fp.close()
            raise _RefusedError("redirects to http, where anybody could change what comes; give the archive's --sha256")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def refuse_unusable(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError:
        usable = False
    if "@" in (parts.netloc if usable else url):  # a password with a slash in it is taken for a port, and is none
        raise UsageError("--url: a name or password in an address is sent nowhere; leave it out")
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError(f"--url {url!r}: not an address that starts with http:// or https://")


def fetch(
    part: Part,
    urls: Sequence[str],
    expected: str | None,
    size: int | None,
    progress: Progress,
    log: Log,
    retries: int,
    timeout: float,
) -> None:
    """Complete `part` from the addresses in turn until its sha256 is the expected one (None: any).

    `size` is the archive's length in bytes, where it is known; `retries` is how many attempts in a row may bring
    nothing, `timeout` the seconds without a byte after which one has failed.

    Raises `DataError` when every address gives something else than the archive, `CifarError` when none gives enough
    of it.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(part.path.lstat().st_mode):  # nothing is written to where a link leads
            raise FolderError(f"{part.path}: is not a plain file: remove it, or name another --data-dir")
    part.read(progress, size)
    part.resumed = part.size
    if part.digest == expected:
        return
    if part.size >= (size or MAX_ARCHIVE):
        log(f"{part.path}: not the archive that is expected; starting again from the first byte")
        part.discard()
    elif part.size:
        log(f"{part.path}: going on from {part.size} bytes")
    waiting = deque(urls)
    reasons: dict[str, str] = {}
    without_content: set[str] = set()
    ready: dict[str, float] = {}
    failures = 0
    restarted = False
    while waiting:
        url = waiting[0]
        before = part.size
        try:
            whole = _attempt(url, part, expected, size, timeout, progress)
            if _is_archive(part, expected):
                return
            reason = f"sha256 is {part.digest}, expected {expected}"
            if not whole:
                reason += f" (the server named no length: these {part.size} bytes may be a part of it)"
            elif restarted or part.last_start == 0:
                reason += f"; if you trust this source: --sha256 {part.digest}"
            raise _SpoiltError(reason, restart=part.last_start > 0)
        except _FailedError as error:
            reasons[url] = str(error)
            failures = 0 if part.size >= before + PROGRESS else failures + 1
            if failures >= max(retries, len(waiting)):  # every mirror has its turn
                break
            waiting.rotate(-1)
            ready[url] = time.monotonic() + error.retry_after
            backoff = min(MAX_BACKOFF, 2 ** max(failures - 1, 0) * random.uniform(0.75, 1.25))
            wait = max(backoff, ready.get(waiting[0], 0.0) - time.monotonic())
            following = "trying again" if waiting[0] == url else f"trying {waiting[0]}"
            log(f"{url}: {error}; {following} in {wait:.0f} s")
            _sleep(wait)
            continue
        except _SpoiltError as error:
            part.discard()
            if error.restart and not restarted:
                restarted = True
                log(f"{url}: {error}; starting again from the first byte")
                continue
            refused = _RefusedError(str(error), content=True)
        except _RefusedError as error:
            refused = error
        reasons[url] = str(refused)
        if refused.content:
            without_content.add(url)
        waiting.popleft()
        if waiting:
            log(f"{url}: {refused}; trying {waiting[0]}")
    why = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
    if without_content == set(urls):
        raise DataError(f"{why}; what was in place is untouched (--url URL: a mirror, --from FILE: a file)")
    kept = f"{part.size} bytes are kept and the same command goes on from there" if part.size else "nothing is kept"
    raise CifarError(
        f"{part.path.stem} could not be fetched: {why}; {kept} "
        "(--url URL: a mirror, --from FILE: an archive that you have)"
    )


def _is_archive(part: Part, expected: str | None) -> bool:
    if part.digest == expected:
        return True
    return (part.unwrap() and part.digest == expected) or expected is None


def _attempt(url: str, part: Part, expected: str | None, size: int | None, timeout: float, progress: Progress) -> bool:
    """Append what one request yields; returns only when the server has no more to give.

    True when it is known that this was all, False when the server named no length and the connection ended.
    """
    part.last_start = part.size
    headers = {"User-Agent": f"cifar100/{__version__}", "Accept-Encoding": "identity"}
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
    request = Request(url, headers=headers)
    try:
        opener = build_opener(_WebRedirects(verified=expected is not None), _Http, _Https)
        response = opener.open(request, timeout=timeout)
    except HTTPError as error:
        with error:
            _interpret_error(error, part, size)
        return True
    except (OSError, HTTPException) as error:
        # urllib has put a proxy in the host's place.
        proxy = request.host if request.host != urlsplit(url).netloc else None
        raise _network_error(error, proxy) from None
    except (ValueError, OverflowError):  # of urllib, about a redirect to a host or port that cannot be
        raise _RefusedError("redirects to an address that is not valid") from None
    with response:
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        # A server that compresses once more sends a little more than the archive itself.
        limit = MAX_ARCHIVE if encoded else size or MAX_ARCHIVE
        response.stream.left = 2 * limit + MAX_HEAD
        start, total = _extent(response)
        if total is None and not encoded:
            total = size
        if start > part.size:
            raise _FailedError(f"sends bytes from {start} on, and was asked for those from {part.size}")
        if total is not None and total > limit:
            raise _RefusedError(f"has {total} bytes, more than the {limit} expected", content=True)
        version = (response.headers.get("ETag"), response.headers.get("Last-Modified"), total)
        if expected is None and not part.is_of(url, version):  # no digest would tell
            raise _SpoiltError("now has another file than the one that the download began with", restart=True)
        excess = part.size - start
        skipped = hashlib.sha256()
        page = encoded and response.headers.get_content_type() == "text/html"
        chunks = _chunks(response)
        first = next(chunks, b"")
        if start == 0 and (page or not GZIP_MAGIC.startswith(first)):
            raise _RefusedError("answers with a web page, not with the archive", content=True)
        if total is not None and total < part.size:
            reason = f"has {total} bytes, fewer than the {part.size} already here"
            # With the size known it is this address that is wrong, and not the bytes from elsewhere.
            raise _RefusedError(reason, content=True) if size else _SpoiltError(reason, restart=True)
        if size and part.size and not encoded and total != size:  # what is here already may be the archive's
            raise _RefusedError(f"has {total} bytes, and the archive {size}; --sha256 none takes any", content=True)
        with part.path.open("ab") as file:
            chunk = first
            while chunk:
                part.fetched += len(chunk)
                fresh = chunk[excess:]
                if excess and start == 0:
                    skipped.update(chunk[:excess])
                    if len(chunk) >= excess and skipped.hexdigest() != part.digest:
                        raise _SpoiltError("begins with other bytes than are already here", restart=True)
                excess = max(0, excess - len(chunk))
                if part.size + len(fresh) > limit:
                    raise _SpoiltError(f"sends more than the {limit} bytes expected", restart=False)
                part.append(file, fresh)
                progress(part.size, total)
                chunk = next(chunks, b"")
        if excess or not part.size or (total is not None and part.size < total):
            raise _FailedError(f"the connection ended after {part.size} of {total or 'an unknown number of'} bytes")
        return total is not None or bool(response.chunked)


def _extent(response: HTTPResponse) -> tuple[int, int | None]:
    """The byte at which the body starts, and the size of the whole archive if the server tells it."""
    if response.status == 200:
        return 0, response.length
    extent = re.fullmatch(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15}|\*)", response.headers.get("Content-Range", ""))
    if response.status != 206 or not extent:
        raise _RefusedError(f"answers HTTP {response.status} without saying which bytes follow")
    return int(extent[1]), None if extent[2] == "*" else int(extent[2])


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    """The body as it comes in, the first chunk long enough to tell what it is."""
    left = response.length
    try:
        # read1 hands over what there is, so that a stall or a kill costs nothing that has arrived;
        # it neither counts nor complains about a short body, hence `left`.
        chunk = response.read(2)
        while chunk:
            yield chunk
            left = None if left is None else left - len(chunk)
            chunk = b"" if left == 0 else response.read1(CHUNK if left is None else min(CHUNK, left))
    except (OSError, HTTPException, ValueError, OverflowError) as error:  # the last two: impossible sizes of chunks
        raise _network_error(error) from None


def _interpret_error(error: HTTPError, part: Part, size: int | None) -> None:
    """Returns if the answer means that the archive is complete already."""
    if error.code == 416 and part.size:
        extent = re.fullmatch(r"bytes \*/(\d{1,15})", error.headers.get("Content-Range", ""))
        total = int(extent[1]) if extent else None
        if size and total is not None and total != size:
            raise _RefusedError(f"has {total} bytes, expected {size}", content=True)
        if total == part.size:
            return
        raise _SpoiltError(f"does not have the {part.size} bytes that are already here", restart=True)
    if error.code in (408, 425, 429) or error.code >= 500:
        raise _FailedError(f"answers HTTP {error.code}", _retry_after(error.headers.get("Retry-After", "")))
    if error.code in (301, 302, 303, 307, 308):
        raise _RefusedError(f"answers HTTP {error.code}, a redirect in a circle, or to something other than http(s)")
    raise _RefusedError(f"answers HTTP {error.code}")


def _retry_after(value: str) -> float:
    try:
        if value.strip().isdigit():
            seconds = float(value)
        else:
            seconds = (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def _network_error(error: Exception, proxy: str | None = None) -> Exception:
    through = f" (through the proxy {proxy}; HTTP_PROXY or HTTPS_PROXY names another, NO_PROXY=* none)" if proxy else ""
    cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    if isinstance(cause, TimeoutError):
        return _FailedError(f"timed out: no data came{through}")
    if isinstance(cause, IncompleteRead):
        return _FailedError("the connection ended too early")
    text = (isinstance(cause, OSError) and cause.strerror) or str(cause) or type(cause).__name__
    text = "".join(character for character in text if character.isprintable())[:120] + through
    if isinstance(cause, SSLCertVerificationError):
        return _RefusedError(f"{text}; if your network has certificates of its own, SSL_CERT_FILE names their file")
    return _FailedError(text)
