"""What detectors of objects share, and Faster R-CNN, from torchvision's parts.

Shapes: B images, C classes, H and W height and width of the input, M boxes of an image (padded), k
boxes of one image, c crowd regions of one image, A anchors of one image, N any number of boxes, D
channels of the pyramid, h and w height and width of one of its maps.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# torchvision's detectors, whose classes are extended here, have no types.

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import (
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)
from torchvision.ops import MultiScaleRoIAlign, box_iou, poolers

from pipeline.config.registry import BoxOptions
from pipeline.core.batch import Batch
from pipeline.core.contracts import Backbone, Features, Objective
from pipeline.core.nn.feature_pyramid import Pyramid
from pipeline.core.rng import uniform

DETECTIONS = 100
"""Detections an image: as many as COCO's metric looks at."""
ANCHOR_STREAM, REGION_STREAM = 11, 12
"""Streams of a row's key that draw the samples of the two losses."""
DRAWN_SCORE = 0.3
"""Detections that are less sure are not drawn."""
IMAGES_AT_ONCE = 16
"""Images predicted at a time.

Evaluation hands over hundreds, whose 1000 regions each would take 13 GB (256 images, width 256).
"""

Targets = list[dict[str, Tensor]]
"""One an image: ``boxes`` (k, 4) pixels, ``labels`` (k,) class numbers, ``places`` (k,) which of
the row's boxes they are, ``crowd`` (c, 4) regions that count neither as object nor as
background."""

Detections = list[dict[str, Tensor]]
"""One an image: ``boxes`` (k, 4) pixels, ``scores`` (k,), ``labels`` (k,) class numbers."""


def has_area(boxes: Tensor) -> Tensor:
    """Return (...) bool: which ``boxes`` (..., 4) corners are wider and higher than 0."""
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


def targets_of(batch: Batch) -> Targets:
    """Return the objects and crowds of each image, without padding."""
    boxes = batch["boxes"].float()
    labels = batch["labels"]
    crowd = batch["crowd"].bool()
    is_box = has_area(boxes) & (labels >= 0)
    is_object = is_box & ~crowd
    is_crowd = is_box & crowd
    return [
        {
            "boxes": boxes[i][is_object[i]],
            "labels": labels[i][is_object[i]],
            "crowd": boxes[i][is_crowd[i]],
            "places": is_object[i].nonzero()[:, 0],
        }
        for i in range(len(boxes))
    ]


def to_shares(boxes: Tensor, frame: Tensor) -> Tensor:
    """Turn pixels of the input (B, k, 4) into shares of the whole image.

    Args:
        frame: (B, 4) width, height, left and top of the image in the input.
    """
    size = frame[:, None, :2].repeat(1, 1, 2)
    corner = frame[:, None, 2:].repeat(1, 1, 2)
    return ((boxes - corner) / size).clamp(0, 1)


def without_padding(detections: Detections, frame: Tensor) -> Detections:
    """Cut detections at the edge of their image, and leave out those wholly in the padding.

    Args:
        detections: ``boxes`` in pixels of the input, and others of each image.
        frame: (B, 4) where the images lie in the input.
    """
    kept: Detections = []
    for detected, of_image in zip(detections, frame, strict=True):
        lowest = of_image[2:].repeat(2)
        boxes = detected["boxes"].clamp(lowest, lowest + of_image[:2].repeat(2))
        inside = has_area(boxes)
        kept.append({name: tensor[inside] for name, tensor in {**detected, "boxes": boxes}.items()})
    return kept


def predicted_boxes(detections: Detections, frame: Tensor) -> dict[str, Tensor]:
    """Return the detections of all images in tensors, the surest first.

    Args:
        detections: ``boxes`` in pixels of the input, ``scores`` and ``labels`` of each image.
        frame: (B, 4) where the images lie in the input.

    Returns:
        ``boxes`` (B, 100, 4) corners as shares of the whole image, ``scores`` (B, 100) and
        ``classes`` (B, 100; -1: none).
    """
    b = len(detections)
    device = frame.device
    boxes = torch.zeros(b, DETECTIONS, 4, device=device)
    scores = torch.zeros(b, DETECTIONS, device=device)
    classes = torch.full((b, DETECTIONS), -1, device=device)
    for i, detected in enumerate(detections):
        k = len(detected["boxes"])
        boxes[i, :k] = to_shares(detected["boxes"][None], frame[i : i + 1])[0]
        scores[i, :k] = detected["scores"]
        classes[i, :k] = detected["labels"]
    return {"boxes": boxes, "scores": scores, "classes": classes}


def true_boxes(batch: Batch, frame: Tensor) -> dict[str, Tensor]:
    """Return ``true_boxes`` (B, M, 4), ``true_classes`` (B, M; -1: none) and ``true_crowd`` (B, M),
    as the modality left them, beside `predicted_boxes`.
    """
    is_box = has_area(batch["boxes"]) & (batch["labels"] >= 0)
    return {
        "true_boxes": to_shares(batch["boxes"], frame),
        "true_classes": torch.where(is_box, batch["labels"], -1),
        "true_crowd": batch["crowd"].bool(),
    }


def in_crowd(boxes: Tensor, crowd: Tensor) -> Tensor:
    """Return (N,) bool: which ``boxes`` (N, 4) have at least half of their area in a region
    ``crowd`` (c, 4).

    COCO measures overlap with a crowd in this way, over the detection's own area (pycocotools:
    iscrowd).
    """
    low = torch.maximum(boxes[:, None, :2], crowd[:, :2])
    high = torch.minimum(boxes[:, None, 2:], crowd[:, 2:])
    shared_area = (high - low).clamp(min=0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return (shared_area >= 0.5 * area[:, None]).any(1)


def sums_by_image(values: Tensor, where: Tensor) -> Tensor:
    """Return (B,) sums of values that stand where ``where`` (B, A) is true."""
    grid = torch.zeros(where.shape, device=values.device, dtype=values.dtype)
    return grid.masked_scatter(where, values).sum(1)


def image_list(batch: Batch) -> ImageList:
    """Return ``image`` (B, 3, H, W) as torchvision's detectors take it."""
    h, w = batch["image"].shape[-2:]
    return ImageList(batch["image"], [(h, w)] * len(batch))


class BoxObjective(Objective):
    """An objective that trains a detector: its loss, and its predictions part by part."""

    detector: Any
    """FCOS, or a `FasterRCNN`; its ``backbone`` is the pyramid, torchvision's name for it."""

    def maps(self, backbone: Backbone, batch: Batch) -> tuple[Features, dict[str, Tensor]]:
        """Return the features with ``stages``, and the pyramid's maps (B, D, h, w) by level."""
        features = backbone(batch, want=("stages",))
        return features, self.detector.backbone(features, batch["image"].shape[-2:])

    def loss(self, backbone: Backbone, batch: Batch):
        features, maps = self.maps(backbone, batch)
        parts, counts = self.detector.losses(maps, batch, targets_of(batch))
        # layers after the last map are part of the graph: DDP waits for every gradient
        unused = features.pooled.float().sum() * 0.0
        total = torch.stack([*parts.values()]).sum() + unused
        logs = {name: part.detach().sum() for name, part in parts.items()}
        return total, counts.sum(), logs

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return what `predict_images` does, `IMAGES_AT_ONCE` images at a time."""
        return batch.predict_in_parts(partial(self.predict_images, backbone), IMAGES_AT_ONCE)

    def predict_images(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return the predictions of a few images."""
        raise NotImplementedError

    def truth(self, maps: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return what predictions are compared with, in a batch with labels.

        Returns:
            ``true_boxes`` (B, M, 4), ``true_classes`` and ``true_crowd`` (B, M) as the modality
            left them, ``image_size`` (B, 2) height and width, and ``loss`` with its ``count`` (B,).
        """
        parts, counts = self.detector.losses(maps, batch, targets_of(batch))
        return {
            **true_boxes(batch, batch["frame"].float()),
            "image_size": batch["image_size"],
            "loss": torch.stack([*parts.values()]).sum(0),
            "count": counts,
        }


# ---------------------------------------------------------------- Faster R-CNN


class Anchors(AnchorGenerator):
    """Anchors at the strides that the maps have.

    torchvision guesses strides from sizes, wrongly where these are no multiples.
    """

    def __init__(self, strides: tuple[int, ...], side: float, ratios: tuple[float, ...]):
        sides = tuple((stride * side,) for stride in strides)
        super().__init__(sides, (ratios,) * len(strides))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors (A, 4) of each image, corners in pixels of the input.

        Args:
            feature_maps: (B, D, h, w) of each level.
        """
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        sizes = [list(level.shape[-2:]) for level in feature_maps]
        of_one_image = torch.cat(self.grid_anchors(sizes, strides))
        return [of_one_image] * len(image_list.image_sizes)


class Sampler:
    """torchvision's BalancedPositiveNegativeSampler, from the rows' keys."""

    def __init__(self, size: int, positive: float, stream: int):
        self.size = size
        self.positive = positive
        self.stream = stream
        self.keys: Any = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return masks of the samples of each image, where labels are 1 or more, and 0."""
        positive, negative = list[Tensor](), list[Tensor]()
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


class Proposals(RegionProposalNetwork):
    """A region proposal network whose losses are kept apart by image, also in evaluation."""

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: Targets | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the proposed boxes (k, 4) of each image, and with targets losses (B,) by name.

        Args:
            features: (B, D, h, w) of each level by name.
            targets: `Targets`; None: no losses.
        """
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
        without_crowds = list[Tensor]()
        for of_image, boxes_of_image, target in zip(labels, anchors, targets, strict=True):
            is_background = of_image == 0
            is_ignored = is_background & in_crowd(boxes_of_image, target["crowd"])
            without_crowds.append(of_image.masked_fill(is_ignored, -1.0))
        labels = without_crowds
        scores = scores.view(len(anchors), -1)
        shifts = shifts.view(len(anchors), -1, 4)
        wanted = self.box_coder.encode(matched, anchors)
        return boxes, self.by_image(scores, shifts, labels, wanted)

    def by_image(
        self, scores: Tensor, shifts: Tensor, labels: list[Tensor], wanted: Any
    ) -> dict[str, Tensor]:
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
            "proposal_box": sums_by_image(boxes, positive) / count,
        }


class Regions(NamedTuple):
    """The regions that the second stage learns from, of each image."""

    boxes: list[Tensor]
    """(k, 4) in pixels of the input."""
    matched: list[Tensor]
    """(k,) the object that each one overlaps most, of the image's targets."""
    labels: list[Tensor]
    """(k,) class numbers from 1; 0: background."""


class FasterRCNN(nn.Module):
    """Faster R-CNN (Ren et al. 2015) over a feature pyramid of strides 4 to 64.

    With torchvision's settings. What lies in a crowd is no background.
    """

    network = "Faster R-CNN"
    loss_names = ("objectness", "proposal_box", "classification", "box")

    def __init__(self, backbone: Backbone, classes: int, options: BoxOptions):
        super().__init__()
        width = options.channels
        self.backbone = Pyramid(backbone, (4, 8, 16, 32), width, "pool")
        strides = self.backbone.strides
        if any(stride & (stride - 1) for stride in strides):
            raise ValueError(
                f"{backbone.arch.name}: {self.network} pools regions from maps whose strides are "
                f"powers of two, these are {list(strides)}; use detection with method: "
                "fcos, or patches of 8, 16 or 32 px"
            )
        ratios = (0.5, 1.0, 2.0)
        self.samplers = (Sampler(256, 0.5, ANCHOR_STREAM), Sampler(512, 0.25, REGION_STREAM))
        proposals_kept = {"training": 2000, "testing": 1000}
        self.rpn = Proposals(
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
        self.roi_heads: Any = RoIHeads(
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

    def region_outputs(
        self, maps: dict[str, Tensor], boxes: list[Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return scores and shifts of the boxes of all images, one after the other."""
        heads = self.roi_heads
        maps = {name: level.float() for name, level in maps.items()}
        pooled = heads.box_roi_pool(maps, boxes, image_list(batch).image_sizes)
        scores, shifts = heads.box_predictor(heads.box_head(pooled))
        return scores.float(), shifts.float()

    def losses(
        self, maps: dict[str, Tensor], batch: Batch, targets: Targets
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return means over the samples of each image (B,) by name, and the count (B,) that the
        loss is divided by: 1 for each image.
        """
        parts, _ = self.region_losses(maps, batch, targets)
        return parts, torch.ones(len(targets), device=parts["box"].device)

    def region_losses(
        self, maps: dict[str, Tensor], batch: Batch, targets: Targets
    ) -> tuple[dict[str, Tensor], Regions]:
        """Return means over the samples of each image (B,) by name, and the samples."""
        for sampler in self.samplers:
            sampler.keys = batch.keys
        # 0 is the background
        shifted = [{**target, "labels": target["labels"] + 1} for target in targets]
        boxes, parts = self.rpn(image_list(batch), maps, shifted)
        usable = list[Tensor]()
        for of_image, target in zip(boxes, targets, strict=True):
            is_in_crowd = in_crowd(of_image, target["crowd"])
            is_on_object = (box_iou(of_image, target["boxes"]) >= 0.5).any(1)
            usable.append(of_image[~is_in_crowd | is_on_object])
        boxes, matched, labels, wanted = self.roi_heads.select_training_samples(usable, shifted)
        scores, shifts = self.region_outputs(maps, boxes, batch)
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
            means = [part.sum() / max(1, len(part)) for part in torch.split(values, sizes)]
            parts[name] = torch.stack(means)
        return parts, Regions(boxes, matched, labels)

    def detections(self, maps: dict[str, Tensor], batch: Batch) -> Detections:
        """Return ``boxes``, ``scores`` and ``labels`` of each image."""
        boxes, _ = self.rpn(image_list(batch), maps)
        scores, shifts = self.region_outputs(maps, boxes, batch)
        processed = self.roi_heads.postprocess_detections(
            scores, shifts, boxes, image_list(batch).image_sizes
        )
        return [
            {"boxes": boxes, "scores": scores, "labels": labels - 1}
            for boxes, scores, labels in zip(*processed, strict=True)
        ]

    def fixed_detections(
        self, maps: dict[str, Tensor], batch: Batch
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return what `detections` chooses from any score on, by operators of fixed shapes.

        Returns:
            ``boxes`` (B, 100, 4) as shares of the whole image, ``scores`` (B, 100) and ``classes``
            (B, 100; -1: none), and the boxes (B, 100, 4) in pixels of the input. They are cut at
            the edge of the image; those wholly in the padding are none.
        """
        heads = self.roi_heads
        h, w = batch["image"].shape[-2:]
        regions, is_region = self.fixed_regions(maps, (h, w))
        pooled = fixed_pool(heads.box_roi_pool, maps, regions, (h, w))
        scores, shifts = heads.box_predictor(heads.box_head(pooled))
        b, k = regions.shape[:2]
        boxes = heads.box_coder.decode_single(shifts.float(), regions.flatten(0, 1))
        boxes = _clipped(boxes.view(b, k, -1, 4)[:, :, 1:], (h, w))  # 0 is the background
        scores = scores.float().softmax(-1).view(b, k, -1)[:, :, 1:]
        is_box = is_region[..., None] & _is_wide(boxes, 1e-2)
        scores = scores.masked_fill(~is_box, -1.0).flatten(1)
        boxes = boxes.flatten(1, 2)
        classes = torch.arange(scores.shape[1], device=scores.device) % is_box.shape[2]
        at, scores = surest(boxes, classes, scores, DETECTIONS, heads.nms_thresh)
        frame = batch["frame"].float()
        low = frame[:, None, 2:].repeat(1, 1, 2)
        boxes = _picked(boxes, at)
        boxes = boxes.maximum(low).minimum(low + frame[:, None, :2].repeat(1, 1, 2))
        is_found = (scores >= 0) & has_area(boxes)
        boxes = torch.where(is_found[..., None], boxes, low)
        found = {
            "boxes": to_shares(boxes, frame),
            "scores": scores.masked_fill(~is_found, 0.0),
            "classes": torch.where(is_found, classes[at], -1),
        }
        return found, boxes

    def fixed_regions(
        self, maps: dict[str, Tensor], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return regions (B, K, 4) in pixels, and which of them (B, K) there are."""
        rpn, levels = self.rpn, [*maps.values()]
        of_levels, shifts = rpn.head(levels)
        [anchors] = rpn.anchor_generator(ImageList(levels[0], [size]), levels)
        sizes = [of_level[0].numel() for of_level in of_levels]
        scores, shifts = concat_box_prediction_layers(of_levels, shifts)
        scores = scores.float().view(-1, len(anchors))
        b = scores.shape[0]
        repeated = anchors.expand(b, -1, -1).reshape(-1, 4)
        boxes = rpn.box_coder.decode_single(shifts.float(), repeated).view(b, -1, 4)
        most = rpn.pre_nms_top_n()
        start, places, groups = 0, list[Tensor](), list[Tensor]()
        for number, size_of_level in enumerate(sizes):
            of_level = scores[:, start : start + size_of_level]
            first = of_level.topk(min(most, size_of_level), 1)[1]
            places.append(first + start)
            groups.append(torch.full_like(first[0], number))
            start += size_of_level
        place = torch.cat(places, 1)
        scores = scores.gather(1, place).sigmoid()
        boxes = _clipped(_picked(boxes, place), size)
        scores = scores.masked_fill(~_is_wide(boxes, rpn.min_size), -1.0)
        kept = min(rpn.post_nms_top_n(), scores.shape[1])
        at, scores = surest(boxes, torch.cat(groups), scores, kept, rpn.nms_thresh)
        return _picked(boxes, at), scores >= 0


# ---------------------------------------------------------------- operators of fixed shapes


def surest(
    boxes: Tensor, groups: Tensor, scores: Tensor, most: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """Choose as torchvision.ops.batched_nms does, the surest first.

    Args:
        boxes: (B, N, 4).
        groups: (N,) class or level: boxes of different ones do not suppress each other.
        scores: (B, N); below 0: no box.
        most: How many are chosen of each row.
        threshold: The overlap above which the less sure box is left out.

    Returns:
        Their places (B, most) and scores (B, most); -1 where there is none left.
    """
    # torch cannot decompose a scan that gradients would pass
    boxes, scores = boxes.detach(), scores.detach()
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    number = torch.arange(boxes.shape[1], device=boxes.device)

    def step(scores: Tensor, _: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        at = scores.argmax(1, keepdim=True)
        box = _picked(boxes, at)
        low = torch.maximum(boxes[..., :2], box[..., :2])
        high = torch.minimum(boxes[..., 2:], box[..., 2:])
        shared = (high - low).clamp(min=0).prod(-1)
        overlap = shared / (areas + areas.gather(1, at) - shared)
        is_over = (overlap > threshold) & (groups == groups[at])
        left = scores.masked_fill(is_over | (number == at), -1.0)
        return left, (at[:, 0], scores.gather(1, at)[:, 0])

    steps = torch.arange(most, device=boxes.device)
    if torch.compiler.is_exporting():
        _, (places, chosen) = scan(step, scores, steps)
        return places.T, chosen.T
    found = list[tuple[Tensor, Tensor]]()
    for one in steps:
        scores, of_step = step(scores, one)
        found.append(of_step)
    places, chosen = (torch.stack(part, 1) for part in zip(*found, strict=True))
    return places, chosen


def fixed_pool(
    pool: MultiScaleRoIAlign, maps: dict[str, Tensor], boxes: Tensor, size: tuple[int, int]
) -> Tensor:
    """Return (B K, D, ...) what ``pool`` gives for ``boxes`` (B, K, 4).

    Every level is read for every box: which boxes are of which level is no fixed shape.
    """
    levels = [maps[name].float() for name in pool.featmap_names]
    parts: Any = poolers
    scales, level_of = parts._setup_scales(
        levels, [size], pool.canonical_scale, pool.canonical_level
    )
    b, k = boxes.shape[:2]
    row = torch.arange(b, device=boxes.device)[:, None, None].expand(b, k, 1)
    regions = torch.cat([row.to(boxes.dtype), boxes], 2).flatten(0, 1)
    level: Tensor = level_of([boxes.flatten(0, 1)])[:, None, None, None]
    pooled: list[Tensor] = [
        parts.roi_align(of_level, regions, pool.output_size, scale, pool.sampling_ratio)
        for of_level, scale in zip(levels, scales, strict=True)
    ]
    out = pooled[0]
    for number, of_level in enumerate(pooled):
        out = torch.where(level == number, of_level, out)
    return out


def _picked(boxes: Tensor, places: Tensor) -> Tensor:
    """Return the boxes at ``places`` (B, K)."""
    return boxes.gather(1, places[..., None].expand(-1, -1, 4))


def _clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    h, w = size
    return boxes.clamp(min=0.0).minimum(boxes.new_tensor([w, h, w, h]))


def _is_wide(boxes: Tensor, least: float) -> Tensor:
    return ((boxes[..., 2:] - boxes[..., :2]) >= least).all(-1)
