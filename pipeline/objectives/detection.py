"""Object detection over a feature pyramid, in one stage (FCOS) or two (Faster R-CNN).

From torchvision's parts. Shapes: B images, C classes, H and W height and width of the input, M =
``max_boxes`` boxes of an image, k boxes of one image, A anchors of one image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import (
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)
from torchvision.ops import (
    MultiScaleRoIAlign,
    box_convert,
    box_iou,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
)

from pipeline.config.registry import Options, nearest, register
from pipeline.core.arrow_compute import pc
from pipeline.core.contracts import Arrays, Backbone, Batch, Features, Objective
from pipeline.core.nn.feature_pyramid import Pyramid
from pipeline.core.rng import uniform
from pipeline.media import drawing, image_io
from pipeline.media.image_ops import in_crowd

DETECTIONS = 100
"""Detections an image: as many as COCO's metric looks at."""

DRAWN_SCORE = 0.3
"""Boxes that are less sure are not drawn."""

AT_ONCE = 16
"""Images predicted at a time.

Evaluation hands over hundreds, whose 1000 regions each would take 13 GB (256 images, width 256).
"""

Targets = list[dict[str, Tensor]]
"""One an image: ``boxes`` (k, 4) pixels, ``labels`` (k,) class numbers, ``crowd`` (c, 4) regions
that count neither as object nor as background."""


class DetectionOptions(Options):
    method: Literal["fcos", "faster_rcnn"] = Field(
        "fcos", description="fcos: one stage; faster_rcnn: two stages"
    )
    box_format: Literal["xyxy", "xywh", "cxcywh"] = Field(
        "xyxy",
        description="what the boxes column holds: corners; corner and size (COCO); centre and size",
    )
    relative: bool = Field(
        True,
        description="boxes are shares of the image (0 to 1); false: pixels, for which the width "
        "and height columns are needed",
    )
    names: list[str] | dict[int | str, str] | None = Field(
        None,
        description="class names: a list (by number from 0) or number: name; without it the "
        "classes are the values of the training rows, sorted",
    )
    max_boxes: int = Field(100, ge=1, description="an image with more boxes is left out")
    channels: int = Field(
        256, ge=64, multiple_of=32, description="width of the pyramid and the heads"
    )
    convs: int = Field(4, ge=1, le=8, description="fcos: convolutions before each output")
    anchor: float = Field(
        8.0,
        gt=0,
        description="faster_rcnn: side of the anchors of a level in its strides; less for small "
        "images",
    )
    score_threshold: float = Field(
        0.05, ge=0, lt=1, description="detections below it are not given"
    )
    nms_threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="of two detections of a class that overlap more than this the surer one "
        "stays; none: 0.6 for fcos, 0.5 for faster_rcnn",
    )


class Boxes(NamedTuple):
    """The boxes of one row, or why they cannot be used."""

    corners: np.ndarray
    """(k, 4) x0 y0 x1 y1 as shares of the image."""
    labels: np.ndarray
    """(k,) class numbers."""
    crowd: np.ndarray
    """(k,) which are crowd regions."""
    reason: str = ""


NO_BOXES = Boxes(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool))


@register("objective", "detection", options=DetectionOptions)
class Detection(Objective):
    """Object detection: boxes and their classes.

    Columns: ``boxes``, a list of 4 numbers for each object; ``labels``, a list of its classes
    (numbers, with holes or not, or texts); where given ``crowd``, a list of flags: such a region
    is not learned, and what is found in it counts neither as hit nor as error; ``width`` and
    ``height`` of the image, for boxes in pixels. An empty list is an image without objects. A box
    that sticks out of its image is cut at the edge; a row whose boxes are null, not finite,
    without area, wholly outside or of an unknown class is refused with the reason.

    Input beside ``image`` (B, C, H, W), as arrays of ``encode`` that the modality moves with the
    image: ``boxes`` (B, M, 4), ``labels`` (B, M; -1: none), ``crowd`` (B, M), ``frame`` (see
    Batch). State: ``values``, ``labels`` and the options that ``encode`` reads.

    The loss is a sum over images with a count that adds up over rows and ranks (torchvision's
    detectors divide inside, by the batch of one rank). FCOS: focal, GIoU and centre-ness losses
    summed, over the number of foreground points, an image without any counting 1 (torchvision: a
    batch without any). Faster R-CNN samples 256 anchors and 512 regions an image: the mean over
    these, summed over images, over the number of images; torchvision's mean over all that were
    sampled is the same unless an image has fewer. Samples follow from the rows' keys.
    """

    roles = ("boxes", "labels")
    optional_roles = ("crowd", "width", "height")
    metrics = ("map", "map50", "loss")
    output_types = {
        "boxes": pa.list_(pa.list_(pa.float64())),
        "scores": pa.list_(pa.float64()),
        "labels": pa.list_(pa.string()),
    }

    @classmethod
    def fit(cls, options, table, columns):
        """Take the classes that option ``names`` names, or the sorted values of the rows.

        Raises:
            ValueError: a class without a name, or boxes in pixels without the image's size.
        """
        for role in ("width", "height"):
            if not options.relative and role not in columns:
                raise ValueError(
                    f"objective.relative is false: boxes in pixels need a {role} column (columns: "
                    f"{{{role}: NAME}}); boxes that are shares of the image need relative: true"
                )
        column = columns["labels"]
        flat = pc.list_flatten(table[column])
        found = pc.unique(flat).drop_null().to_pylist()
        if options.names is None:
            values = sorted(found)
            names = [str(value) for value in values]
        else:
            values, names = _named_classes(options.names, found, column)
        if not values:
            raise ValueError(f"column {column}: the training rows hold no box")
        if len(set(names)) < len(names):
            raise ValueError(f"column {column}: two classes have the same name")
        kept = options.model_dump(include={"box_format", "relative", "max_boxes"})
        return {"values": values, "labels": names, **kept}

    @classmethod
    def encode(cls, table, columns, state) -> Arrays:
        """Return ``boxes`` (n, M, 4), ``labels`` (n, M) and ``crowd`` (n, M)."""
        if columns.get("boxes") not in table.column_names:  # new rows to predict
            return {}
        n = len(table)
        most = state["max_boxes"]
        boxes = np.zeros((n, most, 4), np.float32)
        labels = np.full((n, most), -1, np.int64)
        crowd = np.zeros((n, most), bool)
        for row, found in enumerate(_parsed(table, columns, state)):
            k = len(found.labels)
            boxes[row, :k], labels[row, :k], crowd[row, :k] = found[:3]
        return {"boxes": boxes, "labels": labels, "crowd": crowd}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state):
        """Name rows whose boxes cannot be used.

        Boxes in pixels are of the upright picture, so the image's own size is read for them.
        """
        if columns.get("boxes") not in table.column_names:
            return [""] * len(table)
        more = () if state["relative"] else ("image",)
        return [boxes.reason for boxes in _parsed(table, columns, state, *more)]

    def __init__(self, backbone: Backbone, options: DetectionOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        classes = len(state["labels"])
        self.detector: OneStage | TwoStage
        if options.method == "fcos":
            self.detector = OneStage(backbone, classes, options)
        else:
            self.detector = TwoStage(backbone, classes, options)
        self.log_names = self.detector.loss_names

    def _maps(self, backbone: Backbone, batch: Batch) -> tuple[Features, dict[str, Tensor]]:
        """Return the backbone's features and the pyramid's maps."""
        features = backbone(batch, want=("stages",))
        return features, self.detector.backbone(features, batch["image"].shape[-2:])

    def raw_outputs(self, backbone, batch):
        """`boxes` (B, P, 4) and `scores` (B, P, C): candidates, before any is suppressed.

        Corners x0 y0 x1 y1 in pixels of the input; a score from 0 to 1 for each of `labels`. Keep
        those above `score_threshold`, and apply non-maximum suppression class by class with
        `nms_threshold`.
        """
        _, maps = self._maps(backbone, batch)
        return self.detector.candidates(maps, batch["image"])

    def loss(self, backbone: Backbone, batch: Batch):
        features, maps = self._maps(backbone, batch)
        parts, counts = self.detector.losses(maps, batch, targets_of(batch))
        # layers after the last map are part of the graph: DDP waits for every gradient
        unused = features.pooled.float().sum() * 0.0
        total = torch.stack([*parts.values()]).sum() + unused
        logs = {name: part.detach().sum() for name, part in parts.items()}
        return total, counts.sum(), logs

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return the surest detections first.

        Returns:
            ``boxes`` (B, 100, 4) corners as shares of the whole image, ``scores`` (B, 100) and
            ``classes`` (B, 100; -1: none). With labels ``true_boxes``, ``true_classes`` and
            ``true_crowd`` (B, M) as the modality left them, and ``loss`` with its ``count`` (B,).
        """
        parts = [self._predict(backbone, part) for part in batch.split(AT_ONCE)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        _, maps = self._maps(backbone, batch)
        frame = batch["frame"].float()
        b = len(batch)
        device = frame.device
        boxes = torch.zeros(b, DETECTIONS, 4, device=device)
        scores = torch.zeros(b, DETECTIONS, device=device)
        classes = torch.full((b, DETECTIONS), -1, device=device)
        for i, found in enumerate(self.detector.detections(maps, batch)):
            corners = _shares(found["boxes"][None], frame[i : i + 1])[0]
            inside = (corners[:, 2:] > corners[:, :2]).all(1)  # not in the padding
            k = int(inside.sum())
            boxes[i, :k] = corners[inside]
            scores[i, :k] = found["scores"][inside]
            classes[i, :k] = found["labels"][inside]
        predictions = {"boxes": boxes, "scores": scores, "classes": classes}
        if "labels" not in batch.data:
            return predictions
        parts, counts = self.detector.losses(maps, batch, targets_of(batch))
        is_box = _has_area(batch["boxes"]) & (batch["labels"] >= 0)
        return {
            **predictions,
            "true_boxes": _shares(batch["boxes"], frame),
            "true_classes": torch.where(is_box, batch["labels"], -1),
            "true_crowd": batch["crowd"].bool(),
            "loss": torch.stack([*parts.values()]).sum(0),
            "count": counts,
        }

    def output_columns(self, predictions, raw_rows):
        """Return lists, the surest first: ``boxes``, ``scores`` and ``labels`` (class names).

        Boxes are corners x0 y0 x1 y1 as shares of the image.
        """
        names = np.array(self.state["labels"], dtype=object)
        n = len(predictions["scores"])
        columns = {name: np.empty(n, dtype=object) for name in ("boxes", "scores", "labels")}
        for row, classes in enumerate(predictions["classes"]):
            real = classes >= 0
            columns["boxes"][row] = predictions["boxes"][row][real].tolist()
            columns["scores"][row] = predictions["scores"][row][real].tolist()
            columns["labels"][row] = names[classes[real]].tolist()
        return columns

    def draw(self, picture, columns):
        """Draw the boxes with a score of at least DRAWN_SCORE, the surest ones on top."""
        names: list[str] = self.state["labels"]
        scores = np.array(columns["scores"])
        boxes = np.array(columns["boxes"]).reshape(-1, 4)
        is_drawn = scores >= DRAWN_SCORE
        labels = [name for name, drawn in zip(columns["labels"], is_drawn, strict=True) if drawn]
        pairs = zip(labels, scores[is_drawn], strict=True)
        captions = [f"{name} {score:.2f}" for name, score in pairs]
        classes = [names.index(name) for name in labels]
        return drawing.draw_boxes(picture, boxes[is_drawn], captions, classes)


# ---------------------------------------------------------------- rows


def _named_classes(
    names: list[str] | dict[int | str, str], found: list[Any], column: str
) -> tuple[list[Any], list[str]]:
    """Return the values and names of the classes that option ``names`` names.

    Args:
        found: the values of the training rows.

    Raises:
        ValueError: no class, a name for no number, or a value without a name.
    """
    pairs = [*(names.items() if isinstance(names, dict) else enumerate(names))]
    if not pairs:
        raise ValueError(
            "objective.names: no class is named; leave it out to take the values of the training "
            "rows"
        )
    are_texts = bool(found) and isinstance(found[0], str)
    wrong = [key for key, _ in pairs if not are_texts and not str(key).isdecimal()]
    if wrong:
        raise ValueError(
            f"objective.names: {wrong[0]!r} is no class number, and column {column} holds "
            "numbers; say number: name"
        )
    values = [name if are_texts else int(key) for key, name in pairs]
    unknown = sorted(set(found) - set(values))
    if unknown:
        raise ValueError(
            f"column {column}: class {unknown[0]!r} of the training rows has no name in "
            f"objective.names; {nearest(str(unknown[0]), [str(value) for value in values])}"
        )
    return values, [name for _, name in pairs]


def _parsed(
    table: pa.Table, columns: dict[str, str], state: dict[str, Any], *more: str
) -> Iterator[Boxes]:
    """Yield the boxes of each row; with a reason it has none."""
    roles = ("boxes", "labels", "crowd", "width", "height", *more)
    given = [role for role in roles if columns.get(role) in table.column_names]
    values = {role: table[columns[role]].to_pylist() for role in given}
    index = {value: i for i, value in enumerate(state["values"])}
    for i in range(len(table)):
        row = {role: values[role][i] for role in given}
        try:
            yield _boxes(row, index, state)
        except ValueError as error:
            yield NO_BOXES._replace(reason=str(error))


def _boxes(row: dict[str, Any], index: dict[Any, int], state: dict[str, Any]) -> Boxes:
    """Read the boxes of one row.

    Args:
        row: the value of each role.
        index: the class number of each value.

    Raises:
        ValueError: what is wrong with them.
    """
    boxes = row["boxes"]
    labels = row["labels"]
    if boxes is None or labels is None:
        raise ValueError("its boxes or labels are null; an image without objects has empty lists")
    crowd = row.get("crowd") or [False] * len(boxes)
    if not len(boxes) == len(labels) == len(crowd):
        flags = f" and {len(crowd)} crowd flags" if row.get("crowd") else ""
        raise ValueError(f"{len(boxes)} boxes, but {len(labels)} labels{flags}")
    if len(boxes) > state["max_boxes"]:
        raise ValueError(f"{len(boxes)} boxes, more than objective.max_boxes={state['max_boxes']}")
    unknown = [label for label in labels if label not in index]
    if unknown:
        raise ValueError(
            f"class {unknown[0]!r} is none of the {len(index)} classes of the training rows"
        )
    if any(box is None or len(box) != 4 for box in boxes):
        raise ValueError("a box is not 4 numbers")
    given = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    corners = box_convert(torch.from_numpy(given), state["box_format"], "xyxy").numpy()
    if not state["relative"]:
        width, height = _size_of(row)
        corners = corners / [width, height, width, height]
    inside = corners.clip(0, 1)
    _check_boxes(given, corners, inside, state)
    numbers = np.array([index[label] for label in labels], dtype=np.int64)
    return Boxes(inside, numbers, np.array(crowd, dtype=bool))


def _size_of(row: dict[str, Any]) -> tuple[float, float]:
    """Return width and height that boxes in pixels are of.

    Raises:
        ValueError: there is no size, or it is that of the picture before it is turned upright.
    """
    width = row["width"]
    height = row["height"]
    if not (width and height and width > 0 and height > 0):
        raise ValueError(f"boxes in pixels, but the image is {width} x {height}")
    wide, high = image_io.upright_size(row.get("image")) or (width, height)
    # the image may have been made smaller or squashed since: its boxes are where they were
    distance_upright = abs(width * high - height * wide)
    distance_turned = abs(width * wide - height * high)
    if distance_turned <= max(width, height, wide, high) < distance_upright:
        raise ValueError(
            f"boxes in pixels of an image of {width} x {height}, but upright (EXIF) the image is "
            f"{wide} x {high}"
        )
    return width, height


def _check_boxes(
    given: np.ndarray, corners: np.ndarray, inside: np.ndarray, state: dict[str, Any]
) -> None:
    """Raise ValueError for a box that is not finite, has no area or lies outside its image.

    Args:
        given: (k, 4) boxes as the column has them.
        corners: (k, 4) as shares of the image.
        inside: (k, 4) cut at the image's edge.
    """
    for written, whole, cut in zip(given, corners, inside, strict=True):
        shown = np.array2string(written, precision=6, separator=", ")
        if not np.isfinite(written).all():
            raise ValueError(f"box {shown} is not finite")
        if not (whole[2:] > whole[:2]).all():
            raise ValueError(f"box {shown} has no area (read as {state['box_format']})")
        if not (cut[2:] > cut[:2]).all():
            unit = "shares of it" if state["relative"] else "pixels"
            raise ValueError(f"box {shown} lies outside its image (read as {unit})")


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


def targets_of(batch: Batch) -> Targets:
    boxes = batch["boxes"].float()
    labels = batch["labels"]
    crowd = batch["crowd"].bool()
    is_box = _has_area(boxes) & (labels >= 0)
    is_object = is_box & ~crowd
    is_crowd = is_box & crowd
    return [
        {
            "boxes": boxes[i][is_object[i]],
            "labels": labels[i][is_object[i]],
            "crowd": boxes[i][is_crowd[i]],
        }
        for i in range(len(boxes))
    ]


def _shares(boxes: Tensor, frame: Tensor) -> Tensor:
    """Turn pixels of the input (B, k, 4) into shares of the whole image.

    Args:
        frame: (B, 4) width, height, left and top of the image in the input.
    """
    size = frame[:, None, :2].repeat(1, 1, 2)
    corner = frame[:, None, 2:].repeat(1, 1, 2)
    return ((boxes - corner) / size).clamp(0, 1)


# ---------------------------------------------------------------- detectors


class Anchors(AnchorGenerator):
    """Anchors at the strides that the maps have.

    torchvision guesses strides from sizes, wrongly where these are no multiples.
    """

    def __init__(self, strides: tuple[int, ...], side: float, ratios: tuple[float, ...]):
        sides = tuple((stride * side,) for stride in strides)
        super().__init__(sides, (ratios,) * len(strides))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        sizes = [list(level.shape[-2:]) for level in feature_maps]
        of_one_image = torch.cat(self.grid_anchors(sizes, strides))
        return [of_one_image] * len(image_list.image_sizes)


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
            "box": _by_image(box, is_object),
            "centerness": _by_image(of_centre, is_object),
            "count": is_object.sum(1).clamp(min=1).float(),
        }


def _points_in(points: Tensor, boxes: Tensor) -> Tensor:
    """Return (A,) which of the points (A, 2) lie in one of the boxes (c, 4)."""
    above = points[:, None] > boxes[:, :2]
    below = points[:, None] < boxes[:, 2:]
    return (above & below).all(-1).any(-1)


def _by_image(values: Tensor, where: Tensor) -> Tensor:
    """Return (B,) sums of values that stand where ``where`` (B, A) is true."""
    grid = torch.zeros(where.shape, device=values.device, dtype=values.dtype)
    return grid.masked_scatter(where, values).sum(1)


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

    def _outputs(self, maps: dict[str, Tensor], batch: Batch):
        """Return the head's outputs, the anchors and the number of points of each level."""
        levels = [*maps.values()]
        sizes = [level.shape[-2] * level.shape[-1] for level in levels]
        return self.head(levels), self.anchor_generator(_sized(batch), levels), sizes

    def losses(
        self, maps: dict[str, Tensor], batch: Batch, targets: Targets
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return sums (B,) by name, and the counts (B,) by which their sum is to be divided."""
        outputs, anchors, sizes = self._outputs(maps, batch)
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

    def detections(self, maps: dict[str, Tensor], batch: Batch) -> Targets:
        """Return ``boxes``, ``scores`` and ``labels`` of each image."""
        outputs, anchors, sizes = self._outputs(maps, batch)
        by_level: Any = {
            name: list(tensor.float().split(sizes, dim=1)) for name, tensor in outputs.items()
        }
        anchors_by_level = [list(of_image.split(sizes)) for of_image in anchors]
        return self.postprocess_detections(by_level, anchors_by_level, _sized(batch).image_sizes)


def _sized(batch: Batch) -> ImageList:
    h, w = batch["image"].shape[-2:]
    return ImageList(batch["image"], [(h, w)] * len(batch))


class Sampler:
    """torchvision's BalancedPositiveNegativeSampler, from the rows' keys."""

    def __init__(self, size: int, positive: float, stream: int):
        self.size = size
        self.positive = positive
        self.stream = stream
        self.keys: Any = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return masks of the samples of each image, where labels are 1 or more, and 0."""
        positive = []
        negative = []
        for key, labels in zip(self.keys, matched_idxs, strict=True):
            order = uniform(key[None], len(labels), self.stream)[0].argsort()
            most_positive = int(self.size * self.positive)
            is_positive = _first(labels >= 1, order, most_positive)
            rest = self.size - int(is_positive.sum())
            positive.append(is_positive)
            negative.append(_first(labels == 0, order, rest))
        return positive, negative


def _first(mask: Tensor, order: Tensor, most: int) -> Tensor:
    """Return a mask of the first ``most`` places of ``mask`` in ``order``."""
    chosen = torch.zeros_like(mask)
    chosen[order[mask[order]][:most]] = True
    return chosen


class _Proposals(RegionProposalNetwork):
    """A region proposal network whose losses are kept apart by image, also in evaluation."""

    def forward(self, images, features, targets=None):
        """Return the proposed boxes, and with targets losses (B,) by name."""
        levels = [*features.values()]
        scores, shifts = self.head(levels)
        anchors = self.anchor_generator(images, levels)
        sizes = [of_level[0].numel() for of_level in scores]
        scores, shifts = concat_box_prediction_layers(scores, shifts)
        scores = scores.float()
        shifts = shifts.float()
        boxes = self.box_coder.decode(shifts.detach(), anchors).view(len(anchors), -1, 4)
        boxes, _ = self.filter_proposals(boxes, scores, images.image_sizes, sizes)
        if targets is None:
            return boxes, {}
        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        without_crowds = []
        for of_image, boxes_of_image, target in zip(labels, anchors, targets, strict=True):
            is_background = of_image == 0
            is_ignored = is_background & in_crowd(boxes_of_image, target["crowd"])
            without_crowds.append(of_image.masked_fill(is_ignored, -1.0))
        labels = without_crowds
        scores = scores.view(len(anchors), -1)
        shifts = shifts.view(len(anchors), -1, 4)
        wanted = self.box_coder.encode(matched, anchors)
        return boxes, self.by_image(scores, shifts, labels, wanted)

    def by_image(self, scores, shifts, labels, wanted):
        """Return means over each image's samples (B,) by name."""
        positive, negative = (torch.stack(masks) for masks in self.fg_bg_sampler(labels))
        sampled = positive | negative
        count = sampled.sum(1).clamp(min=1)
        wanted_shifts = torch.stack(wanted)[positive]
        boxes = F.smooth_l1_loss(shifts[positive], wanted_shifts, beta=1 / 9, reduction="none")
        boxes = boxes.sum(-1)
        objects = F.binary_cross_entropy_with_logits(
            scores, torch.stack(labels).clamp(min=0), reduction="none"
        )
        return {
            "objectness": torch.where(sampled, objects, 0.0).sum(1) / count,
            "proposal_box": _by_image(boxes, positive) / count,
        }


class TwoStage(nn.Module):
    """Faster R-CNN (Ren et al. 2015) over a feature pyramid of strides 4 to 64.

    With torchvision's settings. What lies in a crowd is no background.
    """

    loss_names = ("objectness", "proposal_box", "classification", "box")

    def __init__(self, backbone: Backbone, classes: int, options: DetectionOptions):
        super().__init__()
        width = options.channels
        self.backbone = Pyramid(backbone, (4, 8, 16, 32), width, "pool")
        strides = self.backbone.strides
        if any(stride & (stride - 1) for stride in strides):
            raise ValueError(
                f"{backbone.arch.name}: faster_rcnn pools regions from maps whose strides are "
                f"powers of two, these are {list(strides)}; use method: fcos, or patches of 8, 16 "
                "or 32 px"
            )
        ratios = (0.5, 1.0, 2.0)
        self.samplers = (Sampler(256, 0.5, 11), Sampler(512, 0.25, 12))
        proposals_kept = {"training": 2000, "testing": 1000}
        self.rpn = _Proposals(
            Anchors(strides, options.anchor, ratios),
            RPNHead(width, len(ratios)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=proposals_kept,
            post_nms_top_n=proposals_kept,
            nms_thresh=0.7,
        )
        levels = [str(i) for i in range(len(self.backbone.base))]
        self.roi_heads = RoIHeads(
            MultiScaleRoIAlign(levels, 7, 2),
            TwoMLPHead(width * 49, 1024),
            FastRCNNPredictor(1024, classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=options.score_threshold,
            nms_thresh=options.nms_threshold or 0.5,
            detections_per_img=DETECTIONS,
        )
        sampled: tuple[Any, Any] = (self.rpn, self.roi_heads)
        for part, sampler in zip(sampled, self.samplers, strict=True):
            part.fg_bg_sampler = sampler

    def _regions(
        self, maps: dict[str, Tensor], boxes: list[Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return scores and shifts of the boxes of all images, one after the other."""
        heads = self.roi_heads
        maps = {name: level.float() for name, level in maps.items()}
        pooled = heads.box_roi_pool(maps, boxes, _sized(batch).image_sizes)
        scores, shifts = heads.box_predictor(heads.box_head(pooled))
        return scores.float(), shifts.float()

    def candidates(self, maps: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
        """Refuse: the second stage reads the regions that suppression in the first one leaves."""
        raise ValueError(
            "faster_rcnn decides between its stages which regions are kept (torchvision.ops.nms, "
            "roi_align), a number that differs from image to image: no graph of fixed outputs "
            "holds that; train method: fcos"
        )

    def losses(
        self, maps: dict[str, Tensor], batch: Batch, targets: Targets
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return means over the samples of each image (B,) by name, and ones (B,)."""
        for sampler in self.samplers:
            sampler.keys = batch.keys
        # 0 is the background
        shifted = [{**target, "labels": target["labels"] + 1} for target in targets]
        boxes, parts = self.rpn(_sized(batch), maps, shifted)
        usable = []
        for of_image, target in zip(boxes, targets, strict=True):
            is_in_crowd = in_crowd(of_image, target["crowd"])
            is_on_object = _overlaps(of_image, target["boxes"])
            usable.append(of_image[~is_in_crowd | is_on_object])
        boxes, _, labels, wanted = self.roi_heads.select_training_samples(usable, shifted)
        scores, shifts = self._regions(maps, boxes, batch)
        sizes = [len(of_image) for of_image in boxes]
        classes = torch.cat(labels)
        is_object = torch.cat(labels) > 0
        classification = F.cross_entropy(scores, classes, reduction="none")
        shifts = shifts.unflatten(1, (-1, 4))[is_object, classes[is_object]]
        wanted_shifts = torch.cat(wanted)[is_object]
        box = F.smooth_l1_loss(shifts, wanted_shifts, beta=1 / 9, reduction="none")
        box = box.sum(-1)
        box = torch.zeros_like(classification).masked_scatter(is_object, box)
        for name, values in (("classification", classification), ("box", box)):
            means = [part.sum() / max(1, len(part)) for part in values.split(sizes)]
            parts[name] = torch.stack(means)
        return parts, torch.ones(len(boxes), device=scores.device)

    def detections(self, maps: dict[str, Tensor], batch: Batch) -> Targets:
        """Return ``boxes``, ``scores`` and ``labels`` of each image."""
        boxes, _ = self.rpn(_sized(batch), maps)
        scores, shifts = self._regions(maps, boxes, batch)
        found = self.roi_heads.postprocess_detections(
            scores, shifts, boxes, _sized(batch).image_sizes
        )
        return [
            {"boxes": boxes, "scores": scores, "labels": labels - 1}
            for boxes, scores, labels in zip(*found, strict=True)
        ]


def _overlaps(boxes: Tensor, objects: Tensor) -> Tensor:
    """Return (k,) which boxes overlap an object by half or more."""
    return (box_iou(boxes, objects) >= 0.5).any(1)
