"""Check one encoded image, measure it and, where asked, resize it or encode it as JPEG."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
import PIL.Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
QUALITY = 92
DARK_LEVEL = (1 << 14) - 1
"""Highest level of 14 bits. Scanners write 10 to 14 bits into files of 16, whose 8 highest bits are
nearly black then.
"""
_ORIENTATION, _TURNED = 0x0112, range(5, 9)
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
"""The transposition that undoes each EXIF orientation."""


class BrokenImageError(ValueError):
    """A row is left out; the message is the reason."""


@dataclass(frozen=True)
class Picture:
    """A checked image.

    Attributes:
        data: the file to keep.
        upright_size: (width, height) in its header, after EXIF orientation.
        size: of what `data` shows.
        is_dark: a 16-bit image that was written with 8 bits, and that has no level above
            `DARK_LEVEL`.
    """

    data: bytes
    upright_size: tuple[int, int]
    size: tuple[int, int]
    is_dark: bool = False


def examine(data: bytes, resize: int | None = None, quality: int | None = None) -> Picture:
    """Decode an image once.

    An image that is encoded again is upright (EXIF orientation applied), 8 bits, grey or RGB; any
    other keeps its bytes.

    Args:
        data: the file.
        resize: shorter side in pixels, only downwards, antialiased.
        quality: encode it as JPEG, whatever its size.

    Raises:
        BrokenImageError: it is no whole image.
    """
    if not data:
        raise BrokenImageError("the file is empty (0 bytes)")
    image, stored, box = _decoded(data, resize)
    turn = _orientation(image)
    turned = turn in _TURNED
    upright_size = _turned(stored) if turned else stored
    size = shrunk_size(upright_size, resize)
    if size == upright_size and quality is None:
        return Picture(data, upright_size, upright_size)
    is_dark = image.mode.startswith("I") and int(np.asarray(image).max()) <= DARK_LEVEL
    image = eight_bits(image)
    if size != upright_size:
        image = image.resize(
            _turned(size) if turned else size, PIL.Image.Resampling.BICUBIC, box, reducing_gap=3.0
        )
    image = image.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else image
    return Picture(encode_jpeg(image, quality), upright_size, size, is_dark)


def shrunk_size(size: tuple[int, int], shorter_side: int | None) -> tuple[int, int]:
    """Return (width, height) with at most so many pixels on the shorter side; None: unchanged."""
    shorter = min(size)
    if shorter_side is None or shorter <= shorter_side:
        return size
    width, height = (max(shorter_side, round(side * shorter_side / shorter)) for side in size)
    return width, height


def _turned(size: tuple[int, int]) -> tuple[int, int]:
    return size[1], size[0]


def _decoded(
    data: bytes,
    resize: int | None,
) -> tuple[PIL.Image.Image, tuple[int, int], tuple[float, float, float, float] | None]:
    """Return (image, size as stored, box of the image in it).

    A JPEG to be resized is decoded at a reduced size, at least twice the wanted one.
    """
    # Here: it imports torchvision, 80 MB in every worker that prepares tables
    from pipeline.media.image_io import MAX_PIXELS

    try:
        with warnings.catch_warnings():
            # MAX_PIXELS decides
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BrokenImageError(
                f"its header claims {image.width} x {image.height} pixels, more than {MAX_PIXELS}"
            )
        stored = image.size
        wanted = (
            None
            if resize is None
            else tuple(math.ceil(2 * resize * side / min(stored)) for side in stored)
        )
        drafted = image.draft(None, wanted)  # pyright: ignore[reportArgumentType]
        image.load()
        return image, stored, drafted and drafted[1]
    except BrokenImageError:
        raise
    except PIL.UnidentifiedImageError:
        raise BrokenImageError(f"not a {', '.join(FORMATS)} image, or a broken one") from None
    except PIL.Image.DecompressionBombError as error:  # from the header too, far above MAX_PIXELS
        raise BrokenImageError(
            f"its header claims more than {MAX_PIXELS} pixels ({error})"
        ) from None
    except Exception as error:
        # broken bytes make Pillow raise OSError, SyntaxError, struct.error, ValueError and others
        raise BrokenImageError(f"broken image: {error or type(error).__name__}") from None


def _orientation(image: PIL.Image.Image) -> int:
    """Read the orientation from EXIF alone, as decoders do (Pillow's getexif reads XMP too)."""
    exif = PIL.Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        return exif.get(_ORIENTATION, 1)
    except Exception:
        # whatever damaged EXIF makes Pillow raise: the pixels are whole, and decoders then show
        # them as stored
        return 1


def eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert to grey or RGB with 8 bits, without transparency, as the image modality decodes."""
    if image.mode.startswith("I"):
        levels = (np.asarray(image).astype(np.int64) + 128) // 257  # of 16 bits
        return PIL.Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    return (
        image
        if image.mode in ("L", "RGB")
        else image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    )


def encode_jpeg(image: PIL.Image.Image, quality: int | None) -> bytes:
    """Encode an image as JPEG. Raises BrokenImageError for one that is too large for that."""
    sink = io.BytesIO()
    try:
        image.save(sink, "JPEG", quality=quality or QUALITY)
    except (OSError, ValueError) as error:  # a side above 65500 pixels
        raise BrokenImageError(f"cannot be written as JPEG: {error}") from None
    return sink.getvalue()


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W) uint8 to (width, height) by nearest neighbour: classes are not mixed."""
    if mask.shape[::-1] == size:
        return mask
    return np.asarray(PIL.Image.fromarray(mask, "L").resize(size, PIL.Image.Resampling.NEAREST))
