"""Unpack the files that are wanted from a .tar.gz that nobody vouches for.

Only plain files and folders inside the expected folder are tolerated; the wanted ones are written under
names of our own, so that nothing in the archive decides where anything goes.
"""

import gzip
import hashlib
import os
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from cifar100cli.errors import CifarError, DataError
from cifar100cli.fetch import Progress

CHUNK = 1 << 14
MAX_READ = 1 << 18  # tarfile reads a file in pieces of Python's own buffer: 8 KiB, and 128 from Python 3.14 on
MAX_FILE = 256 << 20
MAX_UNPACKED = 1 << 30
MAX_MEMBERS = 1000
MAX_TAIL = 16 << 20


class _PlainTar(gzip.GzipFile):
    """The tar in the archive; tarfile reads whatever length a crafted header names at once, this does not."""

    last = b""  # what was read last

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_READ:
            raise tarfile.ReadError("a header of an impossible size")
        self.last = super().read(size)
        return self.last


def unpack(
    path: Path, label: str, inside: str, wanted: Collection[str], folder: Path, progress: Progress
) -> dict[str, str]:
    """Write the wanted files of the archive's folder `inside`, and nothing else, into `folder`.

    Returns their md5s. Raises `DataError`, with `label` for the archive, when anything in it is not right.
    """
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
                problem = _problem(member, inside, seen)
                if problem is None and (unpacked > MAX_UNPACKED or len(seen) >= MAX_MEMBERS):
                    problem = "too much in one archive"
                if problem is not None:
                    raise DataError(f"{label}: {member.name[:100]!r}: {problem}; nothing of it is kept")
                seen.add(name)
                stream = tar.extractfile(member)
                if stream is None or name.parent != PurePosixPath(inside) or name.name not in wanted:
                    continue
                md5 = hashlib.md5(usedforsecurity=False)
                with stream, (folder / name.name).open("xb") as file:
                    while chunk := stream.read(CHUNK):
                        file.write(chunk)
                        md5.update(chunk)
                        progress(raw.tell(), total)
                    file.flush()
                    os.fsync(file.fileno())
                md5s[name.name] = md5.hexdigest()
            # tarfile takes a header that makes no sense for the end, and newer ones do so with a negative size.
            if any(plain.last):
                raise tarfile.ReadError("a header that makes no sense")
            # The checksum of the whole comes last, and is compared only by whoever reads up to it.
            end = plain.tell() + MAX_TAIL
            while plain.read(CHUNK):
                if plain.tell() > end:
                    raise DataError(f"{label}: damaged: more follows behind its end; nothing of it is kept")
            progress(total, total)
    except CifarError:
        raise
    except (gzip.BadGzipFile, zlib.error, tarfile.TarError, EOFError) as error:
        raise DataError(f"{label}: damaged or cut short ({error}); fetch it again") from None
    except (ArithmeticError, LookupError, RecursionError, ValueError) as error:
        raise DataError(f"{label}: not a sound tar archive ({type(error).__name__}); fetch it again") from None
    for needed in wanted:
        if needed not in md5s:
            raise DataError(f"{label}: has no {inside}/{needed}; not the archive that is wanted")
    return md5s


def _problem(member: tarfile.TarInfo, inside: str, seen: set[PurePosixPath]) -> str | None:
    """What is wrong with a member, if anything."""
    path = PurePosixPath(member.name)
    if not (member.isdir() or member.isreg()) or member.issparse():
        return "neither a plain file nor a folder"
    if path.is_absolute() or ".." in path.parts or path.parts[:1] != (inside,):
        return f"not inside {inside}/"
    if path in seen:
        return "there twice"
    if not 0 <= member.size <= MAX_FILE:
        return f"{member.size} bytes, too large"
    return None
