"""Images: decoded to uint8 pixels in data workers or on a GPU, augmented and normalised on the
device.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.registry import Options, register
from pipeline.core.arrow_lists import holds_files
from pipeline.core.contracts import Arrays, Batch, Modality, View
from pipeline.core.inputs import ImageInputs
from pipeline.core.rng import uniform
from pipeline.core.specs import State
from pipeline.media import drawing, image_io, image_ops, perceptual_hash
from pipeline.media.image_io import resize

FIT_IMAGES, FIT_BYTES = 64, 64 << 20
"""``fit`` decodes so many images at a time, fewer when they are large."""


PUBLISHED = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation that published checkpoints expect: those of torchvision and most of
timm's, and those of Inception (also used by its ViTs and MobileNets).
"""
CROPPED = ("crop", "squash_crop")
"""Values of ``fit`` that cut the edge of an image away."""
CROP, COLOUR, RAND, VIEWS = 0, 16, 17, 32
"""Streams of a row's key; view number i draws from VIEWS + i."""
CACHED = 1 << 18
"""Float32 values of images that fit in a core's cache: 1 MiB."""
PAIR = b"image+mask"
"""Prefix of an image's and its mask's bytes joined for ``unpack``; no image file starts like this.
"""


PREPARATION = """
from PIL import Image, ImageOps

size = {size}
picture = ImageOps.exif_transpose(Image.open("picture.png"))
if picture.mode.startswith("I"):  # 16 bits: convert would clip them instead of scaling them
    levels = (np.asarray(picture, np.int64) + 128) // 257
    picture = Image.fromarray(levels.astype(np.uint8))
picture = picture.convert("{mode}")
width, height = picture.size
{fit}
picture = picture.resize((width, height), Image.Resampling.{filter})
pixels = np.asarray(picture, np.float32).reshape(height, width, -1)
canvas = np.empty((size, size, pixels.shape[2]), np.float32)
canvas[:] = {fill}
y, x = max(top, 0), max(left, 0)
pixels = pixels[max(-top, 0) :, max(-left, 0) :][: size - y, : size - x]
canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
values = (canvas / 255 - {mean}) / {std}
inputs = {{"image": values.transpose(2, 0, 1)[None].astype(np.float32)}}
"""
PREPARED_FITS = {
    "squash": "width = height = size\ntop = left = 0",
    "pad": """most = max(width, height)
width, height = max(1, round(width * size / most)), max(1, round(height * size / most))
top, left = (size - height) // 2, (size - width) // 2""",
    "squash_crop": """width = height = int(size / {share})
top = left = -((width - size) // 2)""",
    "crop": """least, side = min(width, height), int(size / {share})
width, height = width * side // least, height * side // least
top, left = -((height - size) // 2), -((width - size) // 2)""",
}
"""Code that makes the input of a network outside of this package, and its part for each ``fit``."""


class ImageOptions(Options):
    size: int = Field(224, ge=8, le=4096, description="pixels a side after resize and centre crop")
    channels: Literal[1, 3] = Field(
        3, description="1 for grey (X-ray), 3 for colour; files of either kind are converted"
    )
    fit: Literal["crop", "squash", "squash_crop", "pad"] = Field(
        "crop",
        description="crop: shorter side to size, centre crop; squash: both sides to size; pad: "
        "longer side to size, the rest filled with the mean colour; squash_crop: both sides to "
        "size / crop_share, centre crop. Boxes and masks need squash or pad",
    )
    crop: Literal["auto", "shift", "resized", "none"] = Field(
        "auto",
        description="random crop in training. shift: moved by up to 1/8 of size; resized: a random "
        "area and aspect ratio (with boxes or masks: a random scale); auto: shift up to size 64, "
        "else resized",
    )
    area: list[float] = Field(
        [0.35, 1.0],
        min_length=2,
        max_length=2,
        description="with crop: resized, the smallest and largest share of the image's area",
    )
    scale: list[float] = Field(
        [0.8, 1.25],
        min_length=2,
        max_length=2,
        description="with crop: resized, and boxes or masks: the smallest and largest scale",
    )
    flip: bool = Field(True, description="random horizontal flip in training")
    colour: float = Field(
        0.0,
        ge=0,
        le=1,
        description="training: brightness, contrast and saturation by up to this share, hue by a "
        "quarter of it; 0 is off",
    )
    randaugment: int = Field(
        0,
        ge=0,
        le=30,
        description="training: two operations of RandAugment of this magnitude on each image; 0 "
        "is off",
    )
    mean: list[float] | Literal["imagenet", "inception"] | None = Field(
        None,
        description="mean of each channel (0 to 1), or the name of the values that published "
        "checkpoints expect; none: fitted on the training rows",
    )
    std: list[float] | Literal["imagenet", "inception"] | None = Field(
        None, description="standard deviation of each channel, like mean; both or neither"
    )
    crop_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="of fit: crop and squash_crop, the share of the resized (shorter) side that "
        "the centre crop keeps (timm's crop_pct): 0.875 resizes to 256 for a size of 224; refused "
        "with another fit",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="how images are resized, antialiased"
    )


class ImageState(TypedDict):
    """State of `Image`."""

    mean: list[float]
    """Mean of each channel, whose values are from 0 to 1."""
    std: list[float]
    """Standard deviation of each channel."""


@register("modality", "image", options=ImageOptions)
class Image(Modality):
    """Images of ``size`` x ``size`` pixels, with an optional mask.

    Tensors:

    - ``image`` (B, C, size, size): uint8 from ``decode``, normalised float32 after ``finish``
    - ``mask`` (B, size, size) uint8, if a column has the role ``mask``: the class number of each
      pixel, and 255 where there is no image. The column has PNG files: indices of a palette, or
      grey of 8 or 16 bits.
    - ``frame`` (B, 4), unless ``fit`` is crop: where the image lies in the input. In training its
      width is negative if the image was mirrored, so that left + share * width holds there too.
    """

    state: ImageState
    roles = ("image",)
    optional_roles = ("mask",)
    file_roles = ("image", "mask")
    near_search = perceptual_hash.PerceptualSearch("perceptual hash")
    augment_options = ("crop", "area", "scale", "colour", "randaugment")
    target_options = (
        "size",
        "channels",
        "fit",
        "crop",
        "area",
        "scale",
        "flip",
        "colour",
        "randaugment",
        "crop_share",
        "interpolation",
    )

    def __init__(self, options: Any, state: State):
        super().__init__(options, _state_in_use(options, state))
        for name, least, most in (("area", 0, 1), ("scale", 0.05, 20)):
            low, high = getattr(options, name)
            if not least < low <= high <= most:
                raise ValueError(
                    f"{name}: {[low, high]} must be the least and the greatest, above {least} "
                    f"and at most {most}"
                )

    @classmethod
    def ineffective_options(cls, stated, inherited=None) -> str:
        options = ImageOptions.model_construct(**{**(inherited or {}), **stated})
        share = stated.get("crop_share", 1.0)
        if share != 1 and options.fit not in CROPPED:
            return (
                f"crop_share {share:g} has no effect with fit: {options.fit}, which crops nothing: "
                "leave it out, or set fit: crop"
            )
        crop = _training_crop(options)
        for name in ("area", "scale"):
            if name in stated and crop != "resized":
                return (
                    f"{name} {stated[name]} has no effect with crop: {crop} (crop: auto is shift "
                    "up to 64 px): leave it out, or set crop: resized"
                )
        return ""

    @classmethod
    def fit(cls, options, table, columns, backbone) -> ImageState:
        """Measure mean and standard deviation of each channel, unless the options give them.

        Raises ValueError when no image can be decoded.
        """
        if given := _published_mean_std(options):
            return {"mean": given[0], "std": given[1]}
        # without padding, which would pull the mean towards its own colour
        modality = cls(
            options.model_copy(update={"fit": "squash"}) if options.fit == "pad" else options,
            {},
        )
        bad = []
        # counts of all levels of each channel give the exact mean and deviation
        counts = np.zeros((options.channels, 256), dtype=np.int64)
        levels = np.arange(256)
        step = max(1, min(FIT_IMAGES, FIT_BYTES // (options.channels * options.size**2)))
        for start in range(0, len(table), step):
            arrays, reasons = modality.decode(table.slice(start, step), columns)
            bad += reasons
            for image in arrays["image"][[not reason for reason in reasons]]:
                counts += np.stack(
                    [np.bincount(channel.reshape(-1), minlength=256) for channel in image]
                )
        if not counts.any():
            raise ValueError(
                f"column {columns['image']}: none of the first {len(bad)} images can be "
                f"decoded: {bad[0] if bad else 'no rows'}"
            )
        shares = counts / counts.sum(1, keepdims=True)
        mean = shares @ levels
        std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1))
        return {
            "mean": (mean / 255).round(6).tolist(),
            "std": np.maximum(std / 255, 1e-3).round(6).tolist(),
        }

    def required_type(self, role, kind) -> str:
        return (
            ""
            if holds_files(kind)
            else "images: their files' bytes (binary), their paths (string), or structs of bytes "
            "and path"
        )

    def inputs(self) -> ImageInputs:
        return {"channels": self.options.channels, "size": self.options.size}

    def check(self, roles: tuple[str, ...]) -> None:
        dense = [role for role in ("boxes", "mask") if role in roles]
        if dense and self.options.fit in CROPPED:
            roles_named = " and ".join(dense)
            raise ValueError(
                f"fit: {self.options.fit} cuts away what lies at the edge, {roles_named} and all; "
                f"with {roles_named} set fit: pad (keeps the aspect) or fit: squash"
            )

    def decode(self, table, columns) -> tuple[Arrays, list[str]]:
        images = table[columns["image"]]
        masks = table[columns["mask"]] if columns.get("mask") in table.column_names else None
        out = self._blank(len(table), masks is not None, torch.device("cpu"))
        bad = [""] * len(table)
        for i, value in enumerate(images):
            try:
                self._write_row(
                    out,
                    i,
                    image_io.pixels(image_io.file_bytes(value.as_py()), self.options.channels),
                    None if masks is None else image_io.file_bytes(masks[i].as_py(), "mask"),
                )
            except (
                RuntimeError,
                ValueError,
            ) as error:
                # torchvision raises RuntimeError for bytes that are not an image
                bad[i] = _reason(error)
        return {name: tensor.numpy() for name, tensor in out.items()}, bad

    def pictures(self, table, columns):
        for value in table[columns["image"]]:
            try:
                pixels = image_io.pixels(image_io.file_bytes(value.as_py()), 3)
            except (RuntimeError, ValueError):
                yield None  # as for ``decode``, which gives the reason
            else:
                yield pixels.permute(1, 2, 0).numpy()

    def _blank(self, rows: int, mask: bool, device: torch.device) -> dict[str, Tensor]:
        size = self.options.size
        out = {
            "image": torch.zeros(
                (rows, self.options.channels, size, size), dtype=torch.uint8, device=device
            )
        }
        if self.options.fit not in CROPPED:
            out["frame"] = torch.zeros((rows, 4), device=device)
        return out | (
            {"mask": torch.zeros((rows, size, size), dtype=torch.uint8, device=device)}
            if mask
            else {}
        )

    def _write_row(
        self, out: dict[str, Tensor], i: int, pixels: Tensor, mask: bytes | None
    ) -> None:
        """Write one row to place ``i``. Raises ValueError, before writing, for a mask of another
        size.
        """
        size, fit = self.options.size, self.options.fit
        classes = None if mask is None else image_io.classes(mask, pixels.shape[1:])
        out["image"][i] = resize(
            pixels,
            size,
            fit,
            fill=self._fill_colour(),
            crop_share=self.options.crop_share,
            interpolation=self.options.interpolation,
        )
        if "frame" in out:
            out["frame"][i] = torch.tensor(
                image_io.position_in_input(pixels.shape[1:], size, fit), dtype=torch.float32
            )[[1, 0, 3, 2]]
        if classes is not None:
            out["mask"][i] = resize(
                classes[None].to(pixels.device), size, fit, fill=[image_ops.IGNORED], nearest=True
            )[0]

    def _fill_colour(self) -> list[float]:
        """Return the mean colour in levels (0 to 255), which ``finish`` turns into 0."""
        return [255 * level for level in self.state.get("mean", [0.0] * self.options.channels)]

    @classmethod
    def near_signatures(cls, table, columns):
        """Return the perceptual hashes of the images, zeros for what is not an image."""
        options = ImageOptions.model_validate(
            {"size": perceptual_hash.SIDE, "channels": 1, "fit": "squash"}
        )
        modality = cls(options, {})
        encoded, _ = modality.encoded(table, {"image": columns["image"]})
        pixels, _ = modality.unpack(encoded, torch.device("cpu"))
        return perceptual_hash.signatures(pixels["image"].numpy()[:, 0])

    def encoded(self, table, columns) -> tuple[np.ndarray, list[str]]:
        out, bad = np.full(len(table), b"", dtype=object), [""] * len(table)
        masks = table[columns["mask"]] if columns.get("mask") in table.column_names else None
        for i, value in enumerate(table[columns["image"]]):
            try:
                image = image_io.file_bytes(value.as_py())
                out[i] = (
                    image
                    if masks is None
                    else PAIR
                    + struct.pack(">Q", len(image))
                    + image
                    + image_io.file_bytes(masks[i].as_py(), "mask")
                )
            except ValueError as error:
                bad[i] = str(error)
        return out, bad

    def unpack(self, encoded, device) -> tuple[dict[str, Tensor], list[str]]:
        """Decode JPEGs with the GPU's decoder where there is one; everything else on the host."""
        files, masks = zip(*map(_split_pair, encoded), strict=True) if len(encoded) else ((), ())
        out = self._blank(len(files), any(mask is not None for mask in masks), device)
        bad = [""] * len(files)
        decoded = image_io.decode_on_gpu(files, self.options.channels, device)
        for i, data in enumerate(files):
            try:
                self._write_row(
                    out,
                    i,
                    decoded[i] if i in decoded else image_io.pixels(data, self.options.channels),
                    masks[i],
                )
            except (RuntimeError, ValueError) as error:
                bad[i] = _reason(error)
        return out, bad

    def random_rows(self, rows, rng, length=1.0):
        shape = (self.options.size, self.options.size, 3)
        files = [drawing.png(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(rows)]
        return self.collate(self.decode(pa.table({"image": files}), {"image": "image"})[0])

    def preparation_code(self) -> str:
        """Return code that reads and resizes a picture with Pillow (`PreparesInputs`).

        Its pixels differ from those of `decode` by a level or two, which is rounding.
        """
        options = self.options
        return PREPARATION.format(
            mode="RGB" if options.channels == 3 else "L",
            fit=PREPARED_FITS[options.fit].format(share=options.crop_share),
            size=options.size,
            filter=options.interpolation.upper(),
            fill=[round(level) for level in self._fill_colour()],
            mean=self.state["mean"],
            std=self.state["std"],
        )

    def augment(self, batch: Batch) -> Batch:
        """Crop, flip, apply RandAugment and colour jitter.

        Boxes and masks move with their image: it changes its scale and place then, not its aspect
        ratio, and what lies outside is filled with the mean colour.
        """
        return self._in_parts(batch, self._augmented)

    def _in_parts(self, batch: Batch, work: Callable[[Batch], Batch]) -> Batch:
        """Apply ``work`` to the whole batch, or on a CPU to as many rows as fit in its cache.

        At 224 px a row takes 0.06 ms to normalise among 2 rows and 1.1 ms among 16.
        """
        if batch["image"].device.type != "cpu":
            return work(batch)
        done = [
            work(part)
            for part in batch.split(
                max(1, CACHED // (self.options.channels * self.options.size**2))
            )
        ]
        joined = {
            name: torch.cat([part[name] for part in done]) if len(done) > 1 else tensor
            for name, tensor in done[0].data.items()
        }
        return Batch(batch.rows, batch.keys, joined, batch.shards)

    def _augmented(self, batch: Batch) -> Batch:
        options, x, keys = self.options, batch["image"], batch.keys
        crop = _training_crop(options)
        dense = "boxes" in batch.data or "mask" in batch.data
        if not dense:  # nobody follows the frame
            batch = Batch(
                batch.rows,
                keys,
                {name: tensor for name, tensor in batch.data.items() if name != "frame"},
                batch.shards,
            )
        if dense:
            batch = self._crop_and_flip(batch, crop)
        elif crop == "resized":
            window = image_ops.crop_window(
                uniform(keys, 5, CROP), options.size, tuple(options.area), options.flip
            )
            batch = batch.replace(
                image=image_ops.to_uint8(image_ops.resize_bilinear(x, window, options.size))
            )
        elif crop == "shift" or options.flip:
            reach = max(1, options.size // 8) if crop == "shift" else 0
            batch = batch.replace(
                image=image_ops.shift_pixels(x, uniform(keys, 3, CROP), reach, options.flip)
            )
        if options.randaugment:
            batch = batch.replace(
                image=image_ops.rand_augment(
                    batch["image"],
                    uniform(keys, 4, RAND),
                    options.randaugment,
                    self._fill_colour(),
                    still=dense,
                )
            )
        if options.colour:
            changed = image_ops.colour_jitter(
                batch["image"].float() / 255, uniform(keys, 8, COLOUR), options.colour
            )
            batch = batch.replace(image=image_ops.to_uint8(changed * 255))
        return batch

    def _crop_and_flip(self, batch: Batch, crop: str) -> Batch:
        """Move image, mask and frame through one window; boxes follow their frame in ``finish``."""
        options, size = self.options, self.options.size
        if crop == "none" and not options.flip:
            return batch
        u = uniform(batch.keys, 4, CROP)
        if crop == "resized":
            window = image_ops.zoom_window(u, size, tuple(options.scale), options.flip)
        else:
            window = image_ops.shift_window(
                u, size, size // 8 if crop == "shift" else 0, options.flip
            )
        fill = torch.tensor(self._fill_colour(), device=batch["image"].device)
        changed = {
            "image": image_ops.to_uint8(
                image_ops.resize_antialiased(batch["image"], window, size, fill)
            ),
            "frame": image_ops.move_frame(self._frame(batch), window, size),
        }
        if "mask" in batch.data:
            changed["mask"] = image_ops.resample_mask(batch["mask"], window, size)
        return batch.replace(**changed)

    def _frame(self, batch: Batch) -> Tensor:
        """Return ``frame``, or the whole input where images are squashed into it."""
        if "frame" in batch.data or self.options.fit != "squash":
            return batch["frame"]
        size = float(self.options.size)
        whole = torch.tensor([size, size, 0, 0], device=batch["image"].device)
        return whole.expand(len(batch), 4)

    def views(self, batch: Batch, views: tuple[View, ...]) -> Batch:
        """Make random views: resized crop, flip, colour jitter, grey, blur (sigma 0.1 to 2),
        solarisation.
        """
        return self._in_parts(
            batch,
            lambda part: part.replace(
                **{
                    f"view{i}": self._view(part, view, uniform(part.keys, 18, VIEWS + i))
                    for i, view in enumerate(views)
                }
            ),
        )

    def _view(self, batch: Batch, view: View, u: Tensor) -> Tensor:
        """Make one view from random numbers ``u`` (B, 18).

        0 to 4 are for the window, 5 to 12 for the jitter, 13 for the strength of the blur, 14 to 17
        decide whether each change is made.
        """
        size = self.options.size
        into = view.size or size
        x = (image_ops.resize_bilinear if into >= size else image_ops.resize_antialiased)(
            batch["image"],
            image_ops.crop_window(u[:, :5], size, view.area, self.options.flip),
            into,
        ) / 255
        x = image_ops.change_rows(
            x,
            u[:, 14] < view.jitter,
            lambda part, rows: image_ops.colour_jitter(part, u[rows, 5:13], 0.8 * view.strength),
        )
        if x.shape[1] == 3:
            x = image_ops.change_rows(
                x, u[:, 15] < view.grey, lambda part, rows: image_ops.grey(part).expand_as(part)
            )
        x = image_ops.change_rows(
            x,
            u[:, 16] < view.blur,
            lambda part, rows: image_ops.blur(part, 0.1 + 1.9 * u[rows, 13]),
        )
        x = image_ops.change_rows(
            x, u[:, 17] < view.solarize, lambda part, rows: image_ops.solarize(part)
        )
        return self._normalised(x)

    def finish(self, batch: Batch) -> Batch:
        """Normalise the image, and convert boxes from shares of it to pixels of the input."""
        if "boxes" in batch.data:
            batch = batch.replace(
                boxes=image_ops.move_boxes(batch["boxes"], self._frame(batch), self.options.size)
            )
        return self._in_parts(
            batch,
            lambda part: part.replace(image=self._normalised(part["image"].float() * (1 / 255))),
        )

    def _normalised(self, x: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(levels, device=x.device).view(1, -1, 1, 1)
            for levels in (self.state["mean"], self.state["std"])
        )
        return (x - mean) / std


def _published_mean_std(options: ImageOptions) -> tuple[list[float], list[float]] | None:
    """Return mean and standard deviation where the options give them, by name or value.

    For one channel a name stands for the average of its three. Raises ValueError.
    """
    if options.mean is None and options.std is None:
        return None
    values_by_name = []
    for position, name in enumerate(("mean", "std")):
        given = getattr(options, name)
        values = PUBLISHED[given][position] if isinstance(given, str) else given
        if isinstance(given, str) and options.channels == 1:
            values = [round(sum(values) / 3, 6)]
        if (
            values is None
            or len(values) != options.channels
            or not all(0 <= v <= 1 and (v > 0 or name == "mean") for v in values)
        ):
            raise ValueError(
                f"{name}: {given} must be {options.channels} numbers "
                f"({'0' if name == 'mean' else 'above 0'} to 1, one a channel) or a name "
                f"({', '.join(PUBLISHED)}); mean and std go together"
            )
        values_by_name.append([float(v) for v in values])
    return values_by_name[0], values_by_name[1]


def _state_in_use(options: ImageOptions, state: State) -> State:
    """Return the state with the mean and deviation that images are standardised by.

    They are those of the options, else those of the state. Where the state is that of colour images
    and these are grey, or the reverse, each channel has the average of the state's.
    """
    known = len(state.get("mean", ()))
    has_other_channels = known not in (0, options.channels)
    of_source = isinstance(options.mean, list) and len(options.mean) == known
    given = None
    if not (has_other_channels and of_source):
        given = _published_mean_std(options)
    if given:
        mean, std = given
        return {**state, "mean": mean, "std": std}
    if not has_other_channels:
        return state
    averages = {name: round(sum(state[name]) / known, 6) for name in ("mean", "std")}
    return {**state, **{name: [value] * options.channels for name, value in averages.items()}}


def _training_crop(options: ImageOptions) -> str:
    """Return how images are cropped in training, with ``auto`` resolved by their size."""
    if options.crop != "auto":
        return options.crop
    return "shift" if options.size <= 64 else "resized"


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _split_pair(data: bytes) -> tuple[bytes, bytes | None]:
    """Split what ``encoded`` returned into the bytes of the image and those of the mask."""
    if not data.startswith(PAIR):
        return data, None
    start = len(PAIR) + 8
    stop = start + struct.unpack_from(">Q", data, len(PAIR))[0]
    return data[start:stop], data[stop:]
