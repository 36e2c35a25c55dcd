"""Pictures of any kind as small squares, and what `predict` says of them."""

import csv
import errno
import io
import json
import os
import struct
import sys
import warnings
import zlib
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from cifar100cli import images, synthetic
from cifar100cli.errors import DataError
from cifar100cli.images import read_image
from tests.conftest import TINY, Cli

RANDOM = np.random.default_rng(0)
PICTURE: NDArray[np.uint8] = RANDOM.integers(0, 256, (32, 32, 3), np.uint8)


def saved(folder: Path, picture: Image.Image, name: str = "picture.png", **how: Any) -> Path:
    picture.save(folder / name, **how)
    return folder / name


def read(path: Path) -> NDArray[np.uint8]:
    """Height, width, channels."""
    return read_image(path).transpose(1, 2, 0)


def test_a_picture_of_the_right_size_is_taken_as_it_is(tmp_path: Path) -> None:
    found = read_image(saved(tmp_path, Image.fromarray(PICTURE)))
    assert (found.shape, found.dtype.name) == ((3, 32, 32), "uint8")
    assert np.array_equal(found, PICTURE.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        ("RGB", "png"),
        ("RGBA", "png"),
        ("RGB", "bmp"),
        ("RGB", "tiff"),
        ("CMYK", "tiff"),
        ("RGB", "ppm"),
        ("RGBA", "webp"),
    ],
)
def test_colours_come_back_from_every_mode(tmp_path: Path, mode: str, ending: str) -> None:
    picture = Image.fromarray(PICTURE).convert(mode)
    how = {"lossless": True} if ending == "webp" else {}
    assert np.array_equal(read(saved(tmp_path, picture, f"picture.{ending}", **how)), PICTURE)


def test_grey_palette_and_sixteen_bits(tmp_path: Path) -> None:
    grey = PICTURE[:, :, 0]
    as_colour = np.repeat(grey[:, :, None], 3, 2)
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(grey))), as_colour)
    cv2.imwrite(str(tmp_path / "deep.png"), grey.astype(np.uint16) * 257)
    assert np.array_equal(read(tmp_path / "deep.png"), as_colour)
    for scale, name in ((1, "levels.tiff"), (255, "fractions.tiff")):
        cv2.imwrite(str(tmp_path / name), grey.astype(np.float32) / scale)
        assert np.array_equal(read(tmp_path / name), as_colour), name
        whole = Image.fromarray(grey.astype(np.int32) * (257 if scale == 255 else 1))  # of 32 bits, 8 or 16 are used
        assert np.array_equal(read(saved(tmp_path, whole, name)), as_colour), name
    few = PICTURE // 128 * 255  # eight colours
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(few).quantize(8), "palette.gif")), few)
    black_and_white = Image.fromarray(grey).convert("1")
    assert set(np.unique(read(saved(tmp_path, black_and_white)))) == {0, 255}


def tiff_of_twelve_bits(levels: NDArray[np.uint16]) -> bytes:
    """Two levels in three bytes, as scientific cameras write them; neither Pillow nor OpenCV does."""
    height, width = levels.shape
    digits = "".join(f"{level:03x}" for level in levels.ravel())
    entries = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, 12),  # bits
        (259, 3, 1),  # not compressed
        (262, 3, 1),  # 0 is black
        (273, 4, 8),
        (277, 3, 1),  # channels
        (278, 3, height),
        (279, 4, len(digits) // 2),
    ]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    head = b"II*\0" + struct.pack("<I", 8 + len(digits) // 2)
    return head + bytes.fromhex(digits) + struct.pack("<H", len(entries)) + directory + bytes(4)


def test_grey_of_twelve_bits(tmp_path: Path) -> None:
    grey = PICTURE[:, :, 0]
    (tmp_path / "deep.tif").write_bytes(tiff_of_twelve_bits((grey / 255 * 4095).round().astype(np.uint16)))
    assert np.array_equal(read(tmp_path / "deep.tif"), np.repeat(grey[:, :, None], 3, 2))


def test_a_transparent_level_of_sixteen_bits_is_white(tmp_path: Path) -> None:
    """It alone, and not its neighbour, which is the same in 8 bits."""
    levels = np.full((32, 32), 257 * 100, np.uint16)
    levels[:, 16:] += 1
    found = read(saved(tmp_path, Image.fromarray(levels), transparency=257 * 100))
    assert (found[:, :16] == 255).all()
    assert (found[:, 16:] == 100).all()
    below_black = Image.fromarray(np.full((32, 32), -1, np.float32))  # none is transparent in it
    assert (read(saved(tmp_path, below_black, "levels.tiff")) == 0).all()


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    alpha = np.zeros((32, 32, 1), np.uint8)
    alpha[:, :16] = 255
    found = read(saved(tmp_path, Image.fromarray(np.concatenate([PICTURE, alpha], 2))))
    assert np.array_equal(found[:, :16], PICTURE[:, :16])
    assert (found[:, 16:] == 255).all()
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(0, (0, 0, 16, 32))
    found = read(saved(tmp_path, palette, transparency=0))
    assert (found[:, :16] == 255).all()
    assert (found[:, 16:] == (0, 0, 255)).all()


def exif_of(orientation: int, *others: tuple[int, int, int, bytes]) -> bytes:
    """EXIF as it stands in a file: the orientation, and other tags, each with its type, count and four bytes."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", orientation, 0)), *others]
    directory = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)


@pytest.mark.parametrize("ending", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_held_in_any_way(tmp_path: Path, orientation: int, ending: str) -> None:
    """The eight orientations of EXIF, undone with NumPy; a TIFF's is turned by Pillow, and not a second time."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: PICTURE,
        2: PICTURE[:, ::-1],
        3: PICTURE[::-1, ::-1],
        4: PICTURE[::-1],
        5: PICTURE.transpose(1, 0, 2),
        6: np.rot90(PICTURE, -1),
        7: PICTURE[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PICTURE),
    }[orientation]
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(PICTURE), f"picture.{ending}", exif=exif)), upright)


@pytest.mark.parametrize(
    "other", [(0x0128, 2, 2, b"2\0\0\0"), (0x011A, 2, 3, b"72\0\0")], ids=["unit of resolution", "resolution"]
)
def test_a_tag_that_is_not_written_so_turns_no_picture_back(tmp_path: Path, other: tuple[int, int, int, bytes]) -> None:
    """A number as text, as some cameras and editors have it."""
    photo = saved(tmp_path, Image.fromarray(PICTURE), exif=exif_of(6, other))
    assert np.array_equal(read(photo), np.rot90(PICTURE, -1))


def test_the_first_frame_of_a_film(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    for name in ("film.gif", "film.png", "film.webp"):
        path = saved(
            tmp_path,
            frames[0],
            name,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if "webp" in name else {}),
        )
        assert (read(path) == (255, 0, 0)).all(), name


def test_the_middle_square_made_smaller(tmp_path: Path) -> None:
    """Of a wide picture and of a high one; each pixel is near the mean of what it covers, as OpenCV finds it."""
    rows, columns, channels = np.mgrid[:512, :512, :3]
    waves = np.sin(rows / 40 + channels) + np.cos(columns / 60 - channels)
    smooth = (127.5 + 60 * waves).round().astype(np.uint8)
    expected = cv2.resize(smooth, (32, 32), interpolation=cv2.INTER_AREA)
    for axis in (0, 1):
        shape = [512, 512, 3]
        shape[axis] = 100
        side = np.full(shape, 255, np.uint8)
        found = read(saved(tmp_path, Image.fromarray(np.concatenate([side, smooth, side], axis))))
        inner = slice(2, -2)  # at the border the filter sees a little of what was cut off
        assert np.abs(found[inner, inner].astype(int) - expected[inner, inner]).max() <= 2
    tiny = read(saved(tmp_path, Image.new("RGB", (1, 3), "teal")))
    assert (tiny == (0, 128, 128)).all()


def test_broken_words_beside_the_pixels_take_no_picture_away(tmp_path: Path) -> None:
    """An EXIF block that is none, in a JPEG that says how many dots an inch it has, as editors write them."""
    picture = Image.fromarray(cv2.resize(PICTURE, (64, 64), interpolation=cv2.INTER_LINEAR))
    plain = saved(tmp_path, picture, "plain.jpg", dpi=(72, 72))
    broken = saved(tmp_path, picture, "broken.jpg", dpi=(72, 72), exif=b"Exif\0\0nonsense")
    assert np.array_equal(read(broken), read(plain))


# ------------------------------------------------------------------------------------------------- refused


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no image"),
        (b"just text\n", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
        (png_that_claims(60_000, 60_000), "60,000 x 60,000 pixels, and at most 100 million are read"),
        (png_that_claims(12_000, 9_000), "12,000 x 9,000 pixels.* make it smaller first"),
        (png_that_claims(320, 320), "broken"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_image(path)


def test_a_photograph_of_a_telephone(tmp_path: Path) -> None:
    """More pixels than are decoded: a JPEG is read at an eighth of its size."""
    small = Image.effect_noise((1504, 1128), 60).convert("RGB").filter(ImageFilter.GaussianBlur(40))
    large = small.resize((12_032, 9_024))
    found = read_image(saved(tmp_path, large, "large.jpg", quality=30))
    expected = read_image(saved(tmp_path, small, "small.png"))
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 6


def test_half_a_photograph_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.tile(PICTURE, (8, 8, 1))).save(buffer, "JPEG")
    (tmp_path / "half.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(DataError, match="broken"):
        read_image(tmp_path / "half.jpg")
    with pytest.raises(DataError, match=r"[Ii]s a directory"):
        read_image(tmp_path)


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "webp", "avif", "bmp", "ico", "tiff", "ppm", "tga", "jp2"])
def test_a_spoilt_picture_is_read_or_refused(tmp_path: Path, ending: str) -> None:
    """Whatever is wrong within, a decoder's own errors never come through."""
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8))
    try:
        whole = np.frombuffer(saved(tmp_path, noise, f"picture.{ending}").read_bytes(), np.uint8)
    except (KeyError, OSError, ValueError):
        pytest.skip(f"this Pillow has no {ending}")
    refused = 0
    for _ in range(200):
        spoilt = whole.copy()
        places = random.integers(0, min(400, len(whole)), random.integers(1, 8))
        spoilt[places] = random.integers(0, 256, len(places))
        (tmp_path / "spoilt").write_bytes(spoilt[: random.integers(len(whole) // 2, len(whole) + 1)].tobytes())
        try:
            assert read_image(tmp_path / "spoilt").shape == (3, 32, 32)
        except DataError:
            refused += 1
    assert refused > 20


# ------------------------------------------------------------------------------------------------- predict


@pytest.fixture
def run(run_cli: Cli, small_synthetic: synthetic.Drawn) -> str:
    outcome = run_cli("train", *TINY, "--epochs", "2", "--lr", "0.01", "--json")
    assert outcome.code == 0, outcome.err
    folder = json.loads(outcome.out)["run_dir"]
    assert isinstance(folder, str)
    return folder


def test_predict_agrees_with_evaluate(run: str, run_cli: Cli, small_synthetic: synthetic.Drawn, tmp_path: Path) -> None:
    """Test images saved as files: class and confidence, to the last digit that `evaluate` writes."""
    for index, image in enumerate(small_synthetic.test[0][:70]):
        saved(tmp_path, Image.fromarray(image.transpose(1, 2, 0)), f"{index:03}.png")
    outcome = run_cli("predict", run, tmp_path, "--top", "3", "--json")
    assert outcome.code == 0, outcome.err
    predicted = json.loads(outcome.out)
    assert [Path(picture["image"]).name for picture in predicted["images"]] == [f"{i:03}.png" for i in range(70)]
    assert run_cli("evaluate", run, "--predictions", "test.csv").code == 0
    with Path("test.csv").open(newline="") as file:
        evaluated = list(csv.DictReader(file))
    for picture, row in zip(predicted["images"], evaluated, strict=False):
        first, *others = picture["top"]
        assert first["class"] == row["predicted"]
        assert first["probability"] == pytest.approx(float(row["confidence"]), abs=2e-6)
        assert len(others) == 2
        assert first["probability"] >= others[0]["probability"] >= others[1]["probability"]


def test_predict_skips_and_says_so(run: str, run_cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    saved(folder, Image.new("RGB", (50, 40), "red"), "a.JPG")
    saved(folder / "deeper", Image.new("L", (40, 50)), "b.png")
    (folder / "notes.txt").write_text("no picture, and nobody said that it was one")
    assert run_cli("predict", run, folder).code == 0
    (folder / "broken.png").write_bytes(b"x")
    outcome = run_cli("predict", run, folder, folder / "notes.txt", "--json", "--top", "1000")
    assert outcome.code == 3
    assert "broken.png: no image" in outcome.err
    assert "notes.txt: no image" in outcome.err
    answer = json.loads(outcome.out)
    assert [Path(picture["image"]).name for picture in answer["images"]] == ["a.JPG", "b.png"]
    assert [Path(skip["image"]).name for skip in answer["skipped"]] == ["broken.png", "notes.txt"]
    assert len(answer["images"][0]["top"]) == 100
    assert sum(guess["probability"] for guess in answer["images"][0]["top"]) == pytest.approx(1)
    shown = run_cli("predict", run, folder / "a.JPG", "--top", "2")
    assert shown.out.count("%") == 2
    assert ("drawn" in shown.out, "drawn" in shown.err) == (False, True), "a warning is no result"
    assert "drawn" not in run_cli("predict", run, folder / "broken.png").err, "and of nothing there is none"


def test_standard_input_that_is_closed(run: str, run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    outcome = run_cli("predict", run, "-")
    assert outcome.code == 3
    assert outcome.err.splitlines()[-1] == "error: skipped: standard input: it is closed"


def test_predict_reads_standard_input(run: str, run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "PNG")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(buffer.getvalue())))
    outcome = run_cli("predict", run, "-")
    assert outcome.code == 0, outcome.err
    assert "standard input" in outcome.out
    assert run_cli("predict", run, "-", "-").code == 2


def test_predict_wants_pictures(run: str, run_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, words in (((run, "nowhere.png"), "no such image"), ((run, "empty"), "no image in this folder")):
        outcome = run_cli("predict", *arguments)
        assert (outcome.code, len(outcome.err.splitlines())) == (3, 1)
        assert words in outcome.err
    assert run_cli("predict", "nowhere", "x.png").code == 3
    assert run_cli("predict", run).code == 2


def test_what_is_no_folder_of_pictures(run: str, run_cli: Cli, tmp_path: Path) -> None:
    """A run in the place of pictures, a file of a run in the place of the run, and an address of the web."""
    picture = saved(tmp_path, Image.new("RGB", (40, 40)))
    for words, told in (
        ((picture, run), f"{run}: is a run, and no folder of pictures; the model comes first, then these"),
        ((f"{run}/result.json", picture), f"is a file of a run, and no model; name the run's folder: {run}"),
        ((run, "https://example.com/cat.jpg"), "is an address, and nothing is fetched from the web"),
    ):
        outcome = run_cli("predict", *words)
        assert (outcome.code, outcome.out, len(outcome.err.splitlines())) == (3, "", 1)
        assert told in outcome.err
    windows: Any = PureWindowsPath("https://example.com/cat.jpg")
    with pytest.raises(DataError, match="is an address"):
        images.find_images([windows])


def test_folders_below_are_looked_into_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are links; one that may not be read is not passed over."""
    elsewhere = tmp_path / "elsewhere" / "cats"
    elsewhere.mkdir(parents=True)
    saved(elsewhere, Image.fromarray(PICTURE), "cat.png")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "cats").symlink_to(elsewhere)
    (pictures / "round").symlink_to(pictures)
    own = saved(pictures, Image.fromarray(PICTURE), "own.png")
    assert images.find_images([pictures]) == [pictures / "cats" / "cat.png", own]
    scandir = os.scandir

    def shut(path: str) -> object:
        if str(path).endswith("cats"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", shut)
    with pytest.raises(DataError, match="cats: Permission denied"):
        images.find_images([pictures])


def test_pictures_that_cannot_be_looked_at_are_told(
    run: str, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that leads nowhere is skipped; a folder that may be listed, and not entered, is refused."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    own = saved(folder, Image.fromarray(PICTURE), "own.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    outcome = run_cli("predict", run, folder, "--json")
    assert outcome.code == 3
    assert [skip["image"] for skip in json.loads(outcome.out)["skipped"]] == [str(folder / "gone.png")]
    assert outcome.err.splitlines()[-1].endswith("gone.png: No such file or directory")
    look = os.stat

    def shut(path: Any, **options: Any) -> os.stat_result:
        if isinstance(path, os.PathLike | str) and Path(path).parent == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, **options)

    monkeypatch.setattr(os, "stat", shut)
    outcome = run_cli("predict", run, folder)
    assert (outcome.code, outcome.err) == (3, f"error: {folder / 'gone.png'}: Permission denied\n")
    for picture in (own, folder / "gone.png"):
        picture.unlink()
    outcome = run_cli("predict", run, folder)
    assert (outcome.code, outcome.err) == (3, f"error: {folder / 'config.yaml'}: Permission denied\n")


def test_find_images_knows_every_decoders_ending() -> None:
    Image.init()
    for decoder in set(images.DECODERS) & set(Image.OPEN) - {"MPO"}:
        endings = {ending for ending, name in Image.registered_extensions().items() if name == decoder}
        assert endings & images.ENDINGS, decoder


def test_threads_leave_the_filters_of_warnings_as_they_were() -> None:
    before = list(warnings.filters)
    first, second = images._broken_in_words(), images._broken_in_words()
    first.__enter__()
    second.__enter__()
    assert warnings.filters[0][0] == "ignore"
    first.__exit__(None, None, None)
    assert warnings.filters[0][0] == "ignore", "the other is still at it"
    second.__exit__(None, None, None)
    assert warnings.filters == before
