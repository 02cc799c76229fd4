"""One image: whole or refused, its size as it is seen, and what making it smaller does."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import pytest
import torch
from prepare.conftest import encoded
from torchvision.io import ImageReadMode, decode_image
from toys import image_file

from pipeline.media import drawing, image_io
from pipeline.prepare.readers import picture_check
from pipeline.prepare.readers.picture_check import BrokenImageError, eight_bits, examine


def opened(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data))


def smooth(width: int, height: int) -> PIL.Image.Image:
    y, x = np.mgrid[:height, :width]
    return PIL.Image.fromarray(
        np.stack(
            [x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], 2
        ).astype(np.uint8)
    )


def oriented(image: PIL.Image.Image, turn: int, form: str = "JPEG") -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = turn
    return image_file(image, form, exif=exif.tobytes())


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_an_image_that_is_not_written_anew_keeps_its_bytes(form):
    data = encoded(1, (40, 30), form)
    assert examine(data) == picture_check.Picture(data, (40, 30), (40, 30))
    assert examine(data, resize=30).data is data, "only downwards"


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_the_size_is_that_after_exif_orientation(turn, form):
    data = oriented(smooth(60, 40), turn, form)
    picture = examine(data)
    decoded = decode_image(
        torch.frombuffer(bytearray(data), dtype=torch.uint8),
        mode=ImageReadMode.RGB,
        apply_exif_orientation=True,
    )
    assert picture.upright_size == picture.size == (decoded.shape[2], decoded.shape[1])
    small = opened(examine(data, resize=20, quality=95).data)
    assert small.size == ((30, 20) if turn < 5 else (20, 30))
    assert small.getexif().get(0x0112) is None, "upright now"
    wanted = np.asarray(
        PIL.ImageOps.exif_transpose(opened(data))
        .convert("RGB")
        .resize(small.size, PIL.Image.Resampling.BICUBIC),
        dtype=float,
    )
    assert np.abs(np.asarray(small, dtype=float) - wanted).mean() < 4


def test_the_shorter_side_is_made_smaller_and_antialiased():
    stripes = PIL.Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (256, 128)))
    picture = examine(image_file(stripes, "PNG"), resize=64)
    assert picture.size == (64, 64)
    small = np.asarray(opened(picture.data))
    assert small.shape == (64, 64) and np.abs(small.astype(int) - 127).max() < 12, (
        "one pixel in four would give 0 or 255"
    )
    assert examine(encoded(1, (333, 100)), resize=50).size == (166, 50)


@pytest.mark.parametrize("size", [(1600, 1280), (1601, 1281), (1921, 1281)])
def test_a_large_photo_is_made_smaller_as_well_as_by_the_whole_of_it(size):
    """It is decoded at a quarter of its size, of which the last pixel may be a part only: 44 dB,
    and 38 dB when that is overlooked.
    """
    y, x = np.mgrid[: size[1], : size[0]].astype(np.float64)
    waves = [
        127 + 60 * np.sin(x / a + y / b) + 60 * np.sin(x / b - y / a)
        for a, b in ((41, 60), (53, 90), (77, 47))
    ]
    data = image_file(np.stack(waves, 2).astype(np.uint8), "JPEG", quality=95)
    picture = examine(data, resize=160, quality=100)
    assert picture.upright_size == size and min(picture.size) == 160
    wanted = np.asarray(
        opened(data).resize(picture.size, PIL.Image.Resampling.BICUBIC), dtype=float
    )
    assert (
        10
        * np.log10(255**2 / ((np.asarray(opened(picture.data), dtype=float) - wanted) ** 2).mean())
        > 42
    )


@pytest.mark.parametrize(
    ("mode", "after"),
    [
        ("1", "L"),
        ("L", "L"),
        ("LA", "L"),
        ("P", "RGB"),
        ("RGBA", "RGB"),
        ("RGB", "RGB"),
        ("CMYK", "RGB"),
    ],
)
def test_every_mode_becomes_grey_or_rgb(mode, after):
    image = (
        smooth(64, 48).quantize(256, dither=PIL.Image.Dither.NONE)
        if mode == "P"
        else smooth(64, 48).convert(mode)
    )
    data = image_file(
        image, "JPEG" if mode == "CMYK" else "PNG", **({"quality": 95} if mode == "CMYK" else {})
    )
    found = opened(examine(data, quality=95).data)
    assert (found.format, found.mode, found.size) == ("JPEG", after, (64, 48))
    assert (
        np.abs(
            np.asarray(found, dtype=float) - np.asarray(image.convert(after), dtype=float)
        ).mean()
        < 6
    )


def test_of_16_bits_are_8_as_where_the_file_itself_is_read():
    levels = (np.arange(64 * 48, dtype=np.uint32).reshape(48, 64) * 21).astype(np.uint16)
    data = image_file(levels)
    found, wanted = (
        np.asarray(opened(examine(data, quality=98).data), dtype=float),
        image_io.pixels(data, 1)[0].numpy(),
    )
    assert np.abs(found - wanted).max() <= 4
    assert (np.asarray(eight_bits(opened(data))) == wanted).all()


@pytest.mark.parametrize(("highest", "is_dark"), [((1 << 14) - 1, True), (1 << 14, False)])
def test_an_image_of_16_bits_that_holds_14_is_dark_once_it_has_8(highest, is_dark):
    data = image_file(np.linspace(0, highest, 64 * 48).reshape(48, 64).astype(np.uint16))
    assert examine(data, quality=98).is_dark == is_dark
    assert not examine(data).is_dark, "it keeps its levels"
    assert not examine(image_file(np.zeros((48, 64), np.uint8)), quality=98).is_dark


def test_of_an_animation_the_first_picture_is_kept():
    frames = [PIL.Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    data = image_file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert examine(data).size == (20, 20)
    assert opened(examine(data, quality=95).data).getpixel((5, 5))[0] > 240


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    )


@pytest.mark.parametrize("side", [11586, 14000, 60000])
def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(side, monkeypatch):
    monkeypatch.setattr(
        PIL.ImageFile.ImageFile, "load", lambda self: pytest.fail("its pixels are taken")
    )
    with pytest.raises(BrokenImageError, match=r"its header claims .*134217728"):
        examine(png_header(side, side))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image",
        encoded(1)[:400],
        encoded(1, form="PNG")[:-200],
        encoded(1, form="WEBP")[:50],
        b"\xff\xd8\xff\xe0",
        png_header(100, 100),
    ],
    ids=["empty", "text", "jpeg", "png", "webp", "start", "few pixels"],
)
def test_broken_images_are_refused_with_a_reason(data):
    with pytest.raises(BrokenImageError) as caught:
        examine(data)
    assert str(caught.value)


def test_damaged_exif_is_no_reason_to_lose_an_image():
    data = oriented(smooth(60, 40), 6).replace(b"MM\0*", b"XX\0*")
    assert b"XX\0*" in data
    assert examine(data).upright_size == (60, 40)


def test_masks_keep_their_classes_when_they_move():
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[10:30, 20:40], mask[12:20, 22:30] = 90, 255
    small = picture_check.resize_nearest(mask, (30, 20))
    assert small.shape == (20, 30) and set(np.unique(small)) == {0, 90, 255}
    assert (small == mask[1::2, 1::2]).all()
    assert (np.asarray(opened(drawing.png(mask))) == mask).all()
