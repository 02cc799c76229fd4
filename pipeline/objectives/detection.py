"""Object detection over a feature pyramid, in one stage (FCOS) or two (Faster R-CNN).

From torchvision's parts. Shapes: B images, C classes, H and W height and width of the input, M =
``max_boxes`` boxes of an image, k boxes of one image, A anchors of one image.
"""

from __future__ import annotations

from typing import Any, Literal

import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from pipeline.config.registry import BoxOptions, register
from pipeline.core.contracts import Arrays, Backbone, Batch
from pipeline.core.nn.box_detectors import (
    DETECTIONS,
    DRAWN_SCORE,
    Anchors,
    BoxObjective,
    Detections,
    FasterRCNN,
    Targets,
    image_list,
    predicted_boxes,
    sums_by_image,
    without_padding,
)
from pipeline.core.nn.feature_pyramid import Pyramid
from pipeline.media import box_labels
from pipeline.media.box_labels import BoxState


class DetectionOptions(BoxOptions):
    method: Literal["fcos", "faster_rcnn"] = Field(
        "fcos", description="fcos: one stage; faster_rcnn: two stages"
    )
    convs: int = Field(4, ge=1, le=8, description="fcos: convolutions before each output")


@register("objective", "detection", options=DetectionOptions)
class Detection(BoxObjective):
    """Object detection: boxes and their classes.

    It needs images with boxes, and a backbone with feature maps. Use it to find objects and
    their classes. ``method: fcos`` (Tian et al. 2019) has one stage and fewer settings,
    ``faster_rcnn`` (Ren et al. 2015) two stages. Both read a feature pyramid (Lin et al. 2017).

    Columns, by role. An empty list is an image without objects.

    - ``boxes``: a list of 4 numbers for each object
    - ``labels``: a list of the objects' classes: numbers, which may have gaps, or texts
    - ``crowd``, if given: a list of flags. A region with the flag is not learned, and a detection
      in it is neither right nor wrong.
    - ``width`` and ``height`` of the image, for boxes in pixels

    A box that sticks out of its image is cut at the edge. A row is refused, with the reason, if its
    boxes are null, not finite, without area, wholly outside, or of an unknown class.

    The loss is a sum over images, with a count that adds up over rows and ranks. (torchvision's
    detectors divide inside, by the batch of one rank.)

    - FCOS: the sum of focal, GIoU and centre-ness losses, divided by the number of foreground
      points. An image without any counts 1; in torchvision a batch without any does.
    - Faster R-CNN samples 256 anchors and 512 regions of each image. The loss is the mean over
      these, averaged over images. torchvision's mean over all samples is the same, unless an image
      has fewer. Which are sampled follows from the keys of the rows.

    Tensors beside ``image`` (B, C, H, W), which the modality moves with the image: ``boxes`` (B, M,
    4), ``labels`` (B, M; -1: none), ``crowd`` (B, M), ``frame`` (see modality image), and
    ``image_size`` (B, 2), height and width of the stored image.
    """

    state: BoxState
    roles = ("boxes", "labels")
    optional_roles = ("crowd", "width", "height")
    metrics = ("map", "map50", "map_small", "map_medium", "map_large", "loss")
    output_types = {
        "boxes": pa.list_(pa.list_(pa.float64())),
        "scores": pa.list_(pa.float64()),
        "labels": pa.list_(pa.string()),
    }

    @classmethod
    def fit(cls, options, table, columns) -> BoxState:
        """Take the classes that option ``names`` names, or the sorted values of the rows.

        Raises:
            ValueError: a class without a name, or boxes in pixels without the image's size.
        """
        return box_labels.fit_state(options, table, columns)

    @classmethod
    def encode(cls, table, columns, state: BoxState) -> Arrays:
        """Return ``boxes`` (n, M, 4), ``labels`` (n, M), ``crowd`` (n, M) and ``image_size``."""
        if columns.get("boxes") not in table.column_names:  # new rows to predict
            return {}
        padded = box_labels.pad_boxes(
            box_labels.parse_boxes(table, columns, state), state["max_boxes"]
        )
        return {**padded, "image_size": box_labels.image_sizes(table, columns)}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state: BoxState):
        """Name rows whose boxes cannot be used.

        Boxes in pixels are of the upright picture, so the image's own size is read for them.
        """
        if columns.get("boxes") not in table.column_names:
            return [""] * len(table)
        rows = box_labels.parse_boxes(table, columns, state, check_size=True)
        return [boxes.reason for boxes in rows]

    def __init__(self, backbone: Backbone, options: DetectionOptions, state: BoxState):
        super().__init__(backbone, options, state)
        classes = len(state["labels"])
        self.detector: OneStage | FasterRCNN
        if options.method == "fcos":
            self.detector = OneStage(backbone, classes, options)
        else:
            self.detector = FasterRCNN(backbone, classes, options)
        self.log_names = self.detector.loss_names

    def raw_outputs(self, backbone, batch):
        """`boxes` and `scores`, which `method` (in `objective_options`) says how to read.

        `fcos`: `boxes` (B, P, 4) and `scores` (B, P, C), candidates before any is suppressed.
        Corners x0 y0 x1 y1 in pixels of the input; a score from 0 to 1 for each of `labels`. Keep
        those above `score_threshold`, and apply non-maximum suppression class by class with
        `nms_threshold`.

        `faster_rcnn`: `boxes` (B, 100, 4), `scores` (B, 100) and `classes` (B, 100), the detections
        that non-maximum suppression leaves. Keep those with a score above `score_threshold`.
        Corners x0 y0 x1 y1 are shares of the whole image; a class is a place among `labels`, -1 is
        none. The input `frame` is where the image lies in the input: width, height, left and top in
        pixels.
        """
        _, maps = self.maps(backbone, batch)
        if isinstance(self.detector, FasterRCNN):
            return self.detector.fixed_detections(maps, batch)[0]
        return self.detector.candidates(maps, batch["image"])

    def predict_images(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return the surest detections first.

        Returns:
            ``boxes`` (B, 100, 4) corners as shares of the whole image, ``scores`` (B, 100) and
            ``classes`` (B, 100; -1: none). With labels also the `truth`.
        """
        _, maps = self.maps(backbone, batch)
        frame = batch["frame"].float()
        detections = without_padding(self.detector.detections(maps, batch), frame)
        predictions = predicted_boxes(detections, frame)
        return {**predictions, **(self.truth(maps, batch) if "labels" in batch.data else {})}

    def output_columns(self, predictions, raw_rows):
        """Return lists, the surest first: ``boxes``, ``scores`` and ``labels`` (class names).

        Boxes are corners x0 y0 x1 y1 as shares of the image.
        """
        return box_labels.output_columns(predictions, self.state["labels"])

    def draw(self, picture, columns):
        """Draw the boxes with a score of at least DRAWN_SCORE, the surest ones on top."""
        return box_labels.draw(picture, columns, self.state["labels"], DRAWN_SCORE)


class _Head(FCOSHead):
    """FCOS's head whose losses are kept apart by image."""

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, targets, head_outputs, anchors, matched_idxs
    ):
        """Return sums (B,) by name, and ``count`` (B,), the foreground points."""
        logits = head_outputs["cls_logits"].float()
        shifts = head_outputs["bbox_regression"].float()
        centerness = head_outputs["bbox_ctrness"].float()
        grid = torch.stack(anchors)
        matched = torch.stack(matched_idxs)
        is_object = matched >= 0
        middle = (grid[..., :2] + grid[..., 2:]) / 2
        of_images = {"boxes": [], "labels": [], "is_ignored": []}
        for target, index, points in zip(targets, matched, middle, strict=True):
            # the padding is what -1 picks
            padded_boxes = F.pad(target["boxes"], (0, 0, 0, 1))
            padded_labels = F.pad(target["labels"], (0, 1))
            of_images["boxes"].append(padded_boxes[index])
            of_images["labels"].append(padded_labels[index])
            of_images["is_ignored"].append(_points_in(points, target["crowd"]))
        boxes = torch.stack(of_images["boxes"])
        labels = torch.stack(of_images["labels"])
        is_ignored = torch.stack(of_images["is_ignored"])

        wanted = torch.zeros_like(logits)
        wanted[is_object, labels[is_object]] = 1.0
        focal = sigmoid_focal_loss(logits, wanted, reduction="none").sum(-1)
        focal = focal.masked_fill(is_ignored & ~is_object, 0.0)

        predicted = self.box_coder.decode(shifts, grid)[is_object]
        true = boxes[is_object]
        box = generalized_box_iou_loss(predicted, true, reduction="none")
        sides = self.box_coder.encode(grid[is_object], true)
        across = sides[:, [0, 2]]
        down = sides[:, [1, 3]]
        across_ratio = across.amin(1) / across.amax(1)
        down_ratio = down.amin(1) / down.amax(1)
        centre = across_ratio * down_ratio
        of_centre = F.binary_cross_entropy_with_logits(
            centerness[..., 0][is_object], torch.sqrt(centre), reduction="none"
        )
        return {
            "classification": focal.sum(1),
            "box": sums_by_image(box, is_object),
            "centerness": sums_by_image(of_centre, is_object),
            "count": is_object.sum(1).clamp(min=1).float(),
        }


def _points_in(points: Tensor, boxes: Tensor) -> Tensor:
    """Return (A,) which of the points (A, 2) lie in one of the boxes (c, 4)."""
    above = points[:, None] > boxes[:, :2]
    below = points[:, None] < boxes[:, 2:]
    return (above & below).all(-1).any(-1)


class OneStage(FCOS):
    """FCOS (Tian et al. 2019) on maps of strides 8 to 128."""

    loss_names = ("classification", "box", "centerness")

    def __init__(self, backbone: Backbone, classes: int, options: DetectionOptions):
        pyramid = Pyramid(backbone, (8, 16, 32), options.channels, "p6p7")
        super().__init__(
            pyramid,
            classes,
            anchor_generator=Anchors(pyramid.strides, 1.0, (1.0,)),
            head=_Head(options.channels, 1, classes, options.convs),
            score_thresh=options.score_threshold,
            nms_thresh=options.nms_threshold or 0.6,
            detections_per_img=DETECTIONS,
        )

    def outputs_of_maps(self, maps: dict[str, Tensor], batch: Batch):
        """Return the head's outputs, the anchors and the number of points of each level."""
        levels = [*maps.values()]
        sizes = [level.shape[-2] * level.shape[-1] for level in levels]
        return self.head(levels), self.anchor_generator(image_list(batch), levels), sizes

    def losses(
        self, maps: dict[str, Tensor], batch: Batch, targets: Targets
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return sums (B,) by name, and the counts (B,) by which their sum is to be divided."""
        outputs, anchors, sizes = self.outputs_of_maps(maps, batch)
        with torch.autocast(batch["image"].device.type, enabled=False):
            parts = self.compute_loss(targets, outputs, anchors, sizes)
        return parts, parts.pop("count")

    def candidates(self, maps: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
        """Return ``boxes`` (B, P, 4) and ``scores`` (B, P, C) of all points.

        They are those that `detections` chooses from, with torchvision's formulas.
        """
        levels = [*maps.values()]
        outputs = self.head(levels)
        h, w = image.shape[-2:]
        [anchors] = self.anchor_generator(ImageList(image, [(h, w)]), levels)
        boxes = self.box_coder.decode(outputs["bbox_regression"].float(), anchors)
        limits = boxes.new_tensor([w, h, w, h])
        classes = outputs["cls_logits"].float().sigmoid()
        centre = outputs["bbox_ctrness"].float().sigmoid()
        return {
            "boxes": boxes.clamp(min=0.0).minimum(limits),
            "scores": (classes * centre).sqrt(),
        }

    def detections(self, maps: dict[str, Tensor], batch: Batch) -> Detections:
        """Return ``boxes``, ``scores`` and ``labels`` of each image."""
        outputs, anchors, sizes = self.outputs_of_maps(maps, batch)
        by_level: Any = {
            name: list(tensor.float().split(sizes, dim=1)) for name, tensor in outputs.items()
        }
        anchors_by_level = [list(of_image.split(sizes)) for of_image in anchors]
        return self.postprocess_detections(
            by_level, anchors_by_level, image_list(batch).image_sizes
        )
