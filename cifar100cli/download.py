"""Fetch a CIFAR archive through bad weather, trust nothing in it, and put it in place in one step.

Whatever happens on the way, the data folder holds the old data set or the new one, never half of either.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from cifar100cli.atomic import move
from cifar100cli.bounded import kind_of, parse_json, read_file
from cifar100cli.catalog import FOLDERS
from cifar100cli.errors import DataError, DownloadInterrupted, FolderError, UsageError
from cifar100cli.fetch import GZIP_MAGIC, Log, Part, Progress, fetch, refuse_unusable
from cifar100cli.unpack import unpack

OFFICIAL = "official"
"""Stands for the digest of the official archive."""

LARGEST_MANIFEST = 1 << 20  # bytes


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
        folder=FOLDERS["cifar100"],
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
        folder=FOLDERS["cifar10"],
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
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: {error.strerror}; --data-dir or CIFAR100_DATA_DIR names another place"
        ) from None
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
    `retries` is how many attempts in a row may bring nothing, `timeout` the seconds without a byte after which one
    has failed. `progress` is told the bytes done and all, `log` what goes on.

    Raises `UsageError` for an address or digest that cannot be one, `DataError` for an archive that is not what it
    should be, `CifarError` where the servers give none or the folder takes none, and `DownloadInterrupted`.
    """
    expected = archive.sha256 if sha256 == OFFICIAL else sha256 and sha256.lower()
    if expected is not None and not re.fullmatch("[0-9a-f]{64}", expected):
        raise UsageError(f"--sha256 {sha256}: must be 64 hexadecimal digits, or none")
    addresses = list(dict.fromkeys(urls)) or [archive.url]
    for url in addresses:
        refuse_unusable(url)
    if source is not None:
        _refuse_missing(source)

    def in_place() -> Installed | None:
        found = None if force else find_installed(archive, data_dir)
        if found is None or sha256 in (None, OFFICIAL):
            return found
        if expected == found.sha256 or (found.official and expected == archive.sha256):
            return found
        raise DataError(f"{found.path}: is of another archive than that of --sha256 {sha256}; --force replaces it")

    if installed := in_place():
        if source is not None:
            log(f"{source}: not read, since a data set is in place already; --force replaces it")
        return installed
    _make_folder(data_dir)
    part = Part(data_dir / f"{archive.filename}.part")
    under_way = part.path if source is None else None
    with _in_words(data_dir, under_way), _locked(data_dir / f".download-{archive.dataset}.lock", archive.dataset, log):
        final = data_dir / archive.folder
        new, old = data_dir / f".{archive.dataset}-new", data_dir / f".{archive.dataset}-old"
        _repair(final, new, old)
        if installed := in_place():
            return installed
        if source is None:
            size = archive.size if expected == archive.sha256 else None
            fetch(part, addresses, expected, size, progress, log, retries, timeout)
            path, label, digest = part.path, archive.filename, part.digest
        else:
            path, label, digest = source, str(source), _digest_of_file(source, expected, progress)
        log(f"unpacking {label}")
        try:
            new.mkdir()
            md5s = unpack(path, label, archive.folder, archive.files, new, progress)
            _check(check, new, label)
            _write_manifest(archive, new, md5s, digest)
            if os.path.lexists(final) and not find_installed(archive, data_dir):
                kept = _free_name(data_dir / f"{archive.folder}.earlier")  # somebody's own, perhaps
                log(f"{final}: not a data set that can be verified; kept as {kept}")
                _swap(final, new, kept)
            else:
                _swap(final, new, old)
                _remove(old)
        except DataError:
            if source is None:
                part.discard()
            raise
        finally:
            _remove(new)
        if source is None:  # else it may be the archive itself that is named
            part.path.unlink(missing_ok=True)
    official = md5s == dict(archive.files)
    return Installed(archive.dataset, final, official, digest, False, part.fetched, part.resumed)


@contextlib.contextmanager
def _in_words(data_dir: Path, part: Path | None) -> Iterator[None]:
    """What ends an installation that is under way: where, what is kept of it, and what to do."""

    def kept() -> int:
        return part.stat().st_size if part is not None and part.is_file() else 0

    try:
        yield
    except OSError as error:
        size = kept()
        goes_on = (
            f"{size:,} bytes are kept, and the same command goes on from there once that is mended; " if size else ""
        )
        raise FolderError(
            f"{error.filename or data_dir}: {error.strerror or error}; {goes_on}"
            "--data-dir or CIFAR100_DATA_DIR names another place"
        ) from None
    except KeyboardInterrupt as stop:
        if size := kept():
            text = f"{size:,} bytes are kept, and the same command goes on from there"
            raise DownloadInterrupted(text, stop) from None
        raise


def _make_folder(data_dir: Path) -> None:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise FolderError(
            f"data sets cannot be kept in {data_dir}: {reason}; --data-dir or CIFAR100_DATA_DIR names another place"
        ) from None


# ------------------------------------------------------------------------------------ what is in place


def _stamp(path: Path) -> list[int]:
    if not path.is_file():  # reading a pipe would wait for ever
        raise FileNotFoundError(path)
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _read_manifest(archive: Archive, folder: Path) -> tuple[dict[str, list[int]], dict[str, str], str | None]:
    """Size and modification time of each file, its md5, and the archive's sha256; empty if unreadable."""
    try:
        manifest = parse_json(read_file(folder / f".{archive.dataset}.json", LARGEST_MANIFEST))
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
        move(final, old)
    try:
        move(new, final)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(final):
            old.rename(final)
        raise


def _free_name(path: Path) -> Path:
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
    return next(free for name in names if not os.path.lexists(free := path.with_name(name)))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check(check: Callable[[Path], None], folder: Path, label: str) -> None:
    try:
        check(folder)
    except DataError as error:
        reason = str(error).replace(f"{folder}{os.sep}", "")
        raise DataError(f"{label}: not the data set: {reason}; what was in place is untouched") from None


def _refuse_missing(source: Path) -> None:
    kind = kind_of(source)
    if kind != "file":
        raise DataError(f"{source}: {'no such file' if kind is None else 'not a file'}; --from takes a .tar.gz")


def _digest_of_file(source: Path, expected: str | None, progress: Progress) -> str:
    try:
        with source.open("rb") as file:
            magic = file.read(2)
    except OSError as error:
        raise DataError(f"{source}: {error.strerror or error}") from None
    if magic != GZIP_MAGIC:
        raise DataError(f"{source}: not a gzip archive; --from takes the .tar.gz as it was downloaded")
    copy = Part(source)
    copy.read(progress, source.stat().st_size)
    if expected is not None and copy.digest != expected:
        raise DataError(
            f"{source}: sha256 is {copy.digest}, expected {expected}; what was in place is untouched; "
            f"if you trust this file: --sha256 {copy.digest}"
        )
    return copy.digest
