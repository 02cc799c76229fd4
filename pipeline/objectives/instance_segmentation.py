"""Instance segmentation with Mask R-CNN (He et al. 2017): Faster R-CNN with a mask of each object.

From torchvision's parts. Shapes: B images, C classes, H and W height and width of the input, M =
``max_boxes`` objects of an image, k objects or detections of one image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.ops import MultiScaleRoIAlign

from pipeline.config.registry import BoxOptions, register
from pipeline.core.contracts import Arrays, Backbone, Batch
from pipeline.core.nn.box_detectors import (
    DETECTIONS,
    DRAWN_SCORE,
    BoxObjective,
    Detections,
    FasterRCNN,
    Targets,
    fixed_pool,
    image_list,
    predicted_boxes,
    without_padding,
)
from pipeline.core.ragged import ragged
from pipeline.media import box_labels, drawing, instance_masks
from pipeline.media.box_labels import BoxState

MASK_SIDE = 28
"""Pixels a side of the mask that is predicted in each box."""
PASTED_PIXELS = 1 << 24
"""Pixels of masks that are laid over an image at a time: 64 MB of floats."""


class InstanceSegmentationOptions(BoxOptions):
    mask_convs: int = Field(
        4, ge=1, le=8, description="3x3 convolutions of the mask branch before it is enlarged"
    )


class MaskRow(NamedTuple):
    """What is known of one row, or why it cannot be used."""

    boxes: box_labels.Boxes
    runs: np.ndarray
    """Run lengths of all masks, one behind the other, an even number of each mask."""
    size: tuple[int, int]
    """Height and width of the image in pixels; zeros where it cannot be read."""


@register("objective", "instance_segmentation", options=InstanceSegmentationOptions)
class InstanceSegmentation(BoxObjective):
    """Instance segmentation: boxes of objects, their classes and a mask of each.

    Use it where the outline of each object counts; for boxes alone ``detection`` is cheaper, and
    for a class of each pixel take ``segmentation``. He et al. 2017, "Mask R-CNN".

    Columns: those of ``detection``, and ``masks``, a list with a struct for each box: ``size``
    (height and width of the image) and ``counts`` (COCO's compressed run lengths), as pycocotools
    writes them. A row whose masks are null, of another size than its image, broken or without a
    pixel is refused with the reason.

    Input beside that of ``detection``: ``mask_runs`` (B, R), the run lengths, and ``image_size``
    (B, 2), height and width of the image as it is stored. Masks stay run lengths until the loss
    looks up the pixels of the objects that it samples, where ``frame`` says that the image lies:
    so they are resized, cropped and mirrored with it.

    The loss is that of Faster R-CNN (see ``detection``) and the binary cross entropy of the masks
    of the regions that were sampled on objects, the mean over their pixels in the box's own class;
    summed over images, over the number of images. torchvision takes the mean over the regions of
    all images: the same unless one has fewer.

    Metrics compare masks in the pixels of the stored image, as COCO does.
    """

    state: BoxState
    detector: MaskRCNN
    roles = ("boxes", "labels", "masks")
    optional_roles = ("crowd", "width", "height")
    metrics = (
        "mask_map",
        "mask_map50",
        "mask_map_small",
        "mask_map_medium",
        "mask_map_large",
        "map",
        "map50",
        "loss",
    )
    raw_roles = ("image",)
    output_types = {
        "boxes": pa.list_(pa.list_(pa.float64())),
        "scores": pa.list_(pa.float64()),
        "labels": pa.list_(pa.string()),
        "masks": pa.list_(instance_masks.RLE),
    }

    @classmethod
    def fit(cls, options, table, columns) -> BoxState:
        """Take the classes that option ``names`` names, or the sorted values of the rows.

        Raises:
            ValueError: a class without a name, boxes in pixels without the image's size, or masks
                that are no run lengths.
        """
        column = columns["masks"]
        kind = table.schema.field(column).type
        value = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        names = {field.name for field in value} if pa.types.is_struct(value) else set()
        if not {"size", "counts"} <= names:
            raise ValueError(
                f"column {column}: {kind} holds no masks; they are lists of run lengths, structs "
                "of size and counts, as onetomany prepare coco --set masks=instance writes them "
                "(also voc, yolo, cvat, labelstudio)"
            )
        return box_labels.fit_state(options, table, columns)

    @classmethod
    def encode(cls, table, columns, state: BoxState) -> Arrays:
        """Return the arrays of boxes, ``mask_runs`` and ``image_size``."""
        if columns.get("boxes") not in table.column_names:  # new rows to predict
            return {}
        rows = list(_parsed(table, columns, state))
        arrays = box_labels.pad_boxes((row.boxes for row in rows), state["max_boxes"])
        sizes = np.array([row.size for row in rows], dtype=np.int64).reshape(-1, 2)
        return {**arrays, "mask_runs": ragged(row.runs for row in rows), "image_size": sizes}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state: BoxState):
        """Name rows whose boxes or masks cannot be used."""
        if columns.get("boxes") not in table.column_names:
            return [""] * len(table)
        return [row.boxes.reason for row in _parsed(table, columns, state)]

    def __init__(self, backbone: Backbone, options: InstanceSegmentationOptions, state: BoxState):
        super().__init__(backbone, options, state)
        self.detector = MaskRCNN(backbone, len(state["labels"]), options)
        self.log_names = self.detector.loss_names

    def raw_outputs(self, backbone, batch):
        """`boxes` (B, 100, 4), `scores`, `classes` (B, 100), `masks` (B, 100, 28, 28): detections.

        Keep those with a score above `score_threshold` (in `objective_options`); non-maximum
        suppression is done. Corners x0 y0 x1 y1 are shares of the whole image; a class is a place
        among `labels`, -1 is none. A mask is the probability that each part of the box is the
        object: resize it to the box, and the object is where it is above 0.5. The input `frame` is
        where the image lies in the input: width, height, left and top in pixels.
        """
        _, maps = self.maps(backbone, batch)
        found, boxes = self.detector.fixed_detections(maps, batch)
        size = batch["image"].shape[-2:]
        return {**found, "masks": self.detector.fixed_masks(maps, found["classes"], boxes, size)}

    def predict_images(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return the surest detections first.

        Returns:
            ``boxes`` (B, 100, 4) corners as shares of the whole image, ``scores`` (B, 100) and
            ``classes`` (B, 100; -1: none). Of new rows ``masks`` (B, 100, 28, 28), the probability
            that a pixel of the box is the object. With labels instead, in pixels of the stored
            image, ``mask_areas`` (B, 100), ``true_mask_areas`` (B, M) and ``mask_intersections``
            (B, 100, M), and the `truth`.
        """
        _, maps = self.maps(backbone, batch)
        frame = batch["frame"].float()
        detections = without_padding(self.detector.detections(maps, batch), frame)
        predictions = predicted_boxes(detections, frame)
        masks = self.detector.masks(maps, detections, batch)
        if "labels" not in batch.data:
            laid_out = torch.zeros(
                len(batch), DETECTIONS, MASK_SIDE, MASK_SIDE, device=frame.device
            )
            for i, of_image in enumerate(masks):
                laid_out[i, : len(of_image)] = of_image
            return {**predictions, "masks": laid_out}
        rows = range(len(batch))
        compared = [_compared(batch, i, masks[i], predictions["boxes"][i]) for i in rows]
        return {
            **predictions,
            **self.truth(maps, batch),
            **{name: torch.stack([one[name] for one in compared]) for name in compared[0]},
        }

    def output_columns(self, predictions, raw_rows):
        """Return lists, the surest first: ``boxes``, ``scores``, ``labels`` and ``masks``.

        Boxes are corners x0 y0 x1 y1 as shares of the image, labels class names, and masks COCO's
        run lengths in the image's own size: what pycocotools.mask.decode reads.
        """
        columns = box_labels.output_columns(predictions, self.state["labels"])
        sizes = box_labels.image_sizes(raw_rows.table, raw_rows.columns)
        columns["masks"] = np.empty(len(predictions["scores"]), dtype=object)
        for row, classes in enumerate(predictions["classes"]):
            k = int((classes >= 0).sum())
            height, width = sizes[row].clip(1).tolist()
            pasted = _pasted(
                torch.from_numpy(predictions["masks"][row, :k]),
                torch.from_numpy(predictions["boxes"][row, :k]),
                (height, width),
            )
            masks = [instance_masks.packed(mask.numpy()) for part in pasted for mask in part]
            columns["masks"][row] = masks
        return columns

    def draw(self, picture, columns):
        """Draw masks and boxes with a score of at least DRAWN_SCORE, the surest ones on top."""
        is_drawn = [score >= DRAWN_SCORE for score in columns["scores"]]
        shown = [rle for rle, drawn in zip(columns["masks"], is_drawn, strict=True) if drawn]
        labels = [name for name, drawn in zip(columns["labels"], is_drawn, strict=True) if drawn]
        masks = [instance_masks.mask_of(rle, *rle["size"]) for rle in shown]
        classes = [self.state["labels"].index(name) for name in labels]
        coloured = drawing.lay_masks(picture, masks, classes)
        return box_labels.draw(coloured, columns, self.state["labels"], DRAWN_SCORE)


# ---------------------------------------------------------------- rows


def _parsed(table: pa.Table, columns: dict[str, str], state: BoxState) -> Iterator[MaskRow]:
    """Yield the boxes and masks of each row; with a reason it has none."""
    of_masks = table[columns["masks"]].to_pylist()
    sizes = [(int(height), int(width)) for height, width in box_labels.image_sizes(table, columns)]
    of_boxes = box_labels.parse_boxes(table, columns, state, check_size=True)
    rows = zip(of_boxes, of_masks, sizes, strict=True)
    for boxes, masks, size in rows:
        runs = np.zeros(0, np.int32)
        if not boxes.reason:
            try:
                runs, size = _runs(masks, len(boxes.labels), size)
            except ValueError as error:
                boxes = box_labels.NO_BOXES._replace(reason=str(error))
        yield MaskRow(boxes, runs, size)


def _runs(
    masks: list[Any] | None, boxes: int, size: tuple[int, int]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the run lengths of the masks of one row, an even number of each, and their size.

    Args:
        boxes: how many boxes the row has.
        size: height and width of the image; zeros where its masks alone tell them.

    Raises:
        ValueError: what is wrong with them.
    """
    if masks is None:
        raise ValueError("its masks are null; an image without objects has an empty list")
    if len(masks) != boxes:
        raise ValueError(f"{boxes} boxes, but {len(masks)} masks")
    parts = [np.zeros(0, np.int32)]
    for number, mask in enumerate(masks, 1):
        if mask is None or mask["size"] is None or mask["counts"] is None:
            raise ValueError(f"mask {number} of {boxes} is null")
        if not any(size):
            size = tuple(mask["size"])
        try:
            runs = instance_masks.run_lengths(mask, *size)
        except ValueError as error:
            raise ValueError(f"mask {number} of {boxes}: {error}") from None
        if not runs[1::2].any():
            raise ValueError(f"mask {number} of {boxes} covers no pixel")
        parts.append(np.append(runs, [0] * (len(runs) % 2)).astype(np.int32))
    return np.concatenate(parts), size


# ---------------------------------------------------------------- masks


def input_masks(batch: Batch, row: int, places: Tensor) -> Tensor:
    """Look up masks where their image lies in the input, (k, H, W) bool.

    Each pixel of the input takes the pixel of the stored mask in which its centre lies.

    Args:
        row: of the batch.
        places: (k,) which of the row's objects.
    """
    h, w = batch["image"].shape[-2:]
    device = places.device
    height, width = batch["image_size"][row].unbind()
    across, down, left, top = batch["frame"][row].float().unbind()
    x = (((torch.arange(w, device=device) + 0.5 - left) / across) * width).floor().long()
    y = (((torch.arange(h, device=device) + 0.5 - top) / down) * height).floor().long()
    is_inside = ((x >= 0) & (x < width)) & ((y >= 0) & (y < height))[:, None]
    pixel = (x * height + y[:, None]).clamp(min=0).minimum(height * width - 1)
    ends = batch["mask_runs"][row].long().cumsum(0)
    wanted = places[:, None, None] * height * width + pixel
    is_object = torch.searchsorted(ends, wanted, right=True) % 2 == 1
    return is_object & is_inside


def _pasted(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Yield the masks of boxes over an image of height and width ``size``, (some, H, W) bool.

    Args:
        masks: (k, 28, 28) probabilities.
        boxes: (k, 4) corners as shares of the image.
    """
    height, width = size
    corners = boxes.float() * boxes.new_tensor([width, height, width, height])
    some = max(1, PASTED_PIXELS // (height * width))
    for start in range(0, len(masks), some):
        part = slice(start, start + some)
        yield paste_masks_in_image(masks[part, None], corners[part], size)[:, 0] > 0.5


def _compared(batch: Batch, row: int, masks: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """Return how many pixels the masks of a row's detections and objects have, and share.

    Returns:
        ``mask_areas`` (100,), ``true_mask_areas`` (M,) and ``mask_intersections`` (100, M), int32.
    """
    labels = batch["labels"][row]
    device = labels.device
    areas = torch.zeros(DETECTIONS, dtype=torch.int32, device=device)
    true_areas = torch.zeros(len(labels), dtype=torch.int32, device=device)
    shared = torch.zeros(DETECTIONS, len(labels), dtype=torch.int32, device=device)
    height, width = batch["image_size"][row].clamp(min=1).tolist()
    # Every second run is of an object's pixels, down the columns, one object after the other
    runs = batch["mask_runs"][row][: int(batch["mask_runs_lengths"][row])].long()
    lengths, ends = runs[1::2], runs.cumsum(0)[1::2]
    pixels = height * width
    # The last run, where it is empty, begins behind the last object
    last_object = max(0, int((labels >= 0).sum()) - 1)
    owner = ((ends - lengths) // pixels).clamp(max=last_object)
    true_areas.index_add_(0, owner, lengths.int())
    ends = ends - owner * pixels
    at = 0
    for part in _pasted(masks, boxes[: len(masks)], (height, width)):
        span = slice(at, at + len(part))
        by_column = part.transpose(1, 2).flatten(1)
        before = F.pad(by_column.cumsum(1, dtype=torch.int32), (1, 0))
        areas[span] = before[:, -1]
        shared[span].index_add_(1, owner, before[:, ends] - before[:, ends - lengths])
        at += len(part)
    return {"mask_areas": areas, "true_mask_areas": true_areas, "mask_intersections": shared}


class MaskRCNN(FasterRCNN):
    """Mask R-CNN: a Faster R-CNN with a branch that predicts a mask in each box."""

    network = "Mask R-CNN"
    loss_names = (*FasterRCNN.loss_names, "mask")

    def __init__(self, backbone: Backbone, classes: int, options: InstanceSegmentationOptions):
        super().__init__(backbone, classes, options)
        width = options.channels
        levels = [str(i) for i in range(len(self.backbone.base))]
        self.mask_pool = MultiScaleRoIAlign(levels, MASK_SIDE // 2, 2)
        self.mask_head = MaskRCNNHeads(width, [width] * options.mask_convs, 1)
        self.mask_predictor = MaskRCNNPredictor(width, width, classes)

    def mask_scores(self, maps: dict[str, Tensor], boxes: list[Tensor], batch: Batch) -> Tensor:
        """Return logits (R, C, 28, 28) of the boxes of all images, one after the other."""
        maps = {name: level.float() for name, level in maps.items()}
        pooled = self.mask_pool(maps, boxes, image_list(batch).image_sizes)
        return self.mask_predictor(self.mask_head(pooled)).float()

    def losses(
        self, maps: dict[str, Tensor], batch: Batch, targets: Targets
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return means over the samples of each image (B,) by name, and ones (B,)."""
        parts, regions = self.region_losses(maps, batch, targets)
        boxes, matched, classes = [], [], []
        for of_image, objects, labels in zip(*regions, strict=True):
            is_object = labels > 0
            boxes.append(of_image[is_object])
            matched.append(objects[is_object])
            classes.append(labels[is_object] - 1)
        scores = self.mask_scores(maps, boxes, batch)
        wanted = [scores.new_zeros(0, MASK_SIDE, MASK_SIDE)]
        for row, target in enumerate(targets):
            if len(boxes[row]):
                masks = input_masks(batch, row, target["places"])
                wanted.append(project_masks_on_boxes(masks, boxes[row], matched[row], MASK_SIDE))
        of_class = scores[torch.arange(len(scores), device=scores.device), torch.cat(classes)]
        pixels = F.binary_cross_entropy_with_logits(of_class, torch.cat(wanted), reduction="none")
        sizes = [len(of_image) for of_image in boxes]
        by_image = pixels.mean((1, 2)).split(sizes)
        means = [part.sum() / max(1, len(part)) for part in by_image]
        parts["mask"] = torch.stack(means)
        return parts, torch.ones(len(boxes), device=scores.device)

    def masks(self, maps: dict[str, Tensor], detections: Detections, batch: Batch) -> list[Tensor]:
        """Return the probabilities (k, 28, 28) that pixels of each detection's box are of it."""
        boxes = [detected["boxes"] for detected in detections]
        scores = self.mask_scores(maps, boxes, batch)
        classes = torch.cat([detected["labels"] for detected in detections])
        of_class = scores[torch.arange(len(scores), device=scores.device), classes].sigmoid()
        return [*of_class.split([len(of_image) for of_image in boxes])]

    def fixed_masks(
        self, maps: dict[str, Tensor], classes: Tensor, boxes: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Return what `masks` does (B, K, 28, 28) of boxes (B, K, 4), 0 without a class."""
        pooled = fixed_pool(self.mask_pool, maps, boxes, size)
        scores = self.mask_predictor(self.mask_head(pooled)).float()
        scores = scores.view(*classes.shape, -1, MASK_SIDE, MASK_SIDE)
        own_class = classes.clamp(min=0)[..., None, None, None]
        own_class = own_class.expand(-1, -1, 1, MASK_SIDE, MASK_SIDE)
        masks = scores.gather(2, own_class)[:, :, 0].sigmoid()
        return masks.masked_fill((classes < 0)[..., None, None], 0.0)
