"""Semantic segmentation: a class for every pixel, by a light decoder over a backbone's stages."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Features, Objective
from pipeline.io import storage
from pipeline.media import image_io
from pipeline.nn.feature_pyramid import Pyramid

OUTSIDE = image_io.IGNORED
"""Class of pixels where no image is, as the modality writes it."""
AT_ONCE = 16
"""Images predicted at a time: evaluation hands over hundreds, whose scores would take 40 GB (256
images, 150 classes, 512 px).
"""


class SegmentationOptions(Options):
    classes: int | list[str] = Field(
        0,
        description="how many classes the masks hold, from 0, or their names in that order; 2 to "
        "255, always needed",
    )
    ignore: int = Field(
        255,
        ge=0,
        le=255,
        description="class of pixels that are neither learned nor counted; 255 never is",
    )
    channels: int = Field(128, ge=32, multiple_of=32, description="width of the decoder")
    dropout: float = Field(0.1, ge=0, lt=1, description="of whole channels before the last layer")


@register("objective", "segmentation", options=SegmentationOptions)
class Segmentation(Objective):
    """A feature pyramid whose levels are brought to the finest one and summed, then one convolution
    and a classifier (the semantic branch of Panoptic FPN, Kirillov et al. 2019, with one
    convolution a level), upsampled to the input.

    The column ``mask`` holds PNGs of class numbers, read by the image modality since they move with
    their image: ``mask`` (B, H, W), 255 where no image is. The loss is the cross entropy summed
    over pixels, over the number of labelled ones. State: ``labels``, ``ignore``. A mask with a
    class that is neither below the number of classes nor ignored is refused, and named.
    """

    roles = ("mask",)
    fit_roles = ()
    metrics = ("miou", "pixel_accuracy", "loss")
    log_names = ("pixel_accuracy",)
    label_tensors = ("mask", "frame")

    @classmethod
    def fit(cls, options, table, columns):
        """Classes are what the options say: masks are not read whole. Raises ValueError for none,
        too many or two of one name.
        """
        names = (
            [f"class {i}" for i in range(options.classes)]
            if isinstance(options.classes, int)
            else list(options.classes)
        )
        if not 2 <= len(names) <= OUTSIDE or len(set(names)) < len(names):
            raise ValueError(
                f"objective.classes: {len(names)} classes"
                + (f", {len(set(names))} different ones" if len(set(names)) < len(names) else "")
                + f"; give 2 to {OUTSIDE} different names, or their number"
            )
        return {"labels": names, "ignore": options.ignore}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state):
        """Masks are decoded once more for it: on a GPU a class out of range would otherwise be an
        assertion without a name.
        """
        if columns.get("mask") not in table.column_names:
            return [""] * len(table)
        return [
            _mask_problem(value.as_py(), len(state["labels"]), state["ignore"])
            for value in table[columns["mask"]]
        ]

    def __init__(self, backbone: Backbone, options: SegmentationOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        width = options.channels
        self.pyramid = Pyramid(backbone, (4, 8, 16, 32), width)
        self.mix = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(32, width),
            nn.ReLU(),
            nn.Dropout2d(options.dropout),
        )
        self.head = nn.Conv2d(width, len(state["labels"]), 1)

    def _scores(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Features]:
        """(B, classes, H, W) at the input's resolution."""
        size = batch["image"].shape[-2:]
        features = backbone(batch, want=("stages",))
        finest, *coarser = self.pyramid(features, size).values()
        for level in coarser:
            finest = finest + F.interpolate(
                level, size=finest.shape[-2:], mode="bilinear", align_corners=False
            )
        return F.interpolate(
            self.head(self.mix(finest)).float(), size=size, mode="bilinear", align_corners=False
        ), features

    def _truth(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, H, W) int64 classes, OUTSIDE where they do not count, and where they do."""
        mask = batch["mask"].long()
        there = (mask != self.state["ignore"]) & (mask != OUTSIDE)
        return torch.where(there, mask, OUTSIDE), there

    def loss(self, backbone: Backbone, batch: Batch):
        scores, features = self._scores(backbone, batch)
        truth, there = self._truth(batch)
        unused = (
            features.pooled.float().sum() * 0.0
        )  # the layers after the last map belong to the graph too: DDP waits for every parameter
        right = ((scores.argmax(1) == truth) & there).sum()
        return (
            F.cross_entropy(scores, truth, ignore_index=OUTSIDE, reduction="sum") + unused,
            there.sum().float(),
            {"pixel_accuracy": right},
        )

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """With masks ``intersection``, ``predicted``, ``actual`` (B, classes): labelled pixels of
        the input, padding left out, and ``loss`` with its ``count`` (B,). Without them ``classes``
        (B, H, W) uint8 and the ``frame`` (B, 4) where the image lies in them.
        """
        parts = [self._predicted(backbone, part) for part in batch.split(AT_ONCE)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _predicted(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        scores, _ = self._scores(backbone, batch)
        guess, frame = scores.argmax(1), batch["frame"]
        if "mask" not in batch.data:
            return {"classes": guess.to(torch.uint8), "frame": frame}
        truth, there = self._truth(batch)
        classes = scores.shape[1]
        place = torch.arange(len(batch), device=guess.device)[:, None, None] * classes

        def counted(values: Tensor, where: Tensor) -> Tensor:
            return torch.bincount((place + values)[where], minlength=len(batch) * classes).view(
                len(batch), classes
            )

        guessed = counted(guess, there)
        guessed[:, self.state["ignore"] : self.state["ignore"] + 1] = (
            0  # an ignored class has no IoU, also where it is taken for another one
        )
        return {
            "intersection": counted(truth, there & (guess == truth)),
            "predicted": guessed,
            "actual": counted(truth, there),
            "loss": F.cross_entropy(scores, truth, ignore_index=OUTSIDE, reduction="none").sum(
                (1, 2)
            ),
            "count": there.sum((1, 2)).float(),
        }

    def output_columns(self, found, raw_rows):
        """``mask``: a PNG of class numbers a row, the whole image at the input's resolution (to be
        resized to the image's own, nearest pixel).
        """
        out = np.empty(len(found["classes"]), dtype=object)
        for i, (classes, (width, height, left, top)) in enumerate(
            zip(found["classes"], found["frame"].round().astype(int), strict=True)
        ):
            buffer = io.BytesIO()
            height, width = max(1, height), max(1, width)  # a row that cannot be decoded has none
            PIL.Image.fromarray(
                classes[max(0, top) : top + height, max(0, left) : left + width]
            ).save(buffer, "PNG")
            out[i] = buffer.getvalue()
        return {"mask": out}


def _mask_problem(value: Any, classes: int, ignore: int) -> str:
    """Why a mask's classes cannot be learned; nothing for one that cannot be read, which the
    modality tells.
    """
    data = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    data = (storage.read_bytes(data) if isinstance(data, str) else data) or b""
    try:
        found = np.unique(image_io.class_numbers(data))
    except ValueError:
        return ""
    unknown = found[(found >= classes) & (found != ignore) & (found != OUTSIDE)]
    return (
        f"the mask holds class {unknown[0]}, but objective.classes says {classes} (0 to "
        f"{classes - 1}) and {ignore} is ignored"
        if len(unknown)
        else ""
    )
