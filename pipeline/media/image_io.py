"""Image files to pixels: JPEG, PNG, WebP, GIF and BMP, upright; masks of class numbers; the place
of an image in a model's input.

EXIF orientation is applied. Transparency is dropped, as by Pillow's ``convert("RGB")`` and so by
every published ImageNet pipeline. 16-bit PNG are scaled to 8 bits (PNG 3, 13.12). Of an animation
the first picture is used. A header of more than MAX_PIXELS is rejected before memory is allocated.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_image, decode_jpeg

from pipeline.io import storage
from pipeline.media.image_ops import IGNORED, to_uint8

MAX_PIXELS = 1 << 27
"""134 million, 400 MB in colour."""
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def file_bytes(value: Any, what: str = "image") -> bytes:
    """Return the bytes of an image file from a cell with bytes, a path, or a struct of both.

    Raises ValueError for an empty cell.
    """
    data = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    if isinstance(data, str):
        data = storage.read_bytes(data)
    if not data:
        raise ValueError(f"the {what} is {'null' if data is None else 'empty (0 bytes)'}")
    return data


def decode_on_gpu(files: Any, channels: int, device: torch.device) -> dict[int, Tensor]:
    """Decode every suitable JPEG on the GPU in one call.

    Not suitable are images that are too large, images to be rotated (EXIF), which nvJPEG does not
    do, and CMYK and RGB, which it would read as YCbCr.

    Returns:
        The index of a file to its pixels (channels, H, W) uint8. Empty where one of the files is
        broken: each is then to be decoded on the host.
    """
    if device.type != "cuda":
        return {}
    places = [
        i
        for i, data in enumerate(files)
        if data.startswith(JPEG) and _plain(data) and not is_turned(data)
    ]
    if not places:
        return {}
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    try:
        decoded = decode_jpeg(
            [torch.frombuffer(bytearray(files[i]), dtype=torch.uint8) for i in places],
            mode=mode,
            device=device,
        )
    except RuntimeError:
        return {}
    return dict(zip(places, decoded, strict=True))


def is_turned(data: bytes) -> bool:
    """Return whether a JPEG file's EXIF asks for a rotation, or cannot be read."""
    if b"Exif\0" not in data[: 1 << 17]:
        return False
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.getexif().get(0x0112, 1) != 1
    except Exception:
        # Pillow raises many kinds of errors for broken files; the host's decoder gives the reason
        return True


def _plain(data: bytes) -> bool:
    """Tell whether a JPEG is grey or YCbCr, of a size that may be decoded."""
    height, width, components, ycc = jpeg_frame(data) or (0, 0, 0, False)
    return 0 < height * width <= MAX_PIXELS and (components == 1 or (components == 3 and ycc))


def jpeg_frame(data: bytes) -> tuple[int, int, int, bool] | None:
    """Read height, width and number of components from the frame header (ITU-T T.81, B.2.2).

    The last value tells whether three components are YCbCr, which Adobe's marker may deny (ITU-T
    T.872, 6.5.3). None where the markers before the header are damaged.
    """
    at, ycc = 2, True
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], struct.unpack_from(">H", data, at + 2)[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return *struct.unpack_from(">HHB", data, at + 5), ycc and data[
                at + 10 : at + 19 : 3
            ] != b"RGB"  # libjpeg goes by such names of components
        if marker == 0xEE and data[at + 4 : at + 9] == b"Adobe":
            ycc = data[at + 15 : at + 16] != b"\0"
        at += 2 + length
    return None


def _check_size(data: bytes) -> None:
    """Raise ValueError for a header of more than MAX_PIXELS, and for other bytes."""
    frame = jpeg_frame(data) if data.startswith(JPEG) else None
    size = (
        struct.unpack_from(">II", data, 16)
        if data.startswith(PNG) and len(data) > 24
        else frame and frame[:2]
    )
    if size is None:
        try:
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                size = image.size
        except PIL.Image.DecompressionBombError as error:  # Pillow's own limit is above ours
            raise ValueError(f"the image is too large: {error}") from None
        except PIL.UnidentifiedImageError:
            raise ValueError("not a JPEG, PNG, WebP, GIF or BMP image, or a broken one") from None
        except Exception as error:
            # Broken bytes make Pillow raise OSError, SyntaxError, struct.error and others
            raise ValueError(f"broken image: {error}") from None
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"the image is too large: its header says {max(size)} x {min(size)} pixels, more "
            f"than {MAX_PIXELS} in all"
        )


def upright_size(value: Any) -> tuple[int, int] | None:
    """Return (width, height) of the upright image, without decoding it.

    ``value`` is the file's bytes or path, or the cell of a Hugging Face data set. Returns None for
    bytes that are not an image; raises StorageError where a path cannot be read.
    """
    value = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    try:
        with (
            storage.open_read(value)
            if isinstance(value, str)
            else io.BytesIO(value or b"") as file,
            PIL.Image.open(file, formats=FORMATS) as image,
        ):
            # only the EXIF block, as decoders read it: Pillow's getexif would look into XMP too,
            # and read a PNG to its end
            exif = PIL.Image.Exif()
            exif.load(image.info.get("exif", b""))
            return (image.height, image.width) if 5 <= exif.get(0x0112, 1) <= 8 else image.size
    except storage.StorageError:  # no broken file: one that could not be read
        raise
    except Exception:  # what Pillow raises for broken files has no end of kinds
        return None


def pixels(data: bytes, channels: int) -> Tensor:
    """Decode a JPEG, PNG, WebP, GIF or BMP file to (channels, H, W) uint8, upright.

    Transparency is dropped; of an animation the first picture is used. Raises RuntimeError or
    ValueError for other bytes.
    """
    _check_size(data)
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    # Animated, or with EXIF
    extended = data[12:16] == b"VP8X" and bool(data[20:21] and data[20] & 0b1010)
    if not (data.startswith((JPEG, PNG)) or (webp and channels == 3 and not extended)):
        return _by_pillow(
            data,
            channels,
            # torchvision 0.26 has no BMP, no animated WebP, no grey for WebP and GIF, and reads all
            # of an animated GIF
        )
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    decoded = decode_image(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode, apply_exif_orientation=True
    )
    if decoded.dtype == torch.uint16:  # a 16-bit PNG (X-ray); a cast would keep the low byte
        decoded = ((decoded.to(torch.int32) + 128) // 257).to(torch.uint8)
    return decoded


def _by_pillow(data: bytes, channels: int) -> Tensor:
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("BMP", "GIF", "WEBP")) as image:
            array = np.array(
                PIL.ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            )
    except PIL.UnidentifiedImageError:
        raise ValueError("not a JPEG, PNG, WebP, GIF or BMP image, or a broken one") from None
    except Exception as error:
        # broken bytes make Pillow raise OSError, SyntaxError, struct.error, DecompressionBombError
        # and others
        raise ValueError(f"broken image: {error}") from None
    height, width = array.shape[:2]
    image = torch.from_numpy(array.reshape(height, width, channels))
    return image.permute(2, 0, 1).contiguous()


def class_numbers(data: bytes) -> np.ndarray:
    """Decode a PNG mask to (H, W) int64: a palette's indices, not its colours, or levels of grey.

    Raises ValueError for other bytes.
    """
    if not data.startswith(PNG) or len(data) < 26:
        raise ValueError(
            "the mask is not a PNG file: it must be one, with a class number for each pixel"
        )
    _check_size(data)
    depth, colour = data[24], data[25]
    if colour not in (0, 3):
        raise ValueError(
            "the mask has colours: a mask has one class number a pixel, as a palette's index "
            "or a level of grey"
        )
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            numbers = np.array(image).astype(np.int64)
    except Exception as error:
        # Broken bytes make Pillow raise OSError, SyntaxError, struct.error and others
        raise ValueError(f"broken mask: {error}") from None
    # Pillow stretches them to 255
    return numbers // (255 // (2**depth - 1)) if colour == 0 and depth in (2, 4) else numbers


def classes_in(value: Any) -> np.ndarray:
    """Return which class numbers a mask holds, in their order.

    Args:
        value: a cell, as `file_bytes` takes it.

    Raises:
        ValueError: there is no mask, or it cannot be read.
    """
    numbers = class_numbers(file_bytes(value, "mask"))
    # np.unique sorts all pixels, which takes three times as long as to decode them
    return np.flatnonzero(np.bincount(numbers.reshape(-1)))


def doubt_masks(masks: Iterable[Any], ignore: int) -> str:
    """Say that masks hold fewer than two classes to learn; "" where they hold more.

    The mask of one object is often written as 0 and 255, of which 255 is never learned: a network
    that finds nothing is then always right.

    Args:
        masks: cells, as `file_bytes` takes them.
        ignore: class that is not learned either.
    """
    found: set[int] = set()
    learned: set[int] = set()
    for value in masks:
        with contextlib.suppress(ValueError):  # of a mask that cannot be read
            found.update(classes_in(value).tolist())
        learned = found - {ignore, IGNORED}
        if len(learned) > 1:
            return ""
    if not found:
        return ""
    text = f"hold class {learned.pop()} alone" if learned else "hold no class to learn"
    if IGNORED in found:
        text += (
            f", beside {IGNORED}, which is neither learned nor counted; where {IGNORED} is an "
            "object, write its class number instead"
        )
    return text


def describe_unused_levels(images: Iterable[Any]) -> str:
    """Describe 16-bit PNG files that use the lowest levels alone; "" where they do not.

    Scanners write 10 to 14 bits into such files, whose 16 bits `pixels` scales to 8.

    Args:
        images: cells, as `file_bytes` takes them.
    """
    highest = 0
    for value in images:
        try:
            data = file_bytes(value)
            if not data.startswith(PNG) or data[24:25] != b"\x10":
                return ""
            _check_size(data)
            levels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        except (RuntimeError, ValueError):  # of an image that cannot be read
            continue
        highest = max(highest, int(levels.int().max()))
    bits = highest.bit_length()
    if not 0 < bits <= 14:
        return ""
    return (
        f"are PNG files of 16 bits whose highest level is {highest} of 65535: they are read as "
        f"levels 0 to {round(highest / 257)} of 255, and finer differences are lost; multiply "
        f"their levels by {1 << 16 - bits}, or write them with 8 bits"
    )


def classes(data: bytes, size: torch.Size) -> Tensor:
    """Decode a mask to (H, W) uint8 class numbers.

    Raises ValueError for another size than its image's, or a number that no mask may hold.
    """
    numbers = class_numbers(data)
    if numbers.max(initial=0) > IGNORED:
        raise ValueError(
            f"the mask holds class {numbers.max()}: the greatest is {IGNORED - 1}, and {IGNORED} "
            "is what is left out"
        )
    if numbers.shape != tuple(size):
        raise ValueError(
            f"the mask has {numbers.shape[1]} x {numbers.shape[0]} pixels, its image {size[1]} x "
            f"{size[0]}"
        )
    return torch.from_numpy(numbers.astype(np.uint8))


def position_in_input(
    shape: torch.Size, size: int, fit: str, crop_share: float = 1.0
) -> tuple[int, int, int, int]:
    """Return where the whole image lies in the input: height, width, top and left in pixels.

    Top and left are below 0 where it is cropped.

    Args:
        shape: Height and width of the image.
        size: Pixels a side of the input.
        fit: Option ``fit`` of the image modality.
        crop_share: For ``fit`` crop and squash_crop, the share of the resized sides that the crop
            keeps, of crop the shorter one's (timm's crop_pct).
    """
    height, width = shape
    if fit == "squash":
        return size, size, 0, 0
    if fit == "pad":
        most = max(height, width)
        new = max(1, round(height * size / most)), max(1, round(width * size / most))
        return *new, (size - new[0]) // 2, (size - new[1]) // 2
    least, side = min(height, width), int(size / crop_share)
    new = side, side
    if fit == "crop":  # rounded down, as by torchvision and transformers
        new = height * side // least, width * side // least
    return *new, -((new[0] - size) // 2), -((new[1] - size) // 2)


def resize(
    picture: Tensor,
    size: int,
    fit: str = "crop",
    fill: list[float] | None = None,
    nearest: bool = False,
    crop_share: float = 1.0,
    interpolation: str = "bilinear",
) -> Tensor:
    """Resize (C, H, W) uint8 to (C, size, size), then crop the centre or pad with ``fill``.

    Antialiased bilinear or bicubic in uint8 (on a GPU in float, rounded), or the nearest pixel.
    ``fill`` is a level for each channel, 0 by default. Raises ValueError where the enlarged image
    would have more than MAX_PIXELS before it is cropped.
    """
    height, width, top, left = position_in_input(picture.shape[1:], size, fit, crop_share)
    if height * width > MAX_PIXELS:  # 1 x 8000 to 224: 2.4 GB
        raise ValueError(
            f"the image is too thin to be cropped: {picture.shape[2]} x {picture.shape[1]} pixels "
            f"would become {width} x {height}, more than {MAX_PIXELS} in all; fit: pad or squash "
            "takes it"
        )
    if (height, width) != tuple(picture.shape[1:]):
        batch = picture[None].float() if picture.is_cuda else picture[None]
        how: dict[str, Any] = (
            {"mode": "nearest-exact"}
            if nearest
            else {"mode": interpolation, "antialias": True, "align_corners": False}
        )
        picture = F.interpolate(batch, size=(height, width), **how)[0]
        picture = to_uint8(picture) if picture.is_cuda else picture
    if fit != "pad":
        return picture[:, -top : size - top, -left : size - left]
    out = (
        to_uint8(torch.tensor(fill or [0.0] * len(picture), device=picture.device))
        .view(-1, 1, 1)
        .repeat(1, size, size)
    )
    out[:, top : top + height, left : left + width] = picture
    return out
