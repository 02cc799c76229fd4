"""Images: encoded bytes (or paths) to uint8 pixels in the data workers; augmentation and normalisation on the device."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_image, decode_jpeg

from pipeline import storage
from pipeline.contracts import Arrays, Batch, Modality
from pipeline.registry import Options, register
from pipeline.rng import uniform

FIT_IMAGES, FIT_BYTES = 64, 64 << 20
"""``fit`` decodes so many images at a time, fewer when they are large."""


class ImageOptions(Options):
    size: int = Field(224, ge=8, le=4096, description="pixels a side after resize and centre crop")
    channels: Literal[1, 3] = Field(3, description="1 for grey (X-ray), 3 for colour; files of either kind are converted")
    fit: Literal["crop", "squash"] = Field("crop", description="crop: shorter side to size, centre crop; squash: both sides to size")
    crop: Literal["auto", "shift", "resized", "none"] = Field(
        "auto", description="training crop: shift by up to 1/8; resized: random area and aspect; auto: shift up to 64 px")
    flip: bool = Field(True, description="random horizontal flip in training")


@register("modality", "image", options=ImageOptions)
class Image(Modality):
    """``image``: (B, C, size, size), uint8 from ``decode``, normalised float32 after ``finish``."""

    roles = ("image",)

    @classmethod
    def fit(cls, options, table, columns, backbone):
        """Mean and standard deviation of each channel over the sample. Raises ValueError when no image can be decoded."""
        modality, bad = cls(options, {}), []
        counts, levels = np.zeros((options.channels, 256), dtype=np.int64), np.arange(256)  # how often each level stands in each channel: exact
        step = max(1, min(FIT_IMAGES, FIT_BYTES // (options.channels * options.size ** 2)))
        for start in range(0, len(table), step):
            arrays, reasons = modality.decode(table.slice(start, step), columns)
            bad += reasons
            for image in arrays["image"][[not reason for reason in reasons]]:
                counts += np.stack([np.bincount(channel.reshape(-1), minlength=256) for channel in image])
        if not counts.any():
            raise ValueError(f"column {columns['image']}: none of the first {len(bad)} images can be decoded: {bad[0] if bad else 'no rows'}")
        shares = counts / counts.sum(1, keepdims=True)
        mean = shares @ levels
        std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1))
        return {"mean": (mean / 255).round(6).tolist(), "std": np.maximum(std / 255, 1e-3).round(6).tolist()}

    def inputs(self) -> dict[str, Any]:
        return {"channels": self.options.channels, "size": self.options.size}

    def decode(self, table, columns) -> tuple[Arrays, list[str]]:
        size, channels = self.options.size, self.options.channels
        out = np.zeros((len(table), channels, size, size), dtype=np.uint8)
        bad = [""] * len(table)
        for i, value in enumerate(table[columns["image"]]):
            try:
                out[i] = self._one(value)
            except (RuntimeError, ValueError) as error:  # what torchvision raises for bytes that are no image
                bad[i] = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return {"image": out}, bad

    def _one(self, value: pa.Scalar) -> np.ndarray:
        return resize(_pixels(_bytes(value), self.options.channels), self.options.size, self.options.fit).numpy()

    def encoded(self, table, columns) -> tuple[np.ndarray, list[str]]:
        out, bad = np.full(len(table), b"", dtype=object), [""] * len(table)
        for i, value in enumerate(table[columns["image"]]):
            try:
                out[i] = _bytes(value)
            except ValueError as error:
                bad[i] = str(error)
        return out, bad

    def unpack(self, encoded, device) -> tuple[dict[str, Tensor], list[str]]:
        """JPEGs by the GPU's own decoder where the device is one; other formats, and those that it refuses, on the host."""
        out = torch.zeros((len(encoded), self.options.channels, self.options.size, self.options.size), dtype=torch.uint8, device=device)
        bad, there = [""] * len(encoded), _on_gpu(encoded, self.options.channels, device)
        for i, data in enumerate(encoded):
            try:
                pixels = there[i] if i in there else _pixels(data, self.options.channels)
                out[i] = resize(pixels, self.options.size, self.options.fit)
            except (RuntimeError, ValueError) as error:
                bad[i] = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return {"image": out}, bad

    def augment(self, batch: Batch) -> Batch:
        """Crop and flip by one gather (shift) or one bilinear sampling (resized), from the rows' keys."""
        x, size = batch["image"], self.options.size
        crop = self.options.crop if self.options.crop != "auto" else ("shift" if size <= 64 else "resized")
        if crop == "resized":
            return batch.replace(image=_resized_crop(x, uniform(batch.keys, 5), self.options.flip))
        u = uniform(batch.keys, 3)
        reach = max(1, size // 8) if crop == "shift" else 0
        move = (u[:, :2] * (2 * reach + 1)).floor().long() - reach
        along = torch.arange(size, device=x.device)
        ys, xs = (along[None] + move[:, :1]).clamp(0, size - 1), (along[None] + move[:, 1:2]).clamp(0, size - 1)
        if self.options.flip:
            xs = torch.where(u[:, 2:3] < 0.5, xs.flip(1), xs)
        rows = torch.arange(len(x), device=x.device)[:, None, None, None]
        channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
        return batch.replace(image=x[rows, channels, ys[:, None, :, None], xs[:, None, None, :]])

    def finish(self, batch: Batch) -> Batch:
        x = batch["image"]
        mean = torch.tensor(self.state["mean"], device=x.device).view(1, -1, 1, 1)
        std = torch.tensor(self.state["std"], device=x.device).view(1, -1, 1, 1)
        return batch.replace(image=(x.float() * (1 / 255) - mean) / std)


def _bytes(value: pa.Scalar) -> bytes:
    """An image's file: bytes, the bytes or path of a Hugging Face data set's cell, or those behind a path. Raises ValueError for nothing."""
    data = value.as_py()
    if isinstance(data, dict):
        data = data.get("bytes") or data.get("path")
    if isinstance(data, str):
        data = storage.read_bytes(data)
    if not data:
        raise ValueError("the image is empty (0 bytes)" if data is not None else "the image is null")
    return data


def _on_gpu(encoded: np.ndarray, channels: int, device: torch.device) -> dict[int, Tensor]:
    """Place to (channels, H, W) uint8 on the GPU of every JPEG, decoded in one call; none when one of them is broken (each is then tried on the host)."""
    places = [i for i, data in enumerate(encoded) if data.startswith(b"\xff\xd8")] if device.type == "cuda" else []
    if not places:
        return {}
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    try:
        found = decode_jpeg([torch.frombuffer(bytearray(encoded[i]), dtype=torch.uint8) for i in places], mode=mode, device=device)
    except RuntimeError:
        return {}
    return dict(zip(places, found, strict=True))


def _pixels(data: bytes, channels: int) -> torch.Tensor:
    """(channels, H, W) uint8 of a JPEG, PNG, WebP, GIF or BMP file; transparency is dropped, of an animation the first picture is taken.

    Raises RuntimeError or ValueError for bytes that are no such file.
    """
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    animated = data[12:16] == b"VP8X" and bool(data[20:21] and data[20] & 2)
    if not (data.startswith((b"\xff\xd8", b"\x89PNG")) or (webp and channels == 3 and not animated)):
        return _by_pillow(data, channels)  # torchvision 0.26 has no BMP, no animated WebP, no grey for WebP and GIF, and reads all of an animated GIF
    pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB)
    if pixels.dtype == torch.uint16:  # a 16-bit PNG (X-ray): the high byte; a cast would keep the low one
        pixels = (pixels.to(torch.int32) >> 8).to(torch.uint8)
    return pixels


def _by_pillow(data: bytes, channels: int) -> torch.Tensor:
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("BMP", "GIF", "WEBP")) as image:
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except PIL.UnidentifiedImageError:
        raise ValueError("not a JPEG, PNG, WebP, GIF or BMP image, or a broken one") from None
    except Exception as error:  # broken bytes make Pillow raise OSError, SyntaxError, struct.error, DecompressionBombError and others
        raise ValueError(f"broken image: {error}") from None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()


def resize(pixels: torch.Tensor, size: int, fit: str = "crop") -> torch.Tensor:
    """(C, H, W) uint8 to (C, size, size): antialiased bilinear in uint8 (on a GPU in float, rounded), then a centre crop."""
    _, h, w = pixels.shape
    new = (size, size) if fit == "squash" else (max(size, round(h * size / min(h, w))), max(size, round(w * size / min(h, w))))
    if new != (h, w):
        whole = pixels[None].float() if pixels.is_cuda else pixels[None]
        pixels = F.interpolate(whole, size=new, mode="bilinear", antialias=True, align_corners=False)[0]
        pixels = pixels.round().clamp(0, 255).to(torch.uint8) if pixels.is_cuda else pixels
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return pixels[:, top:top + size, left:left + size]


def _resized_crop(x: torch.Tensor, u: torch.Tensor, flip: bool) -> torch.Tensor:
    """Area 0.35 to 1, aspect 3/4 to 4/3 (Szegedy et al. 2015, with a milder area), bilinear, uint8 in and out."""
    area, ratio = 0.35 + 0.65 * u[:, 0], torch.exp((u[:, 1] * 2 - 1) * float(np.log(4 / 3)))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    cx, cy = (u[:, 2] * 2 - 1) * (1 - width), (u[:, 3] * 2 - 1) * (1 - height)
    sign = torch.where(u[:, 4] < 0.5, -1.0, 1.0) if flip else torch.ones_like(width)
    zero = torch.zeros_like(width)
    theta = torch.stack([torch.stack([width * sign, zero, cx], 1), torch.stack([zero, height, cy], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False).round().clamp(0, 255).to(torch.uint8)
