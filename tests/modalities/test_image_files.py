"""Image files as they come: turned, huge, broken, of every layout; masks beside them; where the
image lies in the input.
"""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
import pytest
import torch
from toys import image_file

from pipeline.core.contracts import Batch
from pipeline.io import storage
from pipeline.modalities.image import Image, ImageOptions

STATE = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.5]}


def soft(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC)


def read(images, masks=None, device: bool = False, **options):
    modality = Image(
        ImageOptions(**{"size": 32, **options}),
        STATE if options.get("channels", 3) == 3 else {"mean": [0.5], "std": [0.2]},
    )
    table, columns = (
        {"picture": pa.array(images, pa.binary())},
        {"image": "picture", "label": "absent"},
    )
    if masks is not None:
        table["classes"], columns["mask"] = pa.array(masks, pa.binary()), "classes"
    if device:
        held, bad = modality.encoded(pa.table(table), columns)
        out, more = modality.unpack(held, torch.device("cpu"))
        return {name: tensor.numpy() for name, tensor in out.items()}, [
            a or b for a, b in zip(bad, more, strict=True)
        ]
    return modality.decode(pa.table(table), columns)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 0, lines: bytes = b"") -> bytes:
    """By hand: ``lines`` are the raw bytes of the picture, each line with its filter byte."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------- EXIF


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8])
def test_exif_orientation_is_applied(form, turn):
    exif = PIL.Image.Exif()
    exif[0x0112] = turn
    data = image_file(
        soft(24, 40), form, exif=exif, **({"lossless": True} if form == "WEBP" else {})
    )
    want = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))).convert("RGB")
    assert want.size == ((24, 40) if turn > 4 else (40, 24))
    for device in (False, True):
        found, bad = read([data], size=40, fit="pad", device=device)
        assert bad == [""] and found["frame"].tolist() == [
            [want.width, want.height, (40 - want.width) // 2, (40 - want.height) // 2]
        ]
        left, top = (40 - want.width) // 2, (40 - want.height) // 2
        pixels = np.moveaxis(found["image"][0], 0, -1)[
            top : top + want.height, left : left + want.width
        ]
        # Chroma upsampling differs between libjpeg builds
        assert np.abs(pixels.astype(int) - np.asarray(want)).max() <= 2


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_exif_that_is_broken_or_means_nothing_spoils_no_image(form):
    plain = np.moveaxis(
        np.asarray(PIL.Image.open(io.BytesIO(image_file(soft(32, 32), form))).convert("RGB")), -1, 0
    )
    strange = PIL.Image.Exif()
    strange[0x0112] = 77
    for exif in (strange.tobytes(), b"Exif\x00\x00MM\x00*\xff\xff\xff\xff broken", b"Exif\x00\x00"):
        found, bad = read([image_file(soft(32, 32), form, exif=exif)])
        assert bad == [""] and np.abs(found["image"][0].astype(int) - plain).max() <= 2


def test_what_the_gpu_would_not_turn_goes_to_the_host():
    """nvJPEG knows no EXIF. The GPU is not here; which files it is given is."""
    from pipeline.media import image_io

    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned, plain = image_file(soft(24, 40), "JPEG", exif=exif), image_file(soft(24, 40), "JPEG")
    exif[0x0112] = 1
    assert (
        image_io.is_turned(turned)
        and not image_io.is_turned(plain)
        and not image_io.is_turned(image_file(soft(24, 40), "JPEG", exif=exif))
    )
    assert (
        image_io.jpeg_frame(turned)
        == image_io.jpeg_frame(image_file(soft(24, 40), "JPEG", progressive=True))
        == (24, 40, 3, True)
    )
    assert image_io.jpeg_frame(plain[:30]) is None


def test_colours_that_the_gpu_would_mistake_go_to_the_host(monkeypatch):
    """nvJPEG takes four components for nothing that it knows, and three always for YCbCr: Adobe's
    marker, which says RGB, it does not read.
    """
    from pipeline.media import image_io

    given: list[bytes] = []
    monkeypatch.setattr(
        image_io,
        "decode_jpeg",
        lambda files, **words: given.extend(bytes(file.tolist()) for file in files) or files,
    )
    colour = soft(24, 40)
    red = image_file(colour, "JPEG", keep_rgb=True)
    marker = red.index(b"\xff\xee")
    # Its components are called R, G and B all the same
    unmarked = (
        red[:marker] + red[marker + 2 + int.from_bytes(red[marker + 2 : marker + 4], "big") :]
    )
    host = [
        image_file(colour.convert("CMYK"), "JPEG"),
        red,
        image_file(colour),
        image_file(colour, "JPEG")[:30],
        unmarked,
    ]
    gpu = [
        image_file(colour, "JPEG"),
        image_file(colour.convert("L"), "JPEG"),
        image_file(colour, "JPEG", subsampling=0, progressive=True),
    ]
    assert all(b"Adobe" in data[:30] for data in host[:2])
    files = [part for pair in zip(host, gpu, strict=False) for part in pair] + host[3:]
    assert (
        sorted(image_io.decode_on_gpu(files, 3, torch.device("cuda"))) == [1, 3, 5] and given == gpu
    )
    for data in host[:2]:
        want = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert np.abs(image_io.pixels(data, 3).permute(1, 2, 0).numpy() - want).max() <= 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_the_upright_size_is_told_without_decoding(form):
    from pipeline.media import image_io

    for turn in range(1, 9) if form in ("JPEG", "PNG", "WEBP") else (1,):
        exif = PIL.Image.Exif()
        exif[0x0112] = turn
        data = image_file(soft(24, 40), form, **({"exif": exif} if turn > 1 else {}))
        height, width = image_io.pixels(data, 3).shape[1:]
        assert (
            image_io.upright_size(data) == (width, height) == ((24, 40) if turn > 4 else (40, 24))
        )
    assert image_io.upright_size(b"no image") is image_io.upright_size(b"") is None
    with pytest.raises(storage.StorageError):
        image_io.upright_size("/no/such/picture.jpg")


# ---------------------------------------------------------------- too large, too short


def huge() -> dict[str, bytes]:
    """Files of a few bytes whose headers promise 60000 x 60000 pixels, or 16384 x 16384 (WebP's
    most).
    """
    jpeg = image_file(soft(16, 16), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    gif, bmp = (
        bytearray(image_file(soft(16, 16).quantize(8), "GIF")),
        bytearray(image_file(soft(16, 16), "BMP")),
    )
    gif[6:10] = struct.pack("<HH", 60000, 60000)
    bmp[18:26] = struct.pack("<ii", 60000, 60000)
    webp = bytearray(image_file(soft(16, 16), "WEBP", lossless=True))
    at_webp = webp.index(b"VP8L") + 9
    webp[at_webp : at_webp + 4] = struct.pack("<I", 16383 | 16383 << 14)
    return {
        "png": png(60000, 60000),
        "grey png, just above": png(1 << 14, (1 << 13) + 1),
        "jpeg": jpeg[:at] + struct.pack(">HH", 60000, 60000) + jpeg[at + 4 :],
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "webp": bytes(webp),
    }


@pytest.mark.parametrize("name", list(huge()))
@pytest.mark.parametrize("channels", [1, 3])
def test_a_header_that_promises_too_much_is_refused_before_memory_is_taken(name, channels):
    import resource

    data = huge()[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    for device in (False, True):
        found, bad = read([image_file(soft(32, 32)), data], channels=channels, device=device)
        assert (
            bad[0] == ""
            and "too large" in bad[1]
            and found["image"][0].any()
            and not found["image"][1].any()
        ), bad
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # ru_maxrss counts kilobytes
    assert (
        peak < 32 << 20 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    )


def test_the_reason_tells_the_size():
    assert read([png(60000, 60000)])[1] == [
        "the image is too large: its header says 60000 x 60000 pixels, more than 134217728 in all"
    ]


def test_a_large_image_within_the_limit_is_read():
    data = png(9000, 3, lines=(b"\0" + bytes([128]) * 9000) * 3)
    found, bad = read([data], fit="pad", size=16)
    assert (
        bad == [""]
        and found["frame"].tolist() == [[16, 1, 0, 7]]
        and (found["image"][0, :, 7] == 128).all()
    )


@pytest.mark.parametrize(("height", "width"), [(1, 8000), (8000, 1)])
def test_an_image_too_thin_to_be_cropped_is_refused_before_memory_is_taken(height, width):
    """102 bytes: its shorter side at 224 pixels, the longer one would have 1.8 million, in 2.4
    GB.
    """
    import resource

    data, before = (
        image_file(np.zeros((height, width, 3), np.uint8)),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    for device in (False, True):
        found, bad = read([data, image_file(soft(32, 32))], size=224, device=device)
        new = sorted((224, 1792000), reverse=width > height)
        assert (
            bad
            == [
                f"the image is too thin to be cropped: {width} x {height} pixels would become "
                f"{new[0]} x {new[1]}, more than 134217728 in all; fit: "
                "pad or squash takes it",
                "",
            ]
            and not found["image"][0].any()
        )
        assert (
            read([data], size=224, fit="pad", device=device)[1]
            == read([data], size=224, fit="squash", device=device)[1]
            == [""]
        )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kilobytes


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_truncated_files_are_broken_rows(form):
    whole = image_file(soft(60, 60).quantize(16) if form == "GIF" else soft(60, 60), form)
    cuts = [whole[:n] for n in (1, 4, 12, 20, 26, 30, len(whole) // 2, len(whole) * 9 // 10)] + [
        b""
    ]
    for channels in (1, 3):
        found, bad = read([whole, *cuts, whole], channels=channels)
        assert bad[0] == bad[-1] == "" and all(bad[1:-1]), bad
        assert not found["image"][1:-1].any() and np.array_equal(
            found["image"][0], found["image"][-1]
        )
        assert bad[-2] == "the image is empty (0 bytes)"


# ---------------------------------------------------------------- layouts


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_layouts_of_colour_are_those_of_pillow():
    """CMYK, palettes with and without transparency, grey with alpha, one bit, 16 bits; grey to
    colour and back.
    """
    colour = soft(32, 32)
    clear = np.dstack([np.asarray(colour), np.asarray(soft(32, 32, 5))[:, :, 0]])
    cases = {
        "cmyk": image_file(colour.convert("CMYK"), "JPEG", quality=95),
        "palette": image_file(colour.quantize(16)),
        "palette, one colour clear": image_file(colour.quantize(16), transparency=3),
        "palette with alpha": image_file(
            PIL.Image.fromarray(clear).quantize(16, PIL.Image.Quantize.FASTOCTREE)
        ),
        "grey with alpha": image_file(PIL.Image.fromarray(clear).convert("LA")),
        "alpha": image_file(clear),
        "one bit": image_file(colour.convert("1")),
        "grey": image_file(colour.convert("L")),
        "grey jpeg": image_file(colour.convert("L"), "JPEG"),
        "gif": image_file(colour.quantize(16), "GIF"),
        "gif, one colour clear": image_file(colour.quantize(16), "GIF", transparency=2),
    }
    for name, data in cases.items():
        for channels, mode in ((3, "RGB"), (1, "L")):
            found, bad = read([data], channels=channels)
            want = np.asarray(PIL.Image.open(io.BytesIO(data)).convert(mode)).reshape(
                32, 32, channels
            )
            assert (
                bad == [""]
                and np.abs(np.moveaxis(found["image"][0], 0, -1).astype(int) - want).max() <= 1
            ), (name, mode)


def test_sixteen_bits_of_grey_and_colour_are_divided_by_257():
    levels = np.random.default_rng(0).integers(0, 65536, (32, 32, 3)).astype(">u2")
    colour = png(32, 32, 16, 2, b"".join(b"\0" + line.tobytes() for line in levels))
    grey = image_file(levels[:, :, 0].astype(np.uint16))
    found, bad = read([colour, grey])
    want = np.moveaxis(np.round(levels / 257), -1, 0)
    assert (
        bad == ["", ""]
        and np.array_equal(found["image"][0], want)
        and all(np.array_equal(plane, want[0]) for plane in found["image"][1])
    )


def test_of_an_animation_the_first_picture_is_taken():
    first, second = soft(32, 32).quantize(16), soft(32, 32, 9).quantize(16)
    data = image_file(first, "GIF", save_all=True, append_images=[second, first], duration=50)
    assert getattr(PIL.Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    found, bad = read([data])
    assert bad == [""] and np.array_equal(
        np.moveaxis(found["image"][0], 0, -1), np.asarray(first.convert("RGB"))
    )


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("fit", "channels"), [("pad", 3), ("crop", 1), ("squash", 3), ("squash_crop", 1)]
)
def test_code_for_other_packages_prepares_the_same_input(
    bits, fit, channels, tmp_path, monkeypatch
):
    y, x = np.mgrid[0:70, 0:50]
    levels = (y * 3 + x) * (200 if bits == 16 else 1)
    data = image_file(levels.astype(np.uint16 if bits == 16 else np.uint8))
    (tmp_path / "picture.png").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    modality = Image(
        ImageOptions(
            size=32,
            fit=fit,
            channels=channels,
            crop_share=0.8 if fit == "squash_crop" else 1.0,
        ),
        {"mean": [0.4] * channels, "std": [0.2] * channels},
    )
    prepared = {"np": np}
    exec(modality.preparation_code(), prepared)
    arrays, _ = modality.decode(pa.table({"image": [data]}), {"image": "image"})
    batch = modality.finish(Batch(np.arange(1), torch.arange(1), modality.collate(arrays)))
    pixels = 255 * 0.2 * (prepared["inputs"]["image"] - batch["image"].numpy())
    assert np.abs(pixels).max() <= 2.5


# ---------------------------------------------------------------- where the image lies


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (64, 64), (7, 900), (33, 32)])
def test_padding_keeps_the_aspect_and_frame_tells_where_the_image_is(height, width):
    found, bad = read([image_file(soft(height, width))], size=64, fit="pad")
    w, h, left, top = (int(v) for v in found["frame"][0])
    assert (
        bad == [""]
        and max(w, h) == 64
        and abs(w / h - width / height) <= 0.51 * width / height / min(w, h)
    )
    assert 0 <= 64 - w - 2 * left <= 1 and 0 <= 64 - h - 2 * top <= 1
    want = np.asarray(soft(height, width).resize((w, h), PIL.Image.Resampling.BILINEAR))
    pixels = np.moveaxis(found["image"][0], 0, -1)
    assert np.abs(pixels[top : top + h, left : left + w].astype(int) - want).max() <= 3
    pixels = pixels.copy()
    pixels[top : top + h, left : left + w] = [102, 128, 153]  # the mean: 0 after it is taken off
    assert (pixels == [102, 128, 153]).all()


def test_frame_of_squashed_and_cropped_images():
    assert read([image_file(soft(40, 100))], fit="squash")[0]["frame"].tolist() == [[32, 32, 0, 0]]
    assert "frame" not in read([image_file(soft(40, 100))])[0]


def test_padding_is_no_part_of_the_mean():
    white = image_file(np.full((10, 200, 3), 240, np.uint8))
    state = Image.fit(
        ImageOptions(size=32, fit="pad"), pa.table({"picture": [white]}), {"image": "picture"}, ""
    )
    assert state["mean"] == pytest.approx([240 / 255] * 3, abs=1e-4)


# ---------------------------------------------------------------- masks


def palette_mask(classes: np.ndarray) -> PIL.Image.Image:
    image = PIL.Image.fromarray(classes.astype(np.uint8))
    image.putpalette(
        np.random.default_rng(0).permutation(256).astype(np.uint8).repeat(3)[:768].tobytes()
    )
    return image


@pytest.mark.parametrize("fit", ["pad", "squash"])
@pytest.mark.parametrize("device", [False, True])
def test_masks_give_class_numbers_with_their_images_geometry(fit, device):
    """A palette gives its indices whatever its colours; each class stands where its colour
    stands.
    """
    colours = np.random.default_rng(1).integers(0, 256, (5, 3)).astype(np.uint8)
    classes = np.zeros((60, 90), np.uint8)
    classes[:, 31:60], classes[:29, 60:], classes[29:, 60:] = 1, 2, 4
    forms = [
        palette_mask(classes),
        PIL.Image.fromarray(classes),
        PIL.Image.fromarray(classes.astype(np.uint16)),
    ]
    found, bad = read(
        [image_file(colours[classes])] * 3,
        [image_file(form) for form in forms],
        size=48,
        fit=fit,
        device=device,
    )
    assert (
        bad == ["", "", ""]
        and found["mask"].dtype == np.uint8
        and found["mask"].shape == (3, 48, 48)
    )
    for image, mask in zip(found["image"], found["mask"], strict=True):
        assert np.array_equal(mask, found["mask"][0])
        assert set(np.unique(mask)) == {0, 1, 2, 4, 255} - ({255} if fit == "squash" else set())
        pixels, inside = np.moveaxis(image, 0, -1), mask < 255
        same = (np.abs(pixels[inside].astype(int) - colours[mask[inside]]) <= 1).all(1)
        assert same.mean() > 0.85  # but for the blended edges
    w, h, left, top = found["frame"][0].astype(int)
    want = np.full((48, 48), 255)
    want[top : top + h, left : left + w] = 0
    assert np.array_equal(found["mask"][0] == 255, want == 255)
    # Between centres of pixels, not between their corners
    pillow = PIL.Image.fromarray(classes).resize((w, h), PIL.Image.Resampling.NEAREST)
    assert np.array_equal(found["mask"][0, top : top + h, left : left + w], np.asarray(pillow))


@pytest.mark.parametrize(("depth", "colour"), [(1, 0), (2, 0), (4, 0), (1, 3), (2, 3), (4, 3)])
def test_masks_of_few_bits_are_class_numbers_too(depth, colour):
    """Pillow stretches grey of 2 and 4 bits over 0 to 255."""
    classes = np.arange(32 * 32).reshape(32, 32) % 2**depth
    bits = np.unpackbits(classes.astype(np.uint8)[:, :, None], axis=2)[:, :, 8 - depth :].reshape(
        32, -1
    )
    lines = b"".join(b"\0" + line.tobytes() for line in np.packbits(bits, axis=1))
    data = png(32, 32, depth, colour, lines)
    if colour == 3:
        data = data[:33] + chunk(b"PLTE", bytes(range(100, 148))[: 3 * 2**depth]) + data[33:]
    found, bad = read([image_file(soft(32, 32))], [data], fit="squash")
    assert bad == [""] and np.array_equal(found["mask"][0], classes)


def test_masks_that_cannot_be_used_have_a_reason():
    image = image_file(soft(20, 30))
    good = np.zeros((20, 30), np.uint8)
    cases = {
        "the mask has 20 x 30 pixels, its image 30 x 20": image_file(good.T.copy()),
        "the mask is null": None,
        "the mask is empty (0 bytes)": b"",
        "the mask has colours: a mask has one class number a pixel, as a palette's index or a "
        "level of grey": image_file(np.zeros((20, 30, 3), np.uint8)),
        "the mask holds class 300: the greatest is 254, and 255 is what is left out": image_file(
            np.full((20, 30), 300, np.uint16)
        ),
        "the mask is not a PNG file: it must be one, with a class number for each pixel": image_file(
            good, "BMP"
        ),
        "broken mask": image_file(
            np.random.default_rng(0).integers(0, 20, (20, 30)).astype(np.uint8)
        )[:100],
        "the image is too large": png(60000, 60000),
    }
    for device in (False, True):
        found, bad = read(
            [image] * (len(cases) + 1),
            [*cases.values(), image_file(good)],
            fit="pad",
            device=device,
        )
        assert (
            all(reason.startswith(want) for reason, want in zip(bad, cases, strict=False))
            and bad[-1] == ""
        ), bad
        assert (
            not found["image"][:-1].any()
            and not found["frame"][:-1].any()
            and found["image"][-1].any()
        )


def test_a_mask_belongs_to_the_upright_image():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image = image_file(soft(20, 30), "JPEG", exif=exif)
    _, bad = read(
        [image, image],
        [image_file(np.zeros((20, 30), np.uint8)), image_file(np.zeros((30, 20), np.uint8))],
        fit="pad",
    )
    assert bad == ["the mask has 30 x 20 pixels, its image 20 x 30", ""]


def test_new_rows_to_predict_have_no_mask():
    modality = Image(ImageOptions(size=16, fit="pad"), STATE)
    found, bad = modality.decode(
        pa.table({"picture": [image_file(soft(20, 20))]}), {"image": "picture", "mask": "classes"}
    )
    assert bad == [""] and set(found) == {"image", "frame"}


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("roles", [("boxes", "labels"), ("mask",)])
def test_cropped_images_do_not_go_with_boxes_and_masks(roles):
    with pytest.raises(ValueError, match=rf"fit: crop cuts away .*{roles[0]}.* set fit: pad"):
        Image(ImageOptions(size=32), {}).check(roles)
    for fit in ("pad", "squash"):
        Image(ImageOptions(size=32, fit=fit), {}).check(roles)
    Image(ImageOptions(size=32), {}).check(("label",))


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ({"mean": "imagenet", "std": "imagenet"}, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ({"mean": "inception", "std": "inception"}, [0.5] * 3, [0.5] * 3),
        ({"mean": [0, 0, 0], "std": [1, 1, 1]}, [0.0] * 3, [1.0] * 3),
        ({"mean": "imagenet", "std": [0.2], "channels": 1}, [0.449], [0.2]),
    ],
)
def test_mean_and_deviation_of_published_checkpoints(options, mean, std):
    state = Image.fit(
        ImageOptions(size=16, **options),
        pa.table({"picture": [image_file(soft(20, 20))]}),
        {"image": "picture"},
        "",
    )
    assert state["mean"] == pytest.approx(mean) and state["std"] == pytest.approx(std)
    other = Image(
        ImageOptions(size=16, **options), {"mean": [0.1] * len(mean), "std": [0.9] * len(mean)}
    )
    assert other.state == state, "a checkpoint that tells its own is overridden, not half believed"


@pytest.mark.parametrize(
    ("channels", "state", "mean", "std"),
    [
        (1, STATE, [0.5], [0.316667]),
        (3, STATE, STATE["mean"], STATE["std"]),
        (3, {"mean": [0.5], "std": [0.2]}, [0.5] * 3, [0.2] * 3),
        (1, {}, None, None),
    ],
)
def test_mean_and_deviation_of_colours_are_averaged_for_grey(channels, state, mean, std):
    """A target's channels are its own: the state is its source's."""
    modality = Image(ImageOptions(size=16, channels=channels), state)
    assert "channels" in Image.target_options and (
        modality.state.get("mean"),
        modality.state.get("std"),
    ) == (mean, std)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": "imagenet"}, "std: None must be 3 numbers"),
        ({"std": [0.2, 0.2, 0.2]}, "mean: None must be 3 numbers"),
        ({"mean": [0.5], "std": [0.5]}, r"mean: \[0.5\] must be 3 numbers"),
        ({"mean": [0.5] * 3, "std": [0.2, 0.0, 0.2]}, "std: .*above 0"),
        ({"mean": [120, 120, 120], "std": [60, 60, 60]}, "mean: .*0 to 1, one a channel"),
        ({"area": [0.5, 0.2]}, r"area: \[0.5, 0.2\]"),
        ({"area": [0, 1]}, "area"),
        ({"scale": [0.0, 1.0]}, "scale"),
        ({"area": [0.5, 1.5]}, "area"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Image(ImageOptions(size=16, **options), {})


def test_a_picture_to_draw_on_is_the_upright_image_in_colours():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = image_file(soft(24, 40), "JPEG", exif=exif)
    grey = image_file(soft(10, 20).convert("L"))
    modality = Image(ImageOptions(size=16, channels=1), {"mean": [0.5], "std": [0.2]})
    found = list(
        modality.pictures(pa.table({"x": [turned, grey, b"no image", None]}), {"image": "x"})
    )
    want = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(turned))).convert("RGB")
    assert found[0].shape == (40, 24, 3) and abs(found[0].astype(int) - np.asarray(want)).max() <= 2
    assert found[1].shape == (10, 20, 3) and (found[1][..., :1] == found[1]).all()
    assert found[2:] == [None, None]
