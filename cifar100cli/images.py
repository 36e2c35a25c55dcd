"""Pictures of the user's: any file that Pillow decodes by itself, as the small square images that models here know."""

import contextlib
import io
import math
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from cifar100cli.bounded import kind_of, one_line, walk
from cifar100cli.catalog import SIDE
from cifar100cli.errors import DataError, UsageError
from cifar100cli.shared import Shared

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

STANDARD_INPUT = Path("-")
MOST_PIXELS = 100_000_000
MOST_JPEG_PIXELS = 400_000_000  # decoded at an eighth of their size
MOST_BYTES = 500_000_000
# Pillow also hands PostScript to an interpreter, and knows formats that nobody has looked at for years: not here.
DECODERS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "AVIF", "BMP", "ICO", "TIFF", "PPM", "TGA", "JPEG2000")
ENDINGS = frozenset(
    {
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".gif", ".webp", ".avif"),
        *(".bmp", ".ico", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2"),
    }
)


def find_images(sources: Sequence[Path]) -> list[Path]:
    """The files that are meant: a folder stands for what has an image's ending in it and below, `-` for stdin.

    Raises `DataError` for what is not there, for a folder without images, and for what may not be looked at.
    """
    found: list[Path] = []
    for source in sources:
        if source.as_posix().startswith(("http:/", "https:/")):  # whichever way slashes lean
            raise DataError(f"{source}: is an address, and nothing is fetched from the web: download the picture first")
        kind = kind_of(source)
        if kind == "folder":
            below = sorted(folder / name for folder, names in _below(source) for name in names)
            # A link that leads nowhere is kept: whoever reads it tells.
            inside = [path for path in below if path.suffix.lower() in ENDINGS and kind_of(path) in ("file", None)]
            if not inside:
                if kind_of(source / "config.yaml") == "file":
                    raise DataError(f"{source}: is a run, and no folder of pictures; the model comes first, then these")
                endings = " ".join(sorted(ENDINGS))
                raise DataError(f"{source}: there is no image in this folder (known endings: {endings})")
            found += inside
        elif source != STANDARD_INPUT and kind is None:
            raise DataError(f"{source}: there is no such image")
        else:
            found.append(source)
    if found.count(STANDARD_INPUT) > 1:
        raise UsageError("-: standard input can be read once")
    return found


def _below(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder at and below this one, also by links, with its files. `DataError` for one that may not be read."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: {error.strerror}")

    return walk(folder, hidden=True, links=True, refused=refuse)


def read_image(source: Path) -> NDArray[np.uint8]:
    """One picture as (3, 32, 32) uint8: upright, its first frame, the middle square of it, made smaller with care.

    What is transparent is shown on white. A picture of 32x32 pixels is taken as it is. Raises `DataError` for what
    is no image, is broken, or has more than MOST_PIXELS pixels.
    """
    from PIL import Image, UnidentifiedImageError

    content = _content(source)
    with _broken_in_words():
        Image.init()
        known = [name for name in DECODERS if name in Image.OPEN]  # a Pillow may be built without some
        try:
            opened = _opened(content, known)
        except UnidentifiedImageError:
            raise DataError("no image, or of a kind that is not read here") from None
        with opened as image:
            width, height = image.size
            if MOST_PIXELS < width * height <= MOST_JPEG_PIXELS:
                image.draft("RGB", (width // 8, height // 8))
            if math.prod(image.size) > MOST_PIXELS:  # read from its head; nothing is decoded yet
                raise DataError(
                    f"is said to have {width:,} x {height:,} pixels, and at most {MOST_PIXELS // 10**6} million "
                    f"are read ({MOST_JPEG_PIXELS // 10**6} of a JPEG): make it smaller first"
                )
            return small_square(image)


# Filters of warnings are those of all threads.
_WITHOUT_WARNINGS = Shared(lambda: warnings.catch_warnings(action="ignore"))


@contextmanager
def _broken_in_words() -> Iterator[None]:
    """Decoders are many, and each has its own words for a file that lies, and warnings of what does not matter here."""
    try:
        with _WITHOUT_WARNINGS:
            yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"broken ({one_line(error) or type(error).__name__})") from None


_LIMIT = threading.Lock()


def _opened(content: bytes, known: list[str]) -> "Picture":
    """A picture of which the head is read alone. How many pixels may be read is asked here, and not by Pillow."""
    from PIL import Image

    with _LIMIT:  # of another thread, it would be put back to none
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(content), formats=known)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def small_square(picture: "Picture") -> NDArray[np.uint8]:
    """A picture of Pillow's as (3, 32, 32) uint8: upright, in colour, its middle square, made smaller with care.

    Raises `DataError` for one of a file that turns out to be broken: Pillow decodes it only now.
    """
    from PIL import Image, ImageOps

    with _broken_in_words():
        picture.load()
        small = ImageOps.fit(_in_colour(_upright(picture)), (SIDE, SIDE), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))


def _upright(image: "Picture") -> "Picture":
    """A picture turned as its EXIF says that the camera was held. Pillow has turned a TIFF when it loads it.

    Its `exif_transpose` would write the other tags anew, and fail at any that it would not have written so.
    """
    from PIL import ExifTags
    from PIL.Image import Transpose

    ways = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    way = None
    with contextlib.suppress(Exception):  # what stands beside the pixels may be broken: they are shown as they lie
        way = ways.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if way is None else image.transpose(way)


def _content(source: Path) -> bytes:
    try:
        if source == STANDARD_INPUT:
            if sys.stdin is None:
                raise DataError("it is closed")
            content = _read(sys.stdin.buffer)
        else:
            with source.open("rb") as file:
                content = _read(file)
    except OSError as error:
        raise DataError(error.strerror or str(error)) from None
    if len(content) > MOST_BYTES:
        raise DataError(f"has more than {MOST_BYTES // 10**6} MB")
    return content


def _read(file: BinaryIO) -> bytes:
    """All of a file, or a little more than is allowed. In pieces: one read takes the memory for the most at once."""
    content = io.BytesIO()
    while content.tell() <= MOST_BYTES and (piece := file.read(1 << 20)):
        content.write(piece)
    return content.getvalue()


def _in_colour(image: "Picture") -> "Picture":
    """RGB of any mode: 12 and 16 bits and floating-point numbers scaled to 8 bits, transparency on white."""
    from PIL import Image, TiffImagePlugin

    if image.mode.startswith("I") or image.mode == "F":
        levels = np.nan_to_num(np.asarray(image, np.float32))
        bits = getattr(image, "tag_v2", {}).get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]  # a TIFF may have 12
        # Fractions or levels, 8 bits or 16: numbers of 32 bits do not say how large they may get.
        scales = {"F": (1, 255), "I": (255, 65535)}.get(image.mode, (2**bits - 1,))
        full = next((scale for scale in scales if levels.max() <= scale), scales[-1])
        grey = (levels / full * 255).round().clip(0, 255).astype(np.uint8)
        grey[levels == image.info.get("transparency")] = 255  # a level of as many bits, where a PNG names one
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
