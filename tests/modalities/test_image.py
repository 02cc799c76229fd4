"""Images: pixels as PIL gives them, broken bytes with a reason, augmentation from the rows' keys
alone.
"""

import io
from dataclasses import replace

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toys import image_file

from pipeline.core.contracts import Batch
from pipeline.media import image_io
from pipeline.modalities.image import Image, ImageOptions

STATE = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.5]}


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with edges and some texture, as a photograph has."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(x / rng.uniform(3, 20) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(3, 20))
        for _ in range(3)
    ]
    image = 128 + 70 * np.stack(waves, -1) + rng.normal(0, 4, (height, width, 3))
    image[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return image.clip(0, 255).astype(np.uint8)


def decoded(values, kind=None, **options):
    modality = Image(ImageOptions(**options), {})
    arrays, bad = modality.decode(
        pa.table({"picture": pa.array(values, kind)}), {"image": "picture"}
    )
    return arrays["image"], bad


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def channels_first(image: PIL.Image.Image) -> np.ndarray:
    return np.moveaxis(np.atleast_3d(np.asarray(image)), -1, 0)


# ---------------------------------------------------------------- decode


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    ("height", "width"), [(96, 128), (200, 120), (64, 64), (37, 53), (20, 500)]
)
def test_squashed_pixels_are_those_of_pil(height, width, form):
    data = image_file(photo(height, width), form)
    found, bad = decoded([data], size=48, fit="squash")
    want = (
        PIL.Image.open(io.BytesIO(data))
        .convert("RGB")
        .resize((48, 48), PIL.Image.Resampling.BILINEAR)
    )
    assert bad == [""] and found.shape == (1, 3, 48, 48) and found.dtype == np.uint8
    # Rounding of the two steps; 60 and more on most
    assert psnr(found[0], channels_first(want)) > 45


@pytest.mark.parametrize(("height", "width"), [(96, 144), (144, 96), (64, 64)])
def test_cropped_pixels_are_those_of_torchvision_on_pil(height, width):
    from torchvision.transforms import v2

    data = image_file(photo(height, width))
    found, _ = decoded([data], size=48)
    crop = v2.Compose([v2.Resize(48), v2.CenterCrop(48)])
    assert psnr(found[0], channels_first(crop(PIL.Image.open(io.BytesIO(data))))) > 45


@pytest.mark.parametrize("sides", [(100, 149), (375, 500), (427, 640), (31, 33), (512, 512)])
def test_the_longer_side_is_that_of_torchvision(sides):
    """It is rounded down: 149 of 100 x 149 become 71 where 100 become 48, not 72."""
    from torchvision.transforms import v2

    for shape in (sides, sides[::-1]):
        wanted = v2.Resize(48)(torch.zeros(1, *shape, dtype=torch.uint8)).shape[1:]
        assert image_io.position_in_input(torch.Size(shape), 48, "crop")[:2] == tuple(wanted)


def test_an_image_of_the_right_size_is_not_touched():
    pixels = photo(40, 40)
    assert np.array_equal(decoded([image_file(pixels)], size=40)[0][0], np.moveaxis(pixels, -1, 0))


def test_grey_becomes_colour_and_colour_grey():
    grey, colour = (
        PIL.Image.fromarray(photo(32, 32)).convert("L"),
        PIL.Image.fromarray(photo(32, 32)),
    )
    found, _ = decoded([image_file(grey)], size=32)
    assert all(np.array_equal(found[0, c], np.asarray(grey)) for c in range(3))
    found, _ = decoded([image_file(grey), image_file(colour)], size=32, channels=1)
    assert found.shape == (2, 1, 32, 32) and np.array_equal(found[0, 0], np.asarray(grey))
    assert np.abs(found[1, 0].astype(int) - np.asarray(colour.convert("L"))).max() <= 1


def test_sixteen_bit_images_are_scaled_to_eight():
    """An X-ray as a 16-bit PNG: cast to uint8 it would wrap around 16 grey levels, silently. Scaled
    by 257, as the PNG standard says (13.12).
    """
    ramp = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    for channels in (1, 3):
        found, bad = decoded([image_file(ramp)], size=64, channels=channels)
        assert bad == [""] and all(
            np.array_equal(found[0, c], np.round(ramp / 257)) for c in range(channels)
        )
    found, bad = decoded([image_file(ramp)], size=16, channels=1)
    assert bad == [""] and abs(float(found.mean()) - float(ramp.mean() / 257)) < 1


def test_other_layouts():
    """Transparency is dropped, palettes and CMYK are resolved, a struct of bytes and path is a
    Hugging Face image.
    """
    clear = np.dstack([photo(24, 24), np.full((24, 24), 7, np.uint8)])
    palette = PIL.Image.fromarray(photo(24, 24)).quantize(32)
    data = [
        image_file(clear),
        image_file(palette),
        image_file(PIL.Image.new("CMYK", (24, 24), (10, 20, 30, 40)), "JPEG"),
    ]
    found, bad = decoded(data, size=24)
    assert bad == [""] * 3
    assert np.array_equal(found[0], np.moveaxis(clear[:, :, :3], -1, 0)) and np.array_equal(
        found[1], channels_first(palette.convert("RGB"))
    )
    assert found[2, :, 0, 0].tolist() == pytest.approx([207, 198, 190], abs=2)
    again, bad = decoded([{"bytes": data[0], "path": None}, {"bytes": None, "path": None}], size=24)
    assert np.array_equal(again[0], found[0]) and bad == ["", "the image is null"]


def test_every_suffix_of_image_folders_can_be_decoded():
    """In both numbers of channels, as Pillow has them."""
    from pipeline.data.to_parquet import IMAGE_SUFFIXES

    colour = PIL.Image.fromarray(photo(24, 30))
    grey, few = colour.convert("L"), colour.quantize(32)
    forms = {
        ".jpg": "JPEG",
        ".jpeg": "JPEG",
        ".png": "PNG",
        ".webp": "WEBP",
        ".gif": "GIF",
        ".bmp": "BMP",
    }
    assert forms.keys() == IMAGE_SUFFIXES
    clear = PIL.Image.fromarray(np.dstack([photo(24, 30), np.full((24, 30), 90, np.uint8)]))
    moving = {"save_all": True, "append_images": [few.rotate(180), few]}
    cases = [(form, image, {}) for form in set(forms.values()) for image in (colour, grey)]
    cases += [
        ("GIF", few, {}),
        ("GIF", few, {"transparency": 3}),
        ("GIF", few, moving),
        ("BMP", few, {}),
        ("BMP", colour.convert("1"), {}),
        ("BMP", clear, {}),
        ("WEBP", clear, {"exact": True}),
        ("WEBP", colour, {"save_all": True, "append_images": [colour.rotate(180)]}),
    ]
    for form, image, words in cases:
        data = image_file(image, form, **({"lossless": True} if form == "WEBP" else {}), **words)
        for channels, mode in ((3, "RGB"), (1, "L")):
            want = np.asarray(PIL.Image.open(io.BytesIO(data)).convert(mode)).reshape(
                24, 30, channels
            )
            found, bad = decoded([data], size=24, channels=channels)
            assert bad == [""] and found.shape == (1, channels, 24, 24), (
                form,
                image.mode,
                words,
                channels,
                bad,
            )
            assert np.abs(np.moveaxis(found[0], 0, -1).astype(int) - want[:, 3:27]).max() <= 1, (
                form,
                image.mode,
                words,
                channels,
            )


def test_broken_images_of_the_rarer_formats_have_a_reason():
    picture = PIL.Image.fromarray(photo(40, 40))
    wholes = [
        image_file(picture.quantize(32), "GIF"),
        image_file(picture, "BMP"),
        image_file(picture, "WEBP"),
    ]
    data = [whole[:cut] for whole in wholes for cut in (8, 30, len(whole) // 2)] + [
        image_file(picture, "TIFF"),
        b"%!PS-Adobe-3.0 EPSF-3.0",
    ]
    for channels in (1, 3):
        found, bad = decoded(data, size=16, channels=channels)
        assert (
            all(bad)
            and not found.any()
            and all(len(reason) <= 200 and " object at 0x" not in reason for reason in bad)
        ), bad
        assert bad[-1] == bad[-2] == "not a JPEG, PNG, WebP, GIF or BMP image, or a broken one"


def test_paths_are_read(tmp_path):
    pixels = photo(24, 24)
    path = tmp_path / "a.png"
    path.write_bytes(image_file(pixels))
    found, bad = decoded([str(path), str(path)], size=24)
    assert bad == ["", ""] and np.array_equal(found[1], np.moveaxis(pixels, -1, 0))
    # An I/O error is not a bad row: it is retried, and then it stops the run
    with pytest.raises(OSError, match=r"gone\.png"):
        decoded([str(tmp_path / "gone.png")], size=24)


def test_broken_images_have_a_reason_and_spoil_no_other_row():
    good = image_file(photo(40, 40), "JPEG")
    cut = good[: len(good) // 2]
    data = [good, cut, b"", None, b"no image at all", image_file(photo(40, 40))[:60], good]
    found, bad = decoded(data, pa.binary(), size=32)
    assert bad[0] == bad[-1] == "" and all(bad[1:-1])
    assert bad[2] == "the image is empty (0 bytes)" and bad[3] == "the image is null"
    assert (
        "truncated" in bad[1].lower()
        or "premature" in bad[1].lower()
        or "incomplete" in bad[1].lower()
    )
    assert not found[1:-1].any() and np.array_equal(found[0], found[-1]) and found[0].any()
    assert all(len(reason) <= 200 and "\n" not in reason for reason in bad)


# ---------------------------------------------------------------- fit, finish


def test_fit_is_the_mean_and_deviation_of_each_channel():
    pictures = [photo(20, 20, seed) for seed in range(6)]
    options = ImageOptions(size=20)
    table = pa.table({"picture": [image_file(p) for p in pictures] + [b"broken"]})
    state = Image.fit(options, table, {"image": "picture"}, "timm/resnet18")
    pixels = np.stack(pictures).astype(np.float64) / 255
    assert state["mean"] == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-5) and state[
        "std"
    ] == pytest.approx(pixels.std((0, 1, 2)), abs=1e-5)
    arrays, _ = Image(options, state).decode(table.slice(0, 6), {"image": "picture"})
    done = Image(options, state).finish(
        Batch(
            np.arange(6),
            torch.zeros(6, dtype=torch.int64),
            {"image": torch.from_numpy(arrays["image"])},
        )
    )["image"]
    assert done.mean((0, 2, 3)).abs().max() < 1e-4 and (done.std((0, 2, 3)) - 1).abs().max() < 1e-2


@pytest.mark.parametrize("channels", [1, 3])
def test_fit_decodes_few_images_at_a_time_and_loses_no_precision(monkeypatch, channels):
    pictures = [image_file(photo(24, 24, seed)) for seed in range(150)]
    pictures[70] = pictures[149] = b"broken"
    table = pa.table({"picture": pa.chunked_array([pictures[:10], pictures[10:]])})
    options = ImageOptions(size=20, channels=channels)
    arrays, bad = Image(options, {}).decode(table, {"image": "picture"})
    pixels = arrays["image"][[not reason for reason in bad]].astype(np.float64) / 255
    sizes, decode = [], Image.decode
    monkeypatch.setattr(
        Image,
        "decode",
        lambda self, part, columns: sizes.append(len(part)) or decode(self, part, columns),
    )
    state = Image.fit(options, table, {"image": "picture"}, "timm/resnet18")
    assert sizes == [64, 64, 22] and len(pixels) == 148
    assert state["mean"] == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6) and state[
        "std"
    ] == pytest.approx(pixels.std((0, 2, 3)).tolist(), abs=1e-6)
    sizes.clear()
    Image.fit(
        ImageOptions(size=2048, channels=channels), table.slice(0, 12), {"image": "picture"}, ""
    )
    assert max(sizes) == {1: 12, 3: 5}[channels], "larger images, fewer at a time"


def test_fit_without_a_readable_image_says_which_column():
    with pytest.raises(
        ValueError,
        match="column picture: none of the first 2 images can be decoded: the image is empty",
    ):
        Image.fit(
            ImageOptions(size=16), pa.table({"picture": [b"", b"x"]}), {"image": "picture"}, ""
        )


def test_fit_of_a_blank_corpus_divides_by_no_zero():
    state = Image.fit(
        ImageOptions(size=16),
        pa.table({"picture": [image_file(np.zeros((16, 16, 3), np.uint8))]}),
        {"image": "picture"},
        "",
    )
    assert min(state["std"]) > 0


def test_finish_normalises_by_channel():
    x = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    out = Image(ImageOptions(size=8), STATE).finish(
        Batch(np.arange(2), torch.zeros(2, dtype=torch.int64), {"image": x})
    )["image"]
    mean, std = (torch.tensor(STATE[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(out, (x.float() / 255 - mean) / std)


# ---------------------------------------------------------------- augment


def batch_of(rows: np.ndarray, size: int, seed: int = 0) -> Batch:
    pixels = torch.from_numpy(
        np.stack([np.moveaxis(photo(size, size, int(row)), -1, 0) for row in rows])
    )
    keys = torch.from_numpy(np.random.default_rng(seed).integers(-(1 << 62), 1 << 62, 1000)[rows])
    return Batch(rows, keys, {"image": pixels})


@pytest.mark.parametrize(
    ("crop", "size"), [("shift", 16), ("resized", 16), ("none", 16), ("auto", 16), ("auto", 72)]
)
def test_augmentation_of_a_row_depends_on_its_key_alone(crop, size):
    """The same row beside other rows, at another place, in a smaller batch: the same pixels."""
    modality = Image(ImageOptions(size=size, crop=crop), STATE)
    whole = modality.augment(batch_of(np.arange(12), size))["image"]
    assert whole.dtype == torch.uint8 and whole.shape == (12, 3, size, size)
    for places in ([7], [3, 11, 0], [11, 10, 9, 8, 7]):
        assert torch.equal(
            modality.augment(batch_of(np.array(places), size))["image"], whole[places]
        )
    torch.manual_seed(1)  # nothing is drawn from torch's generator
    assert torch.equal(modality.augment(batch_of(np.arange(12), size))["image"], whole)
    assert not torch.equal(modality.augment(batch_of(np.arange(12), size, seed=1))["image"], whole)


def test_shift_moves_by_at_most_an_eighth_and_flips_half():
    size, n = 16, 600
    modality = Image(ImageOptions(size=size, crop="shift"), STATE)
    ramp = torch.zeros(n, 3, size, size, dtype=torch.uint8)
    ramp[:, 0] = torch.arange(size, dtype=torch.uint8)[None, None, :] * 10
    ramp[:, 1] = torch.arange(size, dtype=torch.uint8)[None, :, None] * 10
    keys = torch.from_numpy(np.random.default_rng(0).integers(-(1 << 62), 1 << 62, n))
    out = modality.augment(Batch(np.arange(n), keys, {"image": ramp}))["image"]
    across, down = out[:, 0, size // 2].int() // 10, out[:, 1, :, size // 2].int() // 10
    flipped = across[:, -1] < across[:, 0]
    across = torch.where(flipped[:, None], across.flip(1), across)
    moves = [(row[size // 2] - size // 2).tolist() for row in (across.T, down.T)]
    for found, lines in zip(moves, (across, down), strict=True):
        assert set(found) == set(range(-2, 3))  # each of -2 .. 2, none beyond
        want = (torch.arange(size)[None] + torch.tensor(found)[:, None]).clamp(0, size - 1)
        assert torch.equal(lines.long(), want)  # the border is repeated
    counts = np.unique(np.stack(moves, 1), axis=0, return_counts=True)[1]
    assert len(counts) == 25 and counts.min() > 5  # both ways at once, independently
    assert 0.42 < flipped.float().mean() < 0.58


def test_without_flip_and_crop_nothing_changes():
    batch = batch_of(np.arange(6), 16)
    assert torch.equal(
        Image(ImageOptions(size=16, crop="none", flip=False), STATE).augment(batch)["image"],
        batch["image"],
    )


def test_flip_alone_mirrors_half_the_rows():
    batch = batch_of(np.arange(200), 8)
    out = Image(ImageOptions(size=8, crop="none"), STATE).augment(batch)["image"]
    same, mirrored = (
        (out == x).flatten(1).all(1) for x in (batch["image"], batch["image"].flip(3))
    )
    assert torch.equal(same, ~mirrored) and 0.35 < mirrored.float().mean() < 0.65


def test_resized_crop_covers_what_it_says():
    """Coordinates as pixel values show the window that was taken: area 0.35 to 1, aspect 3/4 to
    4/3, inside the image.
    """
    size, n = 64, 400
    ramp = torch.zeros(n, 3, size, size, dtype=torch.uint8)
    ramp[:, 0], ramp[:, 1] = (
        torch.arange(size)[None, None, :] * 4,
        torch.arange(size)[None, :, None] * 4,
    )
    keys = torch.from_numpy(np.random.default_rng(0).integers(-(1 << 62), 1 << 62, n))
    out = (
        Image(ImageOptions(size=size, crop="resized"), STATE)
        .augment(Batch(np.arange(n), keys, {"image": ramp}))["image"]
        .float()
    )
    rows, columns = out[:, 1, :, 32], out[:, 0, 32]
    width, height = ((line[:, 56] - line[:, 8]).abs() / (4 * 48) for line in (columns, rows))
    area, ratio = width * height, width / height
    assert area.min() > 0.33 and area.max() < 1.02 and area.max() - area.min() > 0.5
    assert ratio.min() > 0.73 and ratio.max() < 1.37
    flipped = columns[:, 56] < columns[:, 8]
    assert 0.42 < flipped.float().mean() < 0.58 and (rows[:, 56] > rows[:, 8]).all()
    left = torch.minimum(columns[:, 0], columns[:, -1]) / 4
    assert left.min() >= 0 and left.max() > 10  # windows lie in different places


# ---------------------------------------------------------------- decoding on the device


def test_rows_decoded_on_the_device_are_the_batches_of_any_other_place(tmp_path):
    """Here the device is the CPU: the same path, with torchvision's decoder of the host. Broken
    rows are found and left out alike.
    """
    from pipeline.config import registry
    from pipeline.data import manifests, stream
    from pipeline.data.plan import Plan
    from pipeline.io.threads import threaded_map

    rng, encoded = np.random.default_rng(0), []
    for i in range(40):
        pixels = rng.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)
        encoded.append(image_file(pixels, "PNG" if i % 3 else "JPEG"))
    encoded[7], encoded[21], encoded[30] = encoded[7][:50], b"", b"no picture"
    pq.write_table(
        pa.table({"picture": encoded, "label": [i % 2 for i in range(40)]}),
        tmp_path / "rows.parquet",
        row_group_size=16,
    )
    columns = {"image": "picture", "label": "label"}
    kind = registry.get("modality", "image")
    modality = kind(kind.options_class(size=24), {"mean": [0.5] * 3, "std": [0.2] * 3})
    rows = stream.Rows(
        manifests.Selection(manifests.build(str(tmp_path / "rows.parquet"), "auto", "")),
        stream.Decoder(
            modality, "classification", {"values": [0, 1], "labels": ["a", "b"]}, columns
        ),
    )
    plan = Plan(40, 3, 10, item_rows=8)
    loader = stream.Loader(rows.selection, replace(rows.decoder, keep_encoded=True), plan)
    blocks = threaded_map(loader, plan.items(0, 8), 1)
    there = list(stream.batches_of_blocks(rows, plan, blocks, range(8), 0, 1, torch.device("cpu")))
    plain = [
        (batch, bad) for batch, bad, _ in stream.train_batches(rows, plan, range(8), decode="train")
    ]
    for (batch, bad), (other, bad_other) in zip(there, plain, strict=True):
        assert (
            batch.rows.tolist() == other.rows.tolist()
            and torch.equal(batch["image"], other["image"])
            and torch.equal(batch["label"], other["label"])
        )
        assert {row for row, _ in bad} == {row for row, _ in bad_other}
    assert {row for _, bad in there for row, _ in bad} == {7, 21, 30}


def test_a_source_that_names_its_colours_has_grey_targets():
    """Their average, as a name's; numbers that fit the rows themselves stand."""
    state = {"mean": [0.2, 0.3, 0.7], "std": [0.1, 0.2, 0.3]}
    grey = Image(ImageOptions(channels=1, mean=[0.2, 0.3, 0.7], std=[0.1, 0.2, 0.3]), state)
    assert grey.state["mean"] == [0.4] and grey.state["std"] == [0.2]
    assert Image(ImageOptions(channels=1, mean=[0.9], std=[0.8]), state).state["mean"] == [0.9]
