"""Segmentation: the metric against scikit-learn and torchmetrics, sums that add up, refusals, and
that it learns.
"""

import io
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import jaccard_score
from torchmetrics.functional.classification import multiclass_jaccard_index

from pipeline.config import registry
from pipeline.core.contracts import Batch, Task
from pipeline.core.metrics.catalog import metric
from pipeline.data.stream import Decoder
from pipeline.objectives.segmentation import Segmentation, SegmentationOptions
from pipeline.train import loop
from tests import toys


def png(mask: np.ndarray, mode: str | None = None) -> bytes:
    image = PIL.Image.fromarray(mask)
    return toys.image_file(image.convert(mode) if mode else image)


SIDE = 64
COLUMNS = {"image": "image", "mask": "mask"}


def task_of(
    classes: int = 3, ignore: int = 255, backbone: str = "test_resnet", side: int = SIDE, **options
) -> Task:
    return toys.task_of(
        f"timm/{backbone}",
        {"channels": 3, "size": side},
        "segmentation",
        {"labels": [f"class {i}" for i in range(classes)], "ignore": ignore},
        options={"classes": classes, "channels": 32, **options},
    )


def batch_of(
    rows: int = 4, classes: int = 3, seed: int = 0, side: int = SIDE, holes: float = 0.2
) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, classes, (rows, side, side), generator=rng).to(torch.uint8)
    mask[torch.rand(mask.shape, generator=rng) < holes] = 255
    return Batch(
        np.arange(rows),
        torch.arange(rows),
        {
            "image": torch.randn(rows, 3, side, side, generator=rng),
            "mask": mask,
            "frame": torch.tensor([side, side, 0.0, 0.0]).expand(rows, 4),
        },
    )


def predicted(
    guess: np.ndarray, truth: np.ndarray, classes: int, monkeypatch, ignore: int = 255
) -> dict[str, np.ndarray]:
    """What the objective predicts when the most probable classes are ``guess`` (n, H, W)."""
    task = task_of(classes, ignore).eval()
    scores = (
        torch.nn.functional.one_hot(torch.from_numpy(guess), classes).permute(0, 3, 1, 2).float()
    )
    monkeypatch.setattr(task.objective, "head_scores", lambda backbone, batch: (scores, None))
    batch = Batch(
        np.arange(len(guess)),
        torch.arange(len(guess)),
        {"mask": torch.from_numpy(truth.astype(np.uint8)), "frame": torch.zeros(len(guess), 4)},
    )
    return {
        name: tensor.numpy()
        for name, tensor in task.objective.predict(task.backbone, batch).items()
    }


# ---------------------------------------------------------------- the metric


@pytest.mark.parametrize("seed", range(50))
def test_miou_equals_the_references(seed, monkeypatch):
    """scikit-learn's and torchmetrics' macro Jaccard index over all pixels that count, with classes
    that are missing and ignored pixels.
    """
    rng = np.random.default_rng(seed)
    classes, ignore = int(rng.integers(2, 9)), int(rng.choice([255, 0]))
    kinds = rng.choice(classes, rng.integers(1, classes + 1), replace=False)
    truth = rng.choice(kinds, (5, 12, 10))
    guess = np.where(rng.random(truth.shape) < 0.7, truth, rng.choice(kinds, truth.shape))
    truth = np.where(rng.random(truth.shape) < 0.1, 255, truth)
    there = (truth != 255) & (truth != ignore)
    if not there.any():
        return
    found = predicted(guess, truth, classes, monkeypatch, ignore)
    value = metric("miou").value(found)
    # A class that is ignored is none of the mean, also where it is predicted
    scored = np.setdiff1d(np.union1d(truth[there], guess[there]), [ignore])
    assert value == pytest.approx(
        jaccard_score(truth[there], guess[there], average="macro", labels=scored, zero_division=0),
        abs=1e-6,
    )
    theirs = multiclass_jaccard_index(
        torch.from_numpy(guess),
        torch.from_numpy(np.where(there, truth, ignore)),
        classes,
        ignore_index=ignore,
    )
    assert value == pytest.approx(float(theirs), abs=1e-6)
    names = [f"class {k}" for k in range(classes)]
    per_label = metric("miou").per_label
    assert per_label is not None
    by_class = per_label.values(found, names)
    assert list(by_class) == [names[k] for k in scored]
    wanted = jaccard_score(truth[there], guess[there], average=None, labels=scored, zero_division=0)
    assert list(by_class.values()) == pytest.approx(list(wanted))
    assert metric("pixel_accuracy").value(found) == pytest.approx(
        (guess == truth)[there].mean(), abs=1e-9
    )
    counts = rng.integers(0, 3, (6, 5))
    counts[:, 0] += 1
    again = [
        metric("miou").value(
            {name: np.repeat(array, count, axis=0) for name, array in found.items()}
        )
        for count in counts
    ]
    resampled = metric("miou").resampled
    assert resampled is not None
    np.testing.assert_allclose(resampled(found, counts), again, atol=1e-12)


def test_miou_is_the_sets_mean_not_that_of_images(monkeypatch):
    truth = np.zeros((2, 4, 4), dtype=np.int64)
    truth[1, :, 2:] = 1
    guess = np.zeros_like(truth)
    guess[1] = (
        1  # class 0: 16 of 24, class 1: 8 of 16; by image it would be (1 + (0 + 1 / 2) / 2) / 2
    )
    assert metric("miou").value(predicted(guess, truth, 3, monkeypatch)) == pytest.approx(
        (16 / 24 + 8 / 16) / 2
    )


# ---------------------------------------------------------------- the loss


def test_sums_and_counts_add_up_over_ranks(monkeypatch):
    task, batch = task_of().eval(), batch_of(4)
    batch["mask"][2] = 255
    total, count, logs = task(batch)
    halves = [task(toys.rows_at(batch, rows)) for rows in (slice(0, 1), slice(1, 3), slice(3, 4))]
    assert sum(h[1] for h in halves) == count == (batch["mask"] != 255).sum()
    assert sum(h[0] for h in halves).item() == pytest.approx(total.item(), rel=1e-5)
    assert sum(h[2]["pixel_accuracy"] for h in halves) == logs["pixel_accuracy"]
    monkeypatch.setattr("pipeline.objectives.segmentation.IMAGES_AT_ONCE", 2)
    found = task.objective.predict(task.backbone, batch)
    assert (
        found["loss"].sum().item() == pytest.approx(total.item(), rel=1e-5)
        and found["count"].sum() == count
        and found["loss"][2] == 0
    )
    assert found["intersection"].sum() == logs["pixel_accuracy"]
    assert (total / count).item() == pytest.approx(
        torch.nn.functional.cross_entropy(
            task.objective.head_scores(task.backbone, batch)[0],
            batch["mask"].long(),
            ignore_index=255,
        ).item(),
        rel=1e-5,
    )


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize("holes", [0.2, 1.0])
def test_every_parameter_is_in_the_graph(backbone, holes):
    """DDP waits for all of them, also where no pixel is labelled; one image alone, under bf16
    too.
    """
    for rows, precision in ((2, False), (1, True)):
        task = task_of(backbone=backbone, side=160 if backbone == "test_vit" else SIDE)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision):
            total, count, _ = task(
                batch_of(rows, holes=holes, side=160 if backbone == "test_vit" else SIDE)
            )
        total.backward()
        assert torch.isfinite(total) and total.dtype == torch.float32 and (count > 0) == (holes < 1)
        assert [
            name
            for name, p in task.named_parameters()
            if p.grad is None or not torch.isfinite(p.grad).all()
        ] == []


# ---------------------------------------------------------------- masks


def test_classes_out_of_range_are_refused_by_number():
    state = Segmentation.fit(
        SegmentationOptions(classes=["sky", "road", "car"], ignore=7), pa.table({}), COLUMNS
    )
    assert state == {"labels": ["sky", "road", "car"], "ignore": 7}
    fine, wrong = (
        np.array([[0, 1, 2, 7, 255]], dtype=np.uint8),
        np.array([[0, 1, 2, 9]], dtype=np.uint8),
    )
    masks = [
        png(fine),
        png(wrong),
        png(wrong, "P"),
        png(np.array([[0, 1]], dtype=np.uint8) * 255, "1"),
        b"no png",
        None,
        {"bytes": png(wrong)},
    ]
    found = [
        Segmentation.invalid_label_reasons(pa.table({"mask": [mask]}), COLUMNS, state)[0]
        for mask in masks
    ]
    reason = "the mask holds class 9, but objective.classes says 3 (0 to 2) and 7 is ignored"
    # What cannot be read is the modality's to refuse
    assert found == [
        "",
        reason,
        reason,
        "",
        "",
        "",
        reason,
    ]
    assert Segmentation.invalid_label_reasons(pa.table({"image": [b""]}), COLUMNS, state) == [""]
    for classes in (1, 256, ["a", "a"]):
        with pytest.raises(
            ValueError, match=r"objective\.classes: .* give 2 to 255 different names"
        ):
            Segmentation.fit(SegmentationOptions(classes=classes), pa.table({}), COLUMNS)


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_masks_move_with_their_images(fit):
    """A perfect guess at the input's resolution scores 1, padding left out, and is written as a
    mask of the whole image.
    """
    mask = np.zeros((40, 80), dtype=np.uint8)
    mask[10:, 40:] = 1
    picture = np.stack([mask * 200] * 3, axis=-1)
    kind = registry.get("modality", "image")
    modality = kind(kind.options_class(size=SIDE, fit=fit), {"mean": [0.5] * 3, "std": [0.2] * 3})
    state = {"labels": ["a", "b"], "ignore": 255}
    arrays, bad = Decoder(modality, "segmentation", state, COLUMNS)(
        pa.table({"image": [png(picture)], "mask": [png(mask)]})
    )
    assert bad == [""]
    batch = toys.take(toys.rows_of(modality, arrays, "segmentation", state), [0])
    task = task_of(2).eval()
    scores = (
        torch.where(batch["image"][:, :1] > 0.5, 1.0, -1.0)
        * torch.tensor([-1.0, 1.0])[None, :, None, None]
    )
    task.objective.head_scores = lambda backbone, batch: (scores, None)
    found = {
        name: tensor.numpy()
        for name, tensor in task.objective.predict(task.backbone, batch).items()
    }
    assert found["count"][0] == (SIDE * SIDE // 2 if fit == "pad" else SIDE * SIDE)
    assert metric("miou").value(found) > 0.9 and (found["actual"].sum(1) == found["count"]).all()
    new = Batch(batch.rows, batch.keys, {name: batch[name] for name in ("image", "frame")})
    guess = {
        name: tensor.numpy() for name, tensor in task.objective.predict(task.backbone, new).items()
    }
    written = np.array(
        PIL.Image.open(io.BytesIO(task.objective.output_columns(guess, None)["mask"][0]))
    )
    assert written.shape == ((SIDE // 2, SIDE) if fit == "pad" else (SIDE, SIDE))
    again = np.array(PIL.Image.fromarray(written).resize((80, 40), PIL.Image.Resampling.NEAREST))
    assert (again == mask).mean() > 0.95


# ---------------------------------------------------------------- on real masks


@pytest.mark.slow
@pytest.mark.data
def test_segmentation_learns_four_masks_from_scratch():
    """ResNet-18, 96 px: mIoU over the labelled classes of the masks that it was trained on. Seen:
    0.92.
    """
    folder = Path(
        os.environ.get("ONETOMANY_DATA") or pytest.skip("ONETOMANY_DATA names no data folder"),
        "vision",
        "coco128_detection",
    )
    masks = pq.read_table(
        folder / "semantic_masks_train.parquet", columns=["image_id", "mask"]
    ).slice(0, 4)
    table = masks.join(
        pq.read_table(folder / "train.parquet", columns=["image_id", "image"]),
        "image_id",
        join_type="inner",
    ).sort_by("image_id")
    found = [np.array(PIL.Image.open(io.BytesIO(mask))) for mask in table["mask"].to_pylist()]
    # 0 is unlabelled; of 200 numbers most do not stand in 4 images
    kinds = np.unique(np.concatenate([[0], *(mask.ravel() for mask in found)]))
    table = table.set_column(
        table.column_names.index("mask"),
        "mask",
        pa.array([png(np.searchsorted(kinds, mask).astype(np.uint8)) for mask in found]),
    )
    columns = {"image": "image", "mask": "mask"}
    options = SegmentationOptions(classes=len(kinds), ignore=0, dropout=0.0, channels=64)
    state = Segmentation.fit(options, pa.table({}), columns)
    kind = registry.get("modality", "image")
    image = kind.options_class(size=96, fit="pad", flip=False, crop="none")
    modality = kind(image, kind.fit(image, table, columns, "timm/resnet18"))
    arrays, bad = Decoder(modality, "segmentation", state, columns)(table)
    assert bad == [""] * 4
    rows = toys.rows_of(modality, arrays, "segmentation", state)
    task = toys.task_of(
        "timm/resnet18", modality.inputs(), "segmentation", state, options=options.model_dump()
    )
    run = toys.make_run(
        rows,
        task,
        steps=128,
        validation=rows,
        global_batch=4,
        lr=1e-3,
        keep="last",
    )
    outcome = loop.fit(run)
    print(outcome.curve, outcome.seconds)
    assert outcome.curve[-1]["miou"] >= 0.80, outcome.curve
