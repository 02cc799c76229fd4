"""Object detection over a backbone's feature pyramid, in one stage (FCOS) or two (Faster R-CNN),
from torchvision's parts.
"""

from __future__ import annotations

from typing import Any, Literal

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
from pipeline.core.rng import uniform
from pipeline.media import image_io
from pipeline.media.image_ops import in_crowd
from pipeline.nn.feature_pyramid import Pyramid

DETECTIONS = 100
"""Detections an image: as many as COCO's metric looks at."""

AT_ONCE = 16
"""Images predicted at a time: evaluation hands over hundreds, whose 1000 regions each would take 13
GB (256 images, width 256).
"""

Targets = list[dict[str, Tensor]]
"""One a row: ``boxes`` (k, 4) pixels, ``labels`` (k,) class numbers, ``crowd`` (c, 4) regions that
count neither as object nor as background.
"""


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
        "stays; none: "
        "0.6 for fcos, 0.5 for faster_rcnn",
    )


@register("objective", "detection", options=DetectionOptions)
class Detection(Objective):
    """Boxes and their classes.

    Columns: ``boxes``, a list of 4 numbers for each object; ``labels``, a list of its classes
    (numbers, with holes or not, or texts); where given ``crowd``, a list of flags: such a region is
    not learned, and what is found in it counts neither as hit nor as error; ``width`` and
    ``height`` of the image, for boxes in pixels. An empty list is an image without objects. A box
    that sticks out of its image is cut at the edge; a row whose boxes are null, not finite, without
    area, wholly outside or of an unknown class is refused with the reason.

    Input beside ``image`` (B, C, H, W), as arrays of ``encode`` that the modality moves with the
    image: ``boxes`` (B, max_boxes, 4), ``labels`` (B, max_boxes; -1: none), ``crowd`` (B,
    max_boxes), ``frame`` (see Batch). State: ``values``, ``labels`` and the options that ``encode``
    reads.

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
    label_tensors = ("boxes", "labels", "crowd", "frame")
    output_types = {
        "boxes": pa.list_(pa.list_(pa.float64())),
        "scores": pa.list_(pa.float64()),
        "labels": pa.list_(pa.string()),
    }

    @classmethod
    def fit(cls, options, table, columns):
        """Classes are the names given, or the values of the training rows, sorted. Raises
        ValueError for a class without a name, pixels without sizes.
        """
        for role in ("width", "height"):
            if not options.relative and role not in columns:
                raise ValueError(
                    f"objective.relative is false: boxes in pixels need a {role} column "
                    f"(columns: {{{role}: NAME}}); boxes that are shares of "
                    "the image need relative: true"
                )
        # pyright: ignore
        kinds = pc.unique(pc.list_flatten(table[columns["labels"]])).drop_null().to_pylist()
        if options.names is None:
            values = sorted(kinds)
            names = [str(value) for value in values]
        else:
            pairs = [
                *(
                    options.names.items()
                    if isinstance(options.names, dict)
                    else enumerate(options.names)
                )
            ]
            texts = bool(kinds) and isinstance(kinds[0], str)
            wrong = [key for key, _ in pairs if not texts and not str(key).isdecimal()]
            if wrong or not pairs:
                raise ValueError(
                    "objective.names: "
                    + (
                        f"{wrong[0]!r} is no class number, and column {columns['labels']} "
                        "holds numbers; say number: name"
                        if wrong
                        else "no class is named; leave it out to take the values of the training "
                        "rows"
                    )
                )
            values, names = (
                [name if texts else int(key) for key, name in pairs],
                [name for _, name in pairs],
            )
            unknown = sorted(set(kinds) - set(values))
            if unknown:
                raise ValueError(
                    f"column {columns['labels']}: class {unknown[0]!r} of the training rows "
                    "has no name in objective.names; "
                    f"{nearest(str(unknown[0]), [str(v) for v in values])}"
                )
        if not values or len(set(names)) < len(names):
            raise ValueError(
                f"column {columns['labels']}: "
                + (
                    "the training rows hold no box"
                    if not values
                    else "two classes have the same name"
                )
            )
        return {
            "values": values,
            "labels": names,
            **options.model_dump(include={"box_format", "relative", "max_boxes"}),
        }

    @classmethod
    def encode(cls, table, columns, state) -> Arrays:
        if columns.get("boxes") not in table.column_names:  # new rows to predict
            return {}
        n, most = len(table), state["max_boxes"]
        out = {
            "boxes": np.zeros((n, most, 4), np.float32),
            "labels": np.full((n, most), -1, np.int64),
            "crowd": np.zeros((n, most), bool),
        }
        for i, (boxes, labels, crowd, _) in enumerate(_parsed(table, columns, state)):
            (
                out["boxes"][i, : len(boxes)],
                out["labels"][i, : len(boxes)],
                out["crowd"][i, : len(boxes)],
            ) = boxes, labels, crowd
        return out

    @classmethod
    def invalid_label_reasons(cls, table, columns, state):
        more = (
            () if state["relative"] else ("image",)
        )  # its own size: boxes in pixels are of the upright picture
        return (
            [reason for *_, reason in _parsed(table, columns, state, *more)]
            if columns.get("boxes") in table.column_names
            else [""] * len(table)
        )

    def __init__(self, backbone: Backbone, options: DetectionOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        self.detector: OneStage | TwoStage = {"fcos": OneStage, "faster_rcnn": TwoStage}[
            options.method
        ](backbone, len(state["labels"]), options)
        # each method logs its own
        self.log_names = self.detector.losses_named  # pyright: ignore[reportAttributeAccessIssue]

    def _maps(self, backbone: Backbone, batch: Batch) -> tuple[Features, dict[str, Tensor]]:
        features = backbone(batch, want=("stages",))
        return features, self.detector.backbone(features, batch["image"].shape[-2:])

    def loss(self, backbone: Backbone, batch: Batch):
        features, maps = self._maps(backbone, batch)
        parts, counts = self.detector.losses(maps, batch, _targets(batch))
        unused = (
            features.pooled.float().sum() * 0.0
        )  # the layers after the last map belong to the graph too: DDP waits for every parameter
        return (
            torch.stack([*parts.values()]).sum() + unused,
            counts.sum(),
            {name: part.detach().sum() for name, part in parts.items()},
        )

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """``boxes`` (B, 100, 4) corners as shares of the whole image, ``scores`` (B, 100),
        ``classes`` (B, 100; -1: none), the surest first; with labels ``true_boxes``,
        ``true_classes``, ``true_crowd`` (B, max_boxes) as the modality left them, and ``loss`` with
        its ``count`` (B,).
        """
        parts = [self._predicted(backbone, part) for part in batch.split(AT_ONCE)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _predicted(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        _, maps = self._maps(backbone, batch)
        frame = batch["frame"].float()
        b, device = len(batch), frame.device
        out = {
            "boxes": torch.zeros(b, DETECTIONS, 4, device=device),
            "scores": torch.zeros(b, DETECTIONS, device=device),
            "classes": torch.full((b, DETECTIONS), -1, device=device),
        }
        for i, found in enumerate(self.detector.detections(maps, batch)):
            boxes = _shares(found["boxes"][None], frame[i : i + 1])[0]
            inside = (boxes[:, 2:] > boxes[:, :2]).all(1)  # not in the padding
            k = int(inside.sum())
            out["boxes"][i, :k], out["scores"][i, :k], out["classes"][i, :k] = (
                boxes[inside],
                found["scores"][inside],
                found["labels"][inside],
            )
        if "labels" in batch.data:
            parts, counts = self.detector.losses(maps, batch, _targets(batch))
            there = _areas(batch["boxes"]) & (batch["labels"] >= 0)
            out |= {
                "true_boxes": _shares(batch["boxes"], frame),
                "true_classes": torch.where(there, batch["labels"], -1),
                "true_crowd": batch["crowd"].bool(),
                "loss": torch.stack([*parts.values()]).sum(0),
                "count": counts,
            }
        return out

    def output_columns(self, found, raw_rows):
        """A list a row: ``boxes`` (corners x0 y0 x1 y1 as shares of the image), ``scores`` and
        ``labels`` (class names), the surest first.
        """
        names = np.array(self.state["labels"], dtype=object)
        out = {
            name: np.empty(len(found["scores"]), dtype=object)
            for name in ("boxes", "scores", "labels")
        }
        for i, kinds in enumerate(found["classes"]):
            real = kinds >= 0
            out["boxes"][i], out["scores"][i] = (
                found["boxes"][i][real].tolist(),
                found["scores"][i][real].tolist(),
            )
            out["labels"][i] = names[kinds[real]].tolist()
        return out


# ---------------------------------------------------------------- rows


def _parsed(table, columns, state, *more: str):
    """For each row (boxes (k, 4) shares as corners, labels (k,), crowd (k,), reason); with a reason
    it has no boxes.
    """
    roles = ("boxes", "labels", "crowd", "width", "height", *more)
    given = {
        role: table[columns[role]].to_pylist()
        for role in roles
        if columns.get(role) in table.column_names
    }
    index = {value: i for i, value in enumerate(state["values"])}
    none = (np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool))
    for i in range(len(table)):
        row = {role: values[i] for role, values in given.items()}
        try:
            yield *_row(row, index, state), ""
        except ValueError as error:
            yield *none, str(error)


def _row(
    row: dict[str, Any], index: dict[Any, int], state: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Raises ValueError saying what is wrong with the boxes of a row."""
    boxes, labels = row["boxes"], row["labels"]
    if boxes is None or labels is None:
        raise ValueError("its boxes or labels are null; an image without objects has empty lists")
    crowd = row.get("crowd") or [False] * len(boxes)
    if not len(boxes) == len(labels) == len(crowd):
        raise ValueError(
            f"{len(boxes)} boxes, but {len(labels)} labels"
            + (f" and {len(crowd)} crowd flags" if row.get("crowd") else "")
        )
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
        width, height = row["width"], row["height"]
        if not (width and height and width > 0 and height > 0):
            raise ValueError(f"boxes in pixels, but the image is {width} x {height}")
        wide, high = image_io.upright_size(row.get("image")) or (width, height)
        as_told, turned = abs(width * high - height * wide), abs(width * wide - height * high)
        if (
            turned <= max(width, height, wide, high) < as_told
        ):  # one that was only made smaller, or squashed, has its boxes where they are
            raise ValueError(
                f"boxes in pixels of an image of {width} x {height}, but upright (EXIF) the "
                f"image is {wide} x {high}"
            )
        corners = corners / [width, height, width, height]
    cut = corners.clip(0, 1)
    for written, whole, kept in zip(given, corners, cut, strict=True):
        shown = np.array2string(written, precision=6, separator=", ")
        if not np.isfinite(written).all():
            raise ValueError(f"box {shown} is not finite")
        if not (whole[2:] > whole[:2]).all():
            raise ValueError(f"box {shown} has no area (read as {state['box_format']})")
        if not (kept[2:] > kept[:2]).all():
            raise ValueError(
                f"box {shown} lies outside its image (read as "
                f"{'shares of it' if state['relative'] else 'pixels'})"
            )
    return (
        cut,
        np.array([index[label] for label in labels], dtype=np.int64),
        np.array(crowd, dtype=bool),
    )


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


def _targets(batch: Batch) -> Targets:
    boxes, labels, crowd = batch["boxes"].float(), batch["labels"], batch["crowd"].bool()
    there = _areas(boxes) & (labels >= 0)
    real = there & ~crowd
    return [
        {
            "boxes": boxes[i][real[i]],
            "labels": labels[i][real[i]],
            "crowd": boxes[i][there[i] & crowd[i]],
        }
        for i in range(len(boxes))
    ]


def _shares(boxes: Tensor, frame: Tensor) -> Tensor:
    """Pixels of the input (B, k, 4) to shares of the whole image, which lies at ``frame`` (B, 4;
    width, height, left, top).
    """
    size, corner = frame[:, None, :2].repeat(1, 1, 2), frame[:, None, 2:].repeat(1, 1, 2)
    return ((boxes - corner) / size).clamp(0, 1)


# ---------------------------------------------------------------- detectors


class Anchors(AnchorGenerator):
    """Anchors at the strides that the maps have; torchvision's guesses them from sizes, wrongly
    where these are no multiples.
    """

    def __init__(self, strides: tuple[int, ...], side: float, ratios: tuple[float, ...]):
        super().__init__(tuple((stride * side,) for stride in strides), (ratios,) * len(strides))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        one = torch.cat(self.grid_anchors([list(m.shape[-2:]) for m in feature_maps], strides))
        return [one] * len(image_list.image_sizes)


class _Head(FCOSHead):
    """FCOS's head whose losses stay apart by image: (B,) sums, and the number of foreground
    points.
    """

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):  # pyright: ignore
        logits, shifts, centred = (
            head_outputs[name].float() for name in ("cls_logits", "bbox_regression", "bbox_ctrness")
        )
        grid, matched = torch.stack(anchors), torch.stack(matched_idxs)
        there = matched >= 0
        boxes = torch.stack(
            [F.pad(t["boxes"], (0, 0, 0, 1))[m] for t, m in zip(targets, matched, strict=True)]
        )  # -1 takes the padding
        kinds = torch.stack(
            [F.pad(t["labels"], (0, 1))[m] for t, m in zip(targets, matched, strict=True)]
        )
        wanted = torch.zeros_like(logits)
        wanted[there, kinds[there]] = 1.0
        middle = (grid[..., :2] + grid[..., 2:]) / 2
        in_crowd = torch.stack(
            [
                ((m[:, None] > t["crowd"][:, :2]) & (m[:, None] < t["crowd"][:, 2:]))
                .all(-1)
                .any(-1)
                for t, m in zip(targets, middle, strict=True)
            ]
        )
        focal = (
            sigmoid_focal_loss(logits, wanted, reduction="none")
            .sum(-1)
            .masked_fill(in_crowd & ~there, 0.0)
        )
        reached, true = self.box_coder.decode(shifts, grid)[there], boxes[there]
        sides = self.box_coder.encode(grid[there], true)
        across, down = sides[:, [0, 2]], sides[:, [1, 3]]
        centre = torch.sqrt((across.amin(1) / across.amax(1)) * (down.amin(1) / down.amax(1)))
        return {
            "classification": focal.sum(1),
            "box": _by_row(generalized_box_iou_loss(reached, true, reduction="none"), there),
            "centerness": _by_row(
                F.binary_cross_entropy_with_logits(
                    centred[..., 0][there], centre, reduction="none"
                ),
                there,
            ),
            "count": there.sum(1).clamp(min=1).float(),
        }


def _by_row(values: Tensor, where: Tensor) -> Tensor:
    """(B,) sums of values that stand where ``where`` (B, A) is true."""
    return (
        torch.zeros(where.shape, device=values.device, dtype=values.dtype)
        .masked_scatter(where, values)
        .sum(1)
    )


class OneStage(FCOS):
    """FCOS (Tian et al. 2019) on maps of strides 8 to 128."""

    losses_named = ("classification", "box", "centerness")

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
        levels = [*maps.values()]
        return (
            self.head(levels),
            self.anchor_generator(_sized(batch), levels),
            [m.shape[-2] * m.shape[-1] for m in levels],
        )

    def losses(
        self, maps: dict[str, Tensor], batch: Batch, targets: Targets
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Sums by image and name, each (B,), and the counts (B,) by which their sum is to be
        divided.
        """
        outputs, anchors, sizes = self._outputs(maps, batch)
        with torch.autocast(batch["image"].device.type, enabled=False):
            parts = self.compute_loss(targets, outputs, anchors, sizes)
        return parts, parts.pop("count")

    def detections(self, maps: dict[str, Tensor], batch: Batch) -> Targets:
        outputs, anchors, sizes = self._outputs(maps, batch)
        split: Any = {
            name: list(tensor.float().split(sizes, dim=1)) for name, tensor in outputs.items()
        }
        return self.postprocess_detections(
            split, [list(a.split(sizes)) for a in anchors], _sized(batch).image_sizes
        )


def _sized(batch: Batch) -> ImageList:
    h, w = batch["image"].shape[-2:]
    return ImageList(batch["image"], [(h, w)] * len(batch))


class Sampler:
    """torchvision's BalancedPositiveNegativeSampler, from the rows' keys in the place of a global
    generator.
    """

    def __init__(self, size: int, positive: float, stream: int):
        self.size, self.positive, self.stream = size, positive, stream
        self.keys: Any = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each image masks of the places taken, where labels are 1 or more and where they are
        0.
        """
        positive, negative = [], []
        for key, labels in zip(self.keys, matched_idxs, strict=True):
            order = uniform(key[None], len(labels), self.stream)[0].argsort()
            yes = _first(labels >= 1, order, int(self.size * self.positive))
            positive.append(yes)
            negative.append(_first(labels == 0, order, self.size - int(yes.sum())))
        return positive, negative


def _first(mask: Tensor, order: Tensor, most: int) -> Tensor:
    """A mask of the first ``most`` places of ``mask`` in ``order``."""
    out = torch.zeros_like(mask)
    out[order[mask[order]][:most]] = True
    return out


class _Proposals(RegionProposalNetwork):
    """Losses by image, (B,), also in evaluation."""

    def forward(self, images, features, targets=None):
        levels = [*features.values()]
        scores, shifts = self.head(levels)
        anchors = self.anchor_generator(images, levels)
        sizes = [s[0].numel() for s in scores]
        scores, shifts = (t.float() for t in concat_box_prediction_layers(scores, shifts))
        boxes = self.box_coder.decode(shifts.detach(), anchors).view(len(anchors), -1, 4)
        boxes, _ = self.filter_proposals(boxes, scores, images.image_sizes, sizes)
        if targets is None:
            return boxes, {}
        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        labels = [
            k.masked_fill((k == 0) & in_crowd(a, t["crowd"]), -1.0)
            for k, a, t in zip(labels, anchors, targets, strict=True)
        ]
        return boxes, self.by_image(
            scores.view(len(anchors), -1),
            shifts.view(len(anchors), -1, 4),
            labels,
            self.box_coder.encode(matched, anchors),
        )

    def by_image(self, scores, shifts, labels, wanted):
        yes, no = (torch.stack(masks) for masks in self.fg_bg_sampler(labels))
        taken = (yes | no).sum(1).clamp(min=1)
        boxes = F.smooth_l1_loss(
            shifts[yes], torch.stack(wanted)[yes], beta=1 / 9, reduction="none"
        ).sum(-1)
        objects = F.binary_cross_entropy_with_logits(
            scores, torch.stack(labels).clamp(min=0), reduction="none"
        )
        return {
            "objectness": torch.where(yes | no, objects, 0.0).sum(1) / taken,
            "proposal_box": _by_row(boxes, yes) / taken,
        }


class TwoStage(nn.Module):
    """Faster R-CNN (Ren et al. 2015) over a feature pyramid of strides 4 to 64, with torchvision's
    settings. What lies in a crowd is no background.
    """

    losses_named = ("objectness", "proposal_box", "classification", "box")

    def __init__(self, backbone: Backbone, classes: int, options: DetectionOptions):
        super().__init__()
        width = options.channels
        self.backbone = Pyramid(backbone, (4, 8, 16, 32), width, "pool")
        if any(stride & (stride - 1) for stride in self.backbone.strides):
            raise ValueError(
                f"{backbone.arch['name']}: faster_rcnn pools regions from maps whose strides "
                "are powers of two, these are "
                f"{list(self.backbone.strides)}; use method: fcos, or patches of 8, 16 or 32 px"
            )
        ratios = (0.5, 1.0, 2.0)
        self.samplers = (Sampler(256, 0.5, 11), Sampler(512, 0.25, 12))
        keep = {"training": 2000, "testing": 1000}
        self.rpn = _Proposals(
            Anchors(self.backbone.strides, options.anchor, ratios),
            RPNHead(width, len(ratios)),
            0.7,
            0.3,
            256,
            0.5,
            keep,
            keep,
            0.7,
        )
        pool = MultiScaleRoIAlign([str(i) for i in range(len(self.backbone.base))], 7, 2)
        self.roi_heads = RoIHeads(
            pool,
            TwoMLPHead(width * 49, 1024),
            FastRCNNPredictor(1024, classes + 1),
            0.5,
            0.5,
            512,
            0.25,
            None,
            options.score_threshold,
            options.nms_threshold or 0.5,
            DETECTIONS,
        )
        self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler = self.samplers  # pyright: ignore

    def _regions(
        self, maps: dict[str, Tensor], boxes: list[Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        heads = self.roi_heads
        pooled = heads.box_roi_pool(
            {name: m.float() for name, m in maps.items()}, boxes, _sized(batch).image_sizes
        )
        scores, shifts = heads.box_predictor(heads.box_head(pooled))
        return scores.float(), shifts.float()

    def losses(
        self, maps: dict[str, Tensor], batch: Batch, targets: Targets
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Means over the samples of each image by name, each (B,), and ones."""
        for sampler in self.samplers:
            sampler.keys = batch.keys
        shifted = [{**t, "labels": t["labels"] + 1} for t in targets]  # 0 is the background
        boxes, parts = self.rpn(_sized(batch), maps, shifted)
        boxes = [
            b[~in_crowd(b, t["crowd"]) | (box_iou(b, t["boxes"]) >= 0.5).any(1)]
            for b, t in zip(boxes, targets, strict=True)
        ]
        boxes, _, labels, wanted = self.roi_heads.select_training_samples(boxes, shifted)
        scores, shifts = self._regions(maps, boxes, batch)
        sizes = [len(b) for b in boxes]
        kinds, real = torch.cat(labels), torch.cat(labels) > 0
        errors = F.cross_entropy(scores, kinds, reduction="none")
        shifts = shifts.unflatten(1, (-1, 4))
        off = F.smooth_l1_loss(
            shifts[real, kinds[real]], torch.cat(wanted)[real], beta=1 / 9, reduction="none"
        ).sum(-1)
        off = torch.zeros_like(errors).masked_scatter(real, off)
        for name, values in (("classification", errors), ("box", off)):
            parts[name] = torch.stack(
                [part.sum() / max(1, len(part)) for part in values.split(sizes)]
            )
        return parts, torch.ones(len(boxes), device=scores.device)

    def detections(self, maps: dict[str, Tensor], batch: Batch) -> Targets:
        boxes, _ = self.rpn(_sized(batch), maps)
        scores, shifts = self._regions(maps, boxes, batch)
        found = self.roi_heads.postprocess_detections(
            scores, shifts, boxes, _sized(batch).image_sizes
        )
        return [{"boxes": b, "scores": s, "labels": k - 1} for b, s, k in zip(*found, strict=True)]
