"""Fetch a CIFAR archive through bad weather, trust nothing in it, and put it in place in one step.

Whatever happens on the way, the data folder holds the old data set or the new one, never half of either.
"""

import contextlib
import email.utils
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import tarfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from ssl import SSLCertVerificationError
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock, Timeout

from cifar100cli import __version__
from cifar100cli.errors import CifarError, DataError, UsageError

Progress = Callable[[int, int | None], None]
"""Called with the bytes done and, where known, the total; once per phase from the start."""

Log = Callable[[str], None]
"""Called with a line for the user."""

OFFICIAL = "official"
"""Stands for the digest of the official archive."""

CHUNK = 1 << 18
TAR_CHUNK = 1 << 14
GZIP_MAGIC = b"\x1f\x8b"
MAX_ARCHIVE = 1 << 30
MAX_FILE = 256 << 20
MAX_UNPACKED = 1 << 30
MAX_MEMBERS = 1000
MAX_TAIL = 16 << 20
MAX_BACKOFF = 30.0
MAX_RETRY_AFTER = 60.0

_sleep = time.sleep


@dataclass(frozen=True)
class Archive:
    """A data set as its authors publish it: the archive, and the md5 of each file that is kept of it."""

    dataset: str
    folder: str
    url: str
    size: int
    sha256: str
    files: Mapping[str, str]

    @property
    def filename(self) -> str:
        """The archive's own name, e.g. `cifar-100-python.tar.gz`."""
        return PurePosixPath(urlsplit(self.url).path).name


@dataclass(frozen=True)
class Installed:
    """A data set in place, and what it took to put it there."""

    dataset: str
    path: Path
    official: bool
    sha256: str | None
    already_there: bool
    fetched_bytes: int
    resumed_bytes: int


ARCHIVES: Mapping[str, Archive] = {
    "cifar100": Archive(
        dataset="cifar100",
        folder="cifar-100-python",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        size=169001437,
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        files={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
    "cifar10": Archive(
        dataset="cifar10",
        folder="cifar-10-batches-py",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        size=170498071,
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        files={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
    ),
}


def find_installed(archive: Archive, data_dir: Path) -> Installed | None:
    """The data set if it is in place and whole: as its manifest says, or with the official md5s."""
    folder = data_dir / archive.folder
    try:
        stamps = {name: _stamp(folder / name) for name in archive.files}
        recorded, md5s, sha256 = _read_manifest(archive, folder)
        if stamps != recorded:
            found = {name: _md5(folder / name) for name in archive.files}
            if found not in (dict(archive.files), md5s):
                return None
            sha256 = sha256 if found == md5s else None
            md5s = found
            # A folder that may only be read is as good; its md5s are then computed each time.
            with contextlib.suppress(OSError):
                _write_manifest(archive, folder, md5s, sha256)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return Installed(archive.dataset, folder, md5s == dict(archive.files), sha256, True, 0, 0)


def install(
    archive: Archive,
    data_dir: Path,
    *,
    urls: Sequence[str] = (),
    source: Path | None = None,
    sha256: str | None = OFFICIAL,
    force: bool = False,
    check: Callable[[Path], None],
    progress: Progress,
    log: Log,
    retries: int = 5,
    timeout: float = 30.0,
) -> Installed:
    """Put the data set into `data_dir`: from `source`, else from `urls`, else from the official address.

    `sha256` is the digest that the archive must have (None: any), `check` raises DataError if the
    unpacked folder is not the data set. Nothing that was in place is touched before all of that holds.
    """
    expected = archive.sha256 if sha256 == OFFICIAL else sha256 and sha256.lower()
    if expected is not None and not re.fullmatch("[0-9a-f]{64}", expected):
        raise UsageError(f"--sha256 {sha256}: not a sha256, which is 64 hexadecimal digits")
    addresses = list(dict.fromkeys(urls)) or [archive.url]
    for url in addresses:
        _refuse_unusable(url)
    if not force and (installed := find_installed(archive, data_dir)):
        return installed
    data_dir.mkdir(parents=True, exist_ok=True)
    with _locked(data_dir / f".download-{archive.dataset}.lock", archive.dataset, log):
        final = data_dir / archive.folder
        new, old = data_dir / f".{archive.dataset}-new", data_dir / f".{archive.dataset}-old"
        _repair(final, new, old)
        if not force and (installed := find_installed(archive, data_dir)):
            return installed
        part = _Part(data_dir / f"{archive.filename}.part")
        if source is None:
            _fetch(archive, part, addresses, expected, progress, log, retries, timeout)
            path, label, digest = part.path, archive.filename, part.digest
        else:
            path, label, digest = source, str(source), _digest_of_file(source, expected, progress)
        log(f"unpacking {label}")
        try:
            new.mkdir()
            md5s = _extract(archive, path, label, new, progress)
            check(new)
            _write_manifest(archive, new, md5s, digest)
            if os.path.lexists(final) and not find_installed(archive, data_dir):
                log(f"{final}: not a data set that can be verified; replaced")
            _swap(final, new, old)
        except DataError:
            if source is None:
                part.discard()
            raise
        finally:
            _remove(new)
        part.path.unlink(missing_ok=True)
    official = md5s == dict(archive.files)
    return Installed(archive.dataset, final, official, digest, False, part.fetched, part.resumed)


# What is in place


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _read_manifest(archive: Archive, folder: Path) -> tuple[dict[str, list[int]], dict[str, str], str | None]:
    """Size and modification time of each file, its md5, and the archive's sha256; empty if unreadable."""
    try:
        manifest = json.loads((folder / f".{archive.dataset}.json").read_text(encoding="utf-8"))
        files = manifest["files"]
        stamps = {name: [files[name]["size"], files[name]["mtime_ns"]] for name in archive.files}
        return stamps, {name: str(files[name]["md5"]) for name in archive.files}, manifest["archive_sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}, {}, None


def _write_manifest(archive: Archive, folder: Path, md5s: Mapping[str, str], sha256: str | None) -> None:
    files = {}
    for name, md5 in md5s.items():
        size, mtime_ns = _stamp(folder / name)
        files[name] = {"size": size, "mtime_ns": mtime_ns, "md5": md5}
    official = md5s == dict(archive.files)
    manifest = {"dataset": archive.dataset, "archive_sha256": sha256, "official": official, "files": files}
    with (folder / f".{archive.dataset}.json").open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
        _sync(file)


def _sync(file: IO[str] | IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path, dataset: str, log: Log) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log(f"another process is downloading {dataset}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _repair(final: Path, new: Path, old: Path) -> None:
    """Tidy up after a process that died: under the lock, nobody else works on these folders."""
    if os.path.lexists(old) and not os.path.lexists(final):
        old.rename(final)
    _remove(old)
    _remove(new)


def _swap(final: Path, new: Path, old: Path) -> None:
    if os.path.lexists(final):
        final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(final):
            old.rename(final)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Fetching


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


class _Part:
    """The archive as far as it has come; the file outlives broken connections and killed processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.resumed = 0
        self.fetched = 0
        self.last_start = 0
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

    def append(self, file: IO[bytes], chunk: bytes) -> None:
        file.write(chunk)
        file.flush()
        self._sha256.update(chunk)
        self.size += len(chunk)

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.size = self.resumed = 0
        self._sha256 = hashlib.sha256()

    def unwrap(self) -> bool:
        """Undo the compression that some servers put on top of the archive's own; True if there was one."""
        inner = self.path.with_suffix(".inner")
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


class _WebRedirects(HTTPRedirectHandler):
    """Follows redirects, but not out of the web; urllib itself would go on to ftp."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise HTTPError(req.full_url, code, msg, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _refuse_unusable(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError(f"--url {url!r}: not an address that starts with http:// or https://")


def _fetch(
    archive: Archive,
    part: _Part,
    urls: Sequence[str],
    expected: str | None,
    progress: Progress,
    log: Log,
    retries: int,
    timeout: float,
) -> None:
    """Complete `part` from the addresses in turn until it is the archive that is expected."""
    size = archive.size if expected == archive.sha256 else None
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
            _attempt(url, part, size, timeout, progress)
            if _is_archive(part, expected):
                return
            reason = f"sha256 is {part.digest}, expected {expected}"
            if restarted or part.last_start == 0:
                reason += f"; if you trust this source: --sha256 {part.digest}"
            raise _SpoiltError(reason, restart=part.last_start > 0)
        except _FailedError as error:
            reasons[url] = str(error)
            failures = 0 if part.size > before else failures + 1
            if failures >= retries:
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
    kept = (
        f"{part.size} bytes are kept and the same command goes on from there" if part.size else "nothing came"
    )
    raise CifarError(
        f"{archive.filename} could not be fetched: {why}; {kept} "
        "(--url URL: a mirror, --from FILE: an archive that you have)"
    )


def _is_archive(part: _Part, expected: str | None) -> bool:
    if part.digest == expected:
        return True
    return (part.unwrap() and part.digest == expected) or expected is None


def _attempt(url: str, part: _Part, size: int | None, timeout: float, progress: Progress) -> None:
    """Append what one request yields; returns only when the server has no more to give."""
    part.last_start = part.size
    headers = {"User-Agent": f"cifar100/{__version__}", "Accept-Encoding": "identity"}
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
    try:
        response = build_opener(_WebRedirects).open(Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        with error:
            _interpret_error(error, part, size)
        return
    except (OSError, HTTPException) as error:
        raise _network_error(error) from None
    with response:
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        # A server that compresses once more sends a little more than the archive itself.
        limit = MAX_ARCHIVE if encoded else size or MAX_ARCHIVE
        start, total = _extent(response)
        if total is None and not encoded:
            total = size
        if start > part.size:
            raise _FailedError(f"answers from byte {start} on, asked from {part.size}")
        if total is not None and total > limit:
            raise _RefusedError(f"has {total} bytes, more than the {limit} expected", content=True)
        excess = part.size - start
        page = encoded and response.headers.get_content_type() == "text/html"
        chunks = _chunks(response)
        first = next(chunks, b"")
        if start == 0 and (page or not GZIP_MAGIC.startswith(first)):
            raise _RefusedError("answers with a web page, not with the archive", content=True)
        if total is not None and total < part.size:
            reason = f"has {total} bytes, fewer than the {part.size} already here"
            # With the size known it is this address that is wrong, and not the bytes from elsewhere.
            raise _RefusedError(reason, content=True) if size else _SpoiltError(reason, restart=True)
        with part.path.open("ab") as file:
            chunk = first
            while chunk:
                part.fetched += len(chunk)
                fresh = chunk[excess:]
                excess = max(0, excess - len(chunk))
                if part.size + len(fresh) > limit:
                    part.discard()
                    raise _RefusedError(f"sends more than the {limit} bytes expected", content=True)
                part.append(file, fresh)
                progress(part.size, total)
                chunk = next(chunks, b"")
        if excess or not part.size or (total is not None and part.size < total):
            raise _FailedError(
                f"the connection ended after {part.size} of {total or 'an unknown number of'} bytes"
            )


def _extent(response: HTTPResponse) -> tuple[int, int | None]:
    """The byte at which the body starts, and the size of the whole archive if the server tells it."""
    if response.status == 200:
        return 0, response.length
    extent = re.fullmatch(
        r"bytes (\d{1,15})-\d{1,15}/(\d{1,15}|\*)", response.headers.get("Content-Range", "")
    )
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
    except (OSError, HTTPException) as error:
        raise _network_error(error) from None


def _interpret_error(error: HTTPError, part: _Part, size: int | None) -> None:
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
        raise _RefusedError(f"answers HTTP {error.code}, a redirect in a circle or out of the web")
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


def _network_error(error: Exception) -> Exception:
    cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
    if isinstance(cause, TimeoutError):
        return _FailedError("nothing came for too long")
    text = (isinstance(cause, OSError) and cause.strerror) or str(cause) or type(cause).__name__
    text = "".join(character for character in text if character.isprintable())[:120]
    return _RefusedError(text) if isinstance(cause, SSLCertVerificationError) else _FailedError(text)


def _digest_of_file(source: Path, expected: str | None, progress: Progress) -> str:
    if not source.is_file():
        raise DataError(
            f"{source}: {'not a file' if source.exists() else 'no such file'}; --from takes a .tar.gz"
        )
    with source.open("rb") as file:
        if file.read(2) != GZIP_MAGIC:
            raise DataError(f"{source}: not a gzip archive; --from takes the .tar.gz as it was downloaded")
    copy = _Part(source)
    copy.read(progress, source.stat().st_size)
    if expected is not None and copy.digest != expected:
        raise DataError(
            f"{source}: sha256 is {copy.digest}, expected {expected}; what was in place is untouched; "
            f"if you trust this file: --sha256 {copy.digest}"
        )
    return copy.digest


# Unpacking


class _PlainTar(gzip.GzipFile):
    """The tar in the archive; tarfile reads whatever length a crafted header names at once, this does not."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= TAR_CHUNK:
            raise tarfile.ReadError("a header of an impossible size")
        return super().read(size)


def _extract(archive: Archive, path: Path, label: str, folder: Path, progress: Progress) -> dict[str, str]:
    """Write the files that are needed, and nothing else, into `folder`; returns their md5s."""
    md5s: dict[str, str] = {}
    seen: set[PurePosixPath] = set()
    unpacked = 0
    total = path.stat().st_size
    try:
        with (
            path.open("rb") as raw,
            _PlainTar(fileobj=raw) as plain,
            tarfile.open(fileobj=plain, mode="r:") as tar,
        ):
            for member in tar:
                unpacked += member.size
                name = PurePosixPath(member.name)
                problem = _problem(member, archive, seen)
                if problem is None and (unpacked > MAX_UNPACKED or len(seen) >= MAX_MEMBERS):
                    problem = "too much in one archive"
                if problem is not None:
                    raise DataError(f"{label}: {member.name[:100]!r}: {problem}; nothing of it is kept")
                seen.add(name)
                stream = tar.extractfile(member)
                if (
                    stream is None
                    or name.parent != PurePosixPath(archive.folder)
                    or name.name not in archive.files
                ):
                    continue
                md5 = hashlib.md5(usedforsecurity=False)
                with stream, (folder / name.name).open("xb") as file:
                    while chunk := stream.read(TAR_CHUNK):
                        file.write(chunk)
                        md5.update(chunk)
                        progress(raw.tell(), total)
                    _sync(file)
                md5s[name.name] = md5.hexdigest()
            # The checksum of the whole comes last, and is compared only by whoever reads up to it.
            end = plain.tell() + MAX_TAIL
            while plain.read(TAR_CHUNK):
                if plain.tell() > end:
                    raise DataError(f"{label}: goes on after its end; nothing of it is kept")
            progress(total, total)
    except CifarError:
        raise
    except (gzip.BadGzipFile, zlib.error, tarfile.TarError, EOFError) as error:
        raise DataError(f"{label}: damaged or cut short ({error}); fetch it again") from None
    except (ArithmeticError, LookupError, RecursionError, ValueError) as error:
        raise DataError(
            f"{label}: not a sound tar archive ({type(error).__name__}); fetch it again"
        ) from None
    for needed in archive.files:
        if needed not in md5s:
            raise DataError(f"{label}: has no {archive.folder}/{needed}; not the {archive.dataset} archive")
    return md5s


def _problem(member: tarfile.TarInfo, archive: Archive, seen: set[PurePosixPath]) -> str | None:
    """What is wrong with a member, if anything."""
    path = PurePosixPath(member.name)
    if not (member.isdir() or member.isreg()) or member.issparse():
        return "neither a plain file nor a folder"
    if path.is_absolute() or ".." in path.parts or path.parts[:1] != (archive.folder,):
        return f"not inside {archive.folder}/"
    if path in seen:
        return "there twice"
    if not 0 <= member.size <= MAX_FILE:
        return f"{member.size} bytes, too large"
    return None
