"""Archives that mean harm, from a file and from a server."""

import dataclasses
import gzip
import io
import re
import tarfile
from pathlib import Path

import pytest

from cifar100cli import unpack
from cifar100cli.errors import DataError
from tests.weather import (
    ARCHIVE,
    BODY,
    FOLDER,
    HALF,
    MD5S,
    OTHER,
    PART,
    PLAIN,
    Listener,
    Server,
    assert_complete,
    assert_old,
    assert_one_line,
    good,
    install,
    make_file,
    make_tar,
    put_old,
    serving,
    sha256_of,
)

# From a file


@pytest.mark.parametrize("name", ["mine.tar.gz", f"{ARCHIVE.filename}.part"])
def test_the_users_archive_stays(tmp_path: Path, name: str) -> None:
    source = tmp_path / "data" / name
    source.parent.mkdir()
    source.write_bytes(BODY)
    install(source.parent, source=source)
    assert source.read_bytes() == BODY


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


def test_python_reads_in_larger_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffers are of 8 KiB up to Python 3.13, and of 128 KiB from 3.14 on."""

    class Buffered(io.BufferedReader):
        def __init__(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
            super().__init__(tarfile.ExFileObject(tar, member).detach(), 1 << 17)

    monkeypatch.setattr(tarfile.TarFile, "fileobject", Buffered)
    source = tmp_path / "mine.tar.gz"
    source.write_bytes(BODY)
    install(tmp_path / "data", source=source)
    assert_complete(tmp_path / "data")


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
        (special(tarfile.REGTYPE, size=-1024), "too large|no sense"),
        (special(tarfile.REGTYPE, size=1 << 63), "too large"),
        (special(tarfile.REGTYPE, name=f"{FOLDER}/\x1b[2J\n", linkname="x", size=1 << 40), "too large"),
        (special(tarfile.XHDTYPE, size=1 << 30), "impossible size"),
        (special(tarfile.GNUTYPE_LONGNAME, size=-512), "impossible size|no sense"),
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


@pytest.mark.parametrize(("limit", "reason"), [("MAX_UNPACKED", "too much"), ("MAX_TAIL", "behind its end")])
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
