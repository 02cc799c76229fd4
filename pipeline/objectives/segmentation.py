"""Semantic segmentation: a class for every pixel, by a light decoder over feature maps.

Shapes: B rows, C classes, H and W height and width of the input.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypedDict

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Features, Objective
from pipeline.core.nn.feature_pyramid import Pyramid
from pipeline.media import drawing, image_io

OUTSIDE = image_io.IGNORED
"""Class of pixels outside the image, as the modality writes it."""
IMAGES_AT_ONCE = 16
"""Images predicted at a time.

Evaluation hands over hundreds, whose scores would take 40 GB (256 images, 150 classes, 512 px).
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


class SegmentationState(TypedDict):
    """State of `Segmentation`."""

    labels: list[str]
    ignore: int
    """Option ``ignore``."""


@register("objective", "segmentation", options=SegmentationOptions)
class Segmentation(Objective):
    """Semantic segmentation with the branch of Panoptic FPN (Kirillov et al. 2019).

    It needs images with a mask each, and a backbone with feature maps. Use it where every pixel
    has a class; to separate objects of one class take
    ``instance_segmentation``.

    The levels of a feature pyramid are brought to the size of the finest one, with one convolution
    for each, and summed. One more convolution and a classifier follow, whose scores are upsampled
    to the input.

    The column ``mask`` holds PNG files of class numbers. The image modality reads them, since they
    move with their image: ``mask`` (B, H, W), 255 outside the image. The loss is the cross entropy
    summed over pixels, divided by the number of labelled pixels. A row is refused, and named, if
    its mask has a class that is neither below the number of classes nor ignored.
    """

    state: SegmentationState
    roles = ("mask",)
    metrics = ("miou", "pixel_accuracy", "loss")
    log_names = ("pixel_accuracy",)
    output_types = {}

    @classmethod
    def fit(cls, options, table, columns) -> SegmentationState:
        """Take the classes that the options name: masks are files, which are not read whole.

        Raises:
            ValueError: no classes, too many, or two of one name.
        """
        if isinstance(options.classes, int):
            names = [f"class {i}" for i in range(options.classes)]
        else:
            names = list(options.classes)
        different = len(set(names))
        if not 2 <= len(names) <= OUTSIDE or different < len(names):
            some_same = f", {different} different ones" if different < len(names) else ""
            raise ValueError(
                f"objective.classes: {len(names)} classes{some_same}; give 2 to {OUTSIDE} "
                "different names, or their number"
            )
        return {"labels": names, "ignore": options.ignore}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state: SegmentationState):
        """Name rows whose masks hold an unknown class.

        Masks are decoded once more for it: on a GPU a class out of range would otherwise be an
        assertion without a name.
        """
        if columns.get("mask") not in table.column_names:
            return [""] * len(table)
        classes = len(state["labels"])
        ignore = state["ignore"]
        masks = table[columns["mask"]]
        return [_invalid_mask_reason(mask.as_py(), classes, ignore) for mask in masks]

    def __init__(self, backbone: Backbone, options: SegmentationOptions, state: SegmentationState):
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

    def head_scores(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Features]:
        """Return logits (B, C, H, W) at the input's resolution, and the features."""
        size = batch["image"].shape[-2:]
        features = backbone(batch, want=("stages",))
        finest, *coarser = self.pyramid(features, size).values()
        for level in coarser:
            finest = finest + _resized(level, finest.shape[-2:])
        return _resized(self.head(self.mix(finest)).float(), size), features

    def raw_outputs(self, backbone, batch):
        """`scores` (B, C, H, W): one for each of `labels`, at every pixel of the input.

        The class of a pixel is the one with the highest score.
        """
        return {"scores": self.head_scores(backbone, batch)[0]}

    def _truth(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return classes (B, H, W) int64, OUTSIDE where they do not count, and where they do."""
        mask = batch["mask"].long()
        is_labelled = (mask != self.state["ignore"]) & (mask != OUTSIDE)
        return torch.where(is_labelled, mask, OUTSIDE), is_labelled

    def loss(self, backbone: Backbone, batch: Batch):
        scores, features = self.head_scores(backbone, batch)
        truth, is_labelled = self._truth(batch)
        total = F.cross_entropy(scores, truth, ignore_index=OUTSIDE, reduction="sum")
        # layers after the last map are part of the graph: DDP waits for every gradient
        unused = features.pooled.float().sum() * 0.0
        right = ((scores.argmax(1) == truth) & is_labelled).sum()
        return total + unused, is_labelled.sum().float(), {"pixel_accuracy": right}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return ``classes`` (B, H, W) uint8 and ``frame`` (B, 4), where the image lies in them.

        With masks instead ``intersection``, ``predicted`` and ``actual`` (B, C), labelled pixels
        of the input without its padding, and ``loss`` with its ``count`` (B,).
        """
        return batch.predict_in_parts(partial(self._predict, backbone), IMAGES_AT_ONCE)

    def _predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        scores, _ = self.head_scores(backbone, batch)
        guess = scores.argmax(1)
        if "mask" not in batch.data:
            return {"classes": guess.to(torch.uint8), "frame": batch["frame"]}
        truth, is_labelled = self._truth(batch)
        classes = scores.shape[1]
        offset = torch.arange(len(batch), device=guess.device)[:, None, None] * classes

        def count_classes(values: Tensor, where: Tensor) -> Tensor:
            """Return (B, C) how many pixels of each class there are."""
            flat = (offset + values)[where]
            return torch.bincount(flat, minlength=len(batch) * classes).view(len(batch), classes)

        predicted = count_classes(guess, is_labelled)
        # an ignored class has no IoU, also where it is predicted for another one
        ignore = self.state["ignore"]
        predicted[:, ignore : ignore + 1] = 0
        losses = F.cross_entropy(scores, truth, ignore_index=OUTSIDE, reduction="none")
        return {
            "intersection": count_classes(truth, is_labelled & (guess == truth)),
            "predicted": predicted,
            "actual": count_classes(truth, is_labelled),
            "loss": losses.sum((1, 2)),
            "count": is_labelled.sum((1, 2)).float(),
        }

    def output_columns(self, predictions, raw_rows):
        """Return ``mask``: a PNG of class numbers a row, at the input's resolution.

        It covers the whole image, and is to be resized to the image's own size (nearest pixel).
        """
        masks = np.empty(len(predictions["classes"]), dtype=object)
        frames = predictions["frame"].round().astype(int)
        pairs = zip(predictions["classes"], frames, strict=True)
        for row, (classes, (width, height, left, top)) in enumerate(pairs):
            # an undecodable row has no size
            height = max(1, height)
            width = max(1, width)
            down = slice(max(0, top), top + height)
            across = slice(max(0, left), left + width)
            masks[row] = drawing.png(classes[down, across])
        return {"mask": masks}

    def draw(self, picture, columns):
        """Lay the colours of the classes over the picture, with their names below it."""
        mask = image_io.class_numbers(columns["mask"]).astype(np.uint8)
        return drawing.draw_mask(picture, mask, self.state["labels"])


def _resized(x: Tensor, size: Any) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _invalid_mask_reason(value: Any, classes: int, ignore: int) -> str:
    """Return "" or which class of a mask cannot be learned.

    Also "" for a mask that cannot be read, which the modality reports.
    """
    try:
        numbers = image_io.classes_in(value)
    except ValueError:
        return ""
    unknown = numbers[(numbers >= classes) & (numbers != ignore) & (numbers != OUTSIDE)]
    if not len(unknown):
        return ""
    return (
        f"the mask holds class {unknown[0]}, but objective.classes says {classes} "
        f"(0 to {classes - 1}) and {ignore} is ignored"
    )
